"""Clipped policy-gradient losses and their gradient, in one launch and one pass.

With e = m_new - m_old, a row needs the sums <e, z + curvature e/2> and <e, e>, and <m_new - m_ref, m_new - m_ref> for
KL. Its log-ratio is -slope times the first, and its gradient a per-row coefficient times the direction z + curvature e.
The direction does not need the sums, so each program reads its part of the row once, writes the direction and leaves
its partial sums: a row that is split over programs needs no second read. The row's last program adds the partial sums
in a fixed order and turns them into the row's scalars; there alone the objectives differ. The last row's adds the rows.

z is read, or drawn again from its Philox key, or made from the stored states; m_old is read, or made from the states
and z. m_new is read, or combined from the conditional and the unconditional output.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .affine import (
    CURVATURE,
    LOSS_SCALE,
    OUTPUT_COEF,
    SAMPLE_COEF,
    SLOPE,
    STD,
    affine_mean,
    coefficient,
    guided_output,
    inverse,
    load,
    split_of_row,
)
from .launch import contiguous, is_last, launch, tickets
from .philox import normal_block

# partial sums of a split: <e, z + curvature e/2>, <e, e>, <m_new - m_ref, m_new - m_ref>
SUMS = tl.constexpr(3)
ROWS_BLOCK = tl.constexpr(128)
# overflow is clamped to this
LARGEST = tl.constexpr(3.0e38)


@triton.jit
def pcpo(log_ratio, advantage, below, above, lowest, highest):
    """max(0, xi |A| - A log rho): loss, its derivative by -log rho, clipped."""
    # an overflow times an advantage of 0 is 0; NaN stays NaN
    log_ratio = tl.where(log_ratio > LARGEST, LARGEST, tl.where(log_ratio < -LARGEST, -LARGEST, log_ratio))
    clip_range = tl.where(advantage > 0, above, below)
    sign = tl.where(advantage > 0, 1.0, tl.where(advantage < 0, -1.0, 0.0))
    clipped = sign * log_ratio >= clip_range
    loss = tl.where(clipped, 0.0, clip_range * tl.abs(advantage) - advantage * log_ratio)
    return loss, tl.where(clipped, 0.0, advantage), clipped


@triton.jit
def ppo(log_ratio, advantage, below, above, lowest, highest):
    """max(-A rho, -A clip(rho, 1 - below, 1 + above)): loss, its derivative by -log rho, clipped."""
    too_high = (advantage > 0) & (log_ratio > highest)
    too_low = (advantage < 0) & (log_ratio < lowest)
    clipped = too_high | too_low
    ratio = tl.exp(tl.where(too_high, highest, tl.where(too_low, lowest, log_ratio)))
    # an overflow times an advantage of 0 is 0; NaN stays NaN
    surrogate = advantage * tl.where(ratio > LARGEST, LARGEST, ratio)
    return -surrogate, tl.where(clipped, 0.0, surrogate), clipped


# name -> function of log_ratio, advantage, the clip range below and above, and the bounds of log rho (log1p), to
# loss, derivative by -log_ratio and clipped
OBJECTIVES = {"pcpo": pcpo, "ppo": ppo}


@triton.jit
def _finish_batch(row_loss_ptr, loss_ptr, rows, loss_divisor):
    """Writes the sum of the rows' losses, divided by `loss_divisor`."""
    total = 0.0
    for first in range(0, rows, ROWS_BLOCK):
        row = first + tl.arange(0, ROWS_BLOCK)  # [ROWS_BLOCK]
        total += tl.sum(tl.load(row_loss_ptr + row, row < rows, other=0.0, cache_modifier=".cg"))
    tl.store(loss_ptr, tl.div_rn(total, loss_divisor))


@triton.jit
def _finish_row(
    partial_ptr,
    table_ptr,
    step,
    row,
    advantage_ptr,
    row_weight_ptr,
    kl_weight_ptr,
    ticket_ptr,
    row_loss_ptr,
    loss_ptr,
    log_ratio_ptr,
    clipped_ptr,
    kl_ptr,
    old_kl_ptr,
    coefficients_ptr,
    scale,
    below,
    above,
    lowest,
    highest,
    kl_weight,
    loss_divisor,
    num_steps,
    rows,
    OBJECTIVE: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
):
    """Adds a row's partial sums and writes its scalars; the last row's program also writes the batch's loss."""
    split = tl.arange(0, SPLITS_BLOCK)  # [SPLITS_BLOCK]
    partial_ptr += (row * SPLITS + split) * SUMS
    present = split < SPLITS
    slope = scale * coefficient(table_ptr, step, num_steps, SLOPE)
    log_ratio = -slope * tl.sum(tl.load(partial_ptr, present, other=0.0, cache_modifier=".cg"))
    tl.store(log_ratio_ptr + row, log_ratio)
    if OBJECTIVE is None:
        tl.store(coefficients_ptr + row, -slope)
    else:
        b = coefficient(table_ptr, step, num_steps, OUTPUT_COEF)
        native_weight = b * inverse(coefficient(table_ptr, step, num_steps, STD))
        divergence = 0.5 * scale * native_weight * native_weight
        squares = tl.sum(tl.load(partial_ptr + 1, present, other=0.0, cache_modifier=".cg"))
        tl.store(old_kl_ptr + row, divergence * squares)

        advantage = tl.load(advantage_ptr + row).to(tl.float32)
        loss, derivative, clipped = OBJECTIVE(log_ratio, advantage, below, above, lowest, highest)
        loss_scale = coefficient(table_ptr, step, num_steps, LOSS_SCALE)
        loss *= loss_scale
        row_weight = 1.0 if row_weight_ptr is None else tl.load(row_weight_ptr + row).to(tl.float32)
        share = tl.div_rn(row_weight, loss_divisor)
        coefficients_ptr += row * (1 if kl_ptr is None else 2)
        tl.store(coefficients_ptr, share * loss_scale * derivative * slope)
        if kl_ptr is not None:
            if kl_weight_ptr is not None:
                kl_weight = tl.load(kl_weight_ptr + row).to(tl.float32)
            kl = divergence * tl.sum(tl.load(partial_ptr + 2, present, other=0.0, cache_modifier=".cg"))
            tl.store(kl_ptr + row, kl)
            loss += kl_weight * kl
            tl.store(coefficients_ptr + 1, share * kl_weight * 2.0 * divergence)
        tl.store(row_loss_ptr + row, row_weight * loss)
        tl.store(clipped_ptr + row, clipped)
        # nested: the first is known when the kernel is compiled
        if loss_ptr is not None:  # noqa: SIM102
            if is_last(ticket_ptr + rows, rows):
                _finish_batch(row_loss_ptr, loss_ptr, rows, loss_divisor)


@triton.jit(do_not_specialize=["step_stride", "num_steps", "rows"])
def policy_loss_fwd_kernel(
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
    row_weight_ptr,
    kl_weight_ptr,
    direction_ptr,
    partial_ptr,
    ticket_ptr,
    row_loss_ptr,
    loss_ptr,
    log_ratio_ptr,
    clipped_ptr,
    kl_ptr,
    old_kl_ptr,
    coefficients_ptr,
    guidance_scale,
    scale,
    below,
    above,
    lowest,
    highest,
    kl_weight,
    loss_divisor,
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
    curvature = coefficient(table_ptr, step, num_steps, CURVATURE)

    new = load(new_ptr + offset, column, mask)  # [BLOCK]
    if uncond_ptr is not None:
        uncond = load(uncond_ptr + offset, column, mask)  # [BLOCK]
        new = guided_output(new, uncond, guidance_scale, new_ptr.dtype.element_ty).to(tl.float32)
    if noise_ptr is not None:
        noise = load(noise_ptr + offset, column, mask)  # [BLOCK]
    elif seed_ptr is not None:
        noise = normal_block(seed_ptr, tl.load(sample_index_ptr + row), step, num_steps, numel, start, BLOCK)
    if sample_ptr is not None:
        x = load(sample_ptr + offset, column, mask)  # [BLOCK]
        prev_x = load(prev_sample_ptr + offset, column, mask)  # [BLOCK]
        a = coefficient(table_ptr, step, num_steps, SAMPLE_COEF)
        b = coefficient(table_ptr, step, num_steps, OUTPUT_COEF)
        std = coefficient(table_ptr, step, num_steps, STD)
        if old_ptr is not None:
            inverse_std = inverse(std)
    if old_ptr is None:
        # x' = a x + b m_old + s z, solved for m_old
        old = tl.where(mask, (prev_x - affine_mean(x, noise, a, std)) * inverse(b), 0.0)
    else:
        old = load(old_ptr + offset, column, mask)  # [BLOCK]
        if sample_ptr is not None:
            noise = (prev_x - affine_mean(x, old, a, b)) * inverse_std
    e = new - old
    if direction_ptr is not None:
        direction = tl.fma(curvature, e, noise)
        tl.store(direction_ptr + offset + column, direction.to(direction_ptr.dtype.element_ty), mask)

    partial = partial_ptr + tl.program_id(0).to(tl.int64) * SUMS
    tl.store(partial, tl.sum(e * tl.fma(0.5 * curvature, e, noise)))
    if OBJECTIVE is not None:
        tl.store(partial + 1, tl.sum(e * e))
    if ref_ptr is not None:
        away = new - load(ref_ptr + offset, column, mask)  # [BLOCK]
        tl.store(partial + 2, tl.sum(away * away))

    if is_last(ticket_ptr + row, SPLITS):
        _finish_row(
            partial_ptr,
            table_ptr,
            step,
            row,
            advantage_ptr,
            row_weight_ptr,
            kl_weight_ptr,
            ticket_ptr,
            row_loss_ptr,
            loss_ptr,
            log_ratio_ptr,
            clipped_ptr,
            kl_ptr,
            old_kl_ptr,
            coefficients_ptr,
            scale,
            below,
            above,
            lowest,
            highest,
            kl_weight,
            loss_divisor,
            num_steps,
            rows,
            OBJECTIVE,
            SPLITS,
            SPLITS_BLOCK,
        )


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
    advantages: Tensor | None,
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
    rows, numel = model_output.shape[0], model_output[0].numel()
    with_ref = ref_model_output is not None
    settings, splits = launch(numel)
    new, table = model_output.contiguous(), table.contiguous()
    direction = new.new_empty(new.shape if with_gradient else 0)
    partials = table.new_empty(rows * splits * SUMS.value)
    row_losses, log_ratio, old_kl = (table.new_empty(rows) for _ in range(3))
    loss = row_losses if row_reduction == "none" else table.new_empty(())
    clipped = table.new_empty(rows, dtype=torch.bool)
    kl = table.new_empty(rows if with_ref else 0)
    coefficients = table.new_empty((rows, 2 if with_ref else 1))
    policy_loss_fwd_kernel[(rows * splits,)](
        new,
        contiguous(uncond_output),
        contiguous(old_model_output),
        contiguous(noise),
        seed,
        contiguous(sample_index),
        contiguous(sample),
        contiguous(prev_sample),
        contiguous(ref_model_output),
        table,
        step,
        contiguous(advantages),
        contiguous(row_weights),
        contiguous(kl_weights),
        direction if with_gradient else None,
        partials,
        tickets(rows + 1, new.device),
        row_losses,
        None if row_reduction == "none" else loss,
        log_ratio,
        clipped,
        kl if with_ref else None,
        old_kl,
        coefficients,
        guidance_scale,
        1 / numel if reduction == "mean" else 1.0,
        clip_below,
        clip_above,
        math.log1p(-clip_below) if clip_below < 1 else -math.inf,
        math.log1p(clip_above),
        kl_weight,
        float(rows) if row_reduction == "mean" else 1.0,
        step.stride(0),
        table.shape[0],
        rows,
        numel,
        OBJECTIVE=None if objective == "log_ratio" else OBJECTIVES[objective],
        **settings,
    )
    return loss, log_ratio, clipped, kl, old_kl, direction, coefficients


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
    _, log_ratio, _, _, _, direction, coefficients = policy_loss(
        *(model_output, None, 1.0, old_model_output, noise, seed, sample_index, sample, prev_sample, table, step),
        *(None, None, None, 0.0, None, "log_ratio", 1.0, 1.0, reduction, "none", with_gradient),
    )
    return log_ratio, direction, coefficients
