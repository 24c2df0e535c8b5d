"""The log-probability of a sampler step whose states were kept, and its gradient.

With z = (x' - a x - b m)/s, log p(x' | x) = -k <z, z>/2 + numel offset, divided by numel for 'mean', where k = 1 and
offset = -(log s + log(2 pi)/2) for the Gaussian. Its gradient with respect to m is (k b/s) z: a per-row coefficient
times a direction.
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
    inverse,
    per_row,
    reduction_scale,
    row_sums,
    tiles,
)


def step_log_prob_oracle(
    model_output: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    table: Tensor,
    step: Tensor,
    *,
    reduction: str = "mean",
    normalized: bool = True,
) -> Tensor:
    """The textbook formula in float64, differentiable by autograd; 0 for a deterministic step. Not normalised, it is
    -(x' - a x - b m)^2."""
    m, x, x_prev = (t.double().flatten(1) for t in (model_output, sample, prev_sample))
    coef = coefficients(table, step, torch.float64)
    a, b, s = per_row(coef["sample_coef"], coef["output_coef"], coef["std"])
    random = s > 0
    policy = Normal(a * x + b * m, torch.where(random, s, 1.0))
    log_prob = policy.log_prob(x_prev) if normalized else -(x_prev - policy.mean).square()
    log_prob = torch.where(random, log_prob, 0.0)
    return log_prob.mean(dim=1) if reduction == "mean" else log_prob.sum(dim=1)


def step_log_prob(
    model_output: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    table: Tensor,
    step: Tensor,
    reduction: str,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(rows,) log-probabilities, the direction z of the gradient (empty without), and its coefficient (rows, 1)."""
    dtype = compute_dtype(model_output, sample, prev_sample)
    direction = model_output.new_empty(model_output.shape if with_gradient else 0)
    m, x, x_prev = (as_rows(t) for t in (model_output, sample, prev_sample))
    towards = as_rows(direction) if with_gradient else None
    rows, numel = m.shape
    coef = coefficients(table, step, dtype)
    a, b, inverse_std = per_row(coef["sample_coef"], coef["output_coef"], inverse(coef["std"]))
    squares = []

    for _, m_tile, x_tile, x_prev_tile, target, a_tile, b_tile, inverse_tile in tiles(
        m, x, x_prev, towards, a, b, inverse_std
    ):
        mean = affine_mean(cast(x_tile, dtype), cast(m_tile, dtype), a_tile, b_tile)
        z = torch.sub(cast(x_prev_tile, dtype), mean, out=mean).mul_(inverse_tile)
        if target is not None:
            target.copy_(z)
        squares.append(chunk_sums(z.square_()))

    log_prob = gaussian_log_prob(row_sums(squares, rows), coef, numel, reduction)
    coefficient = reduction_scale(numel, reduction) * coef["log_prob_scale"][:, None] * b * inverse_std
    return log_prob.to(dtype), direction, coefficient
