"""What algorithms are compared by: names that a study file, its tables and its figures share, and the best rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

# parts whose names begin with it choose the best learning rates; their seeds are their own
SWEEP = "sweep"

# each measure of quality, and whether more of it is better (1), worse (-1) or neither (0)
QUALITY: dict[str, int] = {
    "frechet_distance": -1,
    "inception_score": 1,
    "accuracy": 1,
    "feature_diversity": 1,
    "pixel_diversity": 1,
    "feature_shift": 0,
}
# a run reaches a reward at these costs, each with the column of its evaluations that counts it
COSTS = {"epochs": "epoch", "images": "images", "seconds": "seconds"}
# how much log rho misses of rho - 1
TAYLOR = "taylor_error"
# a claim is about one of them
MEASURES = (*COSTS, *QUALITY, TAYLOR)


def is_sweep(part: str) -> bool:
    """Whether the part of this name chooses learning rates."""
    return part.startswith(SWEEP)


def reward_at_quality(evaluations: Iterable[Mapping[str, Any]], limit: float | None) -> float | None:
    """The highest reward among the evaluations whose `frechet_distance` is at most `limit` (None: any); None if none.

    Learning rates are chosen by it: a rate that buys reward with worse images than the limit allows does not win.
    """
    rewards = [
        row["reward"]
        for row in evaluations
        if row.get("reward") is not None
        and (limit is None or (row.get("frechet_distance") is not None and row["frechet_distance"] <= limit))
    ]
    return max(rewards, default=None)


def best_learning_rate(runs: Iterable[Mapping[str, Any]], limit: float | None) -> float:
    """The learning rate whose mean over seeds of the highest evaluation reward is highest; the lower one of two equal.

    Args:
        runs: finished runs of one algorithm and task, as study.json has them.
        limit: evaluations with a higher Frechet distance do not count; None for any. A run without any that counts is
            worse than every other.

    Raises:
        ValueError: for no runs.
    """
    rewards: dict[float, list[float]] = {}
    for run in runs:
        reward = reward_at_quality(run["evaluations"], limit)
        rewards.setdefault(run["learning_rate"], []).append(-math.inf if reward is None else reward)
    return max(sorted(rewards), key=lambda rate: fmean(rewards[rate]))
