"""Counter-based noise: Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011).

Four consecutive elements of a row share one counter, (sample_index T + step) ceil(numel/4) + element // 4, so an
element's noise depends on the seed, the sample's global index, the step and its place alone: not on the batch, the rank
or the chunking. The 64-bit seed is the key, the 64-bit counter the two low words of Philox's counter.

Words become normals as Triton's `tl.randn4x` makes them: signed words are folded to integers in [0, 2^31), the first of
a pair becomes a uniform number of at least 1e-7, the second an angle of so many 2^-31 turns, and Box-Muller makes two
normals of them; here in float64, rounded once.
"""

import math

import torch
from torch import Tensor

from .affine import check_steps

ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_INCREMENTS = 0x9E3779B9, 0xBB67AE85
WORD = 0xFFFFFFFF
# the largest float32 whose product with 2^31 - 1 stays below 1
UNIFORM_SCALE = 4.6566127342e-10
SMALLEST_UNIFORM = 1e-7


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Four words from a counter of four words and a key of two, all unsigned 32-bit numbers held in int64."""
    c0, c1, c2, c3 = counter
    rounds = torch.arange(ROUNDS, device=c0.device)
    round_keys = [((k + rounds * increment) & WORD).unbind() for k, increment in zip(key, KEY_INCREMENTS, strict=True)]
    for k0, k1 in zip(*round_keys, strict=True):
        # the product may wrap around int64; its 64 bits are right all the same
        product0, product2 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = (product2 >> 32).bitwise_and_(WORD).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = (product0 >> 32).bitwise_and_(WORD).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = product2.bitwise_and_(WORD), product0.bitwise_and_(WORD)
    return c0, c1, c2, c3


def fold(words: Tensor) -> Tensor:
    """Unsigned 32-bit words to integers in [0, 2^31)."""
    return torch.minimum(words, WORD - words)


def normal_pair(word0: Tensor, word1: Tensor) -> tuple[Tensor, Tensor]:
    """Two float32 normals from two words (Box-Muller)."""
    uniform = fold(word0).float().mul_(UNIFORM_SCALE).clamp_(min=SMALLEST_UNIFORM)
    radius = uniform.double().log_().mul_(-2).sqrt_()
    angle = fold(word1).double().mul_(2 * math.pi / 2**31)
    return (radius * angle.cos()).float(), radius.mul_(angle.sin_()).float()


def first_counters(sample_index: Tensor, step: Tensor, num_steps: int, numel: int) -> Tensor:
    """The counter of each row's first element, (rows, 1)."""
    # 64 bits: indices of int32 would wrap around, and repeat noise
    return (sample_index.long() * num_steps + step).mul_(-(-numel // 4))[:, None]


def noise_tile(seed: Tensor, first_counter: Tensor, columns: slice) -> Tensor:
    """float32 N(0, 1) for some columns, the first a multiple of 4, of the rows with these first counters."""
    offset = first_counter + torch.arange(columns.start // 4, -(-columns.stop // 4), device=seed.device)
    zero = torch.zeros_like(offset)
    w0, w1, w2, w3 = philox4x32((offset & WORD, (offset >> 32) & WORD, zero, zero), (seed & WORD, (seed >> 32) & WORD))
    lanes = (*normal_pair(w0, w1), *normal_pair(w2, w3))
    return torch.stack(lanes, dim=2).flatten(1)[:, : columns.stop - columns.start]


def sample_noise(seed: Tensor, sample_index: Tensor, step: Tensor, num_steps: int, numel: int) -> Tensor:
    """The noise of every row, (rows, numel) float32."""
    check_steps(step, num_steps)
    first_counter = first_counters(sample_index, step, num_steps, numel)
    return noise_tile(seed, first_counter, slice(0, numel)).contiguous()
