"""Clipped policy-gradient losses on one sampler step per row, and their gradient.

A step x' = a x + b m + s z has, for the whitened sample u = (x' - a x)/s, the policy N(u; -w m, 1) with w = -b/s.
`policy_loss_oracle` writes the log-ratio of two such policies as it stands in the textbook. With e = m_new - m_old
it equals, exactly and without cancellation,

    log rho = -L,    L = w <e, z> + w^2 <e, e>/2                        (divided by numel for 'mean')

so a row's loss f(L) has the gradient f'(L) (w z + w^2 e) = [f'(L) w] (z + w e): a per-row coefficient times a
direction. The direction does not need L, so one pass over the row both sums and writes it, and the coefficient is left
to the backward pass, which has to multiply by the incoming scalar anyway. Stored so, it is of order 1 and safe
in half precision.
"""

import math

import torch
from torch import Tensor
from torch.distributions import Normal

from .affine import Coefficients, as_rows, chunk_sums, compute_dtype, reduction_scale, row_sums, tiles


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, log-ratio and clipped of the textbook formula, in float64 and differentiable by autograd."""
    new, old, z = (t.double().flatten(1) for t in (model_output, old_model_output, noise))
    coef = Coefficients.of(table, step)
    weight = coef.weight[:, None]
    advantages = advantages.double()
    reduce = torch.mean if reduction == "mean" else torch.sum

    whitened = z - weight * old
    new_log_prob = reduce(Normal(-weight * new, 1.0).log_prob(whitened), dim=1)
    old_log_prob = reduce(Normal(-weight * old, 1.0).log_prob(whitened), dim=1)
    log_ratio = new_log_prob - old_log_prob
    if objective == "pcpo":
        loss = torch.clamp(clip_range * advantages.abs() - advantages * log_ratio, min=0)
        clipped = advantages.sign() * log_ratio >= clip_range
    else:
        ratio = log_ratio.exp()
        unclipped_loss = -advantages * ratio
        clipped_loss = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
        loss = torch.maximum(unclipped_loss, clipped_loss)
        clipped = clipped_loss > unclipped_loss
    if ref_model_output is not None:
        policy, reference = (-coef.native_weight[:, None] * m for m in (new, ref_model_output.double().flatten(1)))
        kl = torch.distributions.kl_divergence(Normal(policy, 1.0), Normal(reference, 1.0))
        loss = loss + kl_weight * reduce(kl, dim=1)
    return loss.mean(), log_ratio, clipped


def pcpo(log_ratio: Tensor, advantages: Tensor, clip_range: float) -> tuple[Tensor, Tensor, Tensor]:
    """max(0, xi |A| - A log rho): loss, its derivative by L = -log rho, clipped."""
    clipped = advantages.sign() * log_ratio >= clip_range
    loss = advantages.abs().mul_(clip_range).sub_(advantages * log_ratio)
    return loss.masked_fill_(clipped, 0.0), advantages.masked_fill(clipped, 0.0), clipped


def ppo(log_ratio: Tensor, advantages: Tensor, clip_range: float) -> tuple[Tensor, Tensor, Tensor]:
    """max(-A rho, -A clip(rho, 1 - xi, 1 + xi)): loss, its derivative by L = -log rho, clipped."""
    highest, lowest = math.log1p(clip_range), math.log1p(-clip_range) if clip_range < 1 else -math.inf
    clipped = ((advantages > 0) & (log_ratio > highest)) | ((advantages < 0) & (log_ratio < lowest))
    surrogate = advantages * torch.where(clipped, log_ratio.clamp(lowest, highest), log_ratio).exp()
    return -surrogate, surrogate.masked_fill(clipped, 0.0), clipped


OBJECTIVES = {"pcpo": pcpo, "ppo": ppo}


def policy_loss(
    model_output: Tensor,
    old_model_output: Tensor,
    noise: Tensor,
    table: Tensor,
    step: Tensor,
    advantages: Tensor,
    ref_model_output: Tensor | None,
    objective: str,
    clip_range: float,
    reduction: str,
    kl_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss; each row's log-ratio and clipped; the direction z + w e; the gradient's coefficients, (rows, 1): of the
    direction, or (rows, 2): of the direction and of m_new - m_ref."""
    dtype = compute_dtype(model_output, old_model_output, noise, ref_model_output)
    direction = torch.empty_like(model_output, memory_format=torch.contiguous_format)
    new, old, z, towards = (as_rows(t) for t in (model_output, old_model_output, noise, direction))
    ref = None if ref_model_output is None else as_rows(ref_model_output)
    rows, numel = new.shape
    coef = Coefficients.of(table, step)
    weight = coef.weight.to(dtype)[:, None]
    sums: list[list[Tensor]] = [[] for _ in range(2 if ref is None else 3)]

    for tile in tiles(rows, numel, new.device):
        m_new, noise_tile = new[tile].to(dtype), z[tile].to(dtype)
        e = m_new - old[tile].to(dtype)
        scratch = towards[tile] if towards.dtype == dtype else torch.empty_like(e)
        sums[0].append(chunk_sums(torch.mul(e, noise_tile, out=scratch)))
        sums[1].append(chunk_sums(torch.mul(e, e, out=scratch)))
        torch.mul(e, weight[tile[0]], out=scratch).add_(noise_tile)
        if towards.dtype != dtype:
            towards[tile] = scratch
        if ref is not None:
            sums[2].append(chunk_sums(torch.sub(m_new, ref[tile].to(dtype), out=e).square_()))

    scale = reduction_scale(numel, reduction)
    ez, ee, *rr = row_sums(*sums, rows=rows)
    log_ratio = torch.addcmul(ez, coef.weight, ee, value=0.5).mul_(-scale * coef.weight)
    loss, slope, clipped = OBJECTIVES[objective](log_ratio, advantages.double(), clip_range)
    coefficients = [slope * coef.weight]
    if ref is not None:
        coefficients.append(kl_weight * coef.native_weight.square())
        loss = loss + 0.5 * scale * coefficients[1] * rr[0]
    return (
        loss.mean().to(dtype),
        log_ratio.to(dtype),
        clipped,
        direction,
        torch.stack(coefficients, dim=1).mul_(scale / rows).to(dtype),
    )
