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
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch
from torch import Tensor

Credit = Literal["native", "uniform", "variance", "proportionate", "published"]
PredictionType = Literal["epsilon", "v_prediction", "sample"]

CREDITS = ("native", "uniform", "variance", "proportionate", "published")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclasses.dataclass(frozen=True, eq=False)
class StepTable:
    """A sampler as a table of T steps, in the order in which they are taken. All tensors have shape (T,).

    Attributes:
        timesteps: int64, what the model is told at each step.
        sample_coef: float64, a in x' = a x + b m + s z.
        output_coef: float64, b.
        std: float64, s. A step with s = 0 is deterministic: it is sampled and never trained.
        native_weight: float64, -b / s, and 0 where s = 0: the sampler's own credit on the model output.
        weight: float64, what the loss uses in its place; equal to it unless `reweighted`.
        interval: float64, h: the share of the trajectory that the step covers; sums to 1.
        epsilon_scale: float64, d(epsilon) / d(model output).
        resolved: bool, the steps whose variance was re-solved for `target_weight`.
        reweighted: bool, the steps where `weight` differs from `native_weight` by decree.
        credit: the scheme that made the table.
        target_weight: w* on the epsilon-equivalent output, or None for native credit.
        rows: float32 (T, 6), contiguous: [sample_coef, output_coef, std, weight, native_weight, interval],
            what the ops and the kernels read.
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
    rows: Tensor = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        columns = (self.sample_coef, self.output_coef, self.std, self.weight, self.native_weight, self.interval)
        object.__setattr__(self, "rows", torch.stack(columns, dim=1).to(torch.float32).contiguous())

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

        Returns:
            StepTable of T steps, on the CPU.

        Raises:
            ValueError: for values outside those ranges, for a variance that exceeds 1 - ap, for a
                `target_weight` that no step can reach (it names the smallest feasible ones), and for credit on
                an output that carries no epsilon (zero terminal SNR).
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
        return StepTable(
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

    @staticmethod
    def from_scheduler(
        scheduler: Any,
        num_inference_steps: int,
        *,
        eta: float = 1.0,
        credit: Credit = "native",
        target_weight: float | None = None,
    ) -> StepTable:
        """Table of the DDIM sampler on a diffusers scheduler's schedule.

        DDIM, DDPM, PNDM and Euler-discrete schedulers of Stable Diffusion pipelines share the alphas; the
        timesteps follow the scheduler's own `timestep_spacing` and `steps_offset`, and the last step its own
        final alpha.

        Args:
            scheduler: a diffusers DDIMScheduler, DDPMScheduler, PNDMScheduler or EulerDiscreteScheduler.
            num_inference_steps: T.
            eta, credit, target_weight: as in `ddim_table`.

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
        )


ddim_table = _DDIMTable()

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
