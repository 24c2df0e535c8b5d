"""The contents of study.json: its runs and evaluations as tables, and the runs that are compared with each other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pcpo_fast.study.measures import COSTS, QUALITY, best_learning_rate, is_sweep, reward_at_quality

RUN_KEYS = ("part", "task", "algorithm", "learning_rate", "seed")
EVALUATION_KEYS = (*COSTS.values(), "reward", *QUALITY, "pixel_shift")

Array = NDArray[np.float64]
Run = Mapping[str, Any]
# the columns of a run's evaluations, one number per evaluation, NaN where there is none
Curve = dict[str, Array]


def numbers(values: Iterable[float | None]) -> Array:
    """A float64 array of the values, NaN for None."""
    return np.array([math.nan if value is None else value for value in values], np.float64)


def curve_of(run: Run) -> Curve:
    """The evaluations of a run as columns, in order of epochs, without those that have no finite reward."""
    evaluations = sorted(run.get("evaluations") or [], key=lambda row: row["epoch"])
    rows = [row for row in evaluations if row.get("reward") is not None and math.isfinite(row["reward"])]
    return {key: numbers(row.get(key) for row in rows) for key in EVALUATION_KEYS}


def run_frame(study: Mapping[str, Any]) -> pd.DataFrame:
    """One row per finished run of study.json: what identifies it, its last epoch, and its last finite reward."""
    rows = []
    for run in _finished(study):
        curve = curve_of(run)
        last = {f"last_{key}": curve[key][-1] if len(curve[key]) else math.nan for key in ("epoch", "reward")}
        rows.append({**{key: run.get(key) for key in RUN_KEYS}, **last})
    return pd.DataFrame(rows, columns=pd.Index([*RUN_KEYS, "last_epoch", "last_reward"]))


def evaluation_frame(study: Mapping[str, Any]) -> pd.DataFrame:
    """One row per evaluation of the finished runs of study.json; NaN where a number was not finite."""
    frames = [pd.DataFrame({**{key: run.get(key) for key in RUN_KEYS}, **curve_of(run)}) for run in _finished(study)]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=[*RUN_KEYS, *EVALUATION_KEYS])


@dataclass(frozen=True)
class Cell:
    """The runs of one algorithm at one learning rate on one task."""

    algorithm: str
    learning_rate: float
    runs: Mapping[int, Run]
    """By seed."""
    swept: bool = False
    """Whether they are the sweep's."""

    @cached_property
    def curves(self) -> dict[int, Curve]:
        """By seed; runs without any evaluation are left out."""
        curves = {seed: curve_of(run) for seed, run in sorted(self.runs.items())}
        return {seed: curve for seed, curve in curves.items() if len(curve["reward"])}


@dataclass(frozen=True)
class SweptRate:
    """One learning rate of the sweep: means over seeds, and whether it is the one that the others are judged by."""

    learning_rate: float
    rewards: Mapping[int, float | None]
    """`reward_at_quality` by seed."""
    mean: float
    """The mean of `rewards`; minus infinity if a seed has none."""
    final_reward: float
    best: bool
    place: str
    """Whether the best rate lies "inside the sweep" or "at the edge", "the only rate" swept; empty for other rates."""


@dataclass(frozen=True)
class Study:
    """study.json with its questions answered: titles, baselines, targets, and the runs that belong together."""

    file: Mapping[str, Any]
    runs: tuple[Run, ...]

    @classmethod
    def of(cls, study: Mapping[str, Any]) -> Study:
        """The study of the contents of study.json; runs that are not finished are left out."""
        return cls(study.get("file") or {}, tuple(_finished(study)))

    @property
    def tasks(self) -> dict[str, Mapping[str, Any]]:
        return {name: task or {} for name, task in (self.file.get("tasks") or {}).items()}

    @property
    def algorithms(self) -> dict[str, Mapping[str, Any]]:
        return {name: settings or {} for name, settings in (self.file.get("algorithms") or {}).items()}

    @property
    def parts(self) -> dict[str, Mapping[str, Any]]:
        return {name: part or {} for name, part in (self.file.get("parts") or {}).items()}

    @property
    def claims(self) -> list[Mapping[str, Any]]:
        return self.file.get("claims") or []

    def task_title(self, task: str) -> str:
        return self.tasks[task].get("title") or task

    def algorithm_title(self, algorithm: str) -> str:
        return self.algorithms.get(algorithm, {}).get("title") or algorithm

    def baseline(self, task: str) -> str | None:
        return self.tasks[task].get("baseline")

    def targets(self, task: str) -> list[float]:
        """Target rewards of a task, rising."""
        return sorted(float(target) for target in self.tasks[task].get("targets") or [])

    def middle_target(self, task: str) -> float | None:
        targets = self.targets(task)
        return targets[len(targets) // 2] if targets else None

    def is_map_point(self, algorithm: str) -> bool:
        """Whether an algorithm is only a point of the map: it has `credit_powers`, and no title of its own."""
        settings = self.algorithms.get(algorithm, {})
        return settings.get("credit_powers") is not None and settings.get("title", algorithm) == algorithm

    def powers(self, algorithm: str) -> tuple[float, float] | None:
        """(p, q) of a credit proportional to |output_coef|^p std^q; None if the algorithm's credit is no such rule."""
        settings = self.algorithms.get(algorithm, {})
        if settings.get("credit_powers") is not None:
            p, q = settings["credit_powers"]
            return float(p), float(q)
        # the sampler's own weights are |output_coef| / std
        credit = settings.get("credit", "constant")
        return {"native": (1.0, -1.0), "constant": (0.0, 0.0)}.get(credit) if isinstance(credit, str) else None

    @cached_property
    def best(self) -> dict[tuple[str, str], float]:
        """The best learning rate by (task, algorithm): that of the sweep, or the only one of an algorithm not swept."""
        chosen = {}
        for task in self.tasks:
            for algorithm in self.algorithms:
                swept = [rate.learning_rate for rate in self.sweep(task, algorithm) if rate.best]
                if self._planned_sweep(task, algorithm) and not swept:
                    continue
                rates = swept or sorted({run["learning_rate"] for run in self._select(task, algorithm, swept=False)})
                if len(rates) == 1:
                    chosen[task, algorithm] = rates[0]
        return chosen

    def sweep(self, task: str, algorithm: str) -> list[SweptRate]:
        """The learning rates that the sweep has tried, rising; empty if it has no finished run.

        The best is the one with the highest mean over seeds of `reward_at_quality`; of equal ones the lowest. There is
        none before all of the sweep has finished.
        """
        if (task, algorithm) not in self._sweeps:
            self._sweeps[task, algorithm] = self._sweep(task, algorithm)
        return self._sweeps[task, algorithm]

    @cached_property
    def _sweeps(self) -> dict[tuple[str, str], list[SweptRate]]:
        return {}

    @cached_property
    def _grouped(self) -> dict[tuple[str, str], list[Run]]:
        groups: dict[tuple[str, str], list[Run]] = {}
        for run in self.runs:
            groups.setdefault((run["task"], run["algorithm"]), []).append(run)
        return groups

    def _sweep(self, task: str, algorithm: str) -> list[SweptRate]:
        limit = self.tasks[task].get("frechet_limit")
        runs = self._select(task, algorithm, swept=True)
        found: dict[float, dict[int, Run]] = {}
        for run in sorted(runs, key=lambda run: run["learning_rate"]):
            found.setdefault(run["learning_rate"], {})[run["seed"]] = run
        summary = []
        for rate, by_seed in found.items():
            rewards = {seed: reward_at_quality(run["evaluations"], limit) for seed, run in sorted(by_seed.items())}
            values = [-math.inf if reward is None else reward for reward in rewards.values()]
            curves = Cell(algorithm, rate, by_seed).curves.values()
            final = float(np.mean([curve["reward"][-1] for curve in curves])) if curves else math.nan
            summary.append((rate, rewards, float(np.mean(values)), final))
        if not summary:
            return []
        planned = self._planned_sweep(task, algorithm)
        whole = planned <= {(rate, seed) for rate, rewards, *_ in summary for seed in rewards}
        best = best_learning_rate(runs, limit) if whole else None
        edge = "at the edge" if len(summary) > 1 else "the only rate"
        place = edge if best in (summary[0][0], summary[-1][0]) else "inside the sweep"
        return [
            SweptRate(rate, rewards, mean, final, rate == best, place if rate == best else "")
            for rate, rewards, mean, final in summary
        ]

    def _planned_sweep(self, task: str, algorithm: str) -> set[tuple[float, int]]:
        """(learning rate, seed) of the runs that choose the best rate."""
        return {
            (float(rate), seed)
            for part in self._parts(swept=True)
            if task in part.get("tasks", ()) and algorithm in part.get("algorithms", ())
            for rate in part.get("learning_rates", ())
            for seed in part.get("seeds", ())
        }

    def cell(self, task: str, algorithm: str, learning_rate: float, swept: bool = False) -> Cell:
        """The compared runs of an algorithm at a rate, or those of the sweep."""
        runs = self._select(task, algorithm, swept)
        by_seed = {run["seed"]: run for run in runs if run["learning_rate"] == learning_rate}
        return Cell(algorithm, learning_rate, by_seed, swept)

    def best_cells(self, task: str) -> list[Cell]:
        """Each algorithm's compared runs at its best learning rate, the baseline first; points of the map left out."""
        baseline = self.baseline(task)
        names = sorted(self.algorithms, key=lambda name: name != baseline)
        cells = [
            self.cell(task, name, self.best[task, name])
            for name in names
            if (task, name) in self.best and not self.is_map_point(name)
        ]
        return [cell for cell in cells if cell.curves]

    def pairs_at_best(self, task: str) -> list[tuple[Cell, Cell]]:
        """(baseline, other) for every other algorithm, each at its own best rate; empty without baseline runs."""
        cells = self.best_cells(task)
        if not cells or cells[0].algorithm != self.baseline(task):
            return []
        return [(cells[0], cell) for cell in cells[1:]]

    def pairs_at_equal_rates(self, task: str) -> list[tuple[Cell, Cell]]:
        """(baseline, other) at every rate that both have run, by the runs of the sweep where no others were made."""
        baseline = self.baseline(task)
        if baseline is None:
            return []
        pairs = []
        for name in self.algorithms:
            if name == baseline or self.is_map_point(name):
                continue
            for rate in sorted({run["learning_rate"] for run in self.runs if run["task"] == task}):
                for swept in (False, True):
                    pair = self.cell(task, baseline, rate, swept), self.cell(task, name, rate, swept)
                    if pair[0].curves.keys() & pair[1].curves.keys():
                        pairs.append(pair)
                        break
        return pairs

    def even_credit(self, task: str) -> Cell | None:
        """The algorithm whose diagnostics are shown beside the baseline's: constant credit, or another."""
        others = [cell for cell in self.best_cells(task) if cell.algorithm != self.baseline(task)]
        return min(others, key=lambda cell: self.powers(cell.algorithm) != (0.0, 0.0), default=None)

    def planned(self, task: str, algorithm: str, learning_rate: float) -> set[int]:
        """Seeds that the parts of the study file plan for these runs."""
        return {
            seed
            for part in self.parts.values()
            if task in part.get("tasks", ()) and algorithm in part.get("algorithms", ())
            if self._has_rate(part, task, algorithm, learning_rate)
            for seed in part.get("seeds", ())
        }

    def _select(self, task: str, algorithm: str, swept: bool) -> list[Run]:
        runs = self._grouped.get((task, algorithm), [])
        return [run for run in runs if (self._in_sweep(run) if swept else self._is_compared(run))]

    def _in_sweep(self, run: Run) -> bool:
        return is_sweep(run["part"]) or any(self._in_part(run, part) for part in self._parts(swept=True))

    def _is_compared(self, run: Run) -> bool:
        # a run of two parts is made once, and names the first of them; "best" is not asked here, as it asks in turn
        best, others = [], []
        for part in self._parts(swept=False):
            (best if part.get("learning_rates") == "best" else others).append(part)
        if not is_sweep(run["part"]) or any(self._in_part(run, part) for part in others):
            return True
        swept = [rate.learning_rate for rate in self.sweep(run["task"], run["algorithm"]) if rate.best] if best else []
        return run["learning_rate"] in swept and any(self._in_part(run, part, swept[0]) for part in best)

    def _parts(self, swept: bool) -> list[Mapping[str, Any]]:
        return [part for name, part in self.parts.items() if is_sweep(name) == swept]

    def _in_part(self, run: Run, part: Mapping[str, Any], best: float | None = None) -> bool:
        rates = [best] if best is not None else part.get("learning_rates", ())
        return (
            run["task"] in part.get("tasks", ())
            and run["algorithm"] in part.get("algorithms", ())
            and run["seed"] in part.get("seeds", ())
            and rates != "best"
            and any(float(rate) == run["learning_rate"] for rate in rates)
        )

    def _has_rate(self, part: Mapping[str, Any], task: str, algorithm: str, learning_rate: float) -> bool:
        rates = part.get("learning_rates", ())
        if rates == "best":
            return self.best.get((task, algorithm)) == learning_rate
        return any(float(rate) == learning_rate for rate in rates)


def _finished(study: Mapping[str, Any]) -> list[Run]:
    return [run for run in study.get("runs") or [] if run.get("finished", True)]
