"""The claims of a study file against what was measured: one table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pcpo_fast.study.frames import Cell, Run, Study, numbers
from pcpo_fast.study.markdown import NONE, bracket, fixed, grid, show_gain, show_rate, signed, words
from pcpo_fast.study.measures import COSTS, QUALITY, TAYLOR
from pcpo_fast.study.statistics import MIN_SEEDS, gain_of, matched_differences, mean_interval

TEXT = (
    "Every claim that the study file names, on each of its tasks. A gain is the baseline's epochs (or seconds, or "
    "images) to the target reward over ours, minus 1. A difference is ours minus the baseline's, where each run first "
    "reaches the target reward. Both are means over seeds with 95% bootstrap intervals, paired by seed, not adjusted "
    "for the number of claims; ≥ and ≤ mark bounds, where only one of the two never reaches the target in some runs, "
    "and ~ that both do. The other tables have all targets, rates and measures."
)


def claims(study: Study) -> str:
    """The claims as Markdown."""
    rows = [row for claim in study.claims for row in _rows(study, claim)]
    header = ["claim", "stated", "task", "compared", "seeds", "measured", "verdict"]
    table = grid(header, rows) if rows else "The study file names no claims."
    return "\n\n".join(["# Claims", TEXT, table]) + "\n"


def _rows(study: Study, claim: Mapping[str, Any]) -> Iterator[list[str]]:
    stated = [claim["claim"], claim.get("stated") or NONE]
    for task in claim["tasks"]:
        pairs = _pairs(study, claim, task)
        found = [_found(study, task, claim["measure"], pair) for pair in pairs]
        for cells in found or [["no finished runs", NONE, NONE, NONE]]:
            yield [*stated, study.task_title(task), *cells]
            # a text that repeats is shown once
            stated = ["", ""]


def _pairs(study: Study, claim: Mapping[str, Any], task: str) -> list[tuple[Cell, Cell]]:
    """(baseline, ours), each at its best rate, or both at every rate that enough seeds have run."""
    theirs, ours = claim.get("against") or study.baseline(task) or "", claim["algorithm"]
    if claim["rates"] == "best":
        best = study.best.get((task, theirs)), study.best.get((task, ours))
        rates, least = [best], 1
    else:
        tried = {run["learning_rate"] for run in study.runs if run["task"] == task}
        rates, least = [(rate, rate) for rate in sorted(tried)], MIN_SEEDS
    pairs = [
        (study.cell(task, theirs, first), study.cell(task, ours, second))
        for first, second in rates
        if first is not None and second is not None
    ]
    return [pair for pair in pairs if len(pair[0].curves.keys() & pair[1].curves.keys()) >= least]


def _found(study: Study, task: str, measure: str, pair: tuple[Cell, Cell]) -> list[str]:
    """What was compared, over how many seeds, the finding with its interval, and the verdict."""
    target, (theirs, ours) = study.middle_target(task), pair
    compared = _named(study, ours)
    if measure == TAYLOR:
        interval = mean_interval(numbers(_largest(run) for run in ours.runs.values()))
        measured = fixed(100 * interval.estimate, 1) + "%" + bracket(interval, lambda value: f"{100 * value:.1f}")
        return [f"{compared}: the largest of a run", str(interval.n), measured, NONE]
    if target is None:
        return [compared, NONE, NONE, "the task has no target"]
    compared += f" against {_named(study, theirs)}, at {target:g}"
    if measure in COSTS:
        found = gain_of(pair, target, COSTS[measure])
        shown = show_gain(found)
        return [compared, str(found.gain.n), shown if shown == NONE else f"{shown} {measure}", found.verdict]
    interval = matched_differences(pair, target)[measure]
    sides = ("more", "less") if QUALITY[measure] == 0 else ("better", "worse")[:: QUALITY[measure]]
    measured = f"{signed(interval.estimate)}{bracket(interval, signed)} {words(measure)}"
    return [compared, str(interval.n), measured, interval.verdict(sides[0], sides[1])]


def _largest(run: Run) -> float | None:
    """The largest Taylor error of an epoch of a run; None if none was recorded."""
    return max((error for error in run["training"].get(TAYLOR, ()) if error is not None), default=None)


def _named(study: Study, cell: Cell) -> str:
    return f"{study.algorithm_title(cell.algorithm)} ({show_rate(cell.learning_rate)})"
