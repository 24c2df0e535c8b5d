"""Clipped policy-gradient losses and their gradient: reduce, scalar epilogue, one elementwise write.

With e = m_new - m_old, a row needs S1 = <e, z>, S2 = <e, e> (and S3 = <m_new - m_ref, m_new - m_ref>): its log-ratio is
-(w S1 + w^2 S2/2), and its gradient a per-row coefficient times the direction z + w e. The direction does not need the
sums, so each program reads its part of the row once, writes the direction and leaves three partial sums. A second
kernel adds a row's partial sums in a fixed order and turns them into the row's scalars: that is the epilogue, the only
place where the objectives differ.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .affine import NATIVE_WEIGHT, WEIGHT, coefficient
from .launch import REDUCE_WARPS, launch

SUMS = tl.constexpr(3)


@triton.jit
def _policy_loss_fwd_kernel(
    new_ptr,
    old_ptr,
    noise_ptr,
    ref_ptr,
    table_ptr,
    step_ptr,
    direction_ptr,
    partial_ptr,
    numel,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program writes the direction of one split of one row, and the split's three partial sums."""
    program = tl.program_id(0).to(tl.int64)
    row = program // SPLITS
    column = program % SPLITS * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = column < numel
    offset = row * numel + column
    weight = coefficient(table_ptr, step_ptr, row, WEIGHT)

    new = tl.load(new_ptr + offset, mask, other=0.0).to(tl.float32)  # [BLOCK]
    old = tl.load(old_ptr + offset, mask, other=0.0).to(tl.float32)  # [BLOCK]
    noise = tl.load(noise_ptr + offset, mask, other=0.0).to(tl.float32)  # [BLOCK]
    e = new - old
    direction = tl.fma(weight, e, noise)
    tl.store(direction_ptr + offset, direction.to(direction_ptr.dtype.element_ty), mask)

    partial_ptr += program * SUMS
    tl.store(partial_ptr, tl.sum(e * noise))
    tl.store(partial_ptr + 1, tl.sum(e * e))
    if ref_ptr is not None:
        ref = tl.load(ref_ptr + offset, mask, other=0.0).to(tl.float32)  # [BLOCK]
        tl.store(partial_ptr + 2, tl.sum((new - ref) * (new - ref)))


@triton.jit
def _objective(log_ratio, advantage, clip_range, highest, lowest, OBJECTIVE: tl.constexpr):
    """A row's loss, its derivative by -log rho, and whether it is clipped."""
    if OBJECTIVE == "pcpo":
        sign = tl.where(advantage > 0, 1.0, tl.where(advantage < 0, -1.0, 0.0))
        clipped = sign * log_ratio >= clip_range
        loss = tl.where(clipped, 0.0, clip_range * tl.abs(advantage) - advantage * log_ratio)
        slope = advantage
    else:
        tl.static_assert(OBJECTIVE == "ppo")
        above = (advantage > 0) & (log_ratio > highest)
        below = (advantage < 0) & (log_ratio < lowest)
        clipped = above | below
        slope = advantage * tl.exp(tl.where(above, highest, tl.where(below, lowest, log_ratio)))
        loss = -slope
    return loss, tl.where(clipped, 0.0, slope), clipped


@triton.jit
def _policy_loss_rows_kernel(
    partial_ptr,
    table_ptr,
    step_ptr,
    advantage_ptr,
    loss_ptr,
    log_ratio_ptr,
    clipped_ptr,
    coefficients_ptr,
    scale,
    gradient_scale,
    clip_range,
    highest,
    lowest,
    kl_weight,
    SPLITS: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
    OBJECTIVE: tl.constexpr,
    HAS_REF: tl.constexpr,
):
    """One program adds one row's partial sums and writes its loss, log-ratio, clipped and gradient coefficients."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS_BLOCK)  # [SPLITS_BLOCK]
    mask = split < SPLITS
    partial_ptr += (row * SPLITS + split) * SUMS
    ez = tl.sum(tl.load(partial_ptr, mask, other=0.0))
    ee = tl.sum(tl.load(partial_ptr + 1, mask, other=0.0))
    weight = coefficient(table_ptr, step_ptr, row, WEIGHT)
    advantage = tl.load(advantage_ptr + row).to(tl.float32)

    log_ratio = -scale * (weight * ez + 0.5 * weight * weight * ee)
    loss, slope, clipped = _objective(log_ratio, advantage, clip_range, highest, lowest, OBJECTIVE)
    if HAS_REF:
        native_weight = coefficient(table_ptr, step_ptr, row, NATIVE_WEIGHT)
        kl = kl_weight * native_weight * native_weight
        loss += 0.5 * scale * kl * tl.sum(tl.load(partial_ptr + 2, mask, other=0.0))
        tl.store(coefficients_ptr + 2 * row + 1, gradient_scale * kl)
        tl.store(coefficients_ptr + 2 * row, gradient_scale * slope * weight)
    else:
        tl.store(coefficients_ptr + row, gradient_scale * slope * weight)
    tl.store(loss_ptr + row, loss)
    tl.store(log_ratio_ptr + row, log_ratio)
    tl.store(clipped_ptr + row, clipped)


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
    rows = model_output.shape[0]
    numel = model_output[0].numel()
    (block, num_warps), splits = launch(numel)
    has_ref = ref_model_output is not None
    new, old, noise = (t.contiguous() for t in (model_output, old_model_output, noise))
    table, step = table.contiguous(), step.contiguous()
    direction = torch.empty_like(new)
    partials = table.new_empty((rows, splits, SUMS.value))
    loss, log_ratio = table.new_empty(rows), table.new_empty(rows)
    clipped = table.new_empty(rows, dtype=torch.bool)
    coefficients = table.new_empty((rows, 2 if has_ref else 1))
    _policy_loss_fwd_kernel[(rows * splits,)](
        new,
        old,
        noise,
        ref_model_output.contiguous() if has_ref else None,
        table,
        step,
        direction,
        partials,
        numel,
        SPLITS=splits,
        BLOCK=block,
        num_warps=num_warps,
    )
    scale = 1 / numel if reduction == "mean" else 1.0
    _policy_loss_rows_kernel[(rows,)](
        partials,
        table,
        step,
        advantages.contiguous(),
        loss,
        log_ratio,
        clipped,
        coefficients,
        scale,
        scale / rows,
        clip_range,
        math.log1p(clip_range),
        math.log1p(-clip_range) if clip_range < 1 else -math.inf,
        kl_weight,
        SPLITS=splits,
        SPLITS_BLOCK=triton.next_power_of_2(splits),
        OBJECTIVE=objective,
        HAS_REF=has_ref,
        num_warps=REDUCE_WARPS,
    )
    return loss.mean(), log_ratio, clipped, direction, coefficients
