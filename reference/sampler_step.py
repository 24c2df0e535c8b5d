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
    row_sums,
    tiles,
    whiten,
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
    a, b, s, *_ = (column[:, None] for column in Coefficients.of(table, step))
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x', the guided output (empty without guidance), the noise of the stored x', and its log-probability."""
    dtype = compute_dtype(model_output, sample, uncond_output, noise)
    prev_sample = torch.empty_like(sample, memory_format=torch.contiguous_format)
    stored_noise = torch.empty_like(prev_sample, dtype=dtype)
    guided = model_output.new_empty(0)
    m, x, x_prev, z_stored = (as_rows(t) for t in (model_output, sample, prev_sample, stored_noise))
    z_given = None if noise is None else as_rows(noise)
    uncond = None if uncond_output is None else as_rows(uncond_output)
    if uncond is not None:
        guided = torch.empty_like(model_output, memory_format=torch.contiguous_format)
        cond, m = m, as_rows(guided)
    rows, numel = x.shape
    coef = Coefficients.of(table, step)
    std = coef.std.to(dtype)[:, None]
    squares = []

    for tile in tiles(rows, numel, x.device):
        if uncond is not None:
            u = uncond[tile].to(dtype)
            m[tile] = (cond[tile].to(dtype) - u).mul_(guidance_scale).add_(u)
        mean = affine_mean(x[tile].to(dtype), m[tile].to(dtype), coef, tile[0])
        if z_given is not None:
            z = z_given[tile].to(dtype)
        else:
            z = noise_tile(seed, sample_index, step, table.shape[0], numel, *tile).to(dtype)
        x_prev[tile] = (z * std[tile[0]]).add_(mean)
        z = whiten(x_prev[tile].to(dtype), mean, coef, tile[0])
        z_stored[tile] = z
        squares.append(chunk_sums(z.square_()))

    log_prob = gaussian_log_prob(*row_sums(squares, rows=rows), coef.std, numel, "mean")
    return prev_sample, guided, stored_noise, log_prob.to(dtype)
