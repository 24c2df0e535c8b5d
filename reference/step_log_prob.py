"""The log-probability of a sampler step whose states were kept, and its gradient.

With z = (x' - a x - b m)/s, log p(x' | x) = -<z, z>/2 - numel (log s + log(2 pi)/2), divided by numel for 'mean'. Its
gradient with respect to m is (b/s) z: a per-row coefficient times a direction.
"""

import torch
from torch import Tensor
from torch.distributions import Normal

from .affine import Coefficients, RowSum, affine_mean, as_rows, compute_dtype, reduction_scale, tiles, whiten


def step_log_prob_oracle(
    model_output: Tensor, sample: Tensor, prev_sample: Tensor, table: Tensor, step: Tensor, *, reduction: str = "mean"
) -> Tensor:
    """The textbook formula in float64, differentiable by autograd; 0 for a deterministic step."""
    m, x, x_prev = (t.double().flatten(1) for t in (model_output, sample, prev_sample))
    coef = Coefficients.of(table, step)
    random = coef.std > 0
    log_prob = Normal(coef.sample * x + coef.output * m, torch.where(random, coef.std, 1.0)).log_prob(x_prev)
    log_prob = torch.where(random, log_prob, 0.0)
    return log_prob.mean(dim=1) if reduction == "mean" else log_prob.sum(dim=1)


def step_log_prob(
    model_output: Tensor, sample: Tensor, prev_sample: Tensor, table: Tensor, step: Tensor, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(rows,) log-probabilities, the direction z of the gradient, and its coefficient (rows,)."""
    dtype = compute_dtype(model_output, sample, prev_sample)
    direction = torch.empty_like(model_output, memory_format=torch.contiguous_format)
    m, x, x_prev, towards = (as_rows(t) for t in (model_output, sample, prev_sample, direction))
    coef = Coefficients.of(table, step)
    squares = RowSum(m, dtype)

    for tile in tiles(m):
        tile_coef = coef.tile(tile[0], dtype)
        mean = affine_mean(x[tile].to(dtype), m[tile].to(dtype), tile_coef)
        z = whiten(x_prev[tile].to(dtype), mean, tile_coef)
        towards[tile] = z
        squares.add(z.square_(), *tile)

    numel = m.shape[1]
    log_prob = coef.log_prob(squares.total(), numel, reduction)
    coefficient = reduction_scale(numel, reduction) * coef.output * coef.inverse_std
    return log_prob.to(dtype), direction, coefficient[:, 0].to(dtype)
