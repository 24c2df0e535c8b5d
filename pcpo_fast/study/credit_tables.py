"""The tables of credit: the map, and the share of each step that follows from its measured gradient."""

from __future__ import annotations

from pcpo_fast.study.diagnostics import diagnosed, gradient_ends, last_reward, map_points, measured_shares, timesteps_of
from pcpo_fast.study.frames import Study
from pcpo_fast.study.markdown import NONE, bracket, document, fixed, grid, show_rate, significant
from pcpo_fast.study.statistics import Times, horizon_of


def credit_map(study: Study) -> str:
    """Credit proportional to |output_coef|^p std^q on a grid of (p, q)."""
    text = (
        "The map: credit proportional to |output_coef|^p std^q, with the sum of the native credit kept; native credit "
        "is (1, -1), constant credit (0, 0); mean over seeds of the reward at the end, and restricted mean of epochs "
        "to the middle target."
    )

    def section(task: str) -> list[str]:
        lines = []
        for rate, points in map_points(study, task).items():
            target = study.middle_target(task)
            times = (
                {} if target is None else {c.algorithm: Times.of(c.curves, target, "epoch") for c in points.values()}
            )
            horizon = horizon_of(*times.values())
            rows = []
            for (p, q), cell in sorted(points.items()):
                time = times.get(cell.algorithm)
                epochs = [NONE, NONE] if time is None else [fixed(time.mean(horizon), 1), str(time.censored)]
                title = study.algorithm_title(cell.algorithm)
                rows.append([f"{p:g}", f"{q:g}", title, str(len(cell.curves)), fixed(last_reward(cell)), *epochs])
            best = max(points, key=lambda point: last_reward(points[point]))
            ps, qs = (sorted({point[axis] for point in points}) for axis in (0, 1))
            rewards = [
                [f"**p = {p:g}**", *(fixed(last_reward(points[p, q])) if (p, q) in points else NONE for q in qs)]
                for p in ps
            ]
            epochs = "epochs" if target is None else f"epochs to {target:g}"
            lines += [
                f"Learning rate {show_rate(rate)}; the highest reward is at ({best[0]:g}, {best[1]:g}).",
                grid(["reward", *(f"q = {q:g}" for q in qs)], rewards),
                grid(["p", "q", "algorithm", "seeds", "reward", epochs, "never reached"], rows),
            ]
        return lines

    return document("The map of credit", text, study, section)


def gradients(study: Study) -> str:
    """Signal and variance of the gradient by step."""
    text = (
        "Of the base model: the signal of every step's parameter gradient along the policy gradient, its variance, and "
        "the share of credit that follows, signal / variance, with the sum of the native credit. The gain of a credit "
        "is how far its update goes along the policy gradient, over the length of its noise; the measured share that a "
        "seed is judged with comes from the other seeds. Why is in docs/maths.md, under What share a step should have. "
        "Brackets are 95% bootstrap intervals over seeds. By algorithm: the length of the signal and the variance at "
        "the first and the last measured epoch, means over seeds, for the baseline and for constant credit at their "
        "best learning rates; a signal of 0 is hidden by the noise of its measurement."
    )

    def section(task: str) -> list[str]:
        cells = [cell for cell in diagnosed(study, task) if any(run.get("gradients") for run in cell.runs.values())]
        if not cells:
            return []
        header, columns = ["timestep"], []
        for cell in cells:
            ends = gradient_ends(cell)
            for (epoch, found), place in zip(ends.items(), ("start", "end"), strict=False):
                header += [f"{study.algorithm_title(cell.algorithm)}, {place} (epoch {epoch}): {key}" for key in found]
                columns += [[significant(value) for value in values] for values in found.values()]
        steps = timesteps_of(cells[0], max(len(column) for column in columns))
        rows = [
            [steps[index], *(column[index] if index < len(column) else NONE for column in columns)]
            for index in range(len(steps))
        ]
        return [*_shares(study, task), grid(header, rows)]

    return document("Gradients by step", text, study, section)


def _shares(study: Study, task: str) -> list[str]:
    """The share of each step that follows from the base model's gradients, and how far each credit goes."""
    found = measured_shares(study, task)
    if found is None:
        return []
    steps = timesteps_of(found.cell, len(found.native))
    rows = [
        [
            step,
            significant(native),
            f"{significant(along.estimate)}{bracket(along, significant)}",
            *map(significant, rest),
        ]
        for step, native, along, *rest in zip(
            steps, found.native, found.along, found.variance, found.share, strict=True
        )
    ]
    header = ["timestep", "native credit", "signal along the policy gradient", "variance", "measured share"]
    gains = [
        [name, f"{significant(gain.estimate)}{bracket(gain, significant)}", str(gain.n)]
        for name, gain in found.gains.items()
    ]
    return ["The base model:", grid(header, rows), grid(["credit", "gain", "seeds"], gains), "By algorithm:"]
