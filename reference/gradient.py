"""The backward pass of the ops: per-row coefficients times the direction that the forward pass left."""

import torch
from torch import Tensor

from .affine import guided_output


def gradient(
    direction: Tensor,
    coefficients: Tensor,
    grad_output: Tensor,
    model_output: Tensor | None,
    uncond_output: Tensor | None,
    guidance_scale: float,
    ref_model_output: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The gradients with respect to the model output, or to the conditional and the unconditional one (else empty).

    `grad_output` is a scalar, or (rows,)."""
    dtype = coefficients.dtype
    # (rows, 1, ...) tensors, which take part in type promotion where a scalar would be rounded to half precision
    per_row = (-1, *[1] * (direction.dim() - 1))
    factors = coefficients * (grad_output[:, None] if grad_output.dim() else grad_output)
    factor, *ref_factor = (column.view(per_row) for column in factors.unbind(1))
    gradient = direction * factor
    if direction.dtype == torch.float16:
        # a direction that overflowed does not reach a row without gradient
        gradient.masked_fill_(factor == 0, 0.0)
    if ref_model_output is not None:
        new = model_output
        if uncond_output is not None:
            new = guided_output(new, uncond_output, guidance_scale, dtype, torch.empty_like(new))
        gradient.addcmul_(new.to(dtype) - ref_model_output, *ref_factor)
    if uncond_output is None:
        return gradient.to(direction.dtype), direction.new_empty(0)
    return (gradient * guidance_scale).to(direction.dtype), gradient.mul_(1 - guidance_scale).to(direction.dtype)
