"""The registered operators behind `pcpo_fast.ops`: schemas, fakes, gradients, and which code does the work.

Each is one node of a graph for `torch.compile(fullgraph=True)`, in the namespace `torch.ops.pcpo_fast`. The work is
done by `pcpo_fast.reference` (PyTorch) or `pcpo_fast.kernels` (Triton, imported when first used), whose functions have
the names of the operators and take their arguments but for the last, `impl`.

A gradient has the form coefficient[row] * direction[row, element]. The forward pass reads its inputs once and writes
the direction in the model output's dtype; the coefficients are float32, so that half precision does not underflow; the
backward pass, the operator `gradient`, multiplies once.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# the folder of this module is mapped when the package is installed, which pyright does not see
from . import reference  # pyright: ignore[reportAttributeAccessIssue]

_NOISE = "Tensor? noise, Tensor? seed, Tensor? sample_index, Tensor? sample, Tensor? prev_sample"
_SCHEMAS = (
    "sampler_step(Tensor model_output, Tensor sample, Tensor table, Tensor step, Tensor? uncond_output, "
    "float guidance_scale, Tensor? noise, Tensor? seed, Tensor? sample_index, bool return_noise, bool return_mean, "
    "str impl) "
    "-> (Tensor prev_sample, Tensor guided, Tensor noise, Tensor log_prob, Tensor mean)",
    "step_log_prob(Tensor model_output, Tensor sample, Tensor prev_sample, Tensor table, Tensor step, "
    "str reduction, bool with_gradient, str impl) -> (Tensor log_prob, Tensor direction, Tensor coefficient)",
    f"step_log_ratio(Tensor model_output, Tensor? old_model_output, {_NOISE}, "
    "Tensor table, Tensor step, str reduction, bool with_gradient, str impl) "
    "-> (Tensor log_ratio, Tensor direction, Tensor coefficient)",
    "policy_loss(Tensor model_output, Tensor? uncond_output, float guidance_scale, Tensor? old_model_output, "
    f"{_NOISE}, Tensor table, Tensor step, Tensor advantages, Tensor? row_weights, Tensor? ref_model_output, "
    "float kl_weight, Tensor? kl_weights, str objective, float clip_below, float clip_above, str reduction, "
    "str row_reduction, bool with_gradient, str impl) -> (Tensor loss, Tensor log_ratio, Tensor clipped, Tensor kl, "
    "Tensor old_kl, Tensor direction, Tensor coefficients)",
    "gradient(Tensor direction, Tensor coefficients, Tensor grad_output, Tensor? model_output, Tensor? uncond_output, "
    "float guidance_scale, Tensor? ref_model_output, str impl) -> (Tensor gradient, Tensor uncond_gradient)",
    "sample_noise(Tensor seed, Tensor sample_index, Tensor step, int num_steps, int numel, str impl) -> Tensor",
)


def _backend(impl: str, device: torch.device) -> Any:
    """The module whose functions implement the operators."""
    if impl == "torch":
        return reference
    try:
        kernels = importlib.import_module(".kernels", __package__)
    except ImportError as error:
        raise ImportError("impl='triton' needs the package triton; install it or use impl='torch'") from error
    if device.type == "cpu" and not kernels.INTERPRETED:
        raise RuntimeError(
            "impl='triton' was given CPU tensors; move them to a GPU, use impl='torch', or set TRITON_INTERPRET=1 "
            "before triton is imported, to run the kernels in Triton's interpreter"
        )
    return kernels


def _on_cpu(name: str) -> Callable[..., Any]:
    def run(first: Tensor, *args: Any) -> Any:
        return getattr(_backend(args[-1], first.device), name)(first, *args[:-1])

    return run


def _on_cuda(name: str) -> Callable[..., Any]:
    run = _on_cpu(name)

    def run_there(first: Tensor, *args: Any) -> Any:
        # Triton launches on the current device
        with torch.cuda.device(first.device):
            return run(first, *args)

    return run_there


_library = torch.library.Library("pcpo_fast", "DEF")
for _schema in _SCHEMAS:
    _name = _schema.partition("(")[0]
    _library.define(_schema, tags=torch.Tag.pt2_compliant_tag)
    _library.impl(_name, _on_cpu(_name), "CPU")
    _library.impl(_name, _on_cuda(_name), "CUDA")


def _empty_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


def _direction(model_output: Tensor, with_gradient: bool) -> Tensor:
    return model_output.new_empty(model_output.shape if with_gradient else 0)


@torch.library.register_fake("pcpo_fast::sampler_step", lib=_library)
def _(model_output, sample, table, step, uncond_output, guidance_scale, noise, *settings):
    *_, return_noise, return_mean, _ = settings
    dtype = reference.compute_dtype(model_output, sample, uncond_output, noise)
    guided = model_output.new_empty(0) if uncond_output is None else _empty_like(model_output)
    stored_noise, mean = (
        _empty_like(sample, dtype) if wanted else sample.new_empty(0, dtype=dtype)
        for wanted in (return_noise, return_mean)
    )
    return _empty_like(sample), guided, stored_noise, sample.new_empty(len(sample), dtype=dtype), mean


@torch.library.register_fake("pcpo_fast::step_log_prob", lib=_library)
def _(model_output, sample, prev_sample, table, step, reduction, with_gradient, impl):
    dtype, rows = reference.compute_dtype(model_output, sample, prev_sample), len(model_output)
    direction = _direction(model_output, with_gradient)
    return sample.new_empty(rows, dtype=dtype), direction, sample.new_empty((rows, 1), dtype=dtype)


@torch.library.register_fake("pcpo_fast::step_log_ratio", lib=_library)
def _(model_output, old_model_output, noise, seed, sample_index, sample, prev_sample, table, step, *settings):
    dtype, rows = reference.compute_dtype(model_output, old_model_output, noise, sample, prev_sample), len(model_output)
    _, with_gradient, _ = settings
    direction = _direction(model_output, with_gradient)
    return table.new_empty(rows, dtype=dtype), direction, table.new_empty((rows, 1), dtype=dtype)


@torch.library.register_fake("pcpo_fast::policy_loss", lib=_library)
def _(
    model_output,
    uncond_output,
    guidance_scale,
    old_model_output,
    noise,
    seed,
    sample_index,
    sample,
    prev_sample,
    table,
    step,
    advantages,
    row_weights,
    ref_model_output,
    *settings,
):
    *_, row_reduction, with_gradient, _ = settings
    others = (uncond_output, old_model_output, noise, sample, prev_sample, ref_model_output)
    dtype, rows, with_ref = (
        reference.compute_dtype(model_output, *others),
        len(model_output),
        ref_model_output is not None,
    )
    return (
        table.new_empty(rows if row_reduction == "none" else (), dtype=dtype),
        table.new_empty(rows, dtype=dtype),
        table.new_empty(rows, dtype=torch.bool),
        table.new_empty(rows if with_ref else 0, dtype=dtype),
        table.new_empty(rows, dtype=dtype),
        _direction(model_output, with_gradient),
        table.new_empty((rows, 2 if with_ref else 1), dtype=dtype),
    )


@torch.library.register_fake("pcpo_fast::gradient", lib=_library)
def _(direction, coefficients, grad_output, model_output, uncond_output, *_):
    return _empty_like(direction), direction.new_empty(0) if uncond_output is None else _empty_like(direction)


@torch.library.register_fake("pcpo_fast::sample_noise", lib=_library)
def _(seed, sample_index, step, num_steps, numel, impl):
    return seed.new_empty((step.shape[0], numel), dtype=torch.float32)


def call(name: str, **arguments: Any) -> Any:
    """Calls an operator by keyword: all arguments of its schema, and no others.

    The operator itself is called by position: 20 arguments by name cost the dispatcher 17 microseconds.
    """
    operator, names = _OPERATORS[name]
    if len(arguments) != len(names):
        raise TypeError(f"{name} takes {', '.join(names)}; given {', '.join(arguments)}")
    return operator(*[arguments[name] for name in names])


_OPERATORS = {}
for _schema in _SCHEMAS:
    _name = _schema.partition("(")[0]
    _operator = getattr(torch.ops.pcpo_fast, _name).default
    _OPERATORS[_name] = _operator, [argument.name for argument in _operator._schema.arguments]


_gradient, _ = _OPERATORS["gradient"]


def _differentiable(name: str) -> None:
    """Gives an operator its gradient: of the first output, with respect to `model_output` and `uncond_output`.

    Its last two outputs are the gradient's direction and coefficients. What the operator `gradient` needs besides is
    found among the arguments by name.

    `torch.library.register_autograd` would do the same with 75 microseconds more per call.
    """
    operator, names = _OPERATORS[name]
    wanted = ("model_output", "uncond_output", "ref_model_output", "guidance_scale", "impl")
    places = {argument: names.index(argument) for argument in wanted if argument in names}

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            # the same operator, below its autograd
            with torch._C._AutoDispatchBelowAutograd():
                output = operator(*args)
            _, *without_gradient = output
            ctx.mark_non_differentiable(*without_gradient)
            # no zeros for the outputs without gradient, one of which is as large as the input
            ctx.set_materialize_grads(False)
            given = {argument: args[place] for argument, place in places.items()}
            ref_model_output = given.get("ref_model_output")
            # the reference model's part of the gradient is made from the outputs, which are alive anyway
            model_output = None if ref_model_output is None else given["model_output"]
            ctx.save_for_backward(*output[-2:], model_output, given.get("uncond_output"), ref_model_output)
            ctx.guidance_scale, ctx.impl = given.get("guidance_scale", 1.0), given["impl"]
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_output, *_):
            gradients: list[Tensor | None] = [None] * len(names)
            if grad_output is None:
                return tuple(gradients)
            direction, coefficients, model_output, uncond_output, ref_model_output = ctx.saved_tensors
            gradients[places["model_output"]], uncond_gradient = _gradient(
                direction,
                coefficients,
                grad_output,
                model_output,
                uncond_output,
                ctx.guidance_scale,
                ref_model_output,
                ctx.impl,
            )
            if uncond_output is not None:
                gradients[places["uncond_output"]] = uncond_gradient
            return tuple(gradients)

    _library.impl(name, Function.apply, "Autograd")


for _name in ("step_log_prob", "step_log_ratio", "policy_loss"):
    _differentiable(_name)
