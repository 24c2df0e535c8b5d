"""Statistics of a study: epochs and seconds to a reward, quality at matched reward, intervals paired by seed.

Times are right-censored: a run that has not reached the target by its last evaluation counts with the time of that
evaluation, as one that takes at least so long. The restricted mean, of the time up to a horizon, takes such runs in.
The horizon is the earliest time at which a run of the comparison was given up, so that no time below it is unknown.

Intervals are percentile bootstrap intervals over seeds (`scipy.stats.bootstrap`). With few seeds the percentile
interval is too narrow. So its level is raised, as Hesterberg (2015, The American Statistician 69, 371-386) does, to the
one at which the interval of a mean agrees with Student's t. Seeds of both algorithms are drawn together. Of normal
samples the mean lies in the interval in 94% of cases with ten seeds, 91% with five and 75% with three.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from pcpo_fast.study.frames import Array, Cell, Curve, numbers
from pcpo_fast.study.measures import QUALITY

CONFIDENCE = 0.95
# an interval over fewer seeds would say more than they can, and so would a verdict
MIN_SEEDS = 3
VERDICT_SEEDS = 5
RESAMPLES = 9999
NOT_SIGNIFICANT = "not significant"
NEVER = "never reached by either"


@dataclass(frozen=True)
class Interval:
    """An estimate from `n` seeds, with its 95% interval; `low` and `high` are NaN with fewer than three seeds."""

    estimate: float
    low: float
    high: float
    n: int

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return not (math.isnan(self.low) or math.isnan(self.high))

    def verdict(self, more: str, less: str) -> str:
        """`more` or `less` if the interval lies above or below 0, else that the estimate is not significant; with
        fewer than five seeds, that they are too few to tell."""
        if not self.known or self.n < VERDICT_SEEDS:
            return f"n = {self.n}: too few to tell"
        return more if self.low > 0 else less if self.high < 0 else NOT_SIGNIFICANT


def position(reward: Array, target: float) -> float | None:
    """Where a curve first reaches `target`: a fractional index into it, linear between evaluations; None if nowhere."""
    reached = np.flatnonzero(reward >= target)
    if not len(reached):
        return None
    index = int(reached[0])
    if index == 0:
        return 0.0
    before, after = reward[index - 1], reward[index]
    return float(index - 1 + (target - before) / (after - before))


def value_at(values: Array, place: float) -> float:
    """`values` at a fractional index, linear between its neighbours; NaN where one of them is."""
    return float(np.interp(place, np.arange(len(values)), values))


@dataclass(frozen=True)
class Times:
    """Times to a target reward by seed, in epochs, images or seconds."""

    time: dict[int, float]
    """Of a run that never reaches the target, the time of its last evaluation."""
    reached: dict[int, bool]

    @classmethod
    def of(cls, curves: Mapping[int, Curve], target: float, unit: str) -> Times:
        """The times of runs with at least one evaluation; `unit` is "epoch", "images" or "seconds"."""
        places = {seed: position(curve["reward"], target) for seed, curve in curves.items()}
        time = {
            seed: float(curves[seed][unit][-1]) if place is None else value_at(curves[seed][unit], place)
            for seed, place in places.items()
        }
        return cls(time, {seed: place is not None for seed, place in places.items()})

    @property
    def censored(self) -> int:
        """Runs that never reach the target."""
        return sum(not reached for reached in self.reached.values())

    def mean(self, horizon: float) -> float:
        """The restricted mean over all seeds: of min(time, horizon). Up to `horizon_of` no time is unknown."""
        return finite_mean(np.minimum(numbers(self.time.values()), horizon))


def horizon_of(*times: Times) -> float:
    """The earliest time at which a run that never reaches the target ended; without one, the largest time."""
    censored = [item.time[seed] for item in times for seed in item.time if not item.reached[seed]]
    return min(censored) if censored else max((time for item in times for time in item.time.values()), default=math.nan)


def bootstrap(samples: Sequence[Array], statistic: Callable[..., Any]) -> Interval:
    """`statistic` of paired samples with its bootstrap interval over their last axis. The same arguments give the same.

    Args:
        samples: arrays (N,), one value per seed, in the same order of seeds.
        statistic: a function of the samples and `axis`.
    """
    count = len(samples[0])
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        if count == 0:
            return Interval(math.nan, math.nan, math.nan, 0)
        estimate = float(statistic(*samples, axis=-1))
        if count < MIN_SEEDS or not math.isfinite(estimate):
            return Interval(estimate, math.nan, math.nan, count)
        result = stats.bootstrap(
            tuple(samples),
            statistic,
            paired=True,
            vectorized=True,
            n_resamples=RESAMPLES,
            confidence_level=raised_level(count),
            method="percentile",
            rng=np.random.default_rng(0),
        )
    low, high = result.confidence_interval
    return Interval(estimate, float(low), float(high), count)


def raised_level(count: int) -> float:
    """The level at which a percentile interval of the mean of `count` values agrees with Student's 95% interval."""
    tail = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * math.sqrt(count / (count - 1))
    return float(1 - 2 * stats.norm.sf(tail))


def mean_interval(values: Array) -> Interval:
    """The mean of the values that are numbers, with its interval."""
    return bootstrap([values[np.isfinite(values)]], lambda sample, axis: np.mean(sample, axis=axis))


def finite_mean(values: Iterable[float]) -> float:
    """The mean of the values that are finite numbers; NaN if none is."""
    finite = [value for value in values if math.isfinite(value)]
    return float(np.mean(finite)) if finite else math.nan


def paired_difference(ours: Mapping[int, float], baseline: Mapping[int, float]) -> Interval:
    """The mean of ours - baseline over the seeds for which both are numbers."""
    seeds = [seed for seed in sorted(ours) if math.isfinite(ours[seed]) and math.isfinite(baseline.get(seed, math.nan))]
    # the difference is taken first, so that equal pairs give exactly 0
    return mean_interval(numbers(ours[seed] - baseline[seed] for seed in seeds))


@dataclass(frozen=True)
class Gain:
    """How much sooner an algorithm reaches a target than the baseline: baseline / ours - 1, of restricted means."""

    baseline: str
    baseline_rate: float
    algorithm: str
    learning_rate: float
    target: float
    unit: str
    baseline_mean: float
    mean: float
    baseline_censored: int
    censored: int
    horizon: float
    gain: Interval
    cut: bool = False
    """Whether a run reaches the target after the horizon: runs that end at different times."""

    @property
    def bound(self) -> str:
        """≥ if only the baseline has runs that never reach the target, ≤ if only ours has, ~ if both have or `cut`."""
        if self.cut:
            return "~"
        return {(False, False): "", (True, False): "≥", (False, True): "≤"}.get(
            (self.baseline_censored > 0, self.censored > 0), "~"
        )

    @property
    def verdict(self) -> str:
        """What the interval allows."""
        if self.gain.n and self.baseline_censored == self.censored == self.gain.n:
            return NEVER
        if self.gain.n and not math.isfinite(self.gain.estimate):
            return "reached at the start"
        verdict = self.gain.verdict("faster", "slower")
        # an upper bound shows no gain, a lower one no loss
        open_ = {"faster": ("≤", "~"), "slower": ("≥", "~")}.get(verdict, ())
        return f"{verdict} up to the horizon" if self.bound in open_ else verdict


def gain_of(pair: tuple[Cell, Cell], target: float, unit: str) -> Gain:
    """The gain of `pair` = (baseline, ours) over their common seeds; `unit` is "epoch", "images" or "seconds"."""
    seeds = sorted(pair[0].curves.keys() & pair[1].curves.keys())
    both = [Times.of({seed: cell.curves[seed] for seed in seeds}, target, unit) for cell in pair]
    horizon = horizon_of(*both)
    restricted = [np.minimum(numbers(times.time[seed] for seed in seeds), horizon) for times in both]
    gain = bootstrap(restricted, lambda theirs, ours, axis: np.mean(theirs, axis=axis) / np.mean(ours, axis=axis) - 1)
    return Gain(
        pair[0].algorithm,
        pair[0].learning_rate,
        pair[1].algorithm,
        pair[1].learning_rate,
        target,
        unit,
        both[0].mean(horizon),
        both[1].mean(horizon),
        both[0].censored,
        both[1].censored,
        horizon,
        gain,
        any(times.time[seed] > horizon and times.reached[seed] for times in both for seed in seeds),
    )


def quality_at(curves: Mapping[int, Curve], target: float, measure: str) -> dict[int, float]:
    """A measure of quality where each run first reaches `target`, by seed; runs that never do are left out."""
    places = {seed: position(curve["reward"], target) for seed, curve in curves.items()}
    return {seed: value_at(curves[seed][measure], place) for seed, place in places.items() if place is not None}


@dataclass(frozen=True)
class Effect:
    """What an algorithm adds to a measure of quality at equal reward, by the mixed model."""

    algorithm: str
    coefficient: Interval
    p: float


@dataclass(frozen=True)
class MixedModel:
    """A fit of quality ~ reward + algorithm with random intercepts; `effects` is empty where none converged."""

    measure: str
    intercepts: str
    """The random intercepts of the fit, or why there is none."""
    effects: tuple[Effect, ...]


def mixed_model(cells: Sequence[Cell], baseline: str, measure: str) -> MixedModel:
    """Fits a measure of quality on reward and algorithm, as in the PCPO paper, to evaluations after epoch 0.

    The algorithm is coded against the baseline. Every seed has a random intercept, and so has every run within it,
    since the evaluations of a run resemble each other. Where that does not converge, runs alone have one. Intervals and
    p are of Student's t with a degree of freedom less than the algorithm has seeds; Wald's normal ones are too narrow.
    """
    # numbers, as the names of algorithms could be read as formulas
    order = [baseline, *(cell.algorithm for cell in cells if cell.algorithm != baseline)]
    rows = [
        (seed, order.index(cell.algorithm), *point)
        for cell in cells
        for seed, curve in cell.curves.items()
        for epoch, *point in zip(curve["epoch"], curve["reward"], curve[measure], strict=True)
        if epoch > 0 and all(np.isfinite(point))
    ]
    frame = pd.DataFrame(rows, columns=pd.Index(["seed", "algorithm", "reward", "quality"]))
    frame["run"] = frame["seed"].astype(str) + "-" + frame["algorithm"].astype(str)
    present = sorted(set(frame["algorithm"]))
    if 0 not in present:
        return MixedModel(measure, "the baseline has no evaluations", ())
    if len(present) < 2 or frame["seed"].nunique() < MIN_SEEDS:
        return MixedModel(measure, "too few algorithms or seeds", ())
    if frame["quality"].nunique() < 2 or frame["reward"].nunique() < 2:
        return MixedModel(measure, "the measure or the reward does not vary", ())
    # the optimiser wants numbers of order 1; the coefficients scale with the measure
    scale = np.std(frame["quality"].to_numpy(float)).item()
    frame["quality"] = (frame["quality"] - frame["quality"].mean()) / scale
    frame["reward"] = (frame["reward"] - frame["reward"].mean()) / frame["reward"].std()
    for intercepts, groups, components in (
        ("seed, run", "seed", {"run": "0 + C(algorithm)"}),
        ("run", "run", None),
    ):
        fit = _fit(frame, groups, components)
        if fit is not None:
            effects = []
            for code in present[1:]:
                value, error = (fit.loc[f"C(algorithm)[T.{code}]"].to_numpy(float) * scale).tolist()
                seeds = frame.loc[frame["algorithm"] == code, "seed"].nunique()
                # with a single seed there is none, and all of these are NaN
                half = error * stats.t.ppf((1 + CONFIDENCE) / 2, seeds - 1)
                interval = Interval(value, value - half, value + half, seeds)
                effects.append(Effect(order[code], interval, float(2 * stats.t.sf(abs(value) / error, seeds - 1))))
            return MixedModel(measure, intercepts, tuple(effects))
    return MixedModel(measure, "did not converge", ())


def _fit(frame: pd.DataFrame, groups: str, components: dict[str, str] | None) -> pd.DataFrame | None:
    """Coefficient and standard error of each fixed effect, a row each, or None if the model did not converge."""
    from statsmodels.formula.api import mixedlm

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            model = mixedlm(
                "quality ~ reward + C(algorithm)", frame, groups=groups, re_formula="1", vc_formula=components
            )
            result = model.fit(reml=True, method=["lbfgs", "powell"])
            fixed = pd.DataFrame({"coefficient": result.fe_params, "error": result.bse_fe})
        except (np.linalg.LinAlgError, ValueError):
            return None
    good = result.converged and np.isfinite(fixed.to_numpy()).all() and (fixed["error"] > 0).all()
    return fixed if good else None


def matched_differences(pair: tuple[Cell, Cell], target: float) -> dict[str, Interval]:
    """ours - baseline of each measure of quality at a matched reward, paired by seed; `pair` = (baseline, ours)."""
    values = {key: [quality_at(cell.curves, target, key) for cell in pair] for key in QUALITY}
    return {key: paired_difference(ours, theirs) for key, (theirs, ours) in values.items()}
