"""One stochastic step of a sampler: guidance, x' = a x + b m + s z, and the log-probability of what is stored.

The guided output u + g (c - u) is rounded once to the model's dtype and x' once to the sample's; from there on only the
rounded values count. The noise handed back, z = (x' - a x - b m)/s, and the log-probability belong to the stored x'.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .affine import OUTPUT_COEF, SAMPLE_COEF, STD, affine_mean, coefficient, inverse
from .launch import REDUCE_WARPS, launch
from .philox import normal_block
from .step_log_prob import log_prob_rows_kernel


@triton.jit
def _sampler_step_kernel(
    model_output_ptr,
    uncond_ptr,
    sample_ptr,
    noise_ptr,
    seed_ptr,
    sample_index_ptr,
    table_ptr,
    step_ptr,
    prev_sample_ptr,
    guided_ptr,
    stored_noise_ptr,
    partial_ptr,
    guidance_scale,
    num_steps,
    numel,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program takes the step for one split of one row, and leaves the split's <z, z>."""
    program = tl.program_id(0).to(tl.int64)
    row = program // SPLITS
    start = program % SPLITS * BLOCK
    column = start + tl.arange(0, BLOCK)  # [BLOCK]
    mask = column < numel
    offset = row * numel + column
    a = coefficient(table_ptr, step_ptr, row, SAMPLE_COEF)
    b = coefficient(table_ptr, step_ptr, row, OUTPUT_COEF)
    std = coefficient(table_ptr, step_ptr, row, STD)

    m = tl.load(model_output_ptr + offset, mask, other=0.0).to(tl.float32)  # [BLOCK]
    if uncond_ptr is not None:
        uncond = tl.load(uncond_ptr + offset, mask, other=0.0).to(tl.float32)  # [BLOCK]
        guided = tl.fma(guidance_scale, m - uncond, uncond).to(guided_ptr.dtype.element_ty)
        tl.store(guided_ptr + offset, guided, mask)
        m = guided.to(tl.float32)
    x = tl.load(sample_ptr + offset, mask, other=0.0).to(tl.float32)  # [BLOCK]
    if seed_ptr is None:
        noise = tl.load(noise_ptr + offset, mask, other=0.0).to(tl.float32)  # [BLOCK]
    else:
        noise = normal_block(seed_ptr, sample_index_ptr, step_ptr, row, num_steps, numel, start, BLOCK)

    mean = affine_mean(x, m, a, b)
    prev_x = tl.fma(std, noise, mean).to(prev_sample_ptr.dtype.element_ty)
    tl.store(prev_sample_ptr + offset, prev_x, mask)
    z = tl.where(mask, (prev_x.to(tl.float32) - mean) * inverse(std), 0.0)
    tl.store(stored_noise_ptr + offset, z, mask)
    tl.store(partial_ptr + program, tl.sum(z * z))


def sampler_step(
    model_output: Tensor,
    sample: Tensor,
    table: Tensor,
    step: Tensor,
    uncond_output: Tensor | None,
    guidance_scale: float,
    noise: Tensor | None,
    seed: Tensor | None,
    sample_index: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x', the guided output (empty without guidance), the noise of the stored x', and its log-probability."""
    rows = sample.shape[0]
    numel = sample[0].numel()
    (block, num_warps), splits = launch(numel)
    model_output, sample, table, step = (t.contiguous() for t in (model_output, sample, table, step))
    prev_sample = torch.empty_like(sample)
    stored_noise = torch.empty_like(sample, dtype=torch.float32)
    guided = model_output.new_empty(0) if uncond_output is None else torch.empty_like(model_output)
    partials, log_probs = table.new_empty((rows, splits)), table.new_empty(rows)
    _sampler_step_kernel[(rows * splits,)](
        model_output,
        None if uncond_output is None else uncond_output.contiguous(),
        sample,
        None if noise is None else noise.contiguous(),
        seed,
        None if sample_index is None else sample_index.contiguous(),
        table,
        step,
        prev_sample,
        guided,
        stored_noise,
        partials,
        guidance_scale,
        table.shape[0],
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
        None,
        numel,
        1 / numel,
        SPLITS=splits,
        SPLITS_BLOCK=triton.next_power_of_2(splits),
        num_warps=REDUCE_WARPS,
    )
    return prev_sample, guided, stored_noise, log_probs
