"""Clipped policy-gradient losses on one sampler step per row, and their gradient.

A step x' = a x + b m + s z has, for the whitened sample u = (x' - a x)/s, the policy N(u; -w m, 1) with w = -b/s.
`policy_loss_oracle` writes the log-ratio of two such policies as it stands in the textbook. With e = m_new - m_old
it equals, exactly and without cancellation,

    log rho = -L,    L = w <e, z> + w^2 <e, e>/2                        (divided by numel for 'mean')

A row of the table holds `slope` and `curvature`, both w for the plain Gaussian, and L = slope <e, z + curvature e/2>.
So a row's loss f(L) has the gradient [f'(L) slope] (z + curvature e): a per-row coefficient times a direction. The
direction does not need L, so one pass over the row both sums and writes it, and the coefficient is left to the backward
pass, which has to multiply by the incoming scalar anyway. Stored so, the direction is of order 1 and safe in half
precision.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Normal

from .affine import (
    affine_mean,
    as_rows,
    cast,
    chunk_squares,
    chunk_sums,
    coefficients,
    compute_dtype,
    guided_output,
    inverse,
    per_row,
    reduction_scale,
    row_numel,
    row_sums,
    tiles,
)
from .philox import first_counters, noise_tile

# overflow is clamped to this
LARGEST = 3.0e38


def policy_loss_oracle(
    model_output: Tensor,
    old_model_output: Tensor,
    noise: Tensor,
    table: Tensor,
    step: Tensor,
    advantages: Tensor,
    weight: Tensor,
    *,
    objective: str = "pcpo",
    clip_range: tuple[float, float] = (1e-4, 1e-4),
    reduction: str = "mean",
    row_weights: Tensor | None = None,
    ref_model_output: Tensor | None = None,
    kl_weight: Tensor | float = 0.0,
    normalized: bool = True,
    interval: Tensor | None = None,
) -> dict[str, Tensor]:
    """The textbook formulas in float64, differentiable by autograd: loss, log_ratio, clipped, kl and old_kl per row.

    Only a, b and s are read from the table. The credit `weight` (T,), `normalized` and, for the loss of GRPO-Guard, the
    `interval` (T,) are given by themselves. An objective without a textbook formula here is its function in
    `OBJECTIVES`, differentiated by autograd.
    """
    new, old, z = (t.double().flatten(1) for t in (model_output, old_model_output, noise))
    coef = coefficients(table, step, torch.float64)
    std, b, w = per_row(coef["std"], coef["output_coef"], weight.double()[step])
    native = torch.where(std > 0, -b / std, 0.0)
    advantages = advantages.double()
    reduce = torch.mean if reduction == "mean" else torch.sum
    below, above = clip_range

    whitened = z - w * old

    def log_prob(m: Tensor) -> Tensor:
        if normalized:
            return reduce(Normal(-w * m, 1.0).log_prob(whitened), dim=1)
        # x' - a x - b m is s times the whitened distance
        return -reduce((std * (whitened + w * m)).square(), dim=1)

    log_ratio = log_prob(new) - log_prob(old)
    if interval is not None:
        # the shift of the mean's own part of the log-ratio taken out, and the step's scale
        shift = w * (new - old)
        own_part = shift.square() / 2 if normalized else (std * shift).square()
        log_ratio = std.squeeze(1) * (log_ratio + reduce(own_part, dim=1))
    if objective == "pcpo":
        xi = torch.full_like(advantages, below).masked_fill_(advantages > 0, above)
        loss = torch.clamp(xi * advantages.abs() - advantages * log_ratio, min=0)
        clipped = advantages.sign() * log_ratio >= xi
    elif objective == "ppo":
        ratio = log_ratio.exp()
        unclipped_loss = -advantages * ratio
        clipped_loss = -advantages * ratio.clamp(1 - below, 1 + above)
        loss = torch.maximum(unclipped_loss, clipped_loss)
        clipped = clipped_loss > unclipped_loss
    else:
        loss, _, clipped = OBJECTIVES[objective](log_ratio, advantages, below, above)
    if interval is not None:
        loss = loss / interval.double()[step]

    def divergence(m: Tensor, other: Tensor) -> Tensor:
        policy, reference = (Normal(-native * output, 1.0) for output in (m, other))
        return reduce(torch.distributions.kl_divergence(policy, reference), dim=1)

    rows = {"log_ratio": log_ratio, "clipped": clipped, "old_kl": divergence(new, old)}
    if ref_model_output is not None:
        rows["kl"] = divergence(new, ref_model_output.double().flatten(1))
        loss = loss + kl_weight * rows["kl"]
    return rows | {"loss": loss if row_weights is None else loss * row_weights.double()}


def pcpo(log_ratio: Tensor, advantages: Tensor, below: float, above: float) -> tuple[Tensor, Tensor, Tensor]:
    """max(0, xi |A| - A log rho): loss, its derivative by L = -log rho, clipped."""
    # an overflow times an advantage of 0 is 0; NaN stays NaN
    log_ratio = log_ratio.clamp(-LARGEST, LARGEST)
    xi = below if below == above else torch.full_like(advantages, below).masked_fill_(advantages > 0, above)
    clipped = advantages.sign().mul_(log_ratio) >= xi
    loss = advantages.abs().mul_(xi).sub_(advantages * log_ratio)
    return loss.masked_fill_(clipped, 0.0), advantages.masked_fill(clipped, 0.0), clipped


def ppo(log_ratio: Tensor, advantages: Tensor, below: float, above: float) -> tuple[Tensor, Tensor, Tensor]:
    """max(-A rho, -A clip(rho, 1 - below, 1 + above)): loss, its derivative by L = -log rho, clipped."""
    # an overflow times an advantage of 0 is 0; NaN stays NaN
    ratio = log_ratio.exp().clamp_(max=LARGEST)
    surrogate, bounded = advantages * ratio, advantages * ratio.clamp_(1 - below, 1 + above)
    clipped = bounded < surrogate
    return torch.minimum(surrogate, bounded).neg_(), surrogate.masked_fill_(clipped, 0.0), clipped


Objective = Callable[[Tensor, Tensor, float, float], tuple[Tensor, Tensor, Tensor]]

# name -> function of float64 (rows,) log_ratio and advantages, and the clip range, to loss, derivative and clipped
OBJECTIVES: dict[str, Objective] = {"pcpo": pcpo, "ppo": ppo}


def policy_loss(
    model_output: Tensor,
    uncond_output: Tensor | None,
    guidance_scale: float,
    old_model_output: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    sample_index: Tensor | None,
    sample: Tensor | None,
    prev_sample: Tensor | None,
    table: Tensor,
    step: Tensor,
    advantages: Tensor,
    row_weights: Tensor | None,
    ref_model_output: Tensor | None,
    kl_weight: float,
    kl_weights: Tensor | None,
    objective: str,
    clip_below: float,
    clip_above: float,
    reduction: str,
    row_reduction: str,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss; each row's log-ratio, clipped, KL to the reference (empty without one) and KL to the old output; the
    direction z + curvature e (empty without gradient); the gradient's coefficients, (rows, 1): of the direction, or
    (rows, 2): of the direction and of m_new - m_ref."""
    coef, ez, ee, rr, direction = _pass(
        *(model_output, uncond_output, guidance_scale, old_model_output),
        *(noise, seed, sample_index, sample, prev_sample, table, step, ref_model_output, with_gradient),
    )
    slope, loss_scale = coef["slope"], coef["loss_scale"]
    dtype, scale = slope.dtype, reduction_scale(row_numel(model_output), reduction)
    share = scale / len(step) if row_reduction == "mean" else scale
    log_ratio = ez.mul_(slope).mul_(-scale)
    loss, derivative, clipped = OBJECTIVES[objective](log_ratio, advantages.double(), clip_below, clip_above)
    # not in place: an objective may return its own arguments
    loss, shares = loss * loss_scale, (derivative * (loss_scale * slope)).mul_(share)[:, None]
    # KL divergences are w^2 / 2 times a square, with the sampler's own w = -b/s
    divergence = (coef["output_coef"] * inverse(coef["std"])).square_()
    kl = loss.new_empty(0, dtype=dtype)
    if rr is not None:
        weight = kl_weight if kl_weights is None else kl_weights.double()
        kl = rr.mul_(divergence).mul_(0.5 * scale)
        loss, kl = loss + kl * weight, kl.to(dtype)
        shares = torch.cat([shares, (divergence * weight).mul_(share)[:, None]], dim=1)
    if row_weights is not None:
        loss, shares = loss * row_weights, shares * row_weights[:, None]
    total = loss.mean(dtype=dtype) if row_reduction == "mean" else loss.sum(dtype=dtype)
    if total.device.type == "cpu" and not math.isfinite(total):
        _check_finite({"advantages": advantages, "row_weights": row_weights, "Reference.weight": kl_weights})
    loss = loss.to(dtype) if row_reduction == "none" else total
    old_kl = ee.mul_(divergence).mul_(0.5 * scale)
    return loss, log_ratio.to(dtype), clipped, kl, old_kl.to(dtype), direction, shares.to(dtype)


def _check_finite(numbers: dict[str, Tensor | None]) -> None:
    for name, tensor in numbers.items():
        if tensor is None or bool(tensor.isfinite().all()):
            continue
        row = int((~tensor.isfinite()).nonzero()[0])
        raise ValueError(f"{name} holds {float(tensor[row])} in row {row}; give finite numbers (0 leaves a row out)")


def step_log_ratio(
    model_output: Tensor,
    old_model_output: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    sample_index: Tensor | None,
    sample: Tensor | None,
    prev_sample: Tensor | None,
    table: Tensor,
    step: Tensor,
    reduction: str,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's log-ratio; the direction z + curvature e of its gradient (empty without), and its coefficient
    (rows, 1)."""
    coef, ez, _, _, direction = _pass(
        *(model_output, None, 1.0, old_model_output),
        *(noise, seed, sample_index, sample, prev_sample, table, step, None, with_gradient),
    )
    slope, scale = coef["slope"], reduction_scale(row_numel(model_output), reduction)
    return (ez * slope).mul_(-scale).to(slope.dtype), direction, -scale * slope[:, None]


def _pass(
    model_output: Tensor,
    uncond_output: Tensor | None,
    guidance_scale: float,
    old_model_output: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    sample_index: Tensor | None,
    sample: Tensor | None,
    prev_sample: Tensor | None,
    table: Tensor,
    step: Tensor,
    ref_model_output: Tensor | None,
    with_gradient: bool,
) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor | None, Tensor]:
    """Each row's coefficients, <e, z + curvature e/2>, <e, e> and <m_new - m_ref, m_new - m_ref>, and the direction
    z + curvature e (empty without gradient)."""
    dtype = compute_dtype(model_output, old_model_output, noise, ref_model_output, sample, prev_sample, uncond_output)
    direction = model_output.new_empty(model_output.shape if with_gradient else 0)
    rows, numel = len(step), row_numel(model_output)
    coef = coefficients(table, step, dtype)
    states: list[Tensor | None] = [None] * 4
    if sample is not None:
        # the states give z, or m_old where there is none
        divisor = coef["output_coef" if old_model_output is None else "std"]
        states = per_row(coef["sample_coef"], coef["output_coef"], coef["std"], inverse(divisor))
    first_counter = None if seed is None else first_counters(sample_index, step, table.shape[0], numel)
    optional = (direction if with_gradient else None, old_model_output, uncond_output, noise)
    per_element = (None if t is None else as_rows(t) for t in (*optional, sample, prev_sample, ref_model_output))
    sums, squares, ref_squares = [], [], []

    for columns, new, target, old, uncond, z, x, x_prev, ref, curvature, a, b, s, divide, counter in tiles(
        as_rows(model_output), *per_element, *per_row(coef["curvature"]), *states, first_counter
    ):
        if uncond is not None:
            new = guided_output(new, uncond, guidance_scale, dtype, torch.empty_like(new))
        new = cast(new, dtype)
        if counter is not None:
            z = noise_tile(seed, counter, columns)
        if old is None:
            # x' = a x + b m_old + s z, solved for m_old
            rest = affine_mean(cast(x, dtype), cast(z, dtype), a, s)
            old = torch.sub(cast(x_prev, dtype), rest, out=rest).mul_(divide)
        elif x is not None:
            mean = affine_mean(cast(x, dtype), cast(old, dtype), a, b)
            z = torch.sub(cast(x_prev, dtype), mean, out=mean).mul_(divide)
        z, old = cast(z, dtype), cast(old, dtype)
        e = new - old
        direct = torch.addcmul(z, e, curvature, out=target if target is not None and target.dtype == dtype else None)
        if target is not None and direct is not target:
            target.copy_(direct)
        squares.append(chunk_squares(e))
        sums.append(chunk_sums(torch.mul(e, direct, out=e)))
        if ref is not None:
            ref_squares.append(chunk_squares(torch.sub(new, cast(ref, dtype), out=e)))

    ee, rr = row_sums(squares, rows), row_sums(ref_squares, rows) if ref_squares else None
    # <e, z + curvature e> is left over from the direction; beside squares that overflow it stands alone
    half = (ee * coef["curvature"]).mul_(0.5).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    ez = row_sums(sums, rows).sub_(half)
    return coef, ez, ee, rr, direction
