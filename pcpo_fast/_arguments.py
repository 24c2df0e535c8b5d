"""What the ops are given: the types of their arguments, and the checks that come before any work.

Every message says what was given, what is accepted and what to change.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .samplers.checks import LARGEST, check_choice, shown
from .samplers.table import StepTable, check_table

Impl = Literal["auto", "torch", "triton"]
Reduction = Literal["mean", "sum"]
RowReduction = Literal["mean", "sum", "none"]

IMPLS, REDUCTIONS, ROW_REDUCTIONS = map(get_args, (Impl, Reduction, RowReduction))

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INDEX_DTYPES = (torch.int64, torch.int32)

# operator arguments where the caller leaves one out
UNDRAWN = {"noise": None, "seed": None, "sample_index": None}
NO_STATES = {"sample": None, "prev_sample": None}
NO_GUIDANCE = {"uncond_output": None, "guidance_scale": 1.0}
NO_KL = {"ref_model_output": None, "kl_weight": 0.0, "kl_weights": None}


class NoiseKey(NamedTuple):
    """Names the noise of some samples, so that it can be drawn again instead of stored (Philox4x32-10).

    An element's noise depends on the seed, its sample's index, the step and its place in the row, and on nothing else.

    Attributes:
        seed: the run's seed, an int in [0, 2^63) or a 0-d int64 tensor.
        sample_index: int64 or int32 (rows,), the global index of each sample. Two samples with the same index and seed
            have the same noise, so count on from batch to batch.
    """

    seed: int | Tensor
    sample_index: Tensor


class StoredStates(NamedTuple):
    """The states of some steps, which the noise can be made of: z = (x' - a x - b m_old) / s.

    Attributes:
        sample, prev_sample: (rows, ...) the stored x and x'.
        noise: z, (rows, ...) or its key, in the place of m_old, which is then m_old = (x' - a x - s z) / b. Needs
            states in float32: rounded ones no longer belong to the z that was drawn.
    """

    sample: Tensor
    prev_sample: Tensor
    noise: Tensor | NoiseKey | None = None


class Guidance(NamedTuple):
    """Classifier-free guidance inside an op: m = u + scale (c - u) (Ho and Salimans, arXiv 2207.12598).

    It is combined in float32 and rounded once to the model output's dtype. Most trainers combine in the model's own
    dtype, which rounds three times: m_old must come from this combination, too, for the first log-ratio to be 0.

    Attributes:
        uncond_output: (rows, ...) u, in the dtype of the model output c.
        scale: 1 is the conditional output alone.
    """

    uncond_output: Tensor
    scale: float


class Reference(NamedTuple):
    """The reference model of a KL term.

    Attributes:
        model_output: (rows, ...) m_ref on the same rows; made under no_grad, not inference_mode.
        weight: of the term, a number >= 0 or one per row, (rows,).
    """

    model_output: Tensor
    weight: float | Tensor


def check_type(name: str, value: Any, wanted: type, advice: str) -> None:
    if not isinstance(value, wanted):
        raise TypeError(f"{name} is a {type(value).__name__}; {advice}")


def check_tensor(name: str, value: Any) -> None:
    check_type(name, value, Tensor, f"give a tensor, such as torch.as_tensor({name})")


def check_dense(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} has layout {tensor.layout}; convert it with .to_dense()")


def check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device} and model_output on {like.device}; move it with .to()")


def check_like(model_output: Tensor, **others: Tensor | None) -> None:
    """Checks that tensors have the shape and the device of the model output, and a dtype that the ops take."""
    check_rows(model_output)
    shape, device = model_output.shape, model_output.device
    for name, tensor in others.items():
        if tensor is None:
            continue
        check_tensor(name, tensor)
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)} and model_output {tuple(shape)}; make them equal")
        _check_dtype(name, tensor)
        if tensor.device != device:
            check_device(name, tensor, model_output)


def check_rows(model_output: Tensor) -> None:
    """Checks that there are rows, of a dtype that the ops take."""
    check_tensor("model_output", model_output)
    if model_output.dim() == 0 or model_output.numel() == 0:
        raise ValueError(
            f"model_output of shape {tuple(model_output.shape)} has no rows or no elements; give (rows, ...)"
        )
    _check_dtype("model_output", model_output)


def _check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {tensor.dtype}; convert it to one of {', '.join(map(str, DTYPES))}")
    check_dense(name, tensor)


def check_floating(name: str, tensor: Tensor) -> None:
    """Checks that it is a tensor of floating-point numbers, and of at least one."""
    check_tensor(name, tensor)
    if tensor.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)} and no element; give one per row, (rows,)")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} has dtype {tensor.dtype}; convert it to a floating type")
    check_dense(name, tensor)


def check_per_row(name: str, tensor: Tensor, like: Tensor) -> None:
    """Checks a floating-point number per row."""
    check_floating(name, tensor)
    if tensor.shape != like.shape[:1]:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; give one per row, ({like.shape[0]},)")
    check_device(name, tensor, like)


def check_int(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}={shown(value)} is a {type(value).__name__}; give an int")


def check_shape(shape: tuple[int, ...]) -> None:
    """Checks the shape of rows that are to be made."""
    if not isinstance(shape, tuple | list) or not all(isinstance(size, int) for size in shape):
        raise TypeError(f"shape={shown(shape)} is a {type(shape).__name__}; give (rows, ...)")
    if not shape or min(shape) < 1:
        raise ValueError(f"shape {shown(tuple(shape))} has no rows or no elements; give (rows, ...)")


def check_step(step: int | Tensor, table: StepTable, model_output: Tensor) -> Tensor:
    """One step index per row, int64 or int32 (rows,)."""
    check_table("table", table)
    check_rows(model_output)
    if table.rows.device != model_output.device:
        raise ValueError(
            f"table is on {table.rows.device} and model_output on {model_output.device}; move it once, before the "
            f"loop, with table = table.to({str(model_output.device)!r})"
        )
    if isinstance(step, Tensor):
        if step.dtype not in INDEX_DTYPES:
            raise ValueError(f"step has dtype {step.dtype}; convert it with .long()")
        check_device("step", step, model_output)
        if step.dim() == 0:
            return step.expand(model_output.shape[0])
        if step.shape != model_output.shape[:1]:
            raise ValueError(
                f"step has shape {tuple(step.shape)}; give one index, or one per row, ({len(model_output)},)"
            )
        return step
    if not isinstance(step, int) or isinstance(step, bool):
        raise TypeError(f"step={shown(step)} is a {type(step).__name__}; give an int or a tensor of them, (rows,)")
    if not 0 <= step < len(table.rows):
        raise ValueError(f"step={shown(step)} is not in the table; choose one of 0, ..., {len(table.rows) - 1}")
    return torch.full(model_output.shape[:1], step, dtype=torch.int64, device=model_output.device)


def key_arguments(key: NoiseKey, like: Tensor) -> dict[str, Any]:
    """What noise is drawn from, as device tensors: the seed, 0-d, and the rows' sample indices."""
    seed, sample_index = key
    check_type("NoiseKey.sample_index", sample_index, Tensor, "give the global index of every row, int64 (rows,)")
    if sample_index.dtype not in INDEX_DTYPES:
        raise ValueError(f"NoiseKey.sample_index has dtype {sample_index.dtype}; convert it with .long()")
    if sample_index.shape != like.shape[:1]:
        raise ValueError(
            f"NoiseKey.sample_index has shape {tuple(sample_index.shape)}; give one per row, ({like.shape[0]},)"
        )
    check_device("NoiseKey.sample_index", sample_index, like)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim() != 0 or seed.device != like.device:
            raise ValueError(
                f"NoiseKey.seed is a {seed.dtype} tensor of shape {tuple(seed.shape)} on {seed.device}; give an int or "
                f"a 0-d int64 tensor on {like.device}"
            )
    elif not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"NoiseKey.seed={shown(seed)} is a {type(seed).__name__}; give an int or a 0-d int64 tensor")
    elif not 0 <= seed < 2**63:
        raise ValueError(f"NoiseKey.seed={shown(seed)} is out of range; choose 0 <= seed < 2**63")
    else:
        seed = torch.full((), seed, dtype=torch.int64, device=like.device)
    return {"noise": None, "seed": seed, "sample_index": sample_index}


def drawn_arguments(noise: Tensor | NoiseKey, model_output: Tensor) -> dict[str, Any]:
    """Noise that was drawn, as the operators take it."""
    if isinstance(noise, NoiseKey):
        return key_arguments(noise, model_output)
    if not isinstance(noise, Tensor):
        raise TypeError(
            f"noise is a {type(noise).__name__}; give a tensor (rows, ...), NoiseKey(seed, sample_index), or to a loss "
            "StoredStates(sample, prev_sample)"
        )
    return {**UNDRAWN, "noise": detach(noise)}


def noise_arguments(
    noise: Tensor | NoiseKey | StoredStates, old_model_output: Tensor | None, model_output: Tensor
) -> dict[str, Any]:
    """The source of z, and of m_old where that is not given, as the operators take it."""
    states = NO_STATES
    if isinstance(noise, StoredStates):
        for name, tensor in zip(noise._fields[:2], noise[:2], strict=True):
            check_type(f"StoredStates.{name}", tensor, Tensor, "give the stored latents, (rows, ...)")
        states = {"sample": detach(noise.sample), "prev_sample": detach(noise.prev_sample)}
        if (old_model_output is None) == (noise.noise is None):
            given = "neither" if noise.noise is None else "both"
            raise ValueError(
                f"{given} of old_model_output and StoredStates.noise given; the states make each from the other: give "
                "exactly one of them"
            )
        if noise.noise is None:
            return {**UNDRAWN, **states}
        if any(t.dtype not in (torch.float32, torch.float64) for t in noise[:2]):
            raise ValueError(
                f"the states have dtypes {noise.sample.dtype} and {noise.prev_sample.dtype}, and rounded states no "
                "longer belong to the noise that was drawn; store them in float32, or give old_model_output"
            )
        noise = noise.noise
    elif old_model_output is None:
        raise ValueError(
            "old_model_output is None, and only stored states can take its place; give it, or "
            "StoredStates(sample, prev_sample, noise)"
        )
    return {**drawn_arguments(noise, model_output), **states}


def guidance_arguments(guidance: Guidance | None, model_output: Tensor) -> dict[str, Any]:
    if guidance is None:
        return NO_GUIDANCE
    check_type("guidance", guidance, Guidance, "give Guidance(uncond_output, scale)")
    uncond_output, scale = guidance
    check_type("Guidance.uncond_output", uncond_output, Tensor, "give the unconditional output, (rows, ...)")
    if uncond_output.dtype != model_output.dtype:
        raise ValueError(
            f"uncond_output has dtype {uncond_output.dtype} and model_output {model_output.dtype}; make them equal"
        )
    return {"uncond_output": uncond_output, "guidance_scale": _number("Guidance.scale", scale)}


def kl_arguments(kl: Reference | None, model_output: Tensor) -> dict[str, Any]:
    if kl is None:
        return NO_KL
    check_type("kl", kl, Reference, "give Reference(model_output, weight)")
    ref_model_output, weight = kl
    check_type("Reference.model_output", ref_model_output, Tensor, "give the reference model's output, (rows, ...)")
    arguments = {**NO_KL, "ref_model_output": detach(ref_model_output)}
    if isinstance(weight, Tensor):
        check_per_row("Reference.weight", weight, model_output)
        return {**arguments, "kl_weights": detach(weight)}
    number = _number("Reference.weight", weight)
    if number < 0:
        raise ValueError(f"Reference.weight={weight} would push away from the reference; give a number >= 0")
    return {**arguments, "kl_weight": number}


def resolve_clip_range(clip_range: float | tuple[float, float]) -> tuple[float, float]:
    """The clip range below and above."""
    if isinstance(clip_range, list):
        raise TypeError(f"clip_range={shown(clip_range)} is a list; give a number, or a pair as a tuple (below, above)")
    pair = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    if len(pair) != 2:
        raise ValueError(
            f"clip_range={shown(clip_range)} has {len(pair)} numbers; give one, or a pair: below and above"
        )
    below, above = _number("clip_range", pair[0]), _number("clip_range", pair[1])
    if not (below > 0 and above > 0):
        raise ValueError(f"clip_range={clip_range} leaves nothing to learn from; use positive numbers, such as 1e-4")
    return below, above


def resolve_impl(impl: str, *tensors: Tensor | None) -> str:
    check_choice("impl", impl, IMPLS)
    present = [t for t in tensors if t is not None]
    double = any(t.dtype == torch.float64 for t in present)
    if impl == "auto":
        return "triton" if present[0].device.type == "cuda" and not double else "torch"
    if impl == "triton" and double:
        raise ValueError("impl='triton' computes in float32 and was given float64; use impl='torch' or convert it")
    return impl


def wants_gradient(*outputs: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in outputs)


def detach(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or not tensor.requires_grad else tensor.detach()


def _number(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name}={shown(value)} is a {type(value).__name__}; give a number")
    # math.isfinite takes no number that torch.compile has made symbolic, as it does with one that changes between calls
    if not -LARGEST <= value <= LARGEST:
        raise ValueError(f"{name}={shown(value)} is not finite in float32; give a finite number")
    return float(value)
