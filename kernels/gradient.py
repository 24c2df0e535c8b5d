"""The backward pass of the ops: per-row coefficients times the direction that the forward pass left."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .affine import guided_output, load, split_of_row
from .launch import contiguous, launch


@triton.jit(do_not_specialize=["grad_output_stride"])
def gradient_kernel(
    direction_ptr,
    coefficients_ptr,
    grad_output_ptr,
    model_output_ptr,
    uncond_ptr,
    ref_ptr,
    gradient_ptr,
    uncond_gradient_ptr,
    guidance_scale,
    grad_output_stride,
    numel,
    SPLITS: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program writes the gradient of one split of one row."""
    row, offset, _, column, mask = split_of_row(numel, SPLITS, BLOCK)
    grad_output = tl.load(grad_output_ptr + row * grad_output_stride).to(tl.float32)
    coefficients_ptr += row * (1 if ref_ptr is None else 2)
    factor = grad_output * tl.load(coefficients_ptr)
    # a direction that overflowed half precision does not reach a row without gradient
    gradient = tl.where(factor == 0, 0.0, factor * load(direction_ptr + offset, column, mask))  # [BLOCK]
    if ref_ptr is not None:
        new = load(model_output_ptr + offset, column, mask)  # [BLOCK]
        if uncond_ptr is not None:
            uncond = load(uncond_ptr + offset, column, mask)  # [BLOCK]
            new = guided_output(new, uncond, guidance_scale, model_output_ptr.dtype.element_ty).to(tl.float32)
        ref = load(ref_ptr + offset, column, mask)  # [BLOCK]
        gradient = tl.fma(grad_output * tl.load(coefficients_ptr + 1), new - ref, gradient)
    dtype = gradient_ptr.dtype.element_ty
    if uncond_gradient_ptr is None:
        tl.store(gradient_ptr + offset + column, gradient.to(dtype), mask)
    else:
        tl.store(gradient_ptr + offset + column, (guidance_scale * gradient).to(dtype), mask)
        tl.store(uncond_gradient_ptr + offset + column, ((1 - guidance_scale) * gradient).to(dtype), mask)


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
    rows = direction.shape[0]
    settings, splits = launch(direction[0].numel())
    gradient = torch.empty_like(direction)
    uncond_gradient = direction.new_empty(0) if uncond_output is None else torch.empty_like(direction)
    gradient_kernel[(rows * splits,)](
        direction,
        coefficients,
        grad_output,
        contiguous(model_output),
        contiguous(uncond_output),
        contiguous(ref_model_output),
        gradient,
        None if uncond_output is None else uncond_gradient,
        guidance_scale,
        grad_output.stride(0) if grad_output.dim() else 0,
        direction[0].numel(),
        **settings,
    )
    return gradient, uncond_gradient
