"""What is compared: shapes, inputs, operations and competitors.

An operation says in one place which whole tensors it has to read and to write (its floor in bytes), how trainers
usually write it, how this package does, and how both are checked. A case is an operation at a shape and a number of
rows. A variant of an operation is one more `Op`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pcpo_fast import NoiseKey, StepTable, sample_noise

SHAPES = {
    "SD 1.5 512px": (4, 64, 64),
    "FLUX 1024px": (4096, 64),
    "SDXL 1024px": (4, 128, 128),
    "SD3.5 1024px": (16, 128, 128),
}
COMPETITORS = ("eager", "compile", "ours-torch", "ours-triton")
GUIDANCE = 5.0
# rows' log-ratios are either below 3e-4 or above 3e-3, so that rounding clips no row that it should not
CLIP_RANGE = 1e-3
CPU_ROWS = 8
GPU_ROWS = (4, 16, 64)
# variants of an operation are compared at these shapes and, on a GPU, at the most rows only
VARIANT_SHAPES = ("SD 1.5 512px", "FLUX 1024px")

Outputs = dict[str, Tensor]
# model output, sample, schedule, step -> mean, std
UsualStep = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclasses.dataclass
class Inputs:
    """One set of inputs: `rows` samples, each at a step of its own."""

    table: StepTable
    # the same sampler as the usual code has it
    usual_step: UsualStep
    schedule: Tensor
    step: Tensor
    key: NoiseKey
    advantages: Tensor
    old_log_prob: Tensor
    # in the model's dtype: the new policy's output, the two that guidance makes (nearly) it from, and the old one
    model_output: Tensor
    cond_output: Tensor
    uncond_output: Tensor
    old_model_output: Tensor
    # in the latents' dtype; noise is that of the stored prev_sample
    sample: Tensor
    prev_sample: Tensor
    noise: Tensor

    def copy(self) -> Inputs:
        """The same in other memory."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        copies = {name: _copy(value) for name, value in fields.items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **copies, key=NoiseKey(*map(_copy, self.key)))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation.

    reads: fields of `Inputs` that have to be read whole.
    writes: what has to be written whole, and the field of `Inputs` whose shape and dtype it has.
    formula: the usual formula, tensors to tensors; this is what torch.compile gets.
    usual: the formula on `Inputs`, with autograd where a gradient is asked for.
    ours: the same by this package, with the given `impl`.
    check: raises AssertionError if a competitor's outputs are wrong.
    """

    name: str
    reads: tuple[str, ...]
    writes: dict[str, str]
    formula: Callable[..., Any]
    usual: Callable[[Inputs, Callable[..., Any]], Outputs]
    ours: Callable[[Inputs, str], Outputs]
    check: Callable[[Inputs, Outputs, str], None]

    def bytes(self, inputs: Inputs) -> int:
        """The floor: every input read once, every output written once. Per-row scalars are not counted."""
        tensors = [getattr(inputs, name) for name in (*self.reads, *self.writes.values())]
        return sum(t.numel() * t.element_size() for t in tensors)

    def bytes_per_element(self, device: torch.device) -> int:
        return self.bytes(make_inputs(1, (1,), device, seed=0))


@dataclasses.dataclass(frozen=True)
class Case:
    op: Op
    shape: str
    rows: int
    # cases run in this order
    priority: int
    # torch.compile takes seconds per case, so on a GPU it joins at the most rows only
    compiled: bool
    variant: bool = False

    @property
    def name(self) -> str:
        return f"{self.op.name}, {self.rows} x {self.shape}"


def ddim_step(model_output: Tensor, sample: Tensor, schedule: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std of a DDIM step with eta = 1 as DDPO's trainers write it: the cumulative alphas of both ends are
    stretched to the shape of the latents, and the roots taken of that."""
    return _ddim_step(model_output, sample, *(alpha.expand_as(sample) for alpha in per_row(schedule, step, sample)))


def lean_ddim_step(model_output: Tensor, sample: Tensor, schedule: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """The same with roots of one number per row, for who has noticed."""
    return _ddim_step(model_output, sample, *per_row(schedule, step, sample))


def _ddim_step(model_output: Tensor, sample: Tensor, alpha: Tensor, alpha_prev: Tensor) -> tuple[Tensor, Tensor]:
    std = ((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)) ** 0.5
    predicted_sample = (sample - (1 - alpha) ** 0.5 * model_output) / alpha**0.5
    return alpha_prev**0.5 * predicted_sample + (1 - alpha_prev - std**2) ** 0.5 * model_output, std


def affine_step(model_output: Tensor, sample: Tensor, schedule: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std of a step as GRPO's trainers of flow models write it: each of the two tensors times its number."""
    a, b, std = per_row(schedule, step, sample)
    return sample * a + model_output * b, std


def gaussian_log_prob(prev_sample: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """The log-probability of a sampler step as policy-gradient trainers write it, a mean over elements."""
    log_prob = -((prev_sample.detach() - mean) ** 2) / (2 * std**2)
    log_prob = log_prob - torch.log(std) - torch.log(torch.sqrt(2 * torch.as_tensor(math.pi)))
    return log_prob.mean(dim=tuple(range(1, log_prob.dim())))


def usual_log_prob(
    model_output: Tensor, sample: Tensor, prev_sample: Tensor, usual_step: UsualStep, schedule: Tensor, step: Tensor
) -> Tensor:
    return gaussian_log_prob(prev_sample, *usual_step(model_output, sample, schedule, step))


def per_row(table: Tensor, step: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """The columns of a table at each row's step, to be broadcast over its elements."""
    return tuple(column.view(-1, *[1] * (like.dim() - 1)) for column in table[step].unbind(1))


def affine_schedule(table: StepTable) -> Tensor:
    """float32 (T, 3): a, b and s of each step, for `affine_step`."""
    return torch.stack([table.sample_coef, table.output_coef, table.std], dim=1).float()


def coefficients(table: StepTable, step: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """a, b and s of each row's step as the ops read them, in float64, to be broadcast over its elements."""
    return per_row(affine_schedule(table).double(), step, like)


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtypes(device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """Of the model's outputs and of the latents."""
    return (torch.bfloat16 if device.type == "cuda" else torch.float32), torch.float32


# 50 DDIM steps of Stable Diffusion 1.x
ALPHAS = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
TIMESTEPS = torch.arange(981, 0, -20)


def make_table(device: torch.device) -> StepTable:
    return StepTable.ddim(ALPHAS, TIMESTEPS, credit="native").to(device)


def make_schedule(shape: tuple[int, ...], table: StepTable) -> tuple[UsualStep, Tensor]:
    """How the trainers of the model with this shape of latents write that table's step."""
    if SHAPES["FLUX 1024px"] == shape or SHAPES["SD3.5 1024px"] == shape:
        return affine_step, affine_schedule(table)
    previous = (TIMESTEPS - 20).clamp(min=0)
    return ddim_step, torch.stack([ALPHAS[TIMESTEPS], ALPHAS[previous]], dim=1).float().to(table.rows.device)


def make_inputs(rows: int, shape: tuple[int, ...], device: torch.device, seed: int) -> Inputs:
    """Random inputs, all different for another seed."""
    generator = torch.Generator(device).manual_seed(seed)
    model_dtype, latent_dtype = dtypes(device)

    def randn() -> Tensor:
        return torch.randn(rows, *shape, generator=generator, device=device)

    table = make_table(device)
    row = torch.arange(rows, device=device)
    # the noisier steps, each row another one
    step = (row * 7) % 40
    usual_step, schedule = make_schedule(shape, table)
    key = NoiseKey(torch.tensor(seed, device=device), row)
    a, b, s = coefficients(table, step, randn())
    old, uncond = randn().to(model_dtype), randn().to(model_dtype)
    sample, change = randn(), randn()
    noise = sample_noise((rows, *shape), table, step, key, impl="torch")
    # every other row moves along its noise: far outside the clip range
    far = (row % 2).view(-1, *[1] * len(shape))
    new = (old.float() + 1e-2 * (change + far * noise)).to(model_dtype)
    cond = (uncond.float() + (new.float() - uncond.float()) / GUIDANCE).to(model_dtype)
    prev_sample = (a * sample + b * old.double() + s * noise).to(latent_dtype)
    noise = ((prev_sample - a * sample - b * old.double()) / s).to(latent_dtype)
    sample = sample.to(latent_dtype)
    return Inputs(
        table=table,
        usual_step=usual_step,
        schedule=schedule,
        step=step,
        key=key,
        advantages=torch.where(row % 4 < 2, 1.0, -1.0) * (0.5 + row / rows),
        old_log_prob=usual_log_prob(old, sample, prev_sample, usual_step, schedule, step),
        model_output=new.requires_grad_(),
        cond_output=cond.requires_grad_(),
        uncond_output=uncond.requires_grad_(),
        old_model_output=old,
        sample=sample,
        prev_sample=prev_sample,
        noise=noise,
    )


def guided(cond_output: Tensor, uncond_output: Tensor) -> Tensor:
    """Guidance as the usual code has it, in the model's dtype."""
    return uncond_output + GUIDANCE * (cond_output - uncond_output)


def cases(*ops: Op, variants: tuple[Op, ...] = ()) -> list[Any]:
    """The operations at all shapes and numbers of rows, and variants at few, as parameters of a test."""
    found = [case for op in ops for shape in SHAPES for case in _rows(op, shape)]
    found += [
        dataclasses.replace(case, priority=1, variant=True)
        for op in variants
        for shape in VARIANT_SHAPES
        for case in _rows(op, shape)
        if case.priority == 0
    ]
    return [pytest.param(case, id=re.sub("[^a-zA-Z0-9.]+", "_", case.name)) for case in found]


def _rows(op: Op, shape: str) -> Iterator[Case]:
    device = default_device()
    if device.type == "cpu":
        yield Case(op, shape, CPU_ROWS, 0, compiled=True)
        return
    row_bytes = op.bytes_per_element(device) * math.prod(SHAPES[shape])
    beyond_cache = 3 * torch.cuda.get_device_properties(device).L2_cache_size
    # one call alone moves three times the cache
    most = max(GPU_ROWS[-1], 2 ** math.ceil(math.log2(beyond_cache / row_bytes)))
    for rows in sorted({*GPU_ROWS, most}):
        yield Case(op, shape, rows, 0 if rows == most else 2, compiled=rows == most)


def assert_close(name: str, actual: Tensor, expected: Tensor, *, scale: Tensor | float, tolerance: float) -> None:
    """Every element within `tolerance` times `scale` of the float64 value, in rounding units of what is stored too."""
    assert actual.shape == expected.shape, f"{name} has shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    storage = torch.finfo(actual.dtype).eps
    excess = (actual.double() - expected).abs() - storage * expected.abs() - tolerance * scale
    # a NaN is not below either
    assert (excess <= 0).all(), f"{name} is off by up to {excess.max().item():.3g} more than allowed"


def row_rms(expected: Tensor) -> Tensor:
    return expected.flatten(1).square().mean(1).sqrt().view(-1, *[1] * (expected.dim() - 1))


def guidance_slack(i: Inputs) -> Tensor:
    """How far a guided output may be off: the usual code rounds the difference, its product and the sum."""
    cond, uncond = i.cond_output.detach().double(), i.uncond_output.detach().double()
    return 2 * torch.finfo(i.cond_output.dtype).eps * (uncond.abs() + GUIDANCE * (cond - uncond).abs())


def check_guided_output(i: Inputs, actual: Tensor) -> None:
    expected = guided(i.cond_output.detach().double(), i.uncond_output.detach().double())
    assert_close("guided", actual, expected, scale=guidance_slack(i), tolerance=1.0)
