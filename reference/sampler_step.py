"""One stochastic step of a sampler: guidance, x' = a x + b m + s z, and the log-probability of what is stored.

The guided output u + g (c - u) is rounded once to the model's dtype and x' once to the sample's; from there on only the
rounded values count. The noise handed back, z = (x' - a x - b m)/s, and the log-probability belong to the stored x'.
"""

import torch
from torch import Tensor
from torch.distributions import Normal

from .affine import (
    Coefficients,
    affine_mean,
    as_rows,
    chunk_sums,
    compute_dtype,
    gaussian_log_prob,
    guided_output,
    row_sums,
    tiles,
)
from .philox import noise_tile


def sampler_step_oracle(
    model_output: Tensor,
    sample: Tensor,
    table: Tensor,
    step: Tensor,
    noise: Tensor,
    *,
    uncond_output: Tensor | None = None,
    guidance_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """x', the guided output and the log-probability of x' in float64, nothing rounded."""
    m, x, z = (t.double().flatten(1) for t in (model_output, sample, noise))
    if uncond_output is not None:
        uncond = uncond_output.double().flatten(1)
        m = uncond + guidance_scale * (m - uncond)
    a, b, s, *_ = Coefficients.of(table, step)
    random = s > 0
    policy = Normal(a * x + b * m, torch.where(random, s, 1.0))
    prev_sample = torch.where(random, policy.mean + policy.stddev * z, policy.mean)
    log_prob = torch.where(random, policy.log_prob(prev_sample), 0.0).mean(dim=1)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x', the guided output (empty without guidance), the noise of the stored x' (empty unless asked for), and its
    log-probability."""
    dtype = compute_dtype(model_output, sample, uncond_output, noise)
    prev_sample = torch.empty_like(sample, memory_format=torch.contiguous_format)
    stored_noise = torch.empty_like(prev_sample, dtype=dtype) if return_noise else prev_sample.new_empty(0, dtype=dtype)
    guided = model_output.new_empty(0)
    m, x, x_prev = (as_rows(t) for t in (model_output, sample, prev_sample))
    if uncond_output is not None:
        guided = torch.empty_like(model_output, memory_format=torch.contiguous_format)
        cond, uncond, m = m, as_rows(uncond_output), as_rows(guided)
    rows, numel = x.shape
    z_given, z_stored = (as_rows(t) if t is not None and t.numel() else None for t in (noise, stored_noise))
    coef = Coefficients.of(table, step)
    a, b, std, inverse_std = (c.to(dtype) for c in (coef.sample, coef.output, coef.std, coef.inverse_std))
    squares = []

    for tile in tiles(rows, numel, x.device):
        of_tile = tile[0]
        if uncond_output is not None:
            guided_output(cond[tile], uncond[tile], guidance_scale, dtype, m[tile])
        mean = affine_mean(x[tile].to(dtype), m[tile].to(dtype), a[of_tile], b[of_tile])
        if z_given is not None:
            z = z_given[tile].to(dtype)
        else:
            z = noise_tile(seed, sample_index, step, table.shape[0], numel, *tile).to(dtype)
        new = x_prev[tile]
        if new.dtype == dtype:
            torch.addcmul(mean, z, std[of_tile], out=new)
        else:
            new.copy_(torch.addcmul(mean, z, std[of_tile]))
        difference = torch.sub(new.to(dtype), mean, out=mean)
        z = torch.mul(difference, inverse_std[of_tile], out=difference if z_stored is None else z_stored[tile])
        squares.append(chunk_sums(torch.mul(z, z, out=difference)))

    log_prob = gaussian_log_prob(row_sums(squares, rows), coef.std.squeeze(1), numel, "mean")
    return prev_sample, guided, stored_noise, log_prob.to(dtype)
