"""The fused ops of policy-gradient alignment, for any sampler that is a table of steps x' = a x + b m + s z.

Each public function checks what it is given, resolves `impl`, and calls one registered operator (namespace `pcpo_fast`)
that `torch.compile(fullgraph=True)` treats as a single node. The work is done by `pcpo_fast.reference` (PyTorch) or
`pcpo_fast.kernels` (Triton, imported when first used).

Both gradients have the form coefficient[row] * direction[row, element]. The forward pass reads its inputs once and
writes the direction in the model output's dtype; the coefficients are float32, so that half precision does not
underflow; the backward pass multiplies once.

Conventions: rows are dim 0 and everything behind it is flattened as a row's elements. `step` is one index into the
table for all rows, or an int64 tensor with one per row, whose values are not checked (that would wait for the GPU).
On a GPU an op is one kernel launch if `step`, `seed` and `sample_index` are tensors: making one costs a small launch.
Arithmetic is float32 for bfloat16, float16 and float32 inputs, mixed or not, and float64 if an input is float64.
The same inputs give the same bits, and a row alone gives the same bits as in a batch. No op waits for the GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# the folder of this module is mapped when the package is installed, which pyright does not see
from . import reference  # pyright: ignore[reportAttributeAccessIssue]

if TYPE_CHECKING:
    from .tables import StepTable

Impl = Literal["auto", "torch", "triton"]
Reduction = Literal["mean", "sum"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
TABLE_COLUMNS = 8
# odd, so that distinct streams have distinct keys, and far from the small numbers that people choose as seeds
STREAM_KEY = 0x9E3779B97F4A7C15


class SamplerStep(NamedTuple):
    """What `sampler_step` returns."""

    prev_sample: Tensor
    model_output: Tensor
    noise: Tensor | None
    log_prob: Tensor


class PolicyLoss(NamedTuple):
    """What `policy_loss` returns."""

    loss: Tensor
    log_ratio: Tensor
    clipped: Tensor


def sampler_step(
    model_output: Tensor,
    sample: Tensor,
    table: StepTable,
    step: int | Tensor,
    *,
    uncond_output: Tensor | None = None,
    guidance_scale: float = 1.0,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    sample_index: Tensor | None = None,
    return_noise: bool = True,
    impl: Impl = "auto",
) -> SamplerStep:
    """One sampler step x' = a x + b m + s z with the log-probability of what is stored. For rollouts: no gradient.

    With `uncond_output` u, m = u + guidance_scale (model_output - u), combined in float32 and rounded once
    (classifier-free guidance, Ho and Salimans, arXiv 2207.12598). Rows with s = 0 take the deterministic step and draw
    nothing; their noise and log-probability are 0.

    Args:
        model_output: (rows, ...) the model's (conditional) output m.
        sample: (rows, ...) the current latent x, of the same shape.
        table: the sampler, on the same device.
        step: index into the table, for all rows or int64 (rows,).
        uncond_output: (rows, ...) the unconditional output, for guidance.
        guidance_scale: 1 is the conditional output alone.
        noise: (rows, ...) z ~ N(0, 1); give this or `seed`.
        seed: the run's seed, an int or a 0-d int64 tensor. z is drawn by Philox from the seed, each row's
            `sample_index`, its step and the element's place, and by nothing else (see `sample_noise`).
        sample_index: int64 (rows,) global index of each sample, for `seed`; default 0, 1, ..., rows - 1.
        return_noise: without, the noise is None and its memory is saved; a loss can draw it again from the seed.
        impl: "torch", "triton", or "auto": Triton for CUDA tensors, PyTorch otherwise.

    Returns:
        prev_sample: x' in the dtype of `sample`, rounded once.
        model_output: the m that was used, in the dtype of `model_output`: without guidance that tensor, not a copy.
        noise: float32 (rows, ...) z = (x' - a x - b m)/s of the x' that is stored, or None.
        log_prob: float32 (rows,) log N(x'; a x + b m, s^2), a mean over elements, of the x' that is stored (Black et
            al., arXiv 2305.13301, equation 4 for the policy); of a table that is not `normalized`, -(x' - a x - b m)^2.

    Raises:
        ValueError: for shapes, dtypes, devices or a step that do not fit, or unless one of `noise` and `seed` is given.
        ImportError, RuntimeError: for impl="triton" without Triton, or with CPU tensors outside its interpreter.
    """
    tensors = {"sample": sample, "uncond_output": uncond_output, "noise": noise}
    _check_like(model_output, tensors)
    step = _check_step(step, table, model_output)
    if (noise is None) == (seed is None):
        raise ValueError(f"{'neither' if noise is None else 'both'} of noise and seed given: give exactly one of them")
    key = (None, None) if seed is None else _check_key(seed, sample_index, step)
    with torch.no_grad():
        prev_sample, guided, stored_noise, log_prob = torch.ops.pcpo_fast.sampler_step(
            model_output,
            sample,
            table.rows,
            step,
            uncond_output,
            guidance_scale,
            noise,
            *key,
            return_noise,
            _resolve_impl(impl, model_output, *tensors.values()),
        )
    return SamplerStep(
        prev_sample,
        model_output.detach() if uncond_output is None else guided,
        stored_noise if return_noise else None,
        log_prob,
    )


def step_log_prob(
    model_output: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    table: StepTable,
    step: int | Tensor,
    *,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """log N(x'; a x + b m, s^2) of each row, differentiable (once) in `model_output` and in nothing else.

    Of a table that is not `normalized` it is -(x' - a x - b m)^2, without 1/(2 s^2) and constants.
    For trainers that keep states. Subtracting two of these loses almost all digits of a log-ratio; `policy_loss` loses
    none.

    Args:
        model_output: (rows, ...) m.
        sample, prev_sample: (rows, ...) the stored x and x'.
        table, step, impl: as in `sampler_step`.
        reduction: "mean" or "sum" over the row's elements.

    Returns:
        float32 (rows,); 0, with gradient 0, where s = 0.

    Raises:
        ValueError, ImportError, RuntimeError: as `sampler_step`.
    """
    _check_like(model_output, {"sample": sample, "prev_sample": prev_sample})
    step = _check_step(step, table, model_output)
    _check_choice("reduction", reduction, ("mean", "sum"))
    log_prob, _, _ = torch.ops.pcpo_fast.step_log_prob(
        model_output,
        _detach(sample),
        _detach(prev_sample),
        table.rows,
        step,
        reduction,
        _wants_gradient(model_output),
        _resolve_impl(impl, model_output, sample, prev_sample),
    )
    return log_prob


def step_log_ratio(
    model_output: Tensor,
    old_model_output: Tensor,
    noise: Tensor | None,
    table: StepTable,
    step: int | Tensor,
    *,
    seed: int | Tensor | None = None,
    sample_index: Tensor | None = None,
    sample: Tensor | None = None,
    prev_sample: Tensor | None = None,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """log rho of each row, the difference of two outputs' log-probabilities of one step, for objectives of your own.

    log rho = -(w <e, z> + w^2 <e, e>/2) with e = m_new - m_old: exactly 0 where they are equal, and right to float32
    where subtracting two log-probabilities loses all digits. Differentiable (once) in `model_output` alone.

    Args:
        model_output, old_model_output, noise, table, step, seed, sample_index, sample, prev_sample, reduction, impl: as
            in `policy_loss`. The table's `weight` is used; with credit "native" that is the sampler's own.

    Returns:
        float32 (rows,); 0, with gradient 0, where w = 0.

    Raises:
        ValueError, ImportError, RuntimeError: as `policy_loss`.
    """
    tensors = {"old_model_output": old_model_output, "noise": noise, "sample": sample, "prev_sample": prev_sample}
    _check_like(model_output, tensors)
    step = _check_step(step, table, model_output)
    source = _check_noise_source(noise, seed, sample_index, sample, prev_sample, step)
    _check_choice("reduction", reduction, ("mean", "sum"))
    log_ratio, _, _ = torch.ops.pcpo_fast.step_log_ratio(
        model_output,
        _detach(old_model_output),
        *source,
        table.rows,
        step,
        reduction,
        _wants_gradient(model_output),
        _resolve_impl(impl, model_output, *tensors.values()),
    )
    return log_ratio


def policy_loss(
    model_output: Tensor,
    old_model_output: Tensor,
    noise: Tensor | None,
    table: StepTable,
    step: int | Tensor,
    advantages: Tensor,
    *,
    objective: str = "pcpo",
    clip_range: float = 1e-4,
    reduction: Reduction = "mean",
    seed: int | Tensor | None = None,
    sample_index: Tensor | None = None,
    sample: Tensor | None = None,
    prev_sample: Tensor | None = None,
    uncond_output: Tensor | None = None,
    guidance_scale: float = 1.0,
    ref_model_output: Tensor | None = None,
    kl_weight: float = 0.0,
    impl: Impl = "auto",
) -> PolicyLoss:
    """Clipped policy-gradient loss of one sampler step per row, with its gradient made in the same pass.

    With e = m_new - m_old, the step's weight w and the log-ratio log rho = -(w <e, z> + w^2 <e, e>/2), which is exactly
    0 where m_new = m_old:

    - "pcpo": max(0, xi |A| - A log rho), the log-hinge of PCPO (Lee and Ye, arXiv 2509.25774).
    - "ppo": max(-A rho, -A clip(rho, 1 - xi, 1 + xi)) (Schulman et al., arXiv 1707.06347, equation 7), which is
      DDPO's (Black et al., arXiv 2305.13301) and GRPO's.
    - "guard": the same with log rho = -s w <e, z>, divided by the step's interval h: GRPO-Guard (Wang et al., arXiv
      2510.22319).

    A table that is not `normalized` has 2 s^2 times these log-ratios.

    All plus kl_weight times KL(new || ref) = w^2 <m_new - m_ref, m_new - m_ref>/2 with the sampler's own w = -b/s.

    z is `noise`; or, without it, drawn again from `seed` and `sample_index`; or made from the stored states, as
    (x' - a x - b m_old)/s.

    Args:
        model_output: (rows, ...) m_new; it and `uncond_output` get a gradient (once: no double backward).
        old_model_output: (rows, ...) m_old, as the rollout stored it.
        noise: (rows, ...) z of the stored x', as `sampler_step` returns it; or None.
        table, step, impl: as in `sampler_step`. Rows with weight 0 have log-ratio 0 and gradient 0.
        advantages: (rows,) A.
        objective: "pcpo", "ppo" or "guard".
        clip_range: xi.
        reduction: "mean" or "sum" of <., .> over the row's elements.
        seed, sample_index: the key that `sampler_step` drew z from. Only for latents stored in float32: rounded
            latents no longer belong to the z that was drawn.
        sample, prev_sample: (rows, ...) the stored x and x'.
        uncond_output, guidance_scale: m_new is combined and rounded as in `sampler_step`, whose combination m_old must
            come from for the first log-ratio to be 0.
        ref_model_output: (rows, ...) m_ref, needed if `kl_weight` is not 0; made under no_grad, not inference_mode.
        kl_weight: weight of the KL term.

    Returns:
        loss: float32 scalar, the mean over rows.
        log_ratio: float32 (rows,) log rho as the objective has it, without gradient.
        clipped: bool (rows,), without gradient: the rows whose objective is clipped and has no gradient.

    Raises:
        ValueError, ImportError, RuntimeError: as `sampler_step`, and for an unknown objective or reduction, a clip
            range that is not positive, a KL weight without reference output, or unless z has exactly one source.
    """
    if kl_weight == 0:
        ref_model_output = None
    elif ref_model_output is None:
        raise ValueError(f"kl_weight={kl_weight} needs ref_model_output, the reference model's output on the same rows")
    tensors = {
        "uncond_output": uncond_output,
        "old_model_output": old_model_output,
        "noise": noise,
        "sample": sample,
        "prev_sample": prev_sample,
        "ref_model_output": ref_model_output,
    }
    _check_like(model_output, tensors)
    if uncond_output is not None and uncond_output.dtype != model_output.dtype:
        raise ValueError(
            f"uncond_output has dtype {uncond_output.dtype} and model_output {model_output.dtype}; make them equal"
        )
    step = _check_step(step, table, model_output)
    source = _check_noise_source(noise, seed, sample_index, sample, prev_sample, step)
    _check_per_row("advantages", advantages, model_output)
    if not advantages.is_floating_point():
        raise ValueError(f"advantages has dtype {advantages.dtype}; convert it to a floating type")
    _check_choice("objective", objective, tuple(reference.OBJECTIVES))
    _check_choice("reduction", reduction, ("mean", "sum"))
    if not clip_range > 0:
        raise ValueError(f"clip_range={clip_range} leaves nothing to learn from; use a positive number, such as 1e-4")
    loss, log_ratio, clipped, _, _ = torch.ops.pcpo_fast.policy_loss(
        model_output,
        uncond_output,
        guidance_scale,
        _detach(old_model_output),
        *source,
        table.rows,
        step,
        _detach(advantages),
        _detach(ref_model_output),
        objective,
        clip_range,
        reduction,
        kl_weight,
        _wants_gradient(model_output, uncond_output),
        _resolve_impl(impl, model_output, *tensors.values()),
    )
    return PolicyLoss(loss, log_ratio, clipped)


def sample_noise(
    shape: tuple[int, ...],
    table: StepTable,
    step: int | Tensor,
    *,
    seed: int | Tensor,
    sample_index: Tensor | None = None,
    stream: int = 0,
    impl: Impl = "auto",
) -> Tensor:
    """The N(0, 1) noise that `sampler_step` draws from a seed, so that it need not be stored.

    Philox4x32-10 (Salmon et al., SC 2011) keyed by the seed: element i of a row takes lane i % 4 of the counter
    (sample_index len(table) + step) ceil(numel/4) + i // 4.

    Args:
        shape: (rows, ...).
        table: the sampler; the noise is made on its device.
        step, seed, sample_index, impl: as in `sampler_step`.
        stream: 0 is the noise of the sampler steps. Another number gives independent noise, for initial latents say:
            the key is the seed XOR (stream * 0x9E3779B97F4A7C15 mod 2^64).

    Returns:
        float32 of the given shape.

    Raises:
        ValueError, ImportError, RuntimeError: as `sampler_step`.
    """
    like = table.rows.new_empty((1,)).expand(shape)
    _check_like(like, {})
    step = _check_step(step, table, like)
    # as a signed 64-bit number
    stream_key = (stream * STREAM_KEY + 2**63) % 2**64 - 2**63
    key, sample_index = _check_key(seed, sample_index, step)
    noise = torch.ops.pcpo_fast.sample_noise(
        key ^ stream_key, sample_index, step, len(table.rows), like[0].numel(), _resolve_impl(impl, like)
    )
    return noise.view(shape)


def _check_like(model_output: Tensor, others: dict[str, Tensor | None]) -> None:
    if model_output.dim() == 0 or model_output.numel() == 0:
        raise ValueError(f"shape {tuple(model_output.shape)} has no rows or no elements; give (rows, ...)")
    for name, tensor in {"model_output": model_output, **others}.items():
        if tensor is None:
            continue
        if tensor.shape != model_output.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and model_output {tuple(model_output.shape)}; make them equal"
            )
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} has dtype {tensor.dtype}; convert it to one of {', '.join(map(str, DTYPES))}")
        _check_device(name, tensor, model_output)


def _check_device(name: str, tensor: Tensor, model_output: Tensor) -> None:
    if tensor.device != model_output.device:
        raise ValueError(f"{name} is on {tensor.device} and model_output on {model_output.device}; move it with .to()")


def _check_per_row(name: str, tensor: Tensor, model_output: Tensor) -> None:
    if tensor.shape != model_output.shape[:1]:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; give one per row, ({model_output.shape[0]},)")
    _check_device(name, tensor, model_output)


def _check_indices(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.dtype != torch.int64:
        raise ValueError(f"{name} has dtype {tensor.dtype}; convert it with .long()")
    _check_per_row(name, tensor, like)


def _check_step(step: int | Tensor, table: StepTable, model_output: Tensor) -> Tensor:
    """One step index per row."""
    _check_device("table", table.rows, model_output)
    if table.rows.dtype != torch.float32:
        raise ValueError(f"table.rows has dtype {table.rows.dtype}; convert it with .float(), as StepTable has it")
    if table.rows.shape[1:] != (TABLE_COLUMNS,):
        raise ValueError(
            f"table.rows has shape {tuple(table.rows.shape)}; give (T, {TABLE_COLUMNS}), as StepTable has it"
        )
    if isinstance(step, Tensor):
        _check_indices("step", step, model_output)
        return step
    if not 0 <= step < len(table.rows):
        raise ValueError(f"step={step} is not in the table; choose one of 0, ..., {len(table.rows) - 1}")
    return torch.full(model_output.shape[:1], step, dtype=torch.int64, device=model_output.device)


def _check_key(seed: int | Tensor, sample_index: Tensor | None, step: Tensor) -> tuple[Tensor, Tensor]:
    """What noise is drawn from, as device tensors: the seed, 0-d, and the rows' sample indices."""
    if sample_index is None:
        sample_index = torch.arange(len(step), device=step.device)
    else:
        _check_indices("sample_index", sample_index, step)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim() != 0 or seed.device != step.device:
            raise ValueError(
                f"seed is a {seed.dtype} tensor of shape {tuple(seed.shape)} on {seed.device}; "
                f"give an int or a 0-d int64 tensor on {step.device}"
            )
        return seed, sample_index
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed} is out of range; choose 0 <= seed < 2**63")
    return torch.full((), seed, dtype=torch.int64, device=step.device), sample_index


def _check_noise_source(
    noise: Tensor | None,
    seed: int | Tensor | None,
    sample_index: Tensor | None,
    sample: Tensor | None,
    prev_sample: Tensor | None,
    step: Tensor,
) -> tuple[Tensor | None, ...]:
    """The one source of z, as the operators take it: noise, seed, sample index, sample, previous sample."""
    states = sample is not None or prev_sample is not None
    if (noise is not None) + (seed is not None) + states != 1 or (sample is None) != (prev_sample is None):
        given = {"noise": noise, "seed": seed, "sample": sample, "prev_sample": prev_sample}
        names = ", ".join(name for name, value in given.items() if value is not None) or "nothing"
        raise ValueError(f"z is given by {names}; give exactly one of noise, seed, or sample and prev_sample")
    key = (None, None) if seed is None else _check_key(seed, sample_index, step)
    return _detach(noise), *key, _detach(sample), _detach(prev_sample)


def _wants_gradient(*outputs: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in outputs)


def _detach(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or not tensor.requires_grad else tensor.detach()


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(map(repr, choices))}")


def _resolve_impl(impl: str, *tensors: Tensor | None) -> str:
    _check_choice("impl", impl, ("auto", "torch", "triton"))
    present = [t for t in tensors if t is not None]
    double = any(t.dtype == torch.float64 for t in present)
    if impl == "auto":
        return "triton" if present[0].device.type == "cuda" and not double else "torch"
    if impl == "triton" and double:
        raise ValueError("impl='triton' computes in float32 and was given float64; use impl='torch' or convert it")
    return impl


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


_NOISE_SOURCE = "Tensor? noise, Tensor? seed, Tensor? sample_index, Tensor? sample, Tensor? prev_sample, "
_SCHEMAS = (
    "sampler_step(Tensor model_output, Tensor sample, Tensor table, Tensor step, Tensor? uncond_output, "
    "float guidance_scale, Tensor? noise, Tensor? seed, Tensor? sample_index, bool return_noise, str impl) "
    "-> (Tensor prev_sample, Tensor guided, Tensor noise, Tensor log_prob)",
    "step_log_prob(Tensor model_output, Tensor sample, Tensor prev_sample, Tensor table, Tensor step, "
    "str reduction, bool with_gradient, str impl) -> (Tensor log_prob, Tensor direction, Tensor coefficient)",
    f"step_log_ratio(Tensor model_output, Tensor old_model_output, {_NOISE_SOURCE}"
    "Tensor table, Tensor step, str reduction, bool with_gradient, str impl) "
    "-> (Tensor log_ratio, Tensor direction, Tensor coefficient)",
    "policy_loss(Tensor model_output, Tensor? uncond_output, float guidance_scale, Tensor old_model_output, "
    f"{_NOISE_SOURCE}Tensor table, Tensor step, Tensor advantages, Tensor? ref_model_output, str objective, "
    "float clip_range, str reduction, float kl_weight, bool with_gradient, str impl) "
    "-> (Tensor loss, Tensor log_ratio, Tensor clipped, Tensor direction, Tensor coefficients)",
    "gradient(Tensor direction, Tensor coefficients, Tensor grad_output, Tensor? model_output, Tensor? uncond_output, "
    "float guidance_scale, Tensor? ref_model_output, str impl) -> (Tensor gradient, Tensor uncond_gradient)",
    "sample_noise(Tensor seed, Tensor sample_index, Tensor step, int num_steps, int numel, str impl) -> Tensor",
)


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


@torch.library.register_fake("pcpo_fast::sampler_step", lib=_library)
def _(model_output, sample, table, step, uncond_output, guidance_scale, noise, seed, sample_index, return_noise, impl):
    dtype = reference.compute_dtype(model_output, sample, uncond_output, noise)
    guided = model_output.new_empty(0) if uncond_output is None else _empty_like(model_output)
    stored_noise = _empty_like(sample, dtype) if return_noise else sample.new_empty(0, dtype=dtype)
    return _empty_like(sample), guided, stored_noise, sample.new_empty(len(sample), dtype=dtype)


@torch.library.register_fake("pcpo_fast::step_log_prob", lib=_library)
def _(model_output, sample, prev_sample, table, step, reduction, with_gradient, impl):
    dtype, rows = reference.compute_dtype(model_output, sample, prev_sample), len(model_output)
    direction = model_output.new_empty(model_output.shape if with_gradient else 0)
    return sample.new_empty(rows, dtype=dtype), direction, sample.new_empty((rows, 1), dtype=dtype)


@torch.library.register_fake("pcpo_fast::step_log_ratio", lib=_library)
def _(model_output, old_model_output, noise, seed, sample_index, sample, prev_sample, table, step, *settings):
    dtype, rows = reference.compute_dtype(model_output, old_model_output, noise, sample, prev_sample), len(model_output)
    _, with_gradient, _ = settings
    direction = model_output.new_empty(model_output.shape if with_gradient else 0)
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
    ref_model_output,
    *settings,
):
    *_, with_gradient, _ = settings
    others = (uncond_output, old_model_output, noise, sample, prev_sample, ref_model_output)
    dtype, rows = reference.compute_dtype(model_output, *others), len(model_output)
    return (
        table.new_empty((), dtype=dtype),
        table.new_empty(rows, dtype=dtype),
        table.new_empty(rows, dtype=torch.bool),
        model_output.new_empty(model_output.shape if with_gradient else 0),
        table.new_empty((rows, 1 if ref_model_output is None else 2), dtype=dtype),
    )


@torch.library.register_fake("pcpo_fast::gradient", lib=_library)
def _(direction, coefficients, grad_output, model_output, uncond_output, *_):
    return _empty_like(direction), direction.new_empty(0) if uncond_output is None else _empty_like(direction)


@torch.library.register_fake("pcpo_fast::sample_noise", lib=_library)
def _(seed, sample_index, step, num_steps, numel, impl):
    return seed.new_empty((step.shape[0], numel), dtype=torch.float32)


def _differentiable(name: str, uncond: int | None = None, guidance: int | None = None, ref: int | None = None) -> None:
    """Gives an operator its gradient: of the first output, with respect to the first argument and that at `uncond`.

    Its last two outputs are the gradient's direction and coefficients, its last argument is `impl`. The arguments at
    `uncond`, `guidance` and `ref` are what the operator `gradient` wants besides.

    `torch.library.register_autograd` would do the same with 75 microseconds more per call.
    """
    operator = getattr(torch.ops.pcpo_fast, name).default

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
            uncond_output = None if uncond is None else args[uncond]
            ref_model_output = None if ref is None else args[ref]
            # the reference model's part of the gradient is made from the outputs, which are alive anyway
            model_output = None if ref_model_output is None else args[0]
            ctx.save_for_backward(*output[-2:], model_output, uncond_output, ref_model_output)
            ctx.guidance_scale = 1.0 if guidance is None else args[guidance]
            ctx.impl, ctx.count = args[-1], len(args)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_output, *_):
            gradients = [None] * ctx.count
            if grad_output is None:
                return tuple(gradients)
            direction, coefficients, model_output, uncond_output, ref_model_output = ctx.saved_tensors
            gradients[0], uncond_gradient = torch.ops.pcpo_fast.gradient(
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
                gradients[uncond] = uncond_gradient
            return tuple(gradients)

    _library.impl(name, Function.apply, "Autograd")


_differentiable("step_log_prob")
_differentiable("step_log_ratio")
_differentiable("policy_loss", uncond=1, guidance=2, ref=12)
