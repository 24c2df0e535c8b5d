"""Clipped policy-gradient losses and their gradient, in one launch and one pass.

With e = m_new - m_old, a row needs the sum <e, z + w e/2> (and <m_new - m_ref, m_new - m_ref> for KL): its log-ratio is
-k w times that, with k the table's `log_prob_scale`, and its gradient a per-row coefficient times the direction
z + w e. The direction does not need the sum, so each program reads its part of the row once, writes the direction and
leaves its partial sums: a row that is split over programs needs no second read. The row's last program adds the partial
sums in a fixed order and turns them into the row's scalars (`_objective`, the only place where the objectives differ);
the last row's takes the mean.

z is read, or drawn again from its Philox key, or made from the stored states. m_new is read, or combined from the
conditional and the unconditional output.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .affine import (
    INTERVAL,
    LOG_PROB_SCALE,
    NATIVE_WEIGHT,
    OUTPUT_COEF,
    SAMPLE_COEF,
    STD,
    WEIGHT,
    affine_mean,
    coefficient,
    guided_output,
    inverse,
    load,
    split_of_row,
)
from .launch import contiguous, is_last, launch, tickets
from .philox import normal_block

SUMS = tl.constexpr(2)
ROWS_BLOCK = tl.constexpr(128)
# what a number that overflows is taken for
LARGEST = tl.constexpr(3.0e38)


@triton.jit
def _objective(log_ratio, advantage, clip_range, highest, lowest, OBJECTIVE: tl.constexpr):
    """A row's loss, its derivative by -log rho, and whether it is clipped."""
    # what overflows times an advantage of 0 is 0; NaN stays NaN
    if OBJECTIVE == "pcpo":
        log_ratio = tl.where(log_ratio > LARGEST, LARGEST, tl.where(log_ratio < -LARGEST, -LARGEST, log_ratio))
        sign = tl.where(advantage > 0, 1.0, tl.where(advantage < 0, -1.0, 0.0))
        clipped = sign * log_ratio >= clip_range
        loss = tl.where(clipped, 0.0, clip_range * tl.abs(advantage) - advantage * log_ratio)
        slope = advantage
    else:
        tl.static_assert(OBJECTIVE == "ppo" or OBJECTIVE == "guard")
        above = (advantage > 0) & (log_ratio > highest)
        below = (advantage < 0) & (log_ratio < lowest)
        clipped = above | below
        ratio = tl.exp(tl.where(above, highest, tl.where(below, lowest, log_ratio)))
        slope = advantage * tl.where(ratio > LARGEST, LARGEST, ratio)
        loss = -slope
    return loss, tl.where(clipped, 0.0, slope), clipped


@triton.jit
def _finish_batch(row_loss_ptr, loss_ptr, rows):
    """Writes the mean of the rows' losses."""
    total = 0.0
    for first in range(0, rows, ROWS_BLOCK):
        row = first + tl.arange(0, ROWS_BLOCK)  # [ROWS_BLOCK]
        total += tl.sum(tl.load(row_loss_ptr + row, row < rows, other=0.0, cache_modifier=".cg"))
    tl.store(loss_ptr, total / rows)


@triton.jit
def _finish_row(
    partial_ptr,
    table_ptr,
    step,
    row,
    advantage_ptr,
    ticket_ptr,
    row_loss_ptr,
    loss_ptr,
    log_ratio_ptr,
    clipped_ptr,
    coefficients_ptr,
    scale,
    clip_range,
    highest,
    lowest,
    kl_weight,
    rows,
    HAS_REF: tl.constexpr,
    OBJECTIVE: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
):
    """Adds a row's partial sums and writes its loss, log-ratio, clipped and coefficients; the last row's, the mean."""
    split = tl.arange(0, SPLITS_BLOCK)  # [SPLITS_BLOCK]
    partial_ptr += (row * SPLITS + split) * SUMS
    present = split < SPLITS
    weight = coefficient(table_ptr, step, WEIGHT)
    row_scale = 1.0
    if OBJECTIVE == "guard":
        weight *= coefficient(table_ptr, step, STD)
        row_scale = tl.div_rn(1.0, coefficient(table_ptr, step, INTERVAL))
    ratio_scale = scale * coefficient(table_ptr, step, LOG_PROB_SCALE)
    log_ratio = -ratio_scale * weight * tl.sum(tl.load(partial_ptr, present, other=0.0, cache_modifier=".cg"))
    tl.store(log_ratio_ptr + row, log_ratio)
    if OBJECTIVE == "log_ratio":
        tl.store(coefficients_ptr + row, -ratio_scale * weight)
    else:
        advantage = tl.load(advantage_ptr + row).to(tl.float32)
        loss, slope, clipped = _objective(log_ratio, advantage, clip_range, highest, lowest, OBJECTIVE)
        loss *= row_scale
        coefficients_ptr += row * (2 if HAS_REF else 1)
        tl.store(coefficients_ptr, ratio_scale / rows * row_scale * slope * weight)
        if HAS_REF:
            away = tl.sum(tl.load(partial_ptr + 1, present, other=0.0, cache_modifier=".cg"))
            native_weight = coefficient(table_ptr, step, NATIVE_WEIGHT)
            kl = kl_weight * native_weight * native_weight
            loss += 0.5 * scale * kl * away
            tl.store(coefficients_ptr + 1, scale / rows * kl)
        tl.store(row_loss_ptr + row, loss)
        tl.store(clipped_ptr + row, clipped)
        if is_last(ticket_ptr + rows, rows):
            _finish_batch(row_loss_ptr, loss_ptr, rows)


@triton.jit(do_not_specialize=["step_stride", "num_steps", "rows"])
def _policy_loss_fwd_kernel(
    new_ptr,
    uncond_ptr,
    old_ptr,
    noise_ptr,
    seed_ptr,
    sample_index_ptr,
    sample_ptr,
    prev_sample_ptr,
    ref_ptr,
    table_ptr,
    step_ptr,
    advantage_ptr,
    direction_ptr,
    partial_ptr,
    ticket_ptr,
    loss_ptr,
    log_ratio_ptr,
    clipped_ptr,
    coefficients_ptr,
    guidance_scale,
    scale,
    clip_range,
    highest,
    lowest,
    kl_weight,
    step_stride,
    num_steps,
    rows,
    numel,
    OBJECTIVE: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program writes the direction of one split of one row; the last one of a row, and of all, also the scalars."""
    row, offset, start, column, mask = split_of_row(numel, SPLITS, BLOCK)
    step = tl.load(step_ptr + row * step_stride)
    weight = coefficient(table_ptr, step, WEIGHT)

    new = load(new_ptr + offset, column, mask)  # [BLOCK]
    if uncond_ptr is not None:
        uncond = load(uncond_ptr + offset, column, mask)  # [BLOCK]
        new = guided_output(new, uncond, guidance_scale, new_ptr.dtype.element_ty).to(tl.float32)
    old = load(old_ptr + offset, column, mask)  # [BLOCK]
    if noise_ptr is not None:
        noise = load(noise_ptr + offset, column, mask)  # [BLOCK]
    elif seed_ptr is not None:
        noise = normal_block(seed_ptr, tl.load(sample_index_ptr + row), step, num_steps, numel, start, BLOCK)
    else:
        a, b = coefficient(table_ptr, step, SAMPLE_COEF), coefficient(table_ptr, step, OUTPUT_COEF)
        mean = affine_mean(load(sample_ptr + offset, column, mask), old, a, b)  # [BLOCK]
        noise = load(prev_sample_ptr + offset, column, mask) - mean
        noise *= inverse(coefficient(table_ptr, step, STD))
    e = new - old
    if OBJECTIVE == "guard":
        # log rho = -s w <e, z>
        middle, direction = noise, noise
    else:
        middle, direction = tl.fma(0.5 * weight, e, noise), tl.fma(weight, e, noise)
    if direction_ptr is not None:
        tl.store(direction_ptr + offset + column, direction.to(direction_ptr.dtype.element_ty), mask)

    # the rows' losses lie behind the partial sums
    row_loss_ptr = partial_ptr + rows.to(tl.int64) * (SPLITS * SUMS)
    partial = partial_ptr + tl.program_id(0).to(tl.int64) * SUMS
    tl.store(partial, tl.sum(e * middle))
    if ref_ptr is not None:
        away = new - load(ref_ptr + offset, column, mask)  # [BLOCK]
        tl.store(partial + 1, tl.sum(away * away))

    if is_last(ticket_ptr + row, SPLITS):
        _finish_row(
            partial_ptr,
            table_ptr,
            step,
            row,
            advantage_ptr,
            ticket_ptr,
            row_loss_ptr,
            loss_ptr,
            log_ratio_ptr,
            clipped_ptr,
            coefficients_ptr,
            scale,
            clip_range,
            highest,
            lowest,
            kl_weight,
            rows,
            ref_ptr is not None,
            OBJECTIVE,
            SPLITS,
            SPLITS_BLOCK,
        )


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
    advantages: Tensor | None,
    ref_model_output: Tensor | None,
    objective: str,
    clip_range: float,
    reduction: str,
    kl_weight: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss; each row's log-ratio and clipped; the direction z + w e (empty without gradient); the gradient's
    coefficients, (rows, 1): of the direction, or (rows, 2): of the direction and of m_new - m_ref."""
    rows = model_output.shape[0]
    numel = model_output[0].numel()
    settings, splits = launch(numel)
    new, old, table = model_output.contiguous(), old_model_output.contiguous(), table.contiguous()
    direction = new.new_empty(new.shape if with_gradient else 0)
    loss, log_ratio = table.new_empty(()), table.new_empty(rows)
    scratch = table.new_empty(rows * (splits * SUMS.value + 1))
    clipped = table.new_empty(rows, dtype=torch.bool)
    coefficients = table.new_empty((rows, 1 if ref_model_output is None else 2))
    _policy_loss_fwd_kernel[(rows * splits,)](
        new,
        contiguous(uncond_output),
        old,
        contiguous(noise),
        seed,
        contiguous(sample_index),
        contiguous(sample),
        contiguous(prev_sample),
        contiguous(ref_model_output),
        table,
        step,
        contiguous(advantages),
        direction if with_gradient else None,
        scratch,
        tickets(rows + 1, new.device),
        loss,
        log_ratio,
        clipped,
        coefficients,
        guidance_scale,
        1 / numel if reduction == "mean" else 1.0,
        clip_range,
        math.log1p(clip_range),
        math.log1p(-clip_range) if clip_range < 1 else -math.inf,
        kl_weight,
        step.stride(0),
        table.shape[0],
        rows,
        numel,
        OBJECTIVE=objective,
        **settings,
    )
    return loss, log_ratio, clipped, direction, coefficients


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
    _, log_ratio, _, direction, coefficients = policy_loss(
        *(model_output, None, 1.0, old_model_output, noise, seed, sample_index, sample, prev_sample, table, step),
        *(None, None, "log_ratio", 1.0, reduction, 0.0, with_gradient),
    )
    return log_ratio, direction, coefficients
