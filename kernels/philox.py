"""Counter-based noise, Philox4x32-10: four consecutive elements of a row share one counter.

The counter is (sample_index T + step) ceil(numel/4) + element // 4 and the key is the seed, so an element's noise
depends on the seed, the sample's global index, the step and its place alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch


@triton.jit
def normal_block(seed_ptr, sample_index_ptr, step_ptr, row, num_steps, numel, start, BLOCK: tl.constexpr):
    """N(0, 1) for the BLOCK elements of a row from `start`, a multiple of 4."""
    sample_step = tl.load(sample_index_ptr + row) * num_steps + tl.load(step_ptr + row)
    quad = sample_step * tl.cdiv(numel, 4) + start // 4 + tl.arange(0, BLOCK // 4)  # [BLOCK // 4]
    n0, n1, n2, n3 = tl.randn4x(tl.load(seed_ptr), quad)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def _sample_noise_kernel(
    seed_ptr,
    sample_index_ptr,
    step_ptr,
    noise_ptr,
    num_steps,
    numel,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program writes the noise of one split of one row."""
    program = tl.program_id(0).to(tl.int64)
    row = program // SPLITS
    start = program % SPLITS * BLOCK
    column = start + tl.arange(0, BLOCK)  # [BLOCK]
    noise = normal_block(seed_ptr, sample_index_ptr, step_ptr, row, num_steps, numel, start, BLOCK)
    tl.store(noise_ptr + row * numel + column, noise, column < numel)


def sample_noise(seed: Tensor, sample_index: Tensor, step: Tensor, num_steps: int, numel: int) -> Tensor:
    """The noise of every row, (rows, numel) float32."""
    rows = step.shape[0]
    (block, num_warps), splits = launch(numel)
    noise = torch.empty((rows, numel), dtype=torch.float32, device=step.device)
    _sample_noise_kernel[(rows * splits,)](
        seed,
        sample_index.contiguous(),
        step.contiguous(),
        noise,
        num_steps,
        numel,
        SPLITS=splits,
        BLOCK=block,
        num_warps=num_warps,
    )
    return noise
