"""One stochastic step of a sampler in one launch: guidance, noise, x' = a x + b m + s z, and its log-probability.

The guided output u + g (c - u) is rounded once to the model's dtype and x' once to the sample's; from there on only the
rounded values count. The noise handed back, z = (x' - a x - b m)/s, and the log-probability belong to the stored x'.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .affine import OUTPUT_COEF, SAMPLE_COEF, STD, affine_mean, coefficient, guided_output, inverse, load, split_of_row
from .launch import contiguous, launch, tickets
from .philox import normal_block
from .step_log_prob import store_log_prob


@triton.jit(do_not_specialize=["step_stride", "num_steps"])
def sampler_step_kernel(
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
    mean_ptr,
    partial_ptr,
    ticket_ptr,
    log_prob_ptr,
    guidance_scale,
    scale,
    step_stride,
    num_steps,
    numel,
    SPLITS: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program takes the step for one split of one row; the last one of a row also writes its log-probability."""
    row, offset, start, column, mask = split_of_row(numel, SPLITS, BLOCK)
    step = tl.load(step_ptr + row * step_stride)
    a = coefficient(table_ptr, step, num_steps, SAMPLE_COEF)
    b = coefficient(table_ptr, step, num_steps, OUTPUT_COEF)
    std = coefficient(table_ptr, step, num_steps, STD)

    m = load(model_output_ptr + offset, column, mask)  # [BLOCK]
    if uncond_ptr is not None:
        uncond = load(uncond_ptr + offset, column, mask)  # [BLOCK]
        guided = guided_output(m, uncond, guidance_scale, guided_ptr.dtype.element_ty)
        tl.store(guided_ptr + offset + column, guided, mask)
        m = guided.to(tl.float32)
    mean = affine_mean(load(sample_ptr + offset, column, mask), m, a, b)  # [BLOCK]
    if mean_ptr is not None:
        tl.store(mean_ptr + offset + column, mean, mask)
    if seed_ptr is None:
        noise = load(noise_ptr + offset, column, mask)  # [BLOCK]
    else:
        noise = normal_block(seed_ptr, tl.load(sample_index_ptr + row), step, num_steps, numel, start, BLOCK)

    prev_x = tl.fma(std, noise, mean).to(prev_sample_ptr.dtype.element_ty)
    tl.store(prev_sample_ptr + offset + column, prev_x, mask)
    z = tl.where(mask, (prev_x.to(tl.float32) - mean) * inverse(std), 0.0)
    if stored_noise_ptr is not None:
        tl.store(stored_noise_ptr + offset + column, z, mask)
    store_log_prob(
        z, partial_ptr, ticket_ptr, log_prob_ptr, table_ptr, step, num_steps, row, numel, scale, SPLITS, SPLITS_BLOCK
    )


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
    return_noise: bool,
    return_mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x', the guided output (empty without guidance), the noise of the stored x' (empty unless asked for), its
    log-probability, and a x + b m (empty unless asked for)."""
    rows = sample.shape[0]
    numel = sample[0].numel()
    settings, splits = launch(numel)
    model_output, sample, table = model_output.contiguous(), sample.contiguous(), table.contiguous()
    prev_sample = torch.empty_like(sample)
    stored_noise = torch.empty_like(sample, dtype=torch.float32) if return_noise else table.new_empty(0)
    mean = torch.empty_like(sample, dtype=torch.float32) if return_mean else table.new_empty(0)
    guided = model_output.new_empty(0) if uncond_output is None else torch.empty_like(model_output)
    partials, log_probs = table.new_empty(rows * splits), table.new_empty(rows)
    sampler_step_kernel[(rows * splits,)](
        model_output,
        contiguous(uncond_output),
        sample,
        contiguous(noise),
        seed,
        contiguous(sample_index),
        table,
        step,
        prev_sample,
        guided,
        stored_noise if return_noise else None,
        mean if return_mean else None,
        partials,
        tickets(rows, sample.device),
        log_probs,
        guidance_scale,
        1 / numel,
        step.stride(0),
        table.shape[0],
        numel,
        **settings,
    )
    return prev_sample, guided, stored_noise, log_probs, mean
