"""Counter-based noise, Philox4x32-10: four consecutive elements of a row share one counter.

The counter is (sample_index T + step) ceil(numel/4) + element // 4 and the key is the seed, so an element's noise
depends on the seed, the sample's global index, the step and its place alone.

The words are those of `tl.randint4x` and the normals, up to rounding, those of `tl.randn4x`. They are made here because
that takes fewer instructions and no local memory: the product of two words is one instruction; the quarter turn of the
angle is in the word's own bits, so that short polynomials do where the library's cosine takes any angle; and the
logarithm knows the range of its argument.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .affine import split_of_row
from .launch import launch

LN_2 = tl.constexpr(0.6931471805599453)
# an eighth of a turn is 2^28
TURN_SCALE = tl.constexpr(1.5707963267948966 / 2**29)


@triton.jit
def philox4x32(seed, counter):
    """Four random 32-bit words per counter."""
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    c2, c3 = c0 * 0, c0 * 0
    for _ in tl.static_range(10):
        product0, product2 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (product2 >> 32).to(tl.uint32) ^ c1 ^ k0, product2.to(tl.uint32)
        c2, c3 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1, product0.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def fold(word):
    """A random word to an integer in [0, 2^31), as `tl.rand` has it."""
    signed = word.to(tl.int32, bitcast=True)
    return signed ^ (signed >> 31)


@triton.jit
def log_of_uniform(u):
    """log u for u in [1e-7, 1], to a unit in the last place (the polynomial of Cephes' logf)."""
    bits = u.to(tl.int32, bitcast=True)
    # u = 2^exponent (1 + f) with 1 + f between sqrt(1/2) and sqrt(2)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = tl.fma(f, 7.0376836292e-2, -1.1514610310e-1)
    p = tl.fma(p, f, 1.1676998740e-1)
    p = tl.fma(p, f, -1.2420140846e-1)
    p = tl.fma(p, f, 1.4249322787e-1)
    p = tl.fma(p, f, -1.6668057665e-1)
    p = tl.fma(p, f, 2.0000714765e-1)
    p = tl.fma(p, f, -2.4999993993e-1)
    p = tl.fma(p, f, 3.3333331174e-1)
    square = f * f
    return tl.fma(exponent.to(tl.float32), LN_2, tl.fma(p, square * f, tl.fma(-0.5, square, f)))


@triton.jit
def cos_sin_turns(turns):
    """cos and sin of `turns` 2^-31 turns, for integers in [0, 2^31) (the polynomials of Cephes' sinf and cosf)."""
    quarter = (turns + (1 << 28)) >> 29
    angle = (turns - (quarter << 29)).to(tl.float32) * TURN_SCALE
    square = angle * angle
    sin = tl.fma(tl.fma(square, -1.9515295891e-4, 8.3321608736e-3), square, -1.6666654611e-1)
    sin = tl.fma(sin, square * angle, angle)
    cos = tl.fma(tl.fma(square, 2.443315711809948e-5, -1.388731625493765e-3), square, 4.166664568298827e-2)
    cos = tl.fma(cos, square * square, tl.fma(-0.5, square, 1.0))
    odd = (quarter & 1) != 0
    turned_cos, turned_sin = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    turned_cos = tl.where(((quarter + 1) & 2) != 0, -turned_cos, turned_cos)
    return turned_cos, tl.where((quarter & 2) != 0, -turned_sin, turned_sin)


@triton.jit
def normal_pair(word0, word1):
    """Two N(0, 1) from two random words (Box-Muller)."""
    u = tl.maximum(fold(word0).to(tl.float32) * 4.6566127342e-10, 1.0e-7)
    radius = tl.sqrt(-2.0 * log_of_uniform(u))
    cos, sin = cos_sin_turns(fold(word1))
    return radius * cos, radius * sin


@triton.jit
def normal_block(seed_ptr, sample_index, step, num_steps, numel, start, BLOCK: tl.constexpr):
    """N(0, 1) for the BLOCK elements of a row from `start`, a multiple of 4."""
    # 64 bits: indices of int32 would wrap around, and repeat noise
    first = (sample_index.to(tl.int64) * num_steps + step) * tl.cdiv(numel, 4) + start // 4
    w0, w1, w2, w3 = philox4x32(tl.load(seed_ptr), first + tl.arange(0, BLOCK // 4))  # [BLOCK // 4]
    n0, n1 = normal_pair(w0, w1)
    n2, n3 = normal_pair(w2, w3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit(do_not_specialize=["step_stride", "num_steps"])
def sample_noise_kernel(
    seed_ptr,
    sample_index_ptr,
    step_ptr,
    noise_ptr,
    step_stride,
    num_steps,
    numel,
    SPLITS: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program writes the noise of one split of one row."""
    row, offset, start, column, mask = split_of_row(numel, SPLITS, BLOCK)
    sample_index, step = tl.load(sample_index_ptr + row), tl.load(step_ptr + row * step_stride)
    noise = normal_block(seed_ptr, sample_index, step, num_steps, numel, start, BLOCK)
    noise = tl.where((step >= 0) & (step < num_steps), noise, float("nan"))
    tl.store(noise_ptr + offset + column, noise, mask)


def sample_noise(seed: Tensor, sample_index: Tensor, step: Tensor, num_steps: int, numel: int) -> Tensor:
    """The noise of every row, (rows, numel) float32."""
    rows = step.shape[0]
    settings, splits = launch(numel)
    noise = torch.empty((rows, numel), dtype=torch.float32, device=step.device)
    sample_noise_kernel[(rows * splits,)](
        seed, sample_index.contiguous(), step, noise, step.stride(0), num_steps, numel, **settings
    )
    return noise
