"""Checks that the samplers share. Every message says what was given, what is accepted and what to change."""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

# schemes that reweight the loss of any sampler, which `StepTable` applies itself
Scheme = Literal["native", "constant", "proportionate"]
# and one more that the builders of samplers know
Credit = Literal["native", "constant", "proportionate", "published"]


def abbreviate(numbers: Tensor | Sequence[float]) -> str:
    """A list of numbers for a message: its first and last three."""
    shown = [f"{number:.6g}" for number in torch.as_tensor(numbers).flatten().tolist()]
    return f"[{', '.join(shown if len(shown) <= 6 else [*shown[:3], '...', *shown[-3:]])}]"


def check_choice(name: str, given: Any, choices: Any) -> None:
    """Raises ValueError unless `given` is one of the strings of the Literal `choices`."""
    if not isinstance(given, str) or given not in get_args(choices):
        raise ValueError(f"{name}={reprlib.repr(given)} is not known; choose one of {', '.join(get_args(choices))}")


def check_level(credit: str, target_weight: float | None) -> None:
    """Raises ValueError for a `target_weight` that is no credit, or that native credit would not use."""
    if target_weight is None:
        return
    if credit == "native":
        raise ValueError(
            f"target_weight={target_weight} has no meaning with credit='native'; leave it out or choose another credit"
        )
    if not (math.isfinite(target_weight) and target_weight > 0):
        raise ValueError(f"target_weight={target_weight} is not a credit; give a finite number > 0")


def checked_numbers(name: str, given: Any, shape: str) -> Tensor:
    """`given` in float64 on the CPU; `shape` says in a message what is wanted.

    Raises:
        ValueError: for anything but numbers, with the right door for a scheduler.
    """
    if hasattr(given, "set_timesteps"):
        raise ValueError(
            f"{name} is a {type(given).__name__}; build the table of a scheduler with StepTable.from_scheduler"
        )
    try:
        # a device may not have float64
        given = given.detach().cpu() if isinstance(given, Tensor) else given
        return torch.as_tensor(given, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} is a {type(given).__name__}, not numbers; give {shape}") from error


def checked_steps(steps: Iterable[int], num_steps: int) -> list[int]:
    """Step indices as ints.

    Raises:
        ValueError: for a step that is no whole number, or not in the table.
    """
    if not isinstance(steps, Iterable) or isinstance(steps, str):
        raise ValueError(f"steps={reprlib.repr(steps)} is not a list of step indices; give one, such as [0, 3, 4]")
    found = []
    for step in steps:
        truth = isinstance(step, bool) or getattr(step, "dtype", None) == torch.bool
        try:
            index = -1 if truth else operator.index(step)
        except TypeError:
            index = -1
        if not 0 <= index < num_steps:
            raise ValueError(
                f"steps has {reprlib.repr(step)}, which is no step; choose whole numbers from 0 to {num_steps - 1}"
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
    if not pair or any(not isinstance(step, int) or isinstance(step, bool) for step in window):
        raise ValueError(f"window={reprlib.repr(window)} is not a pair of whole numbers; give (start, stop)")
    start, stop = window
    if not 0 <= start <= stop <= num_steps:
        raise ValueError(
            f"window={tuple(window)} does not lie in the table; give (start, stop) with 0 <= start <= stop <= "
            f"{num_steps}"
        )
    return range(start, stop)
