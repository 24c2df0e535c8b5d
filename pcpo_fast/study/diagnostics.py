"""Per-step diagnostics of a study's runs, and the map of credit: what the tables and the figures both show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pcpo_fast.study.frames import Array, Cell, Study, numbers
from pcpo_fast.study.statistics import Interval, finite_mean, mean_interval


def last_reward(cell: Cell) -> float:
    """The mean over seeds of the reward at the last evaluation."""
    return finite_mean(curve["reward"][-1] for curve in cell.curves.values())


def map_points(study: Study, task: str) -> dict[float, dict[tuple[float, float], Cell]]:
    """The cells of the map by (p, q), for every learning rate that an algorithm with `credit_powers` has run.

    Native and constant credit come from algorithms that differ from those in credit only, or else from the first that
    has run, and keep the seeds of the map only.
    """
    rest = {"title", "credit", "credit_powers"}
    settings = {
        name: {key: value for key, value in algorithm.items() if key not in rest}
        for name, algorithm in study.algorithms.items()
    }
    explicit = [name for name in settings if study.algorithms[name].get("credit_powers") is not None]
    rates = sorted({run["learning_rate"] for run in study.runs if run["task"] == task and run["algorithm"] in explicit})
    maps: dict[float, dict[tuple[float, float], Cell]] = {}
    for rate in rates:
        cells = {name: study.cell(task, name, rate) for name in settings if study.powers(name) is not None}
        cells = {name: cell for name, cell in cells.items() if cell.curves}
        seeds = {seed for name in explicit if name in cells for seed in cells[name].curves}
        # explicit powers first, then algorithms that differ from them in credit only
        kin = [settings[name] for name in explicit]
        order = sorted(cells, key=lambda name: (name not in explicit, settings[name] not in kin))
        points: dict[tuple[float, float], Cell] = {}
        for name in order:
            runs = {seed: run for seed, run in cells[name].runs.items() if seed in seeds}
            powers = study.powers(name)
            if runs and powers is not None:
                points.setdefault(powers, Cell(name, rate, runs))
        if seeds:
            maps[rate] = points
    return maps


def diagnosed(study: Study, task: str) -> list[Cell]:
    """The baseline and constant credit at their best rates, as far as they have run."""
    baseline = [cell for cell in study.best_cells(task) if cell.algorithm == study.baseline(task)]
    even = study.even_credit(task)
    return baseline + ([even] if even is not None else [])


def gradient_ends(cell: Cell) -> dict[int, dict[str, Array]]:
    """Signal and variance (T,) by epoch, the first and the last that all runs measured, means over seeds."""
    measured = [{row["epoch"]: row for row in run["gradients"]} for run in cell.runs.values() if run.get("gradients")]
    return _ends(measured, ("signal", "variance"))


@dataclass(frozen=True)
class Shares:
    """Credit from the gradients that the runs of a cell measured before training: one measurement per seed."""

    cell: Cell
    native: Array
    """(T,) the sampler's own weights."""
    variance: Array
    """(T,) of a step's gradient, mean over seeds."""
    along: Sequence[Interval]
    """<signal, policy gradient> of each step."""
    share: Array
    """(T,) `along` / variance, at least 0, with the sum of the native credit, from all seeds."""
    gains: Mapping[str, Interval]
    """By credit: how far its update goes along the policy gradient, over the length of its noise. The measured share of
    a seed comes from the other seeds: the noise that picks it is not the noise that judges it."""


def measured_shares(study: Study, task: str) -> Shares | None:
    """The share of every step that follows for the base model of a task; None where no run has measured it."""
    measured = []
    for cell in diagnosed(study, task):
        starts = {seed: run["gradients"][0] for seed, run in sorted(cell.runs.items()) if run.get("gradients")}
        starts = {seed: row for seed, row in starts.items() if row["epoch"] == 0 and "gram" in row}
        measured.append((len(starts), cell, starts))
    # the base model is the same for all: the cell with most seeds has measured it best
    count, cell, starts = max(measured, key=lambda found: found[0], default=(0, None, {}))
    if cell is None or not count:
        return None
    rows = [
        {key: np.array(row[key], np.float64) for key in ("native_weight", "variance", "gram")}
        for row in starts.values()
    ]
    native = rows[0]["native_weight"]
    along, variance = np.array([row["gram"] @ native for row in rows]), np.array([row["variance"] for row in rows])

    def gain(weight: Array, seed: int) -> float:
        return float(weight @ along[seed] / math.sqrt(weight**2 @ variance[seed]))

    credit = {"native": [native] * count, "constant": [np.where(variance[0] > 0, 1.0, 0.0)] * count}
    if count > 1:
        others = [np.arange(count) != seed for seed in range(count)]
        credit["measured"] = [_share(native, along[rest], variance[rest]) for rest in others]
    return Shares(
        Cell(cell.algorithm, cell.learning_rate, {seed: cell.runs[seed] for seed in starts}),
        native,
        variance.mean(axis=0),
        [mean_interval(column) for column in along.T],
        _share(native, along, variance),
        {name: mean_interval(numbers(map(gain, weights, range(count)))) for name, weights in credit.items()},
    )


def _share(native: Array, along: Array, variance: Array) -> Array:
    """The share (T,) that follows from (N, T) measurements; the native one where no step has a signal."""
    signal, noise = np.maximum(along.mean(axis=0), 0.0), variance.mean(axis=0)
    share = np.divide(signal, noise, out=np.zeros_like(signal), where=noise > 0)
    return share * (native.sum() / share.sum()) if share.any() else native


def timesteps_of(cell: Cell, count: int) -> list[str]:
    """The timesteps of `count` steps as words, or the steps' numbers where none were recorded."""
    for run in cell.runs.values():
        for row in run.get("steps") or ():
            if len(row["timesteps"]) == count:
                return [f"{timestep:.0f}" for timestep in row["timesteps"]]
    return [f"step {index}" for index in range(count)]


def step_ends(cell: Cell) -> dict[int, dict[str, Array]]:
    """Clip fraction and gradient norm (T,) by epoch, the first and the last in all runs, means over seeds."""
    recorded = [{row["epoch"]: row for row in run["steps"]} for run in cell.runs.values() if run.get("steps")]
    return _ends(recorded, ("clip_fraction", "gradient_norm_mean"))


def _ends(recorded: Sequence[Mapping[int, Mapping[str, Any]]], keys: Sequence[str]) -> dict[int, dict[str, Array]]:
    common = sorted(set.intersection(*(set(rows) for rows in recorded))) if recorded else []
    ends = sorted({common[0], common[-1]} if common else ())
    return {
        epoch: {
            key: numbers(map(finite_mean, zip(*(numbers(rows[epoch][key]) for rows in recorded), strict=False)))
            for key in keys
        }
        for epoch in ends
    }
