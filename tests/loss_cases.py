"""Rows for the losses: what an op is given, what the float64 oracle says, and how far rounding may take them apart."""

import dataclasses
import itertools

import torch
from torch import Tensor

from pcpo_fast import (
    Guidance,
    NoiseKey,
    Reference,
    StepTable,
    StoredStates,
    policy_loss,
    reference,
    sample_noise,
    sampler_step,
)
from pcpo_fast.columns import COLUMNS
from pcpo_fast.reference.policy_loss import policy_loss_oracle

EPS = torch.finfo(torch.float32).eps
# a sum of rounded products, by a tree or in chunks, is off by at most (2 + log2(numel) + 16) half units per term; the
# table's slope and curvature, which the oracle takes unrounded, add four
UNIT = 20 * EPS
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# dtypes of model_output, old_model_output, noise, ref_model_output
DTYPES = {"fp32": (F32,) * 4, "bf16": (BF16,) * 4, "fp16": (F16,) * 4, "mixed": (F16, BF16, F32, F32)}
# one element, one row, a power of two, a row split over programs
SHAPES = [(5, 1), (1, 3, 5, 7), (6, 4, 8, 8), (3, 9001)]
OBJECTIVES = list(reference.OBJECTIVES)
KINDS = {
    "plain": {},
    "unnormalized": {"normalized": False},
    "guarded": {"guard": True},
    "guarded, unnormalized": {"normalized": False, "guard": True},
}
# the second is deterministic, given three
DETERMINISTIC_ROW = 1
GUIDANCE = 3.0
KL_WEIGHT = 0.3


def variant(table: StepTable, kind: str) -> StepTable:
    return dataclasses.replace(table, **KINDS[kind])


def column(table: StepTable, name: str, step: Tensor) -> Tensor:
    """A column of the table's rows at each step, float64 (rows,)."""
    return table.rows[step, COLUMNS.index(name)].double()


@dataclasses.dataclass
class Rows:
    """Inputs of a batch. The first advantage is 0 and, given three rows, the second row is deterministic."""

    new: Tensor
    old: Tensor
    noise: Tensor
    ref: Tensor
    uncond: Tensor
    sample: Tensor
    step: Tensor
    advantages: Tensor
    weights: Tensor
    kl_weights: Tensor
    index: Tensor

    def __getitem__(self, part: slice) -> "Rows":
        return self.map(lambda tensor: tensor[part])

    def map(self, change) -> "Rows":
        return Rows(*(change(getattr(self, field.name)) for field in dataclasses.fields(self)))

    def replace(self, **changes) -> "Rows":
        return dataclasses.replace(self, **changes)


def make_rows(shape, device, dtypes=DTYPES["fp32"], distance=1e-2) -> Rows:
    generator = torch.Generator().manual_seed(sum(shape))
    old, change, noise, ref, uncond, sample = (torch.randn(shape, generator=generator) for _ in range(6))
    of_output, of_old, of_noise, of_ref = dtypes
    step = torch.randint(0, 19, shape[:1], generator=generator)
    advantages = torch.randn(shape[:1], generator=generator)
    weights, kl_weights = (torch.rand(shape[:1], generator=generator) + 0.5 for _ in range(2))
    if len(step) > 2:
        step[DETERMINISTIC_ROW] = 19
        advantages[0] = 0
    tensors = (
        (old + distance * change).to(of_output),
        old.to(of_old),
        noise.to(of_noise),
        ref.to(of_ref),
        uncond.to(of_output),
        sample,
        step,
        advantages,
        weights,
        kl_weights,
        torch.arange(shape[0]) + 2**33,
    )
    return Rows(*(tensor.to(device) for tensor in tensors))


@dataclasses.dataclass
class Source:
    """Where z and m_old come from: as the op takes them, as float64 has them, and what float32 makes of that."""

    old_model_output: Tensor | None
    noise: Tensor | NoiseKey | StoredStates
    old: Tensor
    z: Tensor
    old_error: Tensor | float = 0.0
    z_error: Tensor | float = 0.0


SOURCES = ("noise", "key", "states", "states and noise", "states and key")


def source(name: str, rows: Rows, table: StepTable, impl: str) -> Source:
    key = NoiseKey(7, rows.index)
    z = sample_noise(rows.new.shape, table, rows.step, key, impl=impl) if "key" in name else rows.noise
    if "states" not in name:
        return Source(rows.old, key if name == "key" else z, rows.old, z)
    names = ("sample_coef", "output_coef", "std")
    a, b, s = (per_row(column(table, name, rows.step), rows.new) for name in names)
    x, old, z64 = rows.sample.double(), rows.old.double(), z.double()
    prev_sample = (a * x + b * old + s * z64).float()
    stored, size = prev_sample.double(), (a * x).abs() + prev_sample.double().abs()
    if name == "states":
        inverse = torch.where(s > 0, 1 / s, 0.0)
        z64 = (stored - a * x - b * old) * inverse
        z_error = 2 * EPS * ((size + (b * old).abs()) * inverse + z64.abs())
        return Source(rows.old, StoredStates(rows.sample, prev_sample), old, z64, z_error=z_error)
    old = (stored - a * x - s * z64) / b
    old_error = 2 * EPS * ((size + (s * z64).abs()) / b.abs() + old.abs())
    given = StoredStates(rows.sample, prev_sample, key if "key" in name else z)
    return Source(None, given, old, z, old_error=old_error)


def per_row(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a call of `policy_loss` asks for, besides its rows."""

    objective: str = "pcpo"
    clip_range: float | tuple[float, float] = 1e-4
    reduction: str = "mean"
    row_reduction: str = "mean"
    weighted: bool = False
    # None, "number" or "per row"
    kl: str | None = None
    guided: bool = False

    @property
    def pair(self) -> tuple[float, float]:
        return self.clip_range if isinstance(self.clip_range, tuple) else (self.clip_range, self.clip_range)


# row reductions and weights
ROW_SETTINGS = [
    {"row_reduction": row_reduction, "weighted": weighted, "kl": kl, "guided": guided}
    for row_reduction, weighted, kl, guided in itertools.product(
        ("mean", "sum", "none"), (False, True), (None, "number", "per row"), (False, True)
    )
]


@dataclasses.dataclass
class Result:
    """Outputs, and the gradients with respect to the model's outputs."""

    loss: Tensor
    log_ratio: Tensor
    clipped: Tensor
    old_kl: Tensor
    gradients: tuple[Tensor, ...]
    kl: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        outputs = (self.loss, self.log_ratio, self.clipped, self.old_kl, *self.gradients)
        return [*outputs] if self.kl is None else [*outputs, self.kl]

    def __eq__(self, other: object) -> bool:
        """The same bits."""
        assert isinstance(other, Result)
        pairs = zip(self.tensors(), other.tensors(), strict=True)
        return all(torch.equal(ours, theirs) for ours, theirs in pairs)


def factors(loss: Tensor) -> Tensor:
    """Factors of rows that are not reduced, no two the same."""
    return torch.arange(1, len(loss) + 1, device=loss.device, dtype=loss.dtype)


def total(loss: Tensor) -> Tensor:
    return (loss * factors(loss)).sum() if loss.dim() else loss


def run(rows: Rows, table: StepTable, impl: str, given: Source | None = None, **asked) -> Result:
    """`policy_loss` with its gradients; from the stored noise unless another source is given."""
    settings = Settings(**asked)
    given = given or Source(rows.old, rows.noise, rows.old, rows.noise)
    outputs = [rows.new.detach().requires_grad_()]
    guidance = kl = None
    if settings.guided:
        outputs.append(rows.uncond.detach().requires_grad_())
        guidance = Guidance(outputs[1], GUIDANCE)
    if settings.kl:
        kl = Reference(rows.ref, KL_WEIGHT if settings.kl == "number" else rows.kl_weights)
    out = policy_loss(
        outputs[0],
        given.old_model_output,
        given.noise,
        table,
        rows.step,
        rows.advantages,
        objective=settings.objective,
        clip_range=settings.clip_range,
        reduction=settings.reduction,
        row_reduction=settings.row_reduction,
        row_weights=rows.weights if settings.weighted else None,
        guidance=guidance,
        kl=kl,
        impl=impl,
    )
    gradients = torch.autograd.grad(total(out.loss), outputs)
    assert all(gradient.dtype == output.dtype for gradient, output in zip(gradients, outputs, strict=True))
    return Result(out.loss.detach(), out.log_ratio, out.clipped, out.old_kl, gradients, out.kl)


def run_oracle(rows: Rows, table: StepTable, impl: str = "torch", given: Source | None = None, **asked) -> Result:
    """The same by the textbook in float64; `loss` is per row, whatever the reduction. The guided output is the rounded
    one of `sampler_step`, with the gradient of the exact one."""
    settings = Settings(**asked)
    given = given or Source(rows.old, rows.noise, rows.old, rows.noise)
    outputs = [rows.new.detach().double().requires_grad_()]
    new = outputs[0]
    if settings.guided:
        outputs.append(rows.uncond.detach().double().requires_grad_())
        exact = outputs[1] + GUIDANCE * (new - outputs[1])
        step = (rows.new, rows.sample, table, rows.step, torch.zeros_like(rows.sample))
        rounded = sampler_step(*step, guidance=Guidance(rows.uncond, GUIDANCE), impl=impl).model_output
        new = exact + (rounded.double() - exact).detach()
    out = policy_loss_oracle(
        new,
        given.old,
        given.z,
        table.rows,
        rows.step,
        rows.advantages,
        table.weight,
        objective=settings.objective,
        clip_range=settings.pair,
        reduction=settings.reduction,
        row_weights=rows.weights if settings.weighted else None,
        ref_model_output=rows.ref if settings.kl else None,
        kl_weight=rows.kl_weights.double() if settings.kl == "per row" else KL_WEIGHT,
        normalized=table.normalized,
        interval=table.interval if table.guard else None,
    )
    loss = out.pop("loss")
    reduced = {"mean": loss.mean, "sum": loss.sum, "none": lambda: total(loss)}[settings.row_reduction]()
    gradients = torch.autograd.grad(reduced, outputs)
    return Result(loss.detach(), gradients=gradients, **{name: value.detach() for name, value in out.items()})


def clip_range_between(rows: Rows, table: StepTable, given: Source | None = None, **asked) -> tuple[float, float]:
    """A clip range whose bounds lie halfway between two rows' log-ratios, so that some rows are clipped and none is a
    close call; the bounds differ given four rows."""
    moved = run_oracle(rows, table, given=given, **asked).log_ratio.abs().sort().values
    middles = ((moved[:-1] + moved[1:]) / 2).clamp(min=1e-12).tolist() or [2 * float(moved[0])]
    return middles[len(middles) // 2], middles[(len(middles) - 1) // 2]


def check(got: Result, want: Result, rows: Rows, table: StepTable, given: Source | None = None, **asked) -> None:
    """Asserts that every output is the oracle's up to rounding. An objective's derivative is taken to be at most
    |A| max(1, rho), and to change by no more than that per unit of the log-ratio."""
    settings = Settings(**asked)
    given = given or Source(rows.old, rows.noise, rows.old, rows.noise)
    old_error, z_error = (
        error.flatten(1) if isinstance(error, Tensor) else error for error in (given.old_error, given.z_error)
    )
    numel, count = rows.new[0].numel(), len(rows.step)
    scale = 1 / numel if settings.reduction == "mean" else 1.0
    assert got.loss.dtype == got.log_ratio.dtype == got.old_kl.dtype == F32
    assert torch.equal(got.clipped, want.clipped)

    s, b = (column(table, name, rows.step) for name in ("std", "output_coef"))
    native = torch.where(s > 0, b / s, 0.0)
    weight, interval = table.weight[rows.step], table.interval[rows.step]
    slope = weight.abs() * (1 if table.normalized else 2 * s.square()) * (s if table.guard else 1)
    curvature = (torch.zeros_like(weight) if table.guard else weight.abs())[:, None]
    new = rows.new.double()
    if settings.guided:
        new = rows.uncond + GUIDANCE * (new - rows.uncond.double())
    e, z = (new - given.old.double()).flatten(1).abs(), given.z.double().flatten(1).abs()
    away = (new - rows.ref.double()).flatten(1).abs()

    terms = UNIT * (e * z + curvature * e.square()) + e * z_error + (z + curvature * e) * old_error
    error = slope * scale * terms.sum(1)
    assert ((got.log_ratio - want.log_ratio).abs() <= error).all()
    old_kl_error = UNIT * want.old_kl + scale * native.square() * (e * old_error).sum(1)
    assert ((got.old_kl - want.old_kl).abs() <= old_kl_error).all()

    # the loss adds the error of exp and of the sum over rows
    steepness = rows.advantages.double().abs() * want.log_ratio.exp().clamp(min=1)
    if table.guard:
        steepness = steepness / interval
    row_weights = rows.weights.double() if settings.weighted else torch.ones(count, device=s.device).double()
    kl_weights = torch.zeros_like(s)
    loss_error = steepness * (error + UNIT * (1 + max(settings.pair)))
    assert (got.kl is None) == (settings.kl is None)
    if settings.kl:
        assert ((got.kl - want.kl).abs() <= UNIT * want.kl).all()
        kl_weights = rows.kl_weights.double() if settings.kl == "per row" else kl_weights + KL_WEIGHT
        loss_error = loss_error + UNIT * kl_weights * want.kl
    loss_error = row_weights * loss_error
    reduce = {"mean": torch.mean, "sum": torch.sum, "none": lambda losses: losses}[settings.row_reduction]
    assert got.loss.shape == reduce(want.loss).shape
    assert ((got.loss - reduce(want.loss)).abs() <= reduce(loss_error)).all()

    # the direction and the gradient are rounded to the output's dtype, at worst towards 0 (as the interpreter does)
    share = {"mean": 1 / count, "sum": 1.0, "none": factors(want.loss)}[settings.row_reduction] * row_weights * scale
    storage = torch.finfo(rows.new.dtype)
    rounding = 2 * storage.eps + UNIT
    off = (rounding + error[:, None]) * (z + curvature * e) + z_error + curvature * old_error
    tolerance = (share * steepness * slope)[:, None] * off
    tolerance = tolerance + rounding * (share * kl_weights * native.square())[:, None] * away
    sides = (GUIDANCE, 1 - GUIDANCE) if settings.guided else (1.0,)
    for gradient, wanted, side in zip(got.gradients, want.gradients, sides, strict=True):
        allowed = abs(side) * (tolerance + storage.smallest_normal * storage.eps)
        assert ((gradient.double() - wanted).flatten(1).abs() <= allowed).all()
