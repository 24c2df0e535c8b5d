"""Clipped policy-gradient losses on one sampler step per row, and their gradient.

A step x' = a x + b m + s z has, for the whitened sample u = (x' - a x)/s, the policy N(u; -w m, 1) with w = -b/s.
`policy_loss_oracle` writes the log-ratio of two such policies as it stands in the textbook. With e = m_new - m_old
it equals, exactly and without cancellation,

    log rho = -L,    L = w <e, z> + w^2 <e, e>/2                        (divided by numel for 'mean')

so a row's loss f(L) has the gradient f'(L) (w z + w^2 e) = [f'(L) w] (z + w e): a per-row coefficient times a
direction. The direction does not need L = w <e, z + w e/2>, so one pass over the row both sums and writes it, and the
coefficient is left to the backward pass, which has to multiply by the incoming scalar anyway. Stored so, it is of
order 1 and safe in half precision.

GRPO-Guard (Wang et al., arXiv 2510.22319) takes the mean's shift out of the log-ratio and the step's scale into it,
log rho = -s w <e, z>, and divides the loss by the step's interval: then the direction is z.

A table whose log-probability is not normalised, -(x' - a x - b m)^2, has k = 2 s^2 times these log-ratios, its
`log_prob_scale`, and gradients to match.
"""

import torch
from torch import Tensor
from torch.distributions import Normal

from .affine import (
    Coefficients,
    affine_mean,
    as_rows,
    cast,
    chunk_sums,
    compute_dtype,
    guided_output,
    reduction_scale,
    row_numel,
    row_sums,
    tiles,
)
from .philox import first_counters, noise_tile

# what a number that overflows in float32 is taken for
LARGEST = 3.0e38


def policy_loss_oracle(
    model_output: Tensor,
    old_model_output: Tensor,
    noise: Tensor,
    table: Tensor,
    step: Tensor,
    advantages: Tensor,
    *,
    objective: str = "pcpo",
    clip_range: float = 1e-4,
    reduction: str = "mean",
    ref_model_output: Tensor | None = None,
    kl_weight: float = 0.0,
    normalized: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, log-ratio and clipped of the textbook formula, in float64 and differentiable by autograd."""
    new, old, z = (t.double().flatten(1) for t in (model_output, old_model_output, noise))
    coef = Coefficients(table, step, torch.float64)
    weight = coef.weight
    advantages = advantages.double()
    reduce = torch.mean if reduction == "mean" else torch.sum

    whitened = z - weight * old

    def log_prob(m: Tensor) -> Tensor:
        if normalized:
            return reduce(Normal(-weight * m, 1.0).log_prob(whitened), dim=1)
        # x' - a x - b m is s times the whitened distance
        return -reduce((coef.std * (whitened + weight * m)).square(), dim=1)

    log_ratio = log_prob(new) - log_prob(old)
    if objective == "guard":
        # the shift of the mean's own part of the log-ratio taken out, and the step's scale
        shift = weight * (new - old)
        own_part = shift.square() / 2 if normalized else (coef.std * shift).square()
        log_ratio = coef.std.squeeze(1) * (log_ratio + reduce(own_part, dim=1))
    if objective == "pcpo":
        loss = torch.clamp(clip_range * advantages.abs() - advantages * log_ratio, min=0)
        clipped = advantages.sign() * log_ratio >= clip_range
    else:
        ratio = log_ratio.exp()
        unclipped_loss = -advantages * ratio
        clipped_loss = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
        loss = torch.maximum(unclipped_loss, clipped_loss)
        clipped = clipped_loss > unclipped_loss
    if objective == "guard":
        loss = loss / coef.interval.squeeze(1)
    if ref_model_output is not None:
        policy, reference = (-coef.native_weight * m for m in (new, ref_model_output.double().flatten(1)))
        kl = torch.distributions.kl_divergence(Normal(policy, 1.0), Normal(reference, 1.0))
        loss = loss + kl_weight * reduce(kl, dim=1)
    return loss.mean(), log_ratio, clipped


def pcpo(log_ratio: Tensor, advantages: Tensor, clip_range: float) -> tuple[Tensor, Tensor, Tensor]:
    """max(0, xi |A| - A log rho): loss, its derivative by L = -log rho, clipped."""
    # one that overflows times an advantage of 0 is 0; NaN stays NaN
    log_ratio = log_ratio.clamp(-LARGEST, LARGEST)
    clipped = advantages.sign().mul_(log_ratio) >= clip_range
    loss = advantages.abs().mul_(clip_range).sub_(advantages * log_ratio)
    return loss.masked_fill_(clipped, 0.0), advantages.masked_fill(clipped, 0.0), clipped


def ppo(log_ratio: Tensor, advantages: Tensor, clip_range: float) -> tuple[Tensor, Tensor, Tensor]:
    """max(-A rho, -A clip(rho, 1 - xi, 1 + xi)): loss, its derivative by L = -log rho, clipped."""
    # as above
    ratio = log_ratio.exp().clamp_(max=LARGEST)
    surrogate, bounded = advantages * ratio, advantages * ratio.clamp_(1 - clip_range, 1 + clip_range)
    clipped = bounded < surrogate
    return torch.minimum(surrogate, bounded).neg_(), surrogate.masked_fill_(clipped, 0.0), clipped


# guard is ppo on another log-ratio and per interval
OBJECTIVES = {"pcpo": pcpo, "ppo": ppo, "guard": ppo}


def policy_loss(
    model_output: Tensor,
    uncond_output: Tensor | None,
    guidance_scale: float,
    old_model_output: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    sample_index: Tensor | None,
    sample: Tensor | None,
    prev_sample: Tensor | None,
    table: Tensor,
    step: Tensor,
    advantages: Tensor,
    ref_model_output: Tensor | None,
    objective: str,
    clip_range: float,
    reduction: str,
    kl_weight: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss; each row's log-ratio and clipped; the direction z + w e (empty without gradient); the gradient's
    coefficients, (rows, 1): of the direction, or (rows, 2): of the direction and of m_new - m_ref."""
    coef, ez, rr, direction = _pass(
        *(model_output, uncond_output, guidance_scale, old_model_output),
        *(noise, seed, sample_index, sample, prev_sample, table, step, ref_model_output, objective, with_gradient),
    )
    dtype, scale = coef.rows.dtype, reduction_scale(row_numel(model_output), reduction)
    weight = (coef.weight * coef.log_prob_scale).squeeze(1)
    if objective == "guard":
        weight = weight * coef.std.squeeze(1)
    log_ratio = (ez * weight).mul_(-scale)
    loss, slope, clipped = OBJECTIVES[objective](log_ratio, advantages.double(), clip_range)
    if objective == "guard":
        loss, slope = (t / coef.interval.squeeze(1) for t in (loss, slope))
    coefficients = slope.mul_(weight)[:, None]
    if rr is not None:
        kl = kl_weight * coef.native_weight.double().square()
        loss = loss + 0.5 * scale * kl.squeeze(1) * rr
        coefficients = torch.cat([coefficients, kl], dim=1)
    coefficients = coefficients.mul_(scale / len(step)).to(dtype)
    return loss.mean(dtype=dtype), log_ratio.to(dtype), clipped, direction, coefficients


def step_log_ratio(
    model_output: Tensor,
    old_model_output: Tensor,
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
    """Each row's log-ratio; the direction z + w e of its gradient (empty without), and its coefficient (rows, 1)."""
    coef, ez, _, direction = _pass(
        *(model_output, None, 1.0, old_model_output),
        *(noise, seed, sample_index, sample, prev_sample, table, step, None, "log_ratio", with_gradient),
    )
    dtype, scale = coef.rows.dtype, reduction_scale(row_numel(model_output), reduction)
    weight = coef.weight * coef.log_prob_scale
    return (ez * weight.squeeze(1)).mul_(-scale).to(dtype), direction, -scale * weight


def _pass(
    model_output: Tensor,
    uncond_output: Tensor | None,
    guidance_scale: float,
    old_model_output: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    sample_index: Tensor | None,
    sample: Tensor | None,
    prev_sample: Tensor | None,
    table: Tensor,
    step: Tensor,
    ref_model_output: Tensor | None,
    objective: str,
    with_gradient: bool,
) -> tuple[Coefficients, Tensor, Tensor | None, Tensor]:
    """Each row's coefficients, <e, z + w e/2> and <m_new - m_ref, m_new - m_ref>, and the direction z + w e (empty
    without gradient); for guard without the terms in w."""
    dtype = compute_dtype(model_output, old_model_output, noise, ref_model_output, sample, prev_sample, uncond_output)
    direction = model_output.new_empty(model_output.shape if with_gradient else 0)
    rows, numel = len(step), row_numel(model_output)
    coef = Coefficients(table, step, dtype)
    states = (None, None, None) if sample is None else (coef.sample, coef.output, coef.inverse_std)
    first_counter = None if seed is None else first_counters(sample_index, step, table.shape[0], numel)
    w = coef.weight
    optional = (direction if with_gradient else None, uncond_output, noise, sample, prev_sample, ref_model_output)
    per_element = (None if t is None else as_rows(t) for t in optional)
    sums, ref_sums = [], []

    for columns, new, old, target, uncond, z, x, x_prev, ref, weight, half_weight, a, b, inverse_std, counter in tiles(
        *map(as_rows, (model_output, old_model_output)),
        *(*per_element, w, w / 2, *states, first_counter),
    ):
        if uncond is not None:
            new = guided_output(new, uncond, guidance_scale, dtype, torch.empty_like(new))
        new, old = cast(new, dtype), cast(old, dtype)
        if x is not None:
            mean = affine_mean(cast(x, dtype), old, a, b)
            z = torch.sub(cast(x_prev, dtype), mean, out=mean).mul_(inverse_std)
        elif counter is not None:
            z = noise_tile(seed, counter, columns)
        z = cast(z, dtype)
        e = new - old
        scratch = target if target is not None and target.dtype == dtype else torch.empty_like(e)
        if objective == "guard":
            sums.append(chunk_sums(torch.mul(e, z, out=scratch)))
        else:
            sums.append(chunk_sums(torch.addcmul(z, e, half_weight, out=scratch).mul_(e)))
        if target is not None:
            direction_tile = z if objective == "guard" else torch.addcmul(z, e, weight, out=scratch)
            if direction_tile is not target:
                target.copy_(direction_tile)
        if ref is not None:
            ref_sums.append(chunk_sums(torch.sub(new, cast(ref, dtype), out=e).square_()))

    return coef, row_sums(sums, rows), row_sums(ref_sums, rows) if ref_sums else None, direction
