"""The tables of a study, as Markdown. The same study.json gives the same bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pcpo_fast.study.claims import claims
from pcpo_fast.study.credit_tables import credit_map, gradients
from pcpo_fast.study.frames import Cell, Run, Study
from pcpo_fast.study.markdown import (
    NONE,
    bracket,
    document,
    fixed,
    grid,
    ranges,
    show_gain,
    show_rate,
    signed,
    spread,
    words,
)
from pcpo_fast.study.measures import QUALITY
from pcpo_fast.study.statistics import (
    Interval,
    Times,
    finite_mean,
    gain_of,
    matched_differences,
    mixed_model,
    quality_at,
)

INTERVALS = (
    "Brackets are 95% bootstrap intervals over seeds, paired by seed; they are not adjusted for the number of "
    "comparisons. With few seeds they are narrow: of normal samples they hold the mean in 94% of cases with ten seeds, "
    "91% with five, 75% with three. Below five seeds there is no verdict, below three no interval."
)
EQUAL_RATES = (
    "At equal rates the sweep's own seeds stand in (marked *sweep*) where no other seeds were run at that rate."
)


def all_tables(study: Mapping[str, Any]) -> dict[str, str]:
    """The Markdown of every table by file name."""
    whole = Study.of(study)
    return {f"{name}.md": table(whole) for name, table in TABLES.items()}


def learning_rates(study: Study) -> str:
    """The sweep: reward at a fixed quality for every learning rate."""
    text = (
        "Reward of every learning rate in the sweep: the mean over seeds of the highest evaluation reward among "
        "evaluations whose Frechet distance is within the limit, and the reward at the end; the best rate is compared "
        "with the other algorithms', on other seeds."
    )

    def section(task: str) -> list[str]:
        limit = study.tasks[task].get("frechet_limit")
        rows = []
        for algorithm in study.algorithms:
            for rate in study.sweep(task, algorithm):
                none = sum(reward is None for reward in rate.rewards.values())
                reward = f"{none} of {len(rate.rewards)} never within the limit" if none else f"{rate.mean:.3f}"
                mark = f"**best**, {rate.place}" if rate.best else ""
                rows.append(
                    [
                        study.algorithm_title(algorithm),
                        show_rate(rate.learning_rate),
                        str(len(rate.rewards)),
                        reward,
                        fixed(rate.final_reward),
                        mark,
                    ]
                )
        if not rows:
            return []
        words = "any" if limit is None else f"at most {limit:g}"
        header = ["algorithm", "rate", "seeds", f"reward, Frechet distance {words}", "final reward", ""]
        return [grid(header, rows)]

    return document("Learning rates", text, study, section)


def gain(study: Study) -> str:
    """Epochs to the target rewards, and the gain over the baseline."""
    text = (
        "Epochs until the evaluation reward first reaches a target, restricted mean over the common seeds, and the "
        f"gain: baseline's epochs / ours - 1. {INTERVALS} Runs that never reach the target are censored at their last "
        "evaluation, so a gain with ≥ is a lower bound (the baseline has such runs), one with ≤ an upper bound (ours "
        f"has), and one with ~ holds up to the horizon only (both have). {EQUAL_RATES}"
    )

    def rows(task: str, pairs: Iterable[tuple[Cell, Cell]]) -> list[list[str]]:
        return [
            [
                study.algorithm_title(pair[1].algorithm),
                show_rates(study, pair),
                f"{target:g}",
                seeds_of(found.gain.n, pair),
                f"{fixed(found.baseline_mean, 1)} → {fixed(found.mean, 1)}",
                f"{found.baseline_censored} → {found.censored}",
                show_gain(found),
                found.verdict,
            ]
            for pair in pairs
            for target in study.targets(task)
            for found in [gain_of(pair, target, "epoch")]
        ]

    header = ["algorithm", "rate", "target", "seeds", "epochs", "never reached", "gain", "verdict"]
    return document("Epochs to a reward", text, study, lambda task: both_rates(study, task, header, rows))


def seconds(study: Study) -> str:
    """Processor seconds and images to the target rewards."""
    text = (
        "Processor seconds (one thread, sampling, scoring and training) and images until the evaluation reward first "
        "reaches a target, baseline → ours, each at its best learning rate: restricted means over the common seeds, "
        f"and the gain, baseline / ours - 1. {INTERVALS}"
    )

    def section(task: str) -> list[str]:
        rows = []
        for pair in study.pairs_with_baseline(task, "best"):
            for target in study.targets(task):
                cells = [gain_of(pair, target, unit) for unit in ("seconds", "images")]
                shown = [
                    text
                    for found, digits in zip(cells, (1, 0), strict=True)
                    for text in (
                        f"{fixed(found.baseline_mean, digits)} → {fixed(found.mean, digits)}",
                        show_gain(found),
                        found.verdict,
                    )
                ]
                title, n = study.algorithm_title(pair[1].algorithm), str(cells[0].gain.n)
                rows.append([title, show_rates(study, pair), f"{target:g}", n, *shown])
        header = ["algorithm", "rate", "target", "seeds", "seconds", "gain", "verdict", "images", "gain", "verdict"]
        return [*waiting(study, task), grid(header, rows)] if rows else [absent(study, task)]

    return document("Seconds and images to a reward", text, study, section)


def quality(study: Study) -> str:
    """Quality at matched reward."""
    better = {1: "more is better", -1: "less is better", 0: "neither is better"}
    directions = ", ".join(f"{words(key)}: {better[sign]}" for key, sign in QUALITY.items())
    text = (
        "Quality where a run first reaches the target reward, linear between evaluations: means of the baseline, and "
        f"paired differences ours - baseline ({directions}). {INTERVALS} n.s. means not significant: the interval "
        f"contains 0. Runs that never reach a target have no value there. {EQUAL_RATES}"
    )

    def rows(task: str, pairs: Iterable[tuple[Cell, Cell]]) -> list[list[str]]:
        lines, stated = [], set()
        for pair in pairs:
            for target in study.targets(task):
                base = pair[0].learning_rate, target
                values = {key: quality_at(pair[0].curves, target, key) for key in QUALITY}
                reached = len(values["frechet_distance"])
                if base not in stated:
                    stated.add(base)
                    title, rate = study.algorithm_title(pair[0].algorithm), show_rate(pair[0].learning_rate)
                    means = [fixed(finite_mean(values[key].values()), 4) for key in QUALITY]
                    lines.append([title, rate, f"{target:g}", f"{reached} of {len(pair[0].curves)}", *means])
                found = matched_differences(pair, target)
                common = len(pair[0].curves.keys() & pair[1].curves.keys())
                n = max(interval.n for interval in found.values())
                title, rate = study.algorithm_title(pair[1].algorithm), show_rate(pair[1].learning_rate)
                cells = [show_difference(interval) for interval in found.values()]
                lines.append([title, rate, f"{target:g}", f"{n} of {common}", *cells])
        return lines

    header = ["algorithm", "rate", "target", "seeds", *(words(key) for key in QUALITY)]
    return document("Quality at matched reward", text, study, lambda task: both_rates(study, task, header, rows))


def mixed_models(study: Study) -> str:
    """The linear mixed model of the PCPO paper."""
    text = (
        "Linear mixed model, quality ~ reward + algorithm, each algorithm at its best learning rate, coded against the "
        "baseline, on all evaluations after epoch 0; random intercepts for every seed and every run within it, or for "
        "runs alone where that does not converge. The coefficient is what the algorithm adds at equal reward, with its "
        "95% interval and p, by Student's t."
    )

    def section(task: str) -> list[str]:
        if not study.pairs_with_baseline(task, "best"):
            return [absent(study, task)]
        rows = []
        for key in QUALITY:
            found = mixed_model(study.best_cells(task), study.baseline(task) or "", key)
            if not found.effects:
                rows.append([words(key), NONE, NONE, NONE, NONE, f"no fit: {found.intercepts}"])
            for effect in found.effects:
                coefficient = signed(effect.coefficient.estimate) + bracket(effect.coefficient, signed)
                verdict = effect.coefficient.verdict("more", "less")
                p = "< 0.001" if effect.p < 0.001 else fixed(effect.p)
                title = study.algorithm_title(effect.algorithm)
                rows.append([words(key), title, coefficient, p, found.intercepts, verdict])
        return [
            *waiting(study, task),
            grid(["quality", "algorithm", "coefficient", "p", "random intercepts", "verdict"], rows),
        ]

    return document("Mixed model", text, study, section)


def runs(study: Study) -> str:
    """What was run."""
    text = (
        "What was run: finished runs of every task, algorithm and learning rate, of those that the study plans, their "
        "epochs and evaluations, processor seconds per epoch, and the runs that never reach each target (censored)."
    )

    def section(task: str) -> list[str]:
        found: dict[tuple[str, float], list[Run]] = {}
        for run in study.runs:
            if run["task"] == task:
                found.setdefault((run["algorithm"], run["learning_rate"]), []).append(run)
        rows = []
        for algorithm in study.algorithms:
            for name, rate in sorted(key for key in found if key[0] == algorithm):
                finished = found[name, rate]
                cell = Cell(name, rate, {run["seed"]: run for run in finished})
                planned = len(study.planned(task, name, rate) | set(cell.runs))
                curves = list(cell.curves.values())
                epochs = [curve["epoch"][-1] for curve in curves]
                pace = [curve["seconds"][-1] / curve["epoch"][-1] for curve in curves if curve["epoch"][-1] > 0]
                censored = [
                    f"{Times.of(cell.curves, target, 'epoch').censored} at {target:g}" for target in study.targets(task)
                ]
                rows.append(
                    [
                        study.algorithm_title(name),
                        show_rate(rate),
                        ", ".join(dict.fromkeys(str(run.get("part")) for run in finished)),
                        f"{len(cell.runs)} of {planned}",
                        ranges(cell.runs),
                        spread(epochs),
                        spread([len(curve["epoch"]) for curve in curves]),
                        fixed(float(np.median(pace)) if pace else math.nan, 1),
                        ", ".join(censored) or NONE,
                    ]
                )
        missing = sorted(
            {
                study.algorithm_title(name)
                for part in study.parts.values()
                if task in part.get("tasks", ())
                for name in part.get("algorithms", ())
                if not any(key[0] == name for key in found)
            }
        )
        absentees = [f"No finished runs yet of: {', '.join(missing)}."] if missing else []
        header = ["algorithm", "rate", "first part", "runs", "seeds", "epochs", "evaluations", "seconds per epoch"]
        return [grid([*header, "censored"], rows) if rows else "No finished runs.", *absentees]

    return document("What was run", text, study, section)


TABLES: dict[str, Callable[[Study], str]] = {
    "claims": claims,
    "learning_rates": learning_rates,
    "gain": gain,
    "seconds": seconds,
    "quality": quality,
    "mixed_model": mixed_models,
    "map": credit_map,
    "gradients": gradients,
    "runs": runs,
}


def both_rates(
    study: Study, task: str, header: Sequence[str], rows: Callable[[str, Iterable[tuple[Cell, Cell]]], list[list[str]]]
) -> list[str]:
    """The blocks of a task that compare algorithms at their best rates, then at equal ones."""
    blocks = []
    for words_, pairs in (
        ("Each at its best learning rate:", study.pairs_with_baseline(task, "best")),
        ("At equal learning rates:", study.pairs_with_baseline(task, "equal")),
    ):
        lines = rows(task, pairs)
        if lines:
            blocks += [words_, grid(header, lines)]
    if not blocks:
        return [absent(study, task)]
    if not study.pairs_with_baseline(task, "best"):
        return [absent(study, task, "at best learning rates"), *blocks]
    return [*waiting(study, task), *blocks]


def waiting(study: Study, task: str) -> list[str]:
    """A block that names the algorithms whose runs at their best rate are not finished; none if all are there."""
    have = {cell.algorithm for cell in study.best_cells(task)}
    planned = {
        name
        for part in study.parts.values()
        if task in part.get("tasks", ()) and part.get("learning_rates") == "best"
        for name in part.get("algorithms", ())
    }
    names = [study.algorithm_title(name) for name in study.algorithms if name in planned - have]
    return [f"No finished runs at the best learning rate yet: {', '.join(names)}."] if names else []


def absent(study: Study, task: str, where: str = "") -> str:
    """Why a task has nothing to compare."""
    baseline = study.baseline(task)
    if baseline is None:
        return "The task names no baseline."
    if not study.targets(task):
        return "The task names no target rewards."
    have = {cell.algorithm for cell in study.best_cells(task)}
    missing = "the other algorithms" if baseline in have else f"the baseline, {study.algorithm_title(baseline)}"
    return " ".join(f"Nothing to compare {where}: no finished runs of {missing}.".split()).replace(" :", ":")


def show_rates(study: Study, pair: tuple[Cell, Cell]) -> str:
    """The rate of ours, and the baseline's where it is another; marked where the runs are the sweep's."""
    theirs, ours = (show_rate(cell.learning_rate) for cell in pair)
    return (ours if theirs == ours else f"{ours} (baseline {theirs})") + (" *sweep*" if pair[1].swept else "")


def seeds_of(common: int, pair: tuple[Cell, Cell]) -> str:
    """The number of common seeds, and of all where some have run for one algorithm only."""
    either = len(pair[0].curves.keys() | pair[1].curves.keys())
    return str(common) if common == either else f"{common} of {either}"


def show_difference(interval: Interval) -> str:
    """A difference with its interval, and whether it is not significant."""
    if not math.isfinite(interval.estimate):
        return NONE
    if not interval.known:
        return f"{signed(interval.estimate)} (n = {interval.n})"
    mark = " n.s." if interval.low <= 0 <= interval.high else ""
    return f"{signed(interval.estimate)}{bracket(interval, signed)}{mark}"
