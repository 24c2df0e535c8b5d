"""The step table: a stochastic sampler as T rows of numbers, and the credit of each step.

Every sampler that policy-gradient alignment of diffusion models uses takes the affine Gaussian step

    x' = a x + b m + s z,    z ~ N(0, I)

with x the latent, m the model output and x' the next latent. A table holds (a, b, s) per step, in float64. The rest of
a row follows from them and from the credit, and is what the loss does with the step:

    log rho = -slope <e, z + curvature e / 2>,    loss = loss_scale f(log rho),    e = m_new - m_old

                      plain      not normalised      guard
    slope             w~         2 s^2 w~            s w~ (times 2 s^2 if not normalised)
    curvature         w~         w~                  0
    loss_scale        1          1                   1 / h

Here w~ is `weight`, the credit that the loss gives the step, and h is `interval`. The sampler's own credit is
`native_weight`, w = -b / s. Nothing after the table knows which sampler it came from, and any reweighting per step is a
table: no kernel changes.

Credit is compared between steps on the epsilon-equivalent output (Lee and Ye, arXiv 2509.25774): with v-prediction
epsilon = sqrt(at) v + ..., so e_epsilon = sqrt(at) e_v. `epsilon_scale` is that factor. For flow models it is 1: their
credit is compared on the velocity.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from pcpo_fast.columns import COLUMNS

from .checks import (
    Scheme,
    check_choice,
    check_flag,
    checked_level,
    checked_numbers,
    checked_steps,
    is_finite,
    shown,
    whole_number,
)
from .ddim import ddim_table
from .flow import flow_table
from .schedulers import from_scheduler

ONE_PER_STEP = "one number per step, (T,)"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class StepTable:
    """A sampler as a table of T steps, in the order in which they are taken. All tensors have shape (T,).

    `StepTable(timesteps, sample_coef, output_coef, std)` makes one; `ddim`, `flow` and `from_scheduler` build those of
    the usual samplers. `print(table)` shows a line per step. A table keeps the level that it resolved: for another
    credit use `dataclasses.replace(table, credit=..., target_weight=None)`.

    Args:
        timesteps: what the model is given at each step: int64 for diffusion, float32 for flow.
        sample_coef: a in x' = a x + b m + s z; kept in float64, like all columns.
        output_coef: b.
        std: s >= 0. A step with s = 0 is deterministic: it is sampled and never trained.
        credit: how the loss weighs the steps.
            "native": by the sampler's own weight -b / s (DDPO, DanceGRPO, Flow-GRPO).
            "constant": every trained step by `target_weight`, times `epsilon_scale`.
            "proportionate": every trained step by `target_weight` times `interval` (PCPO's rule for flow models).
            A tensor: by these weights.
        target_weight: the level for "constant" and "proportionate". None keeps the sampler's: the mean of its weights
            on the epsilon-equivalent output ("constant"), or their sum over the sum of the intervals ("proportionate").
        interval: h > 0, the share of the trajectory that each step covers. None is 1 / T.
        epsilon_scale: d(epsilon) / d(model output). None is 1. A step where it is 0 has no epsilon-equivalent output
            (zero terminal SNR): it is left out of the mean and keeps its native weight under "constant".
        normalized: whether a log-probability is the Gaussian's. False is -(x' - a x - b m)^2 without 1 / (2 s^2) and
            constants, as FlowCPS has it (Wang and Yu, arXiv 2509.05952).
        guard: the log-ratio and loss of GRPO-Guard (Wang et al., arXiv 2510.22319); see `guarded`.

    Attributes:
        rows: float32 (T, 8), contiguous, with the columns `pcpo_fast.columns.COLUMNS`: what the ops read.

    Raises:
        TypeError: for a `normalized` or `guard` that is not True or False.
        ValueError: for anything but real numbers, shapes that differ, a negative or non-finite entry, an unknown
            credit, a level without a scheme that uses it, a weight whose sign is not that of the native one, and for a
            table that does not fit into float32.
    """

    timesteps: Tensor
    sample_coef: Tensor
    output_coef: Tensor
    std: Tensor
    _: dataclasses.KW_ONLY
    credit: Scheme | Tensor = "native"
    target_weight: float | None = None
    interval: Tensor = None  # pyright: ignore[reportAssignmentType]
    epsilon_scale: Tensor = None  # pyright: ignore[reportAssignmentType]
    normalized: bool = True
    guard: bool = False
    rows: Tensor = dataclasses.field(init=False)

    ddim = staticmethod(ddim_table)
    flow = staticmethod(flow_table)
    from_scheduler = staticmethod(from_scheduler)

    def __post_init__(self) -> None:
        # a tensor stays where it is, whatever the default device
        place = self.timesteps.device if isinstance(self.timesteps, Tensor) else None
        timesteps = checked_numbers("timesteps", self.timesteps, ONE_PER_STEP, dtype=None, device=place)
        if timesteps.ndim != 1 or timesteps.numel() == 0:
            raise ValueError(
                f"timesteps has shape {tuple(timesteps.shape)}; give one number per step, (T,) with T >= 1"
            )
        if not bool(timesteps.isfinite().all()):
            raise ValueError("timesteps has an entry that is not finite; give finite numbers")
        self._set("timesteps", timesteps)
        for name in ("normalized", "guard"):
            check_flag(name, getattr(self, name))
        ones = torch.ones(len(timesteps), dtype=torch.float64, device=timesteps.device)
        defaults = {"interval": ones / len(timesteps), "epsilon_scale": ones}
        for name in ("sample_coef", "output_coef", "std", "interval", "epsilon_scale"):
            given = getattr(self, name)
            self._set(name, defaults[name] if given is None and name in defaults else self._column(name, given))
        if bool((self.std < 0).any()):
            raise ValueError(f"std has the negative entry {float(self.std.min()):.6g}; give s >= 0, 0 for no noise")
        if bool((self.interval <= 0).any()):
            raise ValueError(f"interval has the entry {float(self.interval.min()):.6g}; give h > 0 for every step")
        if isinstance(self.credit, str):
            self._set("target_weight", self._level(self.credit))
        else:
            if self.target_weight is not None:
                raise ValueError(
                    f"target_weight={shown(self.target_weight)} has no meaning beside a tensor of weights; leave it "
                    "out, or choose credit='constant'"
                )
            self._set("credit", self._column("credit", self.credit))
        turned = (self.weight * self.native_weight < 0).nonzero().flatten().tolist()
        if turned:
            weight, native = (float(column[turned[0]]) for column in (self.weight, self.native_weight))
            raise ValueError(
                f"credit gives step {turned[0]} the weight {weight:.6g} and the sampler {native:.6g}, and a loss with "
                "the other sign trains away from the reward; give weights with the sign of -b / s, or give "
                "epsilon_scale that sign"
            )
        columns = self._columns()
        rows = torch.stack([columns[name] for name in COLUMNS], dim=1).to(torch.float32).contiguous()
        lost = ~rows.isfinite().all(dim=1) | (self.trainable & (rows[:, COLUMNS.index("std")] == 0))
        beyond = lost.nonzero().flatten().tolist()
        if beyond:
            std, weight = (float(column[beyond[0]]) for column in (self.std, self.weight))
            raise ValueError(
                f"the table does not fit into float32 at step {beyond[0]} (std {std:.3g}, weight {weight:.3g}); give a "
                "noise level and weights of usual size"
            )
        self._set("rows", rows)

    @property
    def trainable(self) -> Tensor:
        """bool (T,): the steps that draw noise, s > 0."""
        return self.std > 0

    @property
    def native_weight(self) -> Tensor:
        """float64 (T,): w = -b / s, the sampler's own credit on the model output; 0 where s = 0."""
        return torch.where(self.trainable, -self.output_coef / self.std, 0.0)

    @property
    def weight(self) -> Tensor:
        """float64 (T,): w~, the credit that the loss gives each step; 0 where s = 0."""
        if isinstance(self.credit, Tensor):
            assigned = self.credit
        elif self.target_weight is None:
            return self.native_weight
        elif self.credit == "constant":
            level = self.target_weight * self.epsilon_scale
            assigned = torch.where(self.epsilon_scale != 0, level, self.native_weight)
        else:
            assigned = self.target_weight * self.interval
        return torch.where(self.trainable, assigned, 0.0)

    @property
    def epsilon_weight(self) -> Tensor:
        """float64 (T,): `weight` on the epsilon-equivalent output, where the credit of steps is compared; NaN where
        there is none."""
        return torch.where(self.epsilon_scale != 0, self.weight / self.epsilon_scale, math.nan)

    @property
    def log_prob_scale(self) -> Tensor:
        """float64 (T,): k of an element's log-probability log_prob_offset - k z^2 / 2; 2 s^2 if not `normalized`."""
        return torch.ones_like(self.std) if self.normalized else 2 * self.std**2

    @property
    def log_prob_offset(self) -> Tensor:
        """float64 (T,): -(log s + log(2 pi) / 2); 0 if not `normalized`, and where s = 0."""
        offset = -self.std.log() - math.log(2 * math.pi) / 2
        return torch.where(self.trainable & self.normalized, offset, 0.0)

    def __len__(self) -> int:
        return len(self.timesteps)

    def __getitem__(self, steps: int | slice) -> StepTable:
        """The table of one step, or of a slice of them, with the weights that they have here.

        A `NoiseKey` draws other noise from it than from the whole, since a counter depends on step and length.
        """
        if not isinstance(steps, slice):
            index = whole_number(steps)
            if index is None:
                raise TypeError(f"{shown(steps)} is no step of a table; give a whole number, or a slice")
            if not -len(self) <= index < len(self):
                # ends a loop over the table, too
                raise IndexError(f"step {shown(index)} is not in the table; it has {len(self)} steps")
            steps = slice(index % len(self), index % len(self) + 1)
        columns: dict[str, Any] = {name: getattr(self, name)[steps] for name in _TENSORS}
        # the level of a scheme is a number by now, and stays
        credit = self.credit if isinstance(self.credit, str) else self.credit[steps]
        return dataclasses.replace(self, **columns, credit=credit)

    def __str__(self) -> str:
        lines = [f"{'step':>4} {'timestep':>9} {'std':>9} {'native weight':>14} {'weight':>9}"]
        columns = (column.tolist() for column in (self.timesteps, self.std, self.native_weight, self.weight))
        for step, (timestep, std, native, weight) in enumerate(zip(*columns, strict=True)):
            lines.append(f"{step:>4} {timestep:>9.6g} {std:>9.5f} {native:>14.5f} {weight:>9.5f}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        credit = self.credit if isinstance(self.credit, str) else "given"
        return f"<StepTable of {len(self)} steps, {int(self.trainable.sum())} with noise, credit {credit}>"

    def to(self, device: torch.device | str) -> StepTable:
        """The same table, bit for bit, with every tensor on `device`.

        Raises:
            TypeError: for a dtype, since a table keeps its own, and for anything but a device.
            ValueError: for a name that is no device's.
        """
        if isinstance(device, torch.dtype):
            raise TypeError(f"a table keeps its own dtypes and was given {device}; give a device alone")
        if not isinstance(device, str | torch.device):
            raise TypeError(
                f"device={shown(device)} is a {type(device).__name__}; give one such as 'cuda', or tensor.device"
            )
        try:
            device = torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"device={shown(device)} does not exist; give one such as 'cuda' or 'cpu'") from error
        moved = copy.copy(self)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                moved._set(field.name, value.to(device))
        return moved

    def index(self, timesteps: Tensor | Sequence[float] | float) -> Tensor:
        """The step indices of some timesteps, for trainers that carry timesteps; int64 of the same shape, on the
        table's device. Waits for a GPU.

        Raises:
            ValueError: for a timestep that is not in the table, or occurs in it more than once.
        """
        given = checked_numbers("timesteps", timesteps, "those of some steps", dtype=None, device=self.timesteps.device)
        same = given[..., None] == self.timesteps.to(torch.promote_types(given.dtype, self.timesteps.dtype))
        count = same.sum(dim=-1)
        if bool((count == 0).any()):
            missing = given[count == 0].flatten()[0].item()
            nearest = self.timesteps[(self.timesteps.double() - missing).abs().argmin()].item()
            raise ValueError(
                f"timestep {missing:.8g} is not in the table, whose nearest one is {nearest:.8g}; give timesteps as "
                "the table has them, unrounded"
            )
        if bool((count > 1).any()):
            twice = given[count > 1].flatten()[0].item()
            raise ValueError(f"timestep {twice:.8g} occurs more than once in the table; give step indices")
        return same.int().argmax(dim=-1)

    def guarded(self) -> StepTable:
        """The table with GRPO-Guard's log-ratio and loss (Wang et al., arXiv 2510.22319), for objective "ppo".

        The log-ratio loses the shift of the mean and gains the step's scale, log rho = -s w~ <e, z>, and the loss is
        divided by the step's interval h.
        """
        return dataclasses.replace(self, guard=True)

    def for_means(self) -> StepTable:
        """The table for trainers that carry the step's mean mu = a x + b m in the place of the model output.

        There a = 0, b = 1 and x' = mu + s z; weights are those of the same steps on the mean, w~ / b.

        Raises:
            ValueError: for a trained step with b = 0, whose mean does not depend on the model output.
        """
        if bool((self.trainable & (self.output_coef == 0)).any()):
            raise ValueError("output_coef is 0 at a step with noise: its mean does not depend on the model output")
        b = torch.where(self.output_coef == 0, 1.0, self.output_coef)
        return dataclasses.replace(
            self,
            sample_coef=torch.zeros_like(b),
            output_coef=torch.ones_like(b),
            credit=self.weight / b,
            target_weight=None,
            epsilon_scale=self.epsilon_scale / b,
        )

    @staticmethod
    def cat(tables: Iterable[StepTable]) -> StepTable:
        """The rows of several tables one after another, for batches of images of several sizes: step k of table i is
        step k plus the lengths of the tables before it. A `NoiseKey` draws other noise from it than from its parts,
        since a counter depends on the length of the table.

        Raises:
            TypeError: for anything but tables.
            ValueError: for no table, and for tables that differ in `normalized` or `guard`.
        """
        if isinstance(tables, Tensor) or not isinstance(tables, Iterable):
            raise TypeError(f"tables is a {type(tables).__name__}; give a list of StepTable")
        tables = list(tables)
        if not tables:
            raise ValueError("tables is empty: there is no table to concatenate; give at least one")
        for table in tables:
            check_table("tables", table)
        for name in ("normalized", "guard"):
            if len({getattr(table, name) for table in tables}) > 1:
                raise ValueError(f"the tables differ in {name}; build all of them with the same")
        columns: dict[str, Any] = {name: torch.cat([getattr(table, name) for table in tables]) for name in _TENSORS}
        weight = torch.cat([table.weight for table in tables])
        return StepTable(**columns, credit=weight, normalized=tables[0].normalized, guard=tables[0].guard)

    def with_noise_only(self, steps: Iterable[int], deterministic: StepTable) -> StepTable:
        """The rows of this table for `steps`, and those of `deterministic`, its twin without noise, for all others.

        The steps that keep their noise keep their weight.

        Raises:
            TypeError: if `deterministic` is no table.
            ValueError: for a step that is no whole number or not in the table, and for another number of steps.
        """
        check_table("deterministic", deterministic)
        if len(deterministic) != len(self):
            raise ValueError(f"deterministic has {len(deterministic)} steps and the table {len(self)}; make them equal")
        chosen = torch.zeros_like(self.trainable)
        chosen[checked_steps(steps, len(self))] = True
        names = ("sample_coef", "output_coef", "std")
        columns: dict[str, Any] = {
            name: torch.where(chosen, getattr(self, name), getattr(deterministic, name)) for name in names
        }
        return dataclasses.replace(self, **columns)

    def _columns(self) -> dict[str, Tensor]:
        """Every column of `rows` in float64."""
        weight, scale = self.weight, self.log_prob_scale
        return {
            "sample_coef": self.sample_coef,
            "output_coef": self.output_coef,
            "std": self.std,
            "slope": scale * weight * self.std if self.guard else scale * weight,
            "curvature": torch.zeros_like(weight) if self.guard else weight,
            "loss_scale": 1 / self.interval if self.guard else torch.ones_like(weight),
            "log_prob_scale": scale,
            "log_prob_offset": self.log_prob_offset,
        }

    def _level(self, credit: str) -> float | None:
        """The resolved `target_weight` of a scheme; None where no step would use it."""
        check_choice("credit", credit, get_args(Scheme), ", or a tensor")
        own, given = self._own_level(credit), self.target_weight
        # a model that puts out x0 - epsilon, say, has b > 0, and its level is negative
        checked_level(credit, abs(given) if own is not None and own < 0 and is_finite(given) else given)
        return own if given is None else float(given)

    def _own_level(self, credit: str) -> float | None:
        """The sampler's own level; None where no step would use it."""
        if credit == "native":
            return None
        counted = self.trainable & (self.epsilon_scale != 0)
        if not bool(counted.any()):
            return None
        weight = self.native_weight[counted]
        if credit == "constant":
            return float((weight / self.epsilon_scale[counted]).mean())
        return float(weight.sum() / self.interval[counted].sum())

    def _column(self, name: str, values: Any) -> Tensor:
        column = checked_numbers(name, values, ONE_PER_STEP, device=self.timesteps.device)
        if column.shape != self.timesteps.shape:
            raise ValueError(
                f"{name} has shape {tuple(column.shape)} and timesteps {tuple(self.timesteps.shape)}; give one number "
                "per step"
            )
        if not bool(column.isfinite().all()):
            raise ValueError(f"{name} has an entry that is not finite; give finite numbers")
        return column

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def check_table(name: str, value: Any) -> None:
    """Raises TypeError for anything but a table."""
    if not isinstance(value, StepTable):
        raise TypeError(
            f"{name} is a {type(value).__name__}; give a StepTable, such as StepTable.from_scheduler(...) makes"
        )


_TENSORS = ("timesteps", "sample_coef", "output_coef", "std", "interval", "epsilon_scale")
