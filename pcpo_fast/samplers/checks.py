"""Checks that the samplers share. Every message says what was given, what is accepted and what to change."""

from __future__ import annotations

import numbers
import operator
import reprlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeGuard

import numpy as np
import torch
from torch import Tensor

# schemes that reweight the loss of any sampler, which `StepTable` applies itself
Scheme = Literal["native", "constant", "proportionate"]
# and one more that the builders of samplers know
Credit = Literal["native", "constant", "proportionate", "published"]

# steps of a table that nobody asks for on purpose
LARGEST_COUNT = 100_000
# the ops compute in float32
LARGEST = torch.finfo(torch.float32).max


def shown(value: Any) -> str:
    """A value for a message: one short line, whatever it is."""
    try:
        return " ".join(reprlib.repr(value).split())
    except ValueError:
        return "a number of thousands of digits"


def abbreviate(values: Tensor | Sequence[float]) -> str:
    """A list of numbers for a message: its first and last three."""
    found = [f"{number:.6g}" for number in torch.as_tensor(values).flatten().tolist()]
    return f"[{', '.join(found if len(found) <= 6 else [*found[:3], '...', *found[-3:]])}]"


def is_finite(given: Any) -> TypeGuard[float]:
    """Whether `given` is a number, and finite in float32; True and False are none."""
    real = isinstance(given, numbers.Real) and not isinstance(given, bool)
    return real and -LARGEST <= given <= LARGEST  # pyright: ignore[reportOperatorIssue]


def whole_number(given: Any) -> int | None:
    """`given` as an int; None where it is no whole number. True and False are none."""
    truth = isinstance(given, bool) or getattr(given, "dtype", None) == torch.bool
    try:
        return None if truth else operator.index(given)
    except (TypeError, ValueError, RuntimeError):
        return None


def check_choice(name: str, given: Any, choices: Sequence[str], more: str = "") -> None:
    """Raises ValueError unless `given` is one of the strings `choices`; `more` is said after these."""
    if not isinstance(given, str) or given not in choices:
        raise ValueError(f"{name}={shown(given)} is not known; choose one of {', '.join(choices)}{more}")


def check_flag(name: str, given: Any) -> None:
    """Raises TypeError unless `given` is True or False."""
    if not isinstance(given, bool):
        raise TypeError(f"{name}={shown(given)} is a {type(given).__name__}; give True or False")


def checked_count(name: str, given: Any) -> int:
    """A number of steps.

    Raises:
        ValueError: for anything else.
    """
    count = whole_number(given)
    if count is None or not 1 <= count <= LARGEST_COUNT:
        raise ValueError(f"{name}={shown(given)} must be a whole number of at least 1 and at most {LARGEST_COUNT}")
    return count


def checked_level(credit: str, target_weight: float | None) -> float | None:
    """`target_weight` as a float, if there is one.

    Raises:
        ValueError: if it is no credit, or native credit would not use it.
    """
    if target_weight is None:
        return None
    if credit == "native":
        raise ValueError(
            f"target_weight={shown(target_weight)} has no meaning with credit='native'; leave it out or choose another "
            "credit"
        )
    if not (is_finite(target_weight) and target_weight > 0):
        raise ValueError(f"target_weight={shown(target_weight)} is not a credit; give a finite number > 0")
    return float(target_weight)


def checked_numbers(
    name: str,
    given: Any,
    shape: str,
    *,
    dtype: torch.dtype | None = torch.float64,
    device: torch.device | str | None = "cpu",
) -> Tensor:
    """Real numbers as a tensor that nobody else holds; `shape` says in a message what is wanted.

    Raises:
        ValueError: for anything but numbers, with the right door for a scheduler.
    """
    if hasattr(given, "set_timesteps"):
        raise ValueError(
            f"{name} is a {type(given).__name__}; build the table of a scheduler with StepTable.from_scheduler"
        )
    kind = type(given).__name__
    try:
        if isinstance(given, Tensor):
            kind += f" of {given.dtype}"
            plain = given.layout == torch.strided and not given.is_meta
            real = plain and given.dtype != torch.bool and not given.is_complex()
            # the device first: this one may not have float64
            given = given.detach().to(device or given.device)
        else:
            real = np.asarray(given).dtype.kind in "iuf"
        if not real:
            raise TypeError
        return torch.as_tensor(given, dtype=dtype, device=device).clone()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{name} is a {kind}, not real numbers; give {shape}") from error


def checked_steps(steps: Iterable[int], num_steps: int) -> list[int]:
    """Step indices as ints.

    Raises:
        ValueError: for a step that is no whole number, or not in the table.
    """
    # a tensor of one number says that it can be iterated, and cannot
    if not isinstance(steps, Iterable) or isinstance(steps, str) or getattr(steps, "ndim", 1) == 0:
        raise ValueError(f"steps={shown(steps)} is not a list of step indices; give one, such as [0, 3, 4]")
    found = []
    for step in steps:
        index = whole_number(step)
        if index is None or not 0 <= index < num_steps:
            raise ValueError(
                f"steps has {shown(step)}, which is no step; choose whole numbers from 0 to {num_steps - 1}"
            )
        found.append(index)
    return found


def stochastic_steps(
    steps: Iterable[int] | None, window: tuple[int, int] | None, num_steps: int
) -> Iterable[int] | None:
    """The steps that stay stochastic; None for all of them.

    Raises:
        ValueError: for both a list and a window, and for a window that is no pair or does not lie in the table.
    """
    if window is None:
        return steps
    if steps is not None:
        raise ValueError("window and steps were both given; a window is a range of steps, so give one of the two")
    pair = isinstance(window, (tuple, list)) and len(window) == 2
    if not pair or any(whole_number(step) is None for step in window):
        raise ValueError(f"window={shown(window)} is not a pair of whole numbers; give (start, stop)")
    start, stop = window
    if not 0 <= start <= stop <= num_steps:
        raise ValueError(
            f"window={shown(tuple(window))} does not lie in the table; give (start, stop) with 0 <= start <= stop <= "
            f"{num_steps}"
        )
    return range(start, stop)
