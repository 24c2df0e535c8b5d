"""One stochastic step of a sampler: guidance, x' = a x + b m + s z, and the log-probability of what is stored.

The guided output u + g (c - u) is rounded once to the model's dtype and x' once to the sample's; from there on only the
rounded values count. The noise handed back, z = (x' - a x - b m)/s, and the log-probability belong to the stored x'.
"""

import torch
from torch import Tensor
from torch.distributions import Normal

from .affine import (
    affine_mean,
    as_rows,
    cast,
    chunk_sums,
    coefficients,
    compute_dtype,
    gaussian_log_prob,
    guided_output,
    inverse,
    per_row,
    row_numel,
    row_sums,
    tiles,
)
from .philox import first_counters, noise_tile


def sampler_step_oracle(
    model_output: Tensor,
    sample: Tensor,
    table: Tensor,
    step: Tensor,
    noise: Tensor,
    *,
    uncond_output: Tensor | None = None,
    guidance_scale: float = 1.0,
    normalized: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """x', the guided output and the log-probability of x' in float64, nothing rounded. Not normalised, the
    log-probability is -(x' - a x - b m)^2."""
    m, x, z = (t.double().flatten(1) for t in (model_output, sample, noise))
    if uncond_output is not None:
        uncond = uncond_output.double().flatten(1)
        m = uncond + guidance_scale * (m - uncond)
    coef = coefficients(table, step, torch.float64)
    a, b, s = per_row(coef["sample_coef"], coef["output_coef"], coef["std"])
    random = s > 0
    policy = Normal(a * x + b * m, torch.where(random, s, 1.0))
    prev_sample = torch.where(random, policy.mean + policy.stddev * z, policy.mean)
    log_prob = policy.log_prob(prev_sample) if normalized else -(prev_sample - policy.mean).square()
    log_prob = torch.where(random, log_prob, 0.0).mean(dim=1)
    return prev_sample.view_as(sample), m.view_as(sample), log_prob


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
    dtype = compute_dtype(model_output, sample, uncond_output, noise)
    prev_sample = torch.empty_like(sample, memory_format=torch.contiguous_format)
    stored_noise = torch.empty_like(prev_sample, dtype=dtype) if return_noise else prev_sample.new_empty(0, dtype=dtype)
    stored_mean = torch.empty_like(prev_sample, dtype=dtype) if return_mean else prev_sample.new_empty(0, dtype=dtype)
    guided = model_output.new_empty(0)
    if uncond_output is not None:
        guided = torch.empty_like(model_output, memory_format=torch.contiguous_format)
    rows, numel = sample.shape[0], row_numel(sample)
    coef = coefficients(table, step, dtype)
    columns_per_row = per_row(coef["sample_coef"], coef["output_coef"], coef["std"], inverse(coef["std"]))
    first_counter = None if seed is None else first_counters(sample_index, step, table.shape[0], numel)
    optional = (uncond_output, guided, noise, stored_noise, stored_mean)
    per_element = (None if t is None or t.numel() == 0 else as_rows(t) for t in optional)
    squares = []

    for columns, x, m, x_prev, uncond, m_guided, z, z_stored, target_mean, a, b, std, inverse_std, counter in tiles(
        *map(as_rows, (sample, model_output, prev_sample)), *per_element, *columns_per_row, first_counter
    ):
        if uncond is not None:
            m = guided_output(m, uncond, guidance_scale, dtype, m_guided)
        mean = affine_mean(cast(x, dtype), cast(m, dtype), a, b)
        if target_mean is not None:
            target_mean.copy_(mean)
        z = noise_tile(seed, counter, columns) if z is None else z
        if x_prev.dtype == dtype:
            torch.addcmul(mean, cast(z, dtype), std, out=x_prev)
        else:
            x_prev.copy_(torch.addcmul(mean, cast(z, dtype), std))
        difference = torch.sub(cast(x_prev, dtype), mean, out=mean)
        z = torch.mul(difference, inverse_std, out=difference if z_stored is None else z_stored)
        squares.append(chunk_sums(torch.mul(z, z, out=difference)))

    log_prob = gaussian_log_prob(row_sums(squares, rows), coef, numel, "mean")
    return prev_sample, guided, stored_noise, log_prob.to(dtype), stored_mean
