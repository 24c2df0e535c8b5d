"""The log-probability of a sampler step whose states were kept, and its gradient.

With z = (x' - a x - b m)/s the log-probability needs the row's <z, z>, and its gradient is b/s times the direction z.
Each program reads its part of the row once, writes the direction and leaves a partial sum; a second kernel adds a row's
partial sums in a fixed order and writes its log-probability and coefficient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .affine import OUTPUT_COEF, SAMPLE_COEF, STD, affine_mean, coefficient, inverse, log_prob
from .launch import REDUCE_WARPS, launch


@triton.jit
def _step_log_prob_fwd_kernel(
    model_output_ptr,
    sample_ptr,
    prev_sample_ptr,
    table_ptr,
    step_ptr,
    direction_ptr,
    partial_ptr,
    numel,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program writes the direction of one split of one row, and the split's <z, z>."""
    program = tl.program_id(0).to(tl.int64)
    row = program // SPLITS
    column = program % SPLITS * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = column < numel
    offset = row * numel + column
    a = coefficient(table_ptr, step_ptr, row, SAMPLE_COEF)
    b = coefficient(table_ptr, step_ptr, row, OUTPUT_COEF)
    std = coefficient(table_ptr, step_ptr, row, STD)

    m = tl.load(model_output_ptr + offset, mask, other=0.0).to(tl.float32)  # [BLOCK]
    x = tl.load(sample_ptr + offset, mask, other=0.0).to(tl.float32)  # [BLOCK]
    prev_x = tl.load(prev_sample_ptr + offset, mask, other=0.0).to(tl.float32)  # [BLOCK]
    z = (prev_x - affine_mean(x, m, a, b)) * inverse(std)
    tl.store(direction_ptr + offset, z.to(direction_ptr.dtype.element_ty), mask)
    tl.store(partial_ptr + program, tl.sum(z * z))


@triton.jit
def log_prob_rows_kernel(
    partial_ptr,
    table_ptr,
    step_ptr,
    log_prob_ptr,
    coefficient_ptr,
    numel,
    scale,
    SPLITS: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
):
    """One program adds one row's partial sums and writes its log-probability and, if asked, gradient coefficient."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS_BLOCK)  # [SPLITS_BLOCK]
    squares = tl.sum(tl.load(partial_ptr + row * SPLITS + split, split < SPLITS, other=0.0))
    std = coefficient(table_ptr, step_ptr, row, STD)
    tl.store(log_prob_ptr + row, log_prob(squares, std, numel, scale))
    if coefficient_ptr is not None:
        b = coefficient(table_ptr, step_ptr, row, OUTPUT_COEF)
        tl.store(coefficient_ptr + row, scale * b * inverse(std))


def step_log_prob(
    model_output: Tensor, sample: Tensor, prev_sample: Tensor, table: Tensor, step: Tensor, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(rows,) log-probabilities, the direction z of the gradient, and its coefficient (rows,)."""
    rows = model_output.shape[0]
    numel = model_output[0].numel()
    (block, num_warps), splits = launch(numel)
    model_output, sample, prev_sample = (t.contiguous() for t in (model_output, sample, prev_sample))
    table, step = table.contiguous(), step.contiguous()
    direction = torch.empty_like(model_output)
    partials = table.new_empty((rows, splits))
    log_probs, coefficients = table.new_empty(rows), table.new_empty(rows)
    _step_log_prob_fwd_kernel[(rows * splits,)](
        model_output,
        sample,
        prev_sample,
        table,
        step,
        direction,
        partials,
        numel,
        SPLITS=splits,
        BLOCK=block,
        num_warps=num_warps,
    )
    log_prob_rows_kernel[(rows,)](
        partials,
        table,
        step,
        log_probs,
        coefficients,
        numel,
        1 / numel if reduction == "mean" else 1.0,
        SPLITS=splits,
        SPLITS_BLOCK=triton.next_power_of_2(splits),
        num_warps=REDUCE_WARPS,
    )
    return log_probs, direction, coefficients
