"""The affine Gaussian step x' = a x + b m + s z as the kernels see it: its table, its mean and its whitening.

The multiply-adds are written out, because a compiler that contracts them differently in two kernels would give two
values for the log-probability of one step.
"""

import triton
import triton.language as tl

from pcpo_fast.columns import COLUMNS

SAMPLE_COEF = tl.constexpr(COLUMNS.index("sample_coef"))
OUTPUT_COEF = tl.constexpr(COLUMNS.index("output_coef"))
STD = tl.constexpr(COLUMNS.index("std"))
SLOPE = tl.constexpr(COLUMNS.index("slope"))
CURVATURE = tl.constexpr(COLUMNS.index("curvature"))
LOSS_SCALE = tl.constexpr(COLUMNS.index("loss_scale"))
LOG_PROB_SCALE = tl.constexpr(COLUMNS.index("log_prob_scale"))
LOG_PROB_OFFSET = tl.constexpr(COLUMNS.index("log_prob_offset"))
WIDTH = tl.constexpr(len(COLUMNS))


@triton.jit
def split_of_row(numel, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's row, the offset of the row's first element, the first column of its split, all its columns, and
    which of them exist."""
    program = tl.program_id(0)
    # 64 bits before any address
    row = (program // SPLITS).to(tl.int64)
    start = program % SPLITS * BLOCK
    column = start + tl.arange(0, BLOCK)  # [BLOCK]
    return row, row * numel, start, column, column < numel


@triton.jit
def coefficient(table_ptr, step, num_steps, COLUMN: tl.constexpr):
    """One entry of the table's row for this step; NaN for a step that is not in the table."""
    return tl.load(table_ptr + step * WIDTH + COLUMN, (step >= 0) & (step < num_steps), other=float("nan"))


@triton.jit
def load(ptr, column, mask):
    """A part of a row in float32."""
    return tl.load(ptr + column, mask, other=0.0).to(tl.float32)


@triton.jit
def inverse(column):
    """1 / column, and 0 where it is 0: at the std of a deterministic step."""
    return tl.where(column == 0, 0.0, tl.div_rn(1.0, tl.where(column == 0, 1.0, column)))


@triton.jit
def guided_output(cond, uncond, guidance_scale, DTYPE: tl.constexpr):
    """u + g (c - u), rounded once to the model's dtype."""
    return tl.fma(guidance_scale, cond - uncond, uncond).to(DTYPE)


@triton.jit
def affine_mean(x, m, a, b):
    """a x + b m."""
    return tl.fma(a, x, b * m)


@triton.jit
def log_prob(squares_sum, table_ptr, step, num_steps, numel, scale):
    """log N(x'; a x + b m, s^2) from <z, z>, or what the table has in its place, times `scale`; 0 for a deterministic
    step."""
    half_k = 0.5 * coefficient(table_ptr, step, num_steps, LOG_PROB_SCALE)
    total = tl.fma(-half_k, squares_sum, numel * coefficient(table_ptr, step, num_steps, LOG_PROB_OFFSET))
    return tl.where(coefficient(table_ptr, step, num_steps, STD) == 0, 0.0, scale * total)
