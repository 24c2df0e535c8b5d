"""The stochastic samplers of flow models.

Flow models predict the velocity v = epsilon - x0 on x = (1 - t) x0 + t epsilon (rectified flow). Symbols of Flow-GRPO
(Liu et al., arXiv 2505.05470), DanceGRPO (Xue et al., arXiv 2505.07818) and FlowCPS (Wang and Yu, arXiv 2509.05952):

    t, t'         two neighbouring `sigmas`, the share of noise before and after the step
    h             `interval`, t - t'
    nu            `noise_level`
    g             the diffusion coefficient: nu sqrt(t / (1 - t)) for "flow", nu for "dance"
    a, b, s       1 - g^2 h / (2t), -(1 + g^2 (1 - t) / (2t)) h and g sqrt(h) for both of them
    c             t' cos(pi nu / 2) for "cps", with a = 1 - t' + c, b = c (1 - t) - (1 - t') t and s = t' sin(pi nu / 2)
    zeta          `target_weight` of proportionate credit, the credit per unit of t wanted at every step

The ends. At t = 1 the g of "flow" has no value, and its denominator takes the next t: g = nu sqrt(1 / (1 - t')). A t
within 1e-5 of 1 counts as 1: some schedulers start at 0.999999. Noise that is drawn at the last step, t' = 0, stays in
the result, so the published codes take the step of the ODE there, a = 1, b = -h and s = 0; `last_step` chooses. "cps"
has s = 0 there by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from .checks import (
    LARGEST,
    Credit,
    Scheme,
    abbreviate,
    check_choice,
    checked_count,
    checked_level,
    checked_numbers,
    is_finite,
    shown,
    stochastic_steps,
)

if TYPE_CHECKING:
    from .table import StepTable

FlowSDE = Literal["flow", "dance", "cps"]
LastStep = Literal["ode", "noise"]

# the choices of the samplers' authors
NOISE_LEVELS: dict[str, float] = {"flow": 0.7, "dance": 0.3, "cps": 0.8}

# a t this near to 1 counts as 1; the second t of 1000 steps with shift 12 is still eight times as far away
NEARLY_ONE = 1e-5


def flow_table(
    sigmas: Tensor | Sequence[float],
    *,
    sde: FlowSDE = "flow",
    noise_level: float | Tensor | Sequence[float] | None = None,
    credit: Credit = "constant",
    target_weight: float | None = None,
    window: tuple[int, int] | None = None,
    steps: Iterable[int] | None = None,
    last_step: LastStep = "ode",
    normalized: bool = True,
    num_train_timesteps: int = 1000,
) -> StepTable:
    """Table of a stochastic sampler of a model that predicts the velocity v = epsilon - x0.

    Args:
        sigmas: (T + 1,) the share of noise t before each step and after the last, strictly decreasing within [0, 1];
            see `shifted_sigmas`.
        sde: "flow": Flow-GRPO (arXiv 2505.05470), g = noise_level sqrt(t / (1 - t)), with 1 - t' for 1 - t at t = 1.
            "dance": DanceGRPO (arXiv 2505.07818), g = noise_level. "cps": FlowCPS (arXiv 2509.05952),
            s = t' sin(pi noise_level / 2), with the marginals of the flow at any number of steps.
        noise_level: one for all steps, or (T,). 0 is the ODE. "cps" takes less than 2; at 1 all noise of x' is new.
            None means the authors' choice: 0.7 for "flow", 0.3 for "dance", 0.8 for "cps".
        credit: how the loss weighs the steps; the sampler is never touched.
            "native": as the sampler does (DanceGRPO, Flow-GRPO).
            "constant": every trained step has the mean native weight.
            "proportionate": PCPO's for flow models (Lee and Ye, arXiv 2509.25774), zeta h. "published": the same.
        target_weight: the level > 0 for these: the weight of each step for "constant", zeta for the others. None keeps
            the sampler's: its mean, or zeta = the sum of its weights -b / s over the sum of h, where the last row of
            "flow" and "dance" counts as if it drew its noise. The last row of "cps" has no noise, and does not count.
        window: (start, stop): only the steps start <= i < stop are stochastic and trained, with the std and the credit
            that they have in the whole table. The others take the step of the ODE. None means every step.
        steps: any step indices in the place of a window.
        last_step: "ode": a step to t' = 0 takes the step of the ODE. It is sampled and never trained. "noise": it
            draws noise like the others, and is trained ("cps" draws none there). A last step to t' > 0 is an ordinary
            one in both cases.
        normalized: False takes -(x' - a x - b m)^2 as an element's log-probability, as FlowCPS's authors do: the
            log-ratio is then 2 s^2 times the Gaussian's, and so is its gradient.
        num_train_timesteps: N; the model is given N t.

    Returns:
        StepTable of T steps, on the CPU.

    Raises:
        ValueError: for values outside those ranges, and for proportionate credit without any noise.
    """
    from .table import StepTable

    levels = checked_numbers("sigmas", sigmas, "(T + 1,) noise levels")
    if levels.ndim != 1 or levels.numel() < 2:
        raise ValueError(f"sigmas must have shape (T + 1,) with T >= 1; given shape {tuple(levels.shape)}")
    if not is_sigma_schedule(levels):
        raise ValueError(
            f"sigmas must decrease strictly and lie in [0, 1]; given {abbreviate(levels)}. shifted_sigmas makes such a "
            "list"
        )
    check_choice("sde", sde, get_args(FlowSDE))
    check_choice("credit", credit, get_args(Credit))
    check_choice("last_step", last_step, get_args(LastStep))
    target_weight = checked_level(credit, target_weight)
    if not (is_finite(num_train_timesteps) and num_train_timesteps > 0):
        raise ValueError(
            f"num_train_timesteps={shown(num_train_timesteps)} must be positive and finite; 1000 is the usual choice"
        )
    nu = _checked_noise(NOISE_LEVELS[sde] if noise_level is None else noise_level, sde, len(levels) - 1)

    t, t_next = levels[:-1], levels[1:]
    interval = t - t_next
    sample_coef, output_coef, std = _coefs(t, t_next, sde, nu)
    scheme: Scheme = "proportionate" if credit == "published" else credit
    counted = std > 0
    if scheme == "proportionate" and target_weight is None and bool(counted.any()):
        target_weight = float((-output_coef / std)[counted].sum() / interval[counted].sum())
    if last_step == "ode" and float(levels[-1]) == 0:
        sample_coef[-1], output_coef[-1], std[-1] = 1.0, -interval[-1], 0.0
    if scheme == "proportionate" and not bool((std > 0).any()):
        raise ValueError(
            f"credit={credit!r} needs a stochastic sampler, but every std is 0; use noise_level > 0 and at least 2 "
            "steps, or last_step='noise'"
        )
    timesteps = (t * float(num_train_timesteps)).to(torch.float32)
    table = StepTable(
        timesteps,
        sample_coef,
        output_coef,
        std,
        credit=scheme,
        target_weight=target_weight,
        interval=interval,
        normalized=normalized,
    )
    chosen = stochastic_steps(steps, window, len(table))
    if chosen is None:
        return table
    ode = StepTable(timesteps, torch.ones_like(t), -interval, torch.zeros_like(t))
    return table.with_noise_only(chosen, ode)


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
    num_inference_steps = checked_count("num_inference_steps", num_inference_steps)
    if not (is_finite(shift) and shift > 0):
        raise ValueError(f"shift={shown(shift)} is not a shift; give a finite number > 0 (1 changes nothing)")
    shift = float(shift)
    s = torch.linspace(1, 0, num_inference_steps + 1, dtype=torch.float64)
    sigmas = shift * s / (1 + (shift - 1) * s)
    # shift / (1 + (shift - 1)) may round
    sigmas[0] = 1.0
    if not is_sigma_schedule(sigmas):
        raise ValueError(f"shift={shift} leaves noise levels that cannot be told apart; give a smaller number")
    return sigmas


def is_sigma_schedule(levels: Tensor) -> bool:
    """Whether noise levels decrease strictly within [0, 1]."""
    return bool((levels[0] <= 1) & (levels[-1] >= 0) & (levels.diff() < 0).all())


def _checked_noise(noise_level: float | Tensor | Sequence[float], sde: str, num_steps: int) -> Tensor:
    """(T,) in float64."""
    given = checked_numbers("noise_level", noise_level, "a number or (T,)")
    if given.ndim and given.shape != (num_steps,):
        raise ValueError(
            f"noise_level has shape {tuple(given.shape)} and the table {num_steps} steps; give one number, or one per "
            "step"
        )
    bad = ~(given <= LARGEST) | (given < 0)
    if bool(bad.any()):
        raise ValueError(
            f"noise_level={float(given[bad][0])} is not a noise level; give finite numbers >= 0 (0.7 is the usual "
            "choice for 'flow', 0.3 for 'dance', 0.8 for 'cps')"
        )
    if sde == "cps" and bool((given >= 2).any()):
        raise ValueError(
            f"noise_level={float(given.max())} is too much for sde='cps', whose std is t' sin(pi noise_level / 2); "
            "give less than 2 (at 1 all noise of x' is new)"
        )
    return given.expand(num_steps)


def _coefs(t: Tensor, t_next: Tensor, sde: str, noise_level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a, b, s of every row, the last one with its noise."""
    h = t - t_next
    if sde == "cps":
        angle = noise_level * math.pi / 2
        # t' - c: without noise exactly 0, so that the row is exactly the ODE's
        removed = 2 * torch.sin(angle / 2) ** 2 * t_next
        return 1 - removed, -h - removed * (1 - t), torch.sin(angle) * t_next
    g = noise_level
    if sde == "flow":
        g = g * torch.sqrt(t / torch.where(1 - t > NEARLY_ONE, 1 - t, 1 - t_next))
    half = g**2 * h / (2 * t)
    return 1 - half, -h - half * (1 - t), g * torch.sqrt(h)
