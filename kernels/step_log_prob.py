"""The log-probability of a sampler step whose states were kept, and its gradient, in one launch and one pass.

With z = (x' - a x - b m)/s the log-probability needs the row's <z, z>, and its gradient is k b/s times the direction z,
with k the table's `log_prob_scale`.
Each program reads its part of the row once, writes the direction and leaves a partial sum; the row's last program adds
the partial sums in a fixed order and writes its log-probability and coefficient.
"""

import triton
import triton.language as tl
from torch import Tensor

from .affine import (
    LOG_PROB_SCALE,
    OUTPUT_COEF,
    SAMPLE_COEF,
    STD,
    affine_mean,
    coefficient,
    inverse,
    load,
    log_prob,
    split_of_row,
)
from .launch import is_last, launch, tickets


@triton.jit(do_not_specialize=["step_stride", "num_steps"])
def step_log_prob_fwd_kernel(
    model_output_ptr,
    sample_ptr,
    prev_sample_ptr,
    table_ptr,
    step_ptr,
    direction_ptr,
    partial_ptr,
    ticket_ptr,
    log_prob_ptr,
    coefficient_ptr,
    scale,
    step_stride,
    num_steps,
    numel,
    SPLITS: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program writes the direction of one split of one row; the last one of a row also its scalars."""
    row, offset, _, column, mask = split_of_row(numel, SPLITS, BLOCK)
    step = tl.load(step_ptr + row * step_stride)
    a = coefficient(table_ptr, step, num_steps, SAMPLE_COEF)
    b = coefficient(table_ptr, step, num_steps, OUTPUT_COEF)
    inverse_std = inverse(coefficient(table_ptr, step, num_steps, STD))

    m = load(model_output_ptr + offset, column, mask)  # [BLOCK]
    x = load(sample_ptr + offset, column, mask)  # [BLOCK]
    z = (load(prev_sample_ptr + offset, column, mask) - affine_mean(x, m, a, b)) * inverse_std  # [BLOCK]
    if direction_ptr is not None:
        tl.store(direction_ptr + offset + column, z.to(direction_ptr.dtype.element_ty), mask)
    store_log_prob(
        z, partial_ptr, ticket_ptr, log_prob_ptr, table_ptr, step, num_steps, row, numel, scale, SPLITS, SPLITS_BLOCK
    )
    if tl.program_id(0) % SPLITS == 0:
        k = coefficient(table_ptr, step, num_steps, LOG_PROB_SCALE)
        tl.store(coefficient_ptr + row, scale * k * b * inverse_std)


@triton.jit
def store_log_prob(
    z,
    partial_ptr,
    ticket_ptr,
    log_prob_ptr,
    table_ptr,
    step,
    num_steps,
    row,
    numel,
    scale,
    SPLITS: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
):
    """Leaves this split's <z, z>; the row's last program writes the log-probability, times `scale`."""
    tl.store(partial_ptr + tl.program_id(0), tl.sum(z * z))
    if is_last(ticket_ptr + row, SPLITS):
        split = tl.arange(0, SPLITS_BLOCK)  # [SPLITS_BLOCK]
        partials = tl.load(partial_ptr + row * SPLITS + split, split < SPLITS, other=0.0, cache_modifier=".cg")
        tl.store(log_prob_ptr + row, log_prob(tl.sum(partials), table_ptr, step, num_steps, numel, scale))


def step_log_prob(
    model_output: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    table: Tensor,
    step: Tensor,
    reduction: str,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(rows,) log-probabilities, the direction z of the gradient (empty without), and its coefficient (rows, 1)."""
    rows = model_output.shape[0]
    numel = model_output[0].numel()
    settings, splits = launch(numel)
    model_output, table = model_output.contiguous(), table.contiguous()
    direction = model_output.new_empty(model_output.shape if with_gradient else 0)
    partials, log_probs, coefficients = (table.new_empty(shape) for shape in (rows * splits, rows, (rows, 1)))
    step_log_prob_fwd_kernel[(rows * splits,)](
        model_output,
        sample.contiguous(),
        prev_sample.contiguous(),
        table,
        step,
        direction if with_gradient else None,
        partials,
        tickets(rows, direction.device),
        log_probs,
        coefficients,
        1 / numel if reduction == "mean" else 1.0,
        step.stride(0),
        table.shape[0],
        numel,
        **settings,
    )
    return log_probs, direction, coefficients
