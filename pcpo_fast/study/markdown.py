"""Markdown tables, and numbers as words with sensible digits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from pcpo_fast.study.frames import Study
from pcpo_fast.study.statistics import NEVER, Gain, Interval

NONE = "-"


def grid(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def fixed(value: float, digits: int = 3) -> str:
    """A number with so many decimals; a dash for one that is not finite."""
    return f"{value:.{digits}f}" if math.isfinite(value) else NONE


def significant(value: float, digits: int = 3) -> str:
    """A number with so many significant digits; a dash for one that is not finite."""
    return f"{value:.{digits}g}" if math.isfinite(value) else NONE


def signed(value: float) -> str:
    """A difference with its sign and four decimals, fewer where it is large."""
    if not math.isfinite(value):
        return NONE
    return f"{value:+.{2 if abs(value) >= 10 else 3 if abs(value) >= 1 else 4}f}"


def percent(share: float) -> str:
    """A share in percent with its sign, and a decimal below 1%."""
    if not math.isfinite(share):
        return "+∞" if share > 0 else NONE
    value = 100 * share
    shown = f"{value:+.{0 if abs(value) >= 1 else 1}f}"
    return "0" if float(shown) == 0 else shown


def show_rate(rate: float) -> str:
    """A learning rate: 2e-4."""
    mantissa, exponent = f"{rate:.3e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def words(key: str) -> str:
    """The name of a measure as words."""
    return key.replace("_", " ")


def spread(values: Sequence[float]) -> str:
    """The smallest and the largest of the values, or the one that they share."""
    if not values:
        return NONE
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def ranges(seeds: Iterable[int]) -> str:
    """Seeds with neighbours joined: 0-9, 12."""
    joined: list[list[int]] = []
    for seed in sorted(seeds):
        if joined and joined[-1][1] == seed - 1:
            joined[-1][1] = seed
        else:
            joined.append([seed, seed])
    return ", ".join(f"{low}" if low == high else f"{low}-{high}" for low, high in joined) or NONE


def document(title: str, text: str, study: Study, section: Callable[[str], list[str]]) -> str:
    """A page: its sentence, then a heading and blocks for every task that has any."""
    blocks = [f"# {title}", text]
    for task in study.tasks:
        found = section(task)
        blocks += [f"## {study.task_title(task)}", *found] if found else []
    if len(blocks) == 2:
        blocks.append("There is nothing to show yet.")
    return "\n\n".join(blocks) + "\n"


def bracket(interval: Interval, show: Callable[[float], str]) -> str:
    """The ends of an interval in brackets, after a space; nothing where there is no interval."""
    return f" [{show(interval.low)}, {show(interval.high)}]" if interval.known else ""


def show_gain(found: Gain) -> str:
    """A gain in percent with its interval, and the mark of a bound."""
    if not math.isfinite(found.gain.estimate) or found.verdict == NEVER:
        return NONE
    estimate = f"{found.bound} {percent(found.gain.estimate)}%".strip()
    return estimate + bracket(found.gain, percent)
