"""Per-step diagnostics of a study's runs, and the map of credit: what the tables and the figures both show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pcpo_fast.study.frames import Array, Cell, Study, numbers
from pcpo_fast.study.statistics import finite_mean


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
    """Credit from the gradients that the runs of a cell measured before training, means over its seeds, (T,) each."""

    cell: Cell
    native: Array
    signal: Array
    variance: Array
    share: Array
    """<signal, policy gradient> / variance, at least 0, with the sum of the native credit."""
    gains: dict[str, float]
    """How far an update with credit w goes along the policy gradient, over the length of its noise; 1 is the most."""


def measured_shares(study: Study, task: str) -> Shares | None:
    """The share of every step that follows for the base model of a task; None where no run has measured it."""
    for cell in diagnosed(study, task):
        starts = {seed: run["gradients"][0] for seed, run in cell.runs.items() if run.get("gradients")}
        starts = {seed: row for seed, row in starts.items() if row["epoch"] == 0 and "gram" in row}
        if starts:
            keys = ("native_weight", "variance", "gram")
            native, variance, gram = (
                np.array([row[key] for row in starts.values()], np.float64).mean(axis=0) for key in keys
            )
            measured = Cell(cell.algorithm, cell.learning_rate, {seed: cell.runs[seed] for seed in starts})
            return _shares(measured, native, variance, gram)
    return None


def _shares(cell: Cell, native: Array, variance: Array, gram: Array) -> Shares:
    along = np.maximum(gram @ native, 0.0)
    share = np.divide(along, variance, out=np.zeros_like(along), where=variance > 0)
    share *= native.sum() / share.sum()

    def gain(weight: Array) -> float:
        return float(weight @ (gram @ native) / math.sqrt(weight**2 @ variance))

    signal = np.sqrt(np.maximum(gram.diagonal(), 0.0))
    gains = {"native": gain(native) / gain(share), "constant": gain(np.where(variance > 0, 1.0, 0.0)) / gain(share)}
    return Shares(cell, native, signal, variance, share, gains)


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
