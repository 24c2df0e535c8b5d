"""The stochastic DDIM sampler of diffusion models, and PCPO's credit for it.

Symbols of DDIM (Song et al., arXiv 2010.02502, equation 12) and PCPO (Lee and Ye, arXiv 2509.25774):

    at, ap        `alphas_cumprod` at this timestep and at the previous (less noisy) one
    s             `std`, eta sqrt((1 - ap) / (1 - at) (1 - at / ap))
    d             sqrt(1 - ap - s^2), the coefficient of the predicted noise in x'
    c1, b0        sqrt((1 - at) ap / at) and sqrt(1 - ap), so that -b = c1 - d and d = sqrt(b0^2 - s^2)
    w             the native weight -b / s
    w*            `target_weight`, the credit wanted at every step

c1, b0 and w are those of epsilon-prediction. Other outputs have the same credit on the epsilon-equivalent output.

Re-solving the variance. (c1 - sqrt(b0^2 - s^2)) / s = w* has the roots

    s = (w* c1 +/- sqrt(b0^2 (1 + w*^2) - c1^2)) / (1 + w*^2),    valid where c1 - w* s >= 0.

The smallest credit that a step can have is sqrt(c1^2 / b0^2 - 1), and eta = 1 attains it. A step where that exceeds w*
has no root: it keeps eta = 1, and only the loss can be reweighted there.

Zero terminal SNR. At at = 0 the sample is noise alone. Epsilon-prediction says nothing about x0 there. The other
outputs can be sampled, but have no epsilon-equivalent output: such a step keeps its own credit and std, and counts in
no mean. Some schedulers put a small number in the place of 0 (2^-24 in diffusers), so every at below 1e-6 counts as 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from .checks import (
    Credit,
    Scheme,
    abbreviate,
    check_choice,
    checked_level,
    checked_numbers,
    is_finite,
    shown,
    stochastic_steps,
)

if TYPE_CHECKING:
    from .table import StepTable

PredictionType = Literal["epsilon", "v_prediction", "sample"]

# Stable Diffusion's smallest alpha is 4.7e-3
ZERO_ALPHA = 1e-6


def ddim_table(
    alphas_cumprod: Tensor | Sequence[float],
    timesteps: Tensor | Sequence[int],
    *,
    eta: float = 1.0,
    prediction_type: PredictionType = "epsilon",
    final_alpha_cumprod: float | None = None,
    credit: Credit = "constant",
    target_weight: float | None = None,
    window: tuple[int, int] | None = None,
    steps: Iterable[int] | None = None,
    normalized: bool = True,
) -> StepTable:
    """Table of the stochastic DDIM sampler (Song et al., arXiv 2010.02502, equation 12).

    Args:
        alphas_cumprod: (N,) cumulative alphas of the training schedule, decreasing, in [0, 1).
        timesteps: (T,) whole numbers, strictly decreasing, indices into `alphas_cumprod`.
        eta: noise level; 0 is deterministic, 1 has the DDPM posterior's variance.
        prediction_type: what the model outputs: "epsilon", "v_prediction" or "sample".
        final_alpha_cumprod: cumulative alpha after the last step; None means `alphas_cumprod[0]`, as Stable
            Diffusion's schedulers have it.
        credit: how the loss weighs the steps, on the epsilon-equivalent output.
            "native": as the sampler does (DDPO).
            "constant": the sampler is untouched, and every trained step has the mean native weight.
            "proportionate": PCPO's (Lee and Ye, arXiv 2509.25774). s is re-solved so that the native weight is
            `target_weight`. A step where no s does that keeps eta = 1, and the loss gives it `target_weight`.
            "published": s by the root that PCPO's published code takes, to reproduce its runs.
        target_weight: the level > 0 for these. None means the mean native weight (for "published" the mean of
            (c1 + d) / s, which the published code averages).
        window: (start, stop): only the steps start <= i < stop are stochastic and trained, with the variance and the
            credit that they have in the whole table. The others have eta = 0. None means every step.
        steps: any step indices in the place of a window.
        normalized: False takes -(x' - a x - b m)^2 as an element's log-probability; see `StepTable`.

    Returns:
        StepTable of T steps, on the CPU.

    Raises:
        ValueError: for values outside those ranges, for a variance that exceeds 1 - ap, for a `target_weight` that no
            step can reach (it names the smallest feasible ones), for "proportionate" and "published" credit without
            noise, and for epsilon-prediction with zero terminal SNR.
    """
    from .table import StepTable

    alphas, indices = _checked_schedule(alphas_cumprod, timesteps)
    check_choice("credit", credit, get_args(Credit))
    check_choice("prediction_type", prediction_type, get_args(PredictionType))
    target_weight = checked_level(credit, target_weight)
    if not (is_finite(eta) and eta >= 0):
        raise ValueError(f"eta={shown(eta)} is not a noise level; give a finite number >= 0 (1 is the usual choice)")
    eta = float(eta)
    final = float(alphas[0] if final_alpha_cumprod is None else _checked_final(final_alpha_cumprod))
    at = alphas[indices]
    ap = torch.cat([at[1:], at.new_tensor([final])])
    if not float(at[-1]) <= final <= 1:
        raise ValueError(
            f"final_alpha_cumprod={final} must lie between the last timestep's {float(at[-1])} and 1: sampling "
            "removes noise"
        )
    if prediction_type == "epsilon" and float(at[0]) < ZERO_ALPHA:
        raise ValueError(
            f"alphas_cumprod is {float(at[0]):.3g} at timestep {int(indices[0])} (zero terminal SNR): epsilon says "
            "nothing about the sample there; use a v-prediction model, rescale_betas_zero_snr=False or "
            "timestep_spacing='leading'"
        )

    std = _std(at, ap, eta)
    # with zero terminal SNR eta = 1 sits on the bound, and rounding may carry it past
    if bool((std**2 > (1 - ap) * (1 + 1e-12)).any()):
        largest = float((torch.sqrt(1 - ap) / _std(at, ap, 1.0)).nan_to_num(nan=math.inf).min())
        raise ValueError(
            f"eta={eta} asks for more variance than the previous timestep has; on this schedule eta may be at most "
            f"{largest:.6g}"
        )
    if credit == "native" or credit == "constant":
        scheme: Scheme = credit
    else:
        if not bool((std > 0).any()):
            raise ValueError(f"credit={credit!r} needs a stochastic sampler, but every std is 0; use eta > 0")
        std, target_weight = _resolved(at, ap, std, credit, target_weight)
        # the re-solved steps reach w* up to rounding, and the level itself makes the credit exactly constant
        scheme = "constant" if credit == "proportionate" and target_weight is not None else "native"
    sample_coef, output_coef = _coefs(at, ap, std, prediction_type)
    table = StepTable(
        indices,
        sample_coef,
        output_coef,
        std,
        credit=scheme,
        target_weight=None if scheme == "native" else target_weight,
        epsilon_scale=torch.where(at < ZERO_ALPHA, 0.0, _epsilon_scale(at, prediction_type)),
        normalized=normalized,
    )
    chosen = stochastic_steps(steps, window, len(table))
    if chosen is None:
        return table
    none = torch.zeros_like(std)
    return table.with_noise_only(chosen, StepTable(indices, *_coefs(at, ap, none, prediction_type), none))


def _checked_final(final_alpha_cumprod: Any) -> Tensor:
    final = checked_numbers("final_alpha_cumprod", final_alpha_cumprod, "one number")
    if final.ndim:
        raise ValueError(f"final_alpha_cumprod has shape {tuple(final.shape)}; give one number")
    return final


def _checked_schedule(alphas_cumprod: Tensor | Sequence[float], timesteps: Tensor | Sequence[int]):
    alphas = checked_numbers("alphas_cumprod", alphas_cumprod, "(N,) cumulative alphas")
    indices = checked_numbers("timesteps", timesteps, "(T,) whole numbers")
    if alphas.ndim != 1 or indices.ndim != 1 or indices.numel() == 0 or alphas.numel() == 0:
        raise ValueError(
            f"alphas_cumprod and timesteps must be 1-D and not empty; given shapes {tuple(alphas.shape)} and "
            f"{tuple(indices.shape)}"
        )
    if not bool(((alphas >= 0) & (alphas < 1)).all()) or bool((alphas.diff() >= 0).any()):
        raise ValueError(f"alphas_cumprod must decrease strictly and lie in [0, 1); given {abbreviate(alphas)}")
    whole = indices.to(torch.int64)
    if bool((whole != indices).any()):
        raise ValueError(f"timesteps must be whole numbers (indices into alphas_cumprod); given {abbreviate(indices)}")
    if bool((whole < 0).any()) or bool((whole >= alphas.numel()).any()) or bool((whole.diff() >= 0).any()):
        raise ValueError(
            f"timesteps must decrease strictly and lie in 0..{alphas.numel() - 1}; given {abbreviate(whole)}"
        )
    return alphas, whole


def _std(at: Tensor, ap: Tensor, eta: float) -> Tensor:
    return eta * torch.sqrt((1 - ap) / (1 - at) * (1 - at / ap))


def _coefs(at: Tensor, ap: Tensor, std: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """a and b."""
    # rounding may leave s a last digit above sqrt(1 - ap) where the root sits on that bound
    d = torch.sqrt((1 - ap - std**2).clamp(min=0))
    if prediction_type == "epsilon":
        return torch.sqrt(ap / at), d - torch.sqrt(ap * (1 - at) / at)
    if prediction_type == "v_prediction":
        return torch.sqrt(ap * at) + d * torch.sqrt(1 - at), d * torch.sqrt(at) - torch.sqrt(ap * (1 - at))
    return d / torch.sqrt(1 - at), torch.sqrt(ap) - d * torch.sqrt(at / (1 - at))


def _epsilon_scale(at: Tensor, prediction_type: str) -> Tensor:
    """d(epsilon) / d(model output)."""
    if prediction_type == "epsilon":
        return torch.ones_like(at)
    if prediction_type == "v_prediction":
        return torch.sqrt(at)
    return -torch.sqrt(at / (1 - at))


def _resolved(
    at: Tensor, ap: Tensor, native_std: Tensor, credit: str, target_weight: float | None
) -> tuple[Tensor, float | None]:
    """The re-solved std of each step, and w*; None for w* if no stochastic step has an epsilon-equivalent output."""
    counted = (native_std > 0) & (at >= ZERO_ALPHA)
    if not bool(counted.any()):
        return native_std, target_weight
    at, ap, native = at[counted], ap[counted], native_std[counted]
    c1, b0 = torch.sqrt((1 - at) * ap / at), torch.sqrt(1 - ap)
    target = target_weight
    if target is None:
        d = torch.sqrt((b0**2 - native**2).clamp(min=0))
        target = float(((c1 + (d if credit == "published" else -d)) / native).mean())

    discriminant = b0**2 * (1 + target**2) - c1**2
    # eta = 1 is the double root: rounding must not lose a target that is exactly its credit
    solvable = discriminant >= -1e-14 * c1**2
    if not bool(solvable.any()):
        smallest = torch.sqrt((c1 / b0) ** 2 - 1)
        raise ValueError(
            f"target_weight={target:.6g} is below what any step can have: the smallest that some step reaches is "
            f"{float(smallest.min()):.6g}, the smallest that every step reaches is {float(smallest.max()):.6g}"
        )
    root = torch.sqrt(discriminant.clamp(min=0))
    minus, plus = ((target * c1 + side * root) / (1 + target**2) for side in (-1, 1))
    if credit == "published":
        solution = plus
    else:
        plus_is_nearest = (c1 - target * plus >= 0) & ((plus - native).abs() < (minus - native).abs())
        solution = torch.where(plus_is_nearest, plus, minus)
    # where no root exists eta = 1 comes closest: it has the smallest credit of all variances
    std = native_std.clone()
    std[counted] = torch.where(solvable, solution, _std(at, ap, 1.0))
    return std, target
