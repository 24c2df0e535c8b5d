"""Step tables: a stochastic sampler as T rows of three numbers, and the credit of each step.

Every sampler that policy-gradient alignment of diffusion models uses takes the affine Gaussian step

    x' = a x + b m + s z,    z ~ N(0, I)

with x the latent, m the model output, x' the next latent. A table holds (a, b, s) per step and what the loss
makes of them, built once in float64. Nothing after the table knows which sampler it came from.

Symbols of PCPO (Lee and Ye, arXiv 2509.25774) and DDIM (Song et al., arXiv 2010.02502, equation 12):

    at, ap        `alphas_cumprod` at this timestep and at the previous (less noisy) one
    s             `std`, eta sqrt((1 - ap) / (1 - at) (1 - at / ap)) for DDIM
    d             sqrt(1 - ap - s^2), the coefficient of the predicted noise in x'
    c1, b0        sqrt((1 - at) ap / at) and sqrt(1 - ap), so that -b = c1 - d and d = sqrt(b0^2 - s^2)
    w             `native_weight`, -b / s: the credit of a step, since log rho = -(w <e, z> + w^2 <e, e> / 2)
                  with e the change of the model output
    w*            `target_weight`, the credit wanted at every step

Credit is compared between steps on the epsilon-equivalent output: with v-prediction epsilon = sqrt(at) v + ..., so
e_epsilon = sqrt(at) e_v. `epsilon_scale` is that factor, and `weight / epsilon_scale` is a step's credit.

Re-solving the variance. (c1 - sqrt(b0^2 - s^2)) / s = w* has the roots

    s = (w* c1 +/- sqrt(b0^2 (1 + w*^2) - c1^2)) / (1 + w*^2),    valid where c1 - w* s >= 0.

The smallest credit that a step can have is sqrt(c1^2 / b0^2 - 1), and eta = 1 attains it. A step where that exceeds w*
has no root: it keeps eta = 1, and only the loss can be reweighted there.

Flow models predict the velocity v = epsilon - x0 on x = (1 - t) x0 + t epsilon (rectified flow), and credit is
compared on v itself. Symbols of Flow-GRPO (Liu et al., arXiv 2505.05470), DanceGRPO (Xue et al., arXiv 2505.07818) and
FlowCPS (Wang and Yu, arXiv 2509.05952):

    t, t'         two neighbouring `sigmas`, the share of noise before and after the step
    h             `interval`, t - t'
    g             the diffusion coefficient: noise_level sqrt(t / (1 - t)) for "flow", noise_level for "dance"
    a, b, s       1 - g^2 h / (2t), -(1 + g^2 (1 - t) / (2t)) h and g sqrt(h) for both of them
    c             t' cos(pi noise_level / 2) for "cps", with a = 1 - t' + c, b = c (1 - t) - (1 - t') t and
                  s = t' sin(pi noise_level / 2)
    zeta          `target_weight`, the credit per unit of t wanted at every step

The ends. At t = 1 the g of "flow" has no value, and its denominator takes the next t: g = noise_level
sqrt(1 / (1 - t')). The last step, t' = 0, is the step of the ODE, a = 1, b = -h and s = 0, as in the published code:
noise drawn there would stay in the result. "cps" has that by itself.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Credit = Literal["native", "uniform", "variance", "proportionate", "published"]
PredictionType = Literal["epsilon", "v_prediction", "sample"]

FlowCredit = Literal["native", "proportionate"]
FlowSDE = Literal["flow", "dance", "cps"]

# of dynamic shifting: past it noise levels are 1 to float64's precision
LARGEST_MU = 30.0
CREDITS = ("native", "uniform", "variance", "proportionate", "published")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
FLOW_CREDITS = ("native", "proportionate")
FLOW_SDES = ("flow", "dance", "cps")


@dataclasses.dataclass(frozen=True, eq=False)
class StepTable:
    """A sampler as a table of T steps, in the order in which they are taken. All tensors have shape (T,).

    Attributes:
        timesteps: what the model is told at each step: int64 for diffusion, float32 for flow.
        sample_coef: float64, a in x' = a x + b m + s z.
        output_coef: float64, b.
        std: float64, s. A step with s = 0 is deterministic: it is sampled and never trained.
        native_weight: float64, -b / s, and 0 where s = 0: the sampler's own credit on the model output.
        weight: float64, what the loss uses in its place; equal to it unless `reweighted`.
        interval: float64, h: the share of the trajectory that the step covers; sums to 1.
        epsilon_scale: float64, d(epsilon) / d(model output); 1 for flow, whose credit is compared on the velocity.
        resolved: bool, the steps whose variance was re-solved for `target_weight`.
        reweighted: bool, the steps where `weight` differs from `native_weight` by decree.
        credit: the scheme that made the table.
        target_weight: w* on the epsilon-equivalent output, zeta for flow, or None for native credit.
        normalized: whether the log-probability is the Gaussian's, or -(x' - a x - b m)^2 without 1/(2 s^2) and
            constants, as FlowCPS has it.
        log_prob_scale: float64, k of an element's log-probability, log_prob_offset - k z^2 / 2: 1, or 2 s^2 if not
            `normalized`. The log-ratio and its gradient carry it too.
        log_prob_offset: float64, -(log s + log(2 pi) / 2); 0 if not `normalized`, and where s = 0.
        rows: float32 (T, 8), contiguous: [sample_coef, output_coef, std, weight, native_weight, interval,
            log_prob_scale, log_prob_offset], what the ops and the kernels read.
    """

    timesteps: Tensor
    sample_coef: Tensor
    output_coef: Tensor
    std: Tensor
    native_weight: Tensor
    weight: Tensor
    interval: Tensor
    epsilon_scale: Tensor
    resolved: Tensor
    reweighted: Tensor
    credit: str
    target_weight: float | None
    normalized: bool = True
    log_prob_scale: Tensor = dataclasses.field(init=False)
    log_prob_offset: Tensor = dataclasses.field(init=False)
    rows: Tensor = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.normalized:
            scale = torch.ones_like(self.std)
            offset = torch.where(self.std > 0, -self.std.log() - math.log(2 * math.pi) / 2, 0.0)
        else:
            scale, offset = 2 * self.std**2, torch.zeros_like(self.std)
        columns = (self.sample_coef, self.output_coef, self.std, self.weight, self.native_weight, self.interval)
        rows = torch.stack((*columns, scale, offset), dim=1).to(torch.float32).contiguous()
        for name, value in {"log_prob_scale": scale, "log_prob_offset": offset, "rows": rows}.items():
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return self.timesteps.numel()

    @property
    def trainable(self) -> Tensor:
        """bool (T,): the steps that draw noise, s > 0."""
        return self.std > 0

    @property
    def epsilon_weight(self) -> Tensor:
        """float64 (T,): the credit the loss gives each step, on the epsilon-equivalent output."""
        return self.weight / self.epsilon_scale

    def to(self, device: torch.device | str) -> StepTable:
        """The same table with every tensor on `device`."""
        tensors = {
            field.name: getattr(self, field.name).to(device)
            for field in dataclasses.fields(self)
            if field.init and isinstance(getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **tensors)


class _DDIMTable:
    """Builds the table of a DDIM sampler; see `__call__` and `from_scheduler`."""

    def __call__(
        self,
        alphas_cumprod: Tensor,
        timesteps: Tensor,
        *,
        eta: float = 1.0,
        prediction_type: PredictionType = "epsilon",
        final_alpha_cumprod: float | None = None,
        credit: Credit = "native",
        target_weight: float | None = None,
        window: tuple[int, int] | None = None,
    ) -> StepTable:
        """Table of the stochastic DDIM sampler (Song et al., arXiv 2010.02502, equation 12).

        Args:
            alphas_cumprod: (N,) cumulative alphas of the training schedule, decreasing, in [0, 1].
            timesteps: (T,) integers, strictly decreasing, indices into `alphas_cumprod`.
            eta: noise level; 0 is deterministic, 1 has the DDPM posterior's variance.
            prediction_type: what the model outputs: "epsilon", "v_prediction" or "sample".
            final_alpha_cumprod: cumulative alpha after the last step; None means `alphas_cumprod[0]`, as Stable
                Diffusion's schedulers have it.
            credit: how the steps share the credit (Lee and Ye, arXiv 2509.25774).
                "native": as the sampler has it. "uniform": the loss uses the mean native weight.
                "variance": s is re-solved for `target_weight` where it can be. "proportionate": that, and the loss uses
                `target_weight` on the other steps: exactly constant credit. "published": the root that the published
                code takes, for reproducing its runs.
            target_weight: w* > 0 on the epsilon-equivalent output; None means the mean native weight (for "published"
                the mean of (c1 + d) / s, which is what the published code averages).
            window: (start, stop): only the steps start <= i < stop are stochastic and trained, with the variance and
                the credit that they have without a window; the others have eta = 0. None means every step.

        Returns:
            StepTable of T steps, on the CPU.

        Raises:
            ValueError: for values outside those ranges, for a variance that exceeds 1 - ap, for a window that does not
                lie in the table, for a `target_weight` that no step can reach (it names the smallest feasible ones),
                and for credit on an output that carries no epsilon (zero terminal SNR).
        """
        alphas, steps = _checked_schedule(alphas_cumprod, timesteps)
        if credit not in CREDITS:
            raise ValueError(f"credit={credit!r} is not known; choose one of {', '.join(CREDITS)}")
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type={prediction_type!r} is not known; choose one of {', '.join(PREDICTION_TYPES)}"
            )
        if not (math.isfinite(eta) and eta >= 0):
            raise ValueError(f"eta={eta} is not a noise level; give a finite number >= 0 (1 is the usual choice)")
        if target_weight is not None and credit == "native":
            raise ValueError(
                f"target_weight={target_weight} has no meaning with credit='native'; leave it out or choose "
                "another credit"
            )
        final = float(alphas[0]) if final_alpha_cumprod is None else float(final_alpha_cumprod)
        at = alphas[steps]
        ap = torch.cat([at[1:], at.new_tensor([final])])
        if not float(at[-1]) <= final <= 1:
            raise ValueError(
                f"final_alpha_cumprod={final} must lie between the last timestep's {float(at[-1])} and 1: "
                "sampling removes noise"
            )
        if prediction_type == "epsilon" and bool((at == 0).any()):
            raise ValueError(
                "alphas_cumprod is 0 at a timestep (zero terminal SNR): epsilon says nothing about the sample "
                "there; use a v-prediction model or rescale_betas_zero_snr=False"
            )

        native_std = _ddim_std(at, ap, eta)
        # with zero terminal SNR eta = 1 sits on the bound, and rounding may carry it past
        if bool((native_std**2 > (1 - ap) * (1 + 1e-12)).any()):
            largest = float((torch.sqrt(1 - ap) / _ddim_std(at, ap, 1.0)).nan_to_num(nan=math.inf).min())
            raise ValueError(
                f"eta={eta} asks for more variance than the previous timestep has; on this schedule eta may be at "
                f"most {largest:.6g}"
            )
        scale = _epsilon_scale(at, prediction_type)

        std, target, resolved = native_std, None, torch.zeros_like(native_std, dtype=torch.bool)
        if credit != "native":
            if not bool((native_std > 0).any()):
                raise ValueError(f"credit={credit!r} needs a stochastic sampler, but every std is 0; use eta > 0")
            if bool((at == 0).any()):
                raise ValueError(
                    f"credit={credit!r} is defined on the epsilon-equivalent output, and a timestep with "
                    "alphas_cumprod 0 (zero terminal SNR) has none; use credit='native' or leave that timestep out"
                )
            std, target, resolved = _solve_credit(at, ap, native_std, credit, target_weight)

        trainable = std > 0
        sample_coef, output_coef = _ddim_coefs(at, ap, std, prediction_type)
        native_weight = torch.where(trainable, -output_coef / std, 0.0)
        weight, reweighted = native_weight, torch.zeros_like(resolved)
        if target is not None and credit in ("uniform", "proportionate"):
            # re-solved steps reach w* up to rounding; w* itself makes the credit exactly constant
            weight, reweighted = torch.where(trainable, target * scale, 0.0), trainable & ~resolved
        table = StepTable(
            timesteps=steps,
            sample_coef=sample_coef,
            output_coef=output_coef,
            std=std,
            native_weight=native_weight,
            weight=weight,
            interval=torch.full_like(std, 1 / len(steps)),
            epsilon_scale=scale,
            resolved=resolved,
            reweighted=reweighted,
            credit=credit,
            target_weight=target,
        )
        if window is None:
            return table
        settings: dict[str, Any] = {"prediction_type": prediction_type, "final_alpha_cumprod": final}
        return _windowed(table, self(alphas, steps, eta=0.0, **settings), window)

    @staticmethod
    def from_scheduler(
        scheduler: Any,
        num_inference_steps: int,
        *,
        eta: float = 1.0,
        credit: Credit = "native",
        target_weight: float | None = None,
        window: tuple[int, int] | None = None,
    ) -> StepTable:
        """Table of the DDIM sampler on a diffusers scheduler's schedule.

        DDIM, DDPM, PNDM and Euler-discrete schedulers of Stable Diffusion pipelines share the alphas; the
        timesteps follow the scheduler's own `timestep_spacing` and `steps_offset`, and the last step its own
        final alpha.

        Args:
            scheduler: a diffusers DDIMScheduler, DDPMScheduler, PNDMScheduler or EulerDiscreteScheduler.
            num_inference_steps: T.
            eta, credit, target_weight, window: as in `ddim_table`.

        Raises:
            ValueError: for another scheduler class, for settings under which a step is not affine in the model
                output (clip_sample, thresholding), for learned variances and for sigma schedules that leave the
                training timesteps; each names the setting to change.
        """
        config = scheduler.config
        name = type(scheduler).__name__
        if name not in _FINAL_ALPHA:
            raise ValueError(
                f"{name} is not a DDIM-compatible scheduler; accepted are {', '.join(_FINAL_ALPHA)}. Convert it "
                "with DDIMScheduler.from_config(pipeline.scheduler.config) if it shares Stable Diffusion's alphas"
            )
        for setting, wanted in _AFFINE_SETTINGS.items():
            given = config.get(setting, wanted)
            if given != wanted and not str(given).startswith("fixed"):
                raise ValueError(
                    f"{name} has {setting}={given!r}, under which a sampler step is not an affine Gaussian of the "
                    "model output at a training timestep; build it with "
                    f"{name}.from_config(scheduler.config, {setting}={wanted!r})"
                )
        if not 1 <= num_inference_steps <= config.num_train_timesteps:
            raise ValueError(
                f"num_inference_steps={num_inference_steps} must lie between 1 and the schedule's "
                f"{config.num_train_timesteps} training steps"
            )
        from diffusers import DDIMScheduler

        # spelled out: from_config replaces a spacing that was left at Euler's default by DDIM's default
        ddim: Any = DDIMScheduler(
            num_train_timesteps=config.num_train_timesteps,
            timestep_spacing=config.timestep_spacing,
            steps_offset=config.steps_offset,
        )
        ddim.set_timesteps(num_inference_steps)
        return ddim_table(
            scheduler.alphas_cumprod,
            ddim.timesteps,
            eta=eta,
            prediction_type=config.prediction_type,
            final_alpha_cumprod=_FINAL_ALPHA[name](scheduler),
            credit=credit,
            target_weight=target_weight,
            window=window,
        )


ddim_table = _DDIMTable()


class _FlowTable:
    """Builds the table of a sampler of a flow model; see `__call__` and `from_scheduler`."""

    def __call__(
        self,
        sigmas: Tensor | Sequence[float],
        *,
        sde: FlowSDE = "flow",
        noise_level: float,
        credit: FlowCredit = "native",
        target_weight: float | None = None,
        window: tuple[int, int] | None = None,
        normalized: bool = True,
        num_train_timesteps: int = 1000,
    ) -> StepTable:
        """Table of a stochastic sampler of a model that predicts the velocity v = epsilon - x0.

        The last step is the ODE's, a = 1, b = -h, s = 0: it is sampled and never trained.

        Args:
            sigmas: (T + 1,) the share of noise t before each step and after the last, strictly decreasing from exactly
                1 to exactly 0; see `shifted_sigmas`.
            sde: "flow": Flow-GRPO (arXiv 2505.05470), g = noise_level sqrt(t / (1 - t)), with 1 - t' for 1 - t at
                t = 1. "dance": DanceGRPO (arXiv 2505.07818), g = noise_level. "cps": FlowCPS (arXiv 2509.05952),
                s = t' sin(pi noise_level / 2), with the marginals of the flow at any number of steps.
            noise_level: 0 is the ODE; at most 1 for "cps".
            credit: how the steps share the credit (Lee and Ye, arXiv 2509.25774). "native": as the sampler has it.
                "proportionate": the loss uses zeta h, with the std untouched.
            target_weight: zeta > 0, the credit per unit of t. None keeps the sampler's total: the sum of its weights
                -b / s, where the last row of "flow" and "dance" counts as if it still drew its noise g sqrt(h), so
                that the h of the sum add up to 1. The last row of "cps" has no noise at all, and zeta is there the
                sum of the other weights over the sum of their h.
            window: (start, stop): only the steps start <= i < stop are stochastic and trained, with the std and the
                credit that they have without a window; the others take the step of the ODE. None means every step.
            normalized: False takes -(x' - a x - b m)^2 as an element's log-probability, as FlowCPS's authors do: the
                log-ratio is then 2 s^2 times the Gaussian's, and so is its gradient.
            num_train_timesteps: N; the model is told N t.

        Returns:
            StepTable of T steps, on the CPU.

        Raises:
            ValueError: for values outside those ranges, for a window that does not lie in the table, for a
                `target_weight` with native credit, and for proportionate credit without any noise.
        """
        levels = torch.as_tensor(sigmas, dtype=torch.float64).detach().cpu()
        if levels.ndim != 1 or levels.numel() < 2:
            raise ValueError(f"sigmas must have shape (T + 1,) with T >= 1; given shape {tuple(levels.shape)}")
        if not _falls_from_one_to_zero(levels):
            raise ValueError(
                f"sigmas must decrease strictly from exactly 1 to exactly 0; given {_in_short(levels)}. "
                "shifted_sigmas makes such a list"
            )
        if sde not in FLOW_SDES:
            raise ValueError(f"sde={sde!r} is not known; choose one of {', '.join(FLOW_SDES)}")
        if credit not in FLOW_CREDITS:
            raise ValueError(
                f"credit={credit!r} is not known for flow, whose std is never re-solved; choose one of "
                f"{', '.join(FLOW_CREDITS)}"
            )
        if not (math.isfinite(noise_level) and noise_level >= 0):
            raise ValueError(
                f"noise_level={noise_level} is not a noise level; give a finite number >= 0 (0.7 is the usual choice "
                "for 'flow', 0.3 for 'dance')"
            )
        if sde == "cps" and noise_level > 1:
            raise ValueError(
                f"noise_level={noise_level} is too much for sde='cps': at 1 all noise of x' is new, and past it "
                "cos(pi noise_level / 2) turns the predicted noise around; give a number in [0, 1]"
            )
        if target_weight is not None and credit == "native":
            raise ValueError(
                f"target_weight={target_weight} has no meaning with credit='native'; leave it out or choose "
                "credit='proportionate'"
            )
        if target_weight is not None and not (math.isfinite(target_weight) and target_weight > 0):
            raise ValueError(f"target_weight={target_weight} is not a credit; give a finite number > 0")
        if not 0 < num_train_timesteps < math.inf:
            raise ValueError(
                f"num_train_timesteps={num_train_timesteps} must be positive and finite; 1000 is the usual choice"
            )

        t, t_next = levels[:-1], levels[1:]
        interval = t - t_next
        sample_coef, output_coef, std = _flow_coefs(t, t_next, sde, noise_level)
        # the last row with its noise, where it has any
        counted = std > 0
        full_weight = torch.where(counted, -output_coef / std, 0.0)
        sample_coef[-1], output_coef[-1], std[-1] = 1.0, -interval[-1], 0.0
        trainable = std > 0
        native_weight = torch.where(trainable, full_weight, 0.0)

        weight, target = native_weight, None
        if credit == "proportionate":
            if not bool(trainable.any()):
                raise ValueError(
                    f"credit={credit!r} needs a stochastic sampler, but every std is 0; use noise_level > 0 and at "
                    "least 2 steps"
                )
            target = float(full_weight.sum() / interval[counted].sum()) if target_weight is None else target_weight
            weight = torch.where(trainable, target * interval, 0.0)
        table = StepTable(
            timesteps=(t * num_train_timesteps).to(torch.float32),
            sample_coef=sample_coef,
            output_coef=output_coef,
            std=std,
            native_weight=native_weight,
            weight=weight,
            interval=interval,
            epsilon_scale=torch.ones_like(std),
            resolved=torch.zeros_like(trainable),
            reweighted=trainable if credit == "proportionate" else torch.zeros_like(trainable),
            credit=credit,
            target_weight=target,
            normalized=normalized,
        )
        beyond = (~table.rows.isfinite()).any(dim=1).nonzero().flatten().tolist()
        if beyond:
            std, weight = (float(column[beyond[0]]) for column in (table.std, table.weight))
            raise ValueError(
                f"the table does not fit into float32 at step {beyond[0]} (std {std:.3g}, weight {weight:.3g}); give a "
                "noise level and a target weight of usual size"
            )
        if window is None:
            return table
        ode = self(levels, sde=sde, noise_level=0.0, num_train_timesteps=num_train_timesteps)
        return _windowed(table, ode, window)

    @staticmethod
    def from_scheduler(
        scheduler: Any,
        num_inference_steps: int,
        *,
        sigmas: Tensor | Sequence[float] | None = None,
        image_seq_len: int | None = None,
        sde: FlowSDE = "flow",
        noise_level: float,
        credit: FlowCredit = "native",
        target_weight: float | None = None,
        window: tuple[int, int] | None = None,
        normalized: bool = True,
    ) -> StepTable:
        """Table of a flow sampler on a diffusers scheduler's sigmas and timesteps, exactly as it has them.

        The shift, static or by image size, and Karras, exponential or beta sigmas are the scheduler's own. It is left
        as it was given. Only its list is used: its `stochastic_sampling` says nothing here.

        Args:
            scheduler: a diffusers FlowMatchEulerDiscreteScheduler.
            num_inference_steps: T.
            sigmas: (T,) the list that the pipeline hands to `set_timesteps`, before the shift and without the final 0:
                linspace(1, 1/T, T) for FLUX. None is the scheduler's own, as in StableDiffusion3Pipeline.
            image_seq_len: tokens of an image, (height/16) (width/16) for FLUX: what the shift is computed from where
                the scheduler has `use_dynamic_shifting`, as the pipelines' `calculate_shift` does; else not used.
            sde, noise_level, credit, target_weight, window, normalized: as in `flow_table`.

        Raises:
            ValueError: as `flow_table`, for another scheduler class, for a number of steps below 1 or other than that
                of `sigmas`, for dynamic shifting without `image_seq_len`, and for settings whose sigmas do not fall
                from 1 to 0, such as `invert_sigmas`; each names the setting to change.
        """
        name, config = type(scheduler).__name__, scheduler.config
        if name != "FlowMatchEulerDiscreteScheduler":
            raise ValueError(
                f"{name} is not a flow scheduler that can be read; accepted is FlowMatchEulerDiscreteScheduler. "
                "Convert it with FlowMatchEulerDiscreteScheduler.from_config(scheduler.config) if it shares the flow, "
                "or give its sigmas to flow_table"
            )
        if config.get("invert_sigmas", False):
            raise ValueError(
                f"{name} has invert_sigmas=True, under which the sigmas rise from 0 to 1; build it with "
                f"{name}.from_config(scheduler.config, invert_sigmas=False)"
            )
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={num_inference_steps} must be at least 1")
        given = None if sigmas is None else torch.as_tensor(sigmas, dtype=torch.float64).detach().cpu()
        if given is not None and given.shape != (num_inference_steps,):
            raise ValueError(
                f"sigmas has shape {tuple(given.shape)} and num_inference_steps is {num_inference_steps}; give one "
                "per step, without the final 0, such as linspace(1, 1 / T, T)"
            )
        shift = {}
        if config.get("use_dynamic_shifting", False):
            if image_seq_len is None:
                raise ValueError(
                    f"{name} has use_dynamic_shifting=True, and its shift depends on the size of the image; give "
                    "image_seq_len, or build it with use_dynamic_shifting=False"
                )
            shift["mu"] = _dynamic_shift(config, image_seq_len)
        own = copy.deepcopy(scheduler)
        own.set_timesteps(num_inference_steps, sigmas=None if given is None else given.tolist(), **shift)
        if not _falls_from_one_to_zero(own.sigmas):
            raise ValueError(
                f"{name} with these settings has sigmas {_in_short(own.sigmas)}, and they must decrease strictly from "
                "1 to 0; change num_inference_steps or sigmas, or shift, shift_terminal or use_..._sigmas in its config"
            )
        table = flow_table(
            own.sigmas,
            sde=sde,
            noise_level=noise_level,
            credit=credit,
            target_weight=target_weight,
            window=window,
            normalized=normalized,
        )
        return dataclasses.replace(table, timesteps=own.timesteps.detach().to("cpu", torch.float32))


flow_table = _FlowTable()


def shifted_sigmas(num_inference_steps: int, shift: float = 1.0) -> Tensor:
    """Equally spaced noise levels from 1 to 0, shifted towards 1: shift s / (1 + (shift - 1) s) (Esser et al., arXiv
    2403.03206, equation 23).

    Args:
        num_inference_steps: T.
        shift: 1 leaves them equally spaced; 3 is the usual choice for images of 1024 pixels.

    Returns:
        float64 (T + 1,), strictly decreasing from exactly 1 to exactly 0.

    Raises:
        ValueError: for fewer than 1 step and for a shift that is not positive and finite.
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps={num_inference_steps} must be at least 1")
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift={shift} is not a shift; give a finite number > 0 (1 changes nothing)")
    s = torch.linspace(1, 0, num_inference_steps + 1, dtype=torch.float64)
    sigmas = shift * s / (1 + (shift - 1) * s)
    # shift / (1 + (shift - 1)) may round
    sigmas[0] = 1.0
    if not bool((sigmas.diff() < 0).all()):
        raise ValueError(f"shift={shift} leaves noise levels that cannot be told apart; give a smaller number")
    return sigmas


# the cumulative alpha that each scheduler itself uses after its last timestep
_FINAL_ALPHA = {
    "DDIMScheduler": lambda scheduler: scheduler.final_alpha_cumprod,
    "PNDMScheduler": lambda scheduler: scheduler.final_alpha_cumprod,
    "DDPMScheduler": lambda scheduler: 1.0,
    "EulerDiscreteScheduler": lambda scheduler: (
        1.0 if scheduler.config.get("final_sigmas_type", "zero") == "zero" else scheduler.alphas_cumprod[0]
    ),
}

# settings that must stand as given here for a step to be affine on the training timesteps
_AFFINE_SETTINGS = {
    "clip_sample": False,
    "thresholding": False,
    "variance_type": "fixed_small",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "timestep_type": "discrete",
}


def _windowed(table: StepTable, ode: StepTable, window: tuple[int, int]) -> StepTable:
    """The rows of `table` for the steps start <= i < stop, and of `ode`, its deterministic twin, for the others."""
    pair = isinstance(window, Sequence) and len(window) == 2
    if not pair or any(not isinstance(step, int) or isinstance(step, bool) for step in window):
        raise ValueError(f"window={window!r} is not a pair of whole numbers; give (start, stop)")
    start, stop = window
    if not 0 <= start <= stop <= len(table):
        raise ValueError(
            f"window={tuple(window)} does not lie in the table; give (start, stop) with 0 <= start <= stop <= "
            f"{len(table)}"
        )
    step = torch.arange(len(table))
    inside = (start <= step) & (step < stop)
    columns = {
        field.name: torch.where(inside, getattr(table, field.name), getattr(ode, field.name))
        for field in dataclasses.fields(table)
        if field.init and isinstance(getattr(table, field.name), Tensor)
    }
    return dataclasses.replace(table, **columns)


def _falls_from_one_to_zero(levels: Tensor) -> bool:
    return bool((levels[0] == 1) & (levels[-1] == 0) & (levels.diff() < 0).all())


def _in_short(levels: Tensor) -> str:
    """A list of numbers for a message: its first and last few."""
    numbers = [f"{number:.6g}" for number in levels.tolist()]
    return f"[{', '.join(numbers if len(numbers) <= 6 else [*numbers[:3], '...', *numbers[-3:]])}]"


def _flow_coefs(t: Tensor, t_next: Tensor, sde: str, noise_level: float) -> tuple[Tensor, Tensor, Tensor]:
    """a, b, s of every row, the last one with its noise."""
    h = t - t_next
    if sde == "cps":
        angle = noise_level * math.pi / 2
        # t' - c: without noise exactly 0, so that the row is exactly the ODE's
        removed = 2 * math.sin(angle / 2) ** 2 * t_next
        return 1 - removed, -h - removed * (1 - t), math.sin(angle) * t_next
    g = torch.full_like(t, noise_level)
    if sde == "flow":
        g = g * torch.sqrt(t / torch.where(t < 1, 1 - t, 1 - t_next))
    half = g**2 * h / (2 * t)
    return 1 - half, -h - half * (1 - t), g * torch.sqrt(h)


def _dynamic_shift(config: Any, image_seq_len: int) -> float:
    """mu for an image of this many tokens: `calculate_shift` of the diffusers pipelines."""
    shortest, longest = config.base_image_seq_len, config.max_image_seq_len
    if shortest == longest:
        raise ValueError(
            f"base_image_seq_len and max_image_seq_len are both {longest}, and the shift is a line between them; build "
            "the scheduler with two numbers, or with use_dynamic_shifting=False"
        )
    slope = (config.max_shift - config.base_shift) / (longest - shortest)
    mu = image_seq_len * slope + config.base_shift - slope * shortest
    # the schedulers take its exponential
    if not isinstance(image_seq_len, int) or image_seq_len < 1 or mu > LARGEST_MU:
        raise ValueError(
            f"image_seq_len={image_seq_len} is no size of an image; give the number of its patches, such as 4096"
        )
    return mu


def _checked_schedule(alphas_cumprod: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    alphas = torch.as_tensor(alphas_cumprod).detach().to("cpu", torch.float64)
    steps = torch.as_tensor(timesteps).detach().cpu()
    if alphas.ndim != 1 or steps.ndim != 1 or steps.numel() == 0 or alphas.numel() == 0:
        raise ValueError(
            f"alphas_cumprod and timesteps must be 1-D and not empty; given shapes {tuple(alphas.shape)} and "
            f"{tuple(steps.shape)}"
        )
    if not bool(((alphas >= 0) & (alphas < 1)).all()) or bool((alphas.diff() >= 0).any()):
        raise ValueError(
            "alphas_cumprod must decrease strictly and lie in [0, 1); "
            f"given {float(alphas[0]):.6g} ... {float(alphas[-1]):.6g}"
        )
    whole = steps.to(torch.int64)
    if bool((whole != steps).any()):
        raise ValueError(f"timesteps must be whole numbers (indices into alphas_cumprod); given {steps.tolist()}")
    if bool((whole < 0).any()) or bool((whole >= alphas.numel()).any()) or bool((whole.diff() >= 0).any()):
        raise ValueError(f"timesteps must decrease strictly and lie in 0..{alphas.numel() - 1}; given {whole.tolist()}")
    return alphas, whole


def _ddim_std(at: Tensor, ap: Tensor, eta: float) -> Tensor:
    return eta * torch.sqrt((1 - ap) / (1 - at) * (1 - at / ap))


def _ddim_coefs(at: Tensor, ap: Tensor, std: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    # rounding may leave s a last digit above sqrt(1 - ap) where the root sits on that bound
    d = torch.sqrt((1 - ap - std**2).clamp(min=0))
    if prediction_type == "epsilon":
        return torch.sqrt(ap / at), d - torch.sqrt(ap * (1 - at) / at)
    if prediction_type == "v_prediction":
        return torch.sqrt(ap * at) + d * torch.sqrt(1 - at), d * torch.sqrt(at) - torch.sqrt(ap * (1 - at))
    return d / torch.sqrt(1 - at), torch.sqrt(ap) - d * torch.sqrt(at / (1 - at))


def _epsilon_scale(at: Tensor, prediction_type: str) -> Tensor:
    if prediction_type == "epsilon":
        return torch.ones_like(at)
    if prediction_type == "v_prediction":
        return torch.sqrt(at)
    return -torch.sqrt(at / (1 - at))


def _solve_credit(
    at: Tensor, ap: Tensor, native_std: Tensor, credit: str, target_weight: float | None
) -> tuple[Tensor, float, Tensor]:
    """The std of each step, w*, and which steps were re-solved."""
    c1, b0 = torch.sqrt((1 - at) * ap / at), torch.sqrt(1 - ap)
    stochastic = native_std > 0
    d = torch.sqrt((b0**2 - native_std**2).clamp(min=0))
    sign = 1 if credit == "published" else -1
    target = target_weight
    if target is None:
        target = float(((c1 + sign * d) / native_std)[stochastic].mean())
    if not (math.isfinite(target) and target > 0):
        raise ValueError(f"target_weight={target} is not a credit; give a finite number > 0")
    if credit == "uniform":
        return native_std, target, torch.zeros_like(stochastic)

    discriminant = b0**2 * (1 + target**2) - c1**2
    # eta = 1 is the double root: rounding must not lose a target that is exactly its credit
    solvable = stochastic & (discriminant >= -1e-14 * c1**2)
    if not bool(solvable.any()):
        smallest = torch.sqrt((c1 / b0) ** 2 - 1)[stochastic]
        raise ValueError(
            f"target_weight={target:.6g} is below what any step can have: the smallest that some step reaches is "
            f"{float(smallest.min()):.6g}, the smallest that every step reaches is {float(smallest.max()):.6g}"
        )
    root = torch.sqrt(discriminant.clamp(min=0))
    minus, plus = ((target * c1 + side * root) / (1 + target**2) for side in (-1, 1))
    if credit == "published":
        solution = plus
    else:
        plus_is_valid = (c1 - target * plus >= 0) & ((plus - native_std).abs() < (minus - native_std).abs())
        solution = torch.where(plus_is_valid, plus, minus)
    # where no root exists eta = 1 comes closest: it has the smallest credit of all variances
    return torch.where(solvable, solution, _ddim_std(at, ap, 1.0)), target, solvable
