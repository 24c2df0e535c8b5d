"""The figures of a study, as PNG: 8.3 inches wide, so that words have their size at a width of 830 pixels."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

from pcpo_fast.files import write_atomically
from pcpo_fast.reward_axis import RewardAxis
from pcpo_fast.study.diagnostics import diagnosed, last_reward, map_points, measured_shares, step_ends, timesteps_of
from pcpo_fast.study.frames import Array, Cell, Curve, Study
from pcpo_fast.study.markdown import show_gain, show_rate, words
from pcpo_fast.study.measures import file_name
from pcpo_fast.study.statistics import NEVER, gain_of, mean_interval, position, value_at

# Okabe and Ito's, which colour-blind readers can tell apart; black is the baseline's
BASELINE = "#000000"
OTHERS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A6D3B")
WIDTH, DPI = 8.3, 160
STYLES = ("-", "--", "-.", ":")


def all_figures(study: Mapping[str, Any]) -> dict[str, bytes]:
    """The PNG of every figure by file name; those that no finished run belongs to are left out."""
    whole = Study.of(study)
    figures = {name: draw(whole) for name, draw in FIGURES.items()}
    for task in whole.tasks:
        figures["map_" + file_name(task)] = credit_map(whole, task)
    return {f"{name}.png": _png(figure) for name, figure in figures.items() if figure is not None}


def save_figures(study: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes every figure into `folder`, which exists."""
    paths = []
    for name, content in all_figures(study).items():
        write_atomically(folder / name, content)
        paths.append(folder / name)
    return paths


def gain(study: Study) -> Figure | None:
    """Epochs saved to the middle target, every algorithm against its task's baseline: points with intervals."""
    rows = []
    for task in study.tasks:
        target = study.middle_target(task)
        if target is None:
            continue
        for pair in study.pairs_with_baseline(task, "best"):
            found = gain_of(pair, target, "epoch")
            if math.isfinite(found.gain.estimate) and found.verdict != NEVER:
                rows.append((task, found))
    figure = Figure(figsize=(WIDTH, 1.2 + 0.27 * (len(rows) + len({task for task, _ in rows}))), layout="constrained")
    axes, place, names, before = figure.subplots(), 0, [], None
    for task, found in rows:
        if task != before:
            title = _plain(f"{study.task_title(task)}, to {found.target:g}")
            axes.annotate(
                title, (0, place), (4, 0), ("axes fraction", "data"), "offset points", va="center", fontsize=8
            )
            place, before = place - 1, task
        colour, _ = _look(study, task, found.algorithm)
        low, high = (found.gain.low, found.gain.high) if found.gain.known else (found.gain.estimate,) * 2
        axes.plot([100 * low, 100 * high], [place, place], color=colour, linewidth=1.6)
        axes.plot(100 * found.gain.estimate, place, color=colour, marker="o", markersize=4.5)
        axes.annotate(
            show_gain(found), (1, place), (4, 0), ("axes fraction", "data"), "offset points", va="center", fontsize=8
        )
        names.append((place, f"{_plain(study.algorithm_title(found.algorithm))}, n = {found.gain.n}"))
        place -= 1
    axes.axvline(0, color="0.5", linewidth=0.8, zorder=1)
    axes.set_yticks([place for place, _ in names], [name for _, name in names])
    axes.set_xlabel("epochs of the baseline / epochs - 1, %")
    _finish(axes, "", legend=False)
    axes.tick_params(axis="y", length=0)
    note = "each at its best learning rate, with 95% intervals over seeds; ≥ and ≤ are bounds"
    return _titled(figure, "Epochs to a reward, against the baseline", bool(rows), note)


def reward_epochs(study: Study) -> Figure | None:
    """Reward against epochs, each algorithm at its best learning rate."""
    return _rewards(study, "epoch", "epochs")


def reward_seconds(study: Study) -> Figure | None:
    """Reward against processor seconds, each algorithm at its best learning rate."""
    return _rewards(study, "seconds", "processor seconds, one thread")


def _rewards(study: Study, unit: str, label: str) -> Figure | None:
    cells = {task: found for task in study.tasks if (found := study.best_cells(task))}
    figure, panels = _panels(len(cells), _most(cells))
    for (task, found), axes in zip(cells.items(), panels, strict=True):
        scale = RewardAxis([value for cell in found for curve in cell.curves.values() for value in curve["reward"]])
        for cell in found:
            colour, style = _look(study, task, cell.algorithm)
            # every run reaches the end of the shared axis
            ends = [(curve[unit][0], curve[unit][-1]) for curve in cell.curves.values()]
            places = np.linspace(max(low for low, _ in ends), min(high for _, high in ends), 81)
            if unit == "epoch" and len({tuple(curve["epoch"]) for curve in cell.curves.values()}) == 1:
                places = next(iter(cell.curves.values()))["epoch"]
            rows = np.array([np.interp(places, curve[unit], curve["reward"]) for curve in cell.curves.values()])
            _band(axes, places, rows, scale.to_axis, color=colour, linestyle=style, label=_named(study, cell))
        scale.label(axes.yaxis)
        axes.set(xlabel=label, ylabel="evaluation reward")
        if unit == "epoch":
            for target in study.targets(task):
                axes.axhline(
                    float(scale.to_axis(np.array(target))), color="0.6", linestyle="--", linewidth=0.8, zorder=1.5
                )
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _finish(axes, study.task_title(task))
    return _titled(figure, f"Reward against {label}", bool(cells), f"{BAND}; dashed: targets")


def quality_reward(study: Study) -> Figure | None:
    """Frechet distance and feature diversity against reward."""
    cells = {task: found for task in study.tasks if (found := study.best_cells(task))}
    figure, panels = _panels(2 * len(cells), _most(cells))
    for index, (task, found) in enumerate(cells.items()):
        scale = RewardAxis([value for cell in found for curve in cell.curves.values() for value in curve["reward"]])
        for axes, key in zip(panels[2 * index : 2 * index + 2], ("frechet_distance", "feature_diversity"), strict=True):
            for cell in found:
                colour, style = _look(study, task, cell.algorithm)
                levels, rows = along_reward(list(cell.curves.values()), key, scale)
                if len(levels):
                    look = {"color": colour, "linestyle": style, "label": _named(study, cell)}
                    _band(axes, scale.to_axis(levels), rows, lambda values: values, **look)
            scale.label(axes.xaxis)
            axes.set(xlabel="evaluation reward", ylabel=words(key).replace("frechet", "Frechet"))
            _finish(axes, study.task_title(task), legend=key == "frechet_distance")
    return _titled(
        figure, "Quality at matched reward", bool(cells), BAND + ";\ncurves end at the reward that every seed reaches"
    )


def along_reward(curves: Sequence[Curve], measure: str, scale: RewardAxis) -> tuple[Array, Array]:
    """Rewards (L,) that every run reaches and none starts above, and the measure where each first does (N, L)."""
    low = max(curve["reward"][0] for curve in curves)
    high = min(curve["reward"].max() for curve in curves)
    if not low < high:
        return np.array([]), np.array([])
    levels = scale.between(low, high, 25)
    places = [[position(curve["reward"], level) or 0.0 for level in levels] for curve in curves]
    rows = [[value_at(curve[measure], place) for place in row] for curve, row in zip(curves, places, strict=True)]
    return levels, np.array(rows)


def learning_rates(study: Study) -> Figure | None:
    """Reward at a fixed quality against the learning rate."""
    swept = {task: [name for name in study.algorithms if study.sweep(task, name)] for task in study.tasks}
    swept = {task: names for task, names in swept.items() if names}
    figure, panels = _panels(len(swept), _most(swept))
    for (task, names), axes in zip(swept.items(), panels, strict=True):
        found = {name: [rate for rate in study.sweep(task, name) if math.isfinite(rate.mean)] for name in names}
        scale = RewardAxis(
            [
                reward
                for rates in found.values()
                for rate in rates
                for reward in rate.rewards.values()
                if reward is not None
            ]
        )
        for name, rates in found.items():
            if not rates:
                continue
            colour, style = _look(study, task, name)
            seeds = max(len(rate.rewards) for rate in rates)
            label = f"{_plain(study.algorithm_title(name))}, n = {seeds}"
            x, y = [rate.learning_rate for rate in rates], scale.to_axis(np.array([rate.mean for rate in rates]))
            axes.plot(x, y, color=colour, linestyle=style, label=label)
            for rate in rates:
                points = scale.to_axis(np.array([reward for reward in rate.rewards.values() if reward is not None]))
                axes.plot([rate.learning_rate] * len(points), points, "o", color=colour, markersize=2.5, alpha=0.5)
                if rate.best:
                    mean = scale.to_axis(np.array(rate.mean))
                    axes.plot(rate.learning_rate, mean, "*", color=colour, markersize=10, zorder=3)
        limit = study.tasks[task].get("frechet_limit")
        quality = "" if limit is None else f",\nFrechet distance ≤ {limit:g}"
        scale.label(axes.yaxis)
        axes.set(xscale="log", xlabel="learning rate", ylabel=f"highest reward{quality}")
        ticks = sorted({rate.learning_rate for rates in found.values() for rate in rates})
        if ticks:
            axes.set_xticks(ticks, [show_rate(tick) for tick in ticks])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
        _finish(axes, study.task_title(task))
    note = "lines: means over the seeds of the sweep; dots: seeds; star: the best rate"
    return _titled(figure, "Reward at a fixed quality against the learning rate", bool(swept), note)


def steps(study: Study) -> Figure | None:
    """Clip rate and gradient norm by timestep, at the first and the last epoch."""
    sides = {"clip_fraction": "clipped rows, %", "gradient_norm_mean": "gradient norm at the model's output"}
    shown = {
        task: found for task in study.tasks if (found := [cell for cell in diagnosed(study, task) if step_ends(cell)])
    }
    figure, panels = _panels(2 * len(shown), 2 * _most(shown))
    for index, (task, cells) in enumerate(shown.items()):
        for side, (axes, key) in enumerate(zip(panels[2 * index : 2 * index + 2], sides, strict=True)):
            count = 0
            for cell in cells:
                colour, _ = _look(study, task, cell.algorithm)
                for (epoch, rows), style, marker in zip(step_ends(cell).items(), (":", "-"), ("o", "s"), strict=False):
                    values = rows[key] * (100 if key == "clip_fraction" else 1)
                    count = max(count, len(values))
                    label = f"{_named(study, cell)}, epoch {epoch}"
                    look = {"linestyle": style, "marker": marker, "markersize": 3.5, "label": label}
                    axes.plot(np.arange(len(values)), values, color=colour, **look)
            _step_axis(axes, timesteps_of(cells[0], count))
            axes.set_ylabel(sides[key])
            positive = [value for line in axes.lines for value in np.asarray(line.get_ydata(), float) if value > 0]
            if key != "clip_fraction" and positive:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axes.yaxis.set_minor_formatter(NullFormatter())
            else:
                axes.set_ylim(bottom=0)
            _finish(axes, study.task_title(task), legend=side == 0)
    return _titled(figure, "Clipping and gradient by timestep", bool(shown), "high noise at the left")


def gradients(study: Study) -> Figure | None:
    """Of the base model: the signal of every step along the policy gradient, and the credit that follows."""
    shown = {task: found for task in study.tasks if (found := measured_shares(study, task)) is not None}
    figure, panels = _panels(2 * len(shown), 3)
    for index, (task, found) in enumerate(shown.items()):
        signal, credit = panels[2 * index : 2 * index + 2]
        places, names = np.arange(len(found.native)), timesteps_of(found.cell, len(found.native))
        ends = np.array([[step.estimate - step.low, step.high - step.estimate] for step in found.along])
        signal.errorbar(
            places,
            [step.estimate for step in found.along],
            yerr=ends.T if np.isfinite(ends).all() else None,
            color=OTHERS[0],
            marker="o",
            markersize=4,
            linestyle="none",
            label=f"n = {len(found.cell.runs)} seeds, with 95% intervals",
        )
        signal.axhline(0, color="0.5", linewidth=0.8)
        signal.set_ylabel("signal along\nthe policy gradient")
        even = np.where(found.variance > 0, found.native.sum() / (found.variance > 0).sum(), 0.0)
        for values, name, colour in (
            (found.native, "native", BASELINE),
            (even, "constant", OTHERS[0]),
            (found.share, "signal / variance", OTHERS[1]),
        ):
            credit.plot(places, values, color=colour, marker="o", markersize=3.5, label=name)
        credit.set_ylabel("credit, with the same sum")
        credit.set_ylim(bottom=0)
        for axes in (signal, credit):
            _step_axis(axes, names)
            _finish(axes, study.task_title(task))
    note = "measured on the base model; high noise at the left"
    return _titled(figure, "Signal of the gradient by timestep, and the credit that follows", bool(shown), note)


def _step_axis(axes: Axes, names: Sequence[str]) -> None:
    """Timesteps along the horizontal axis, ten of them named."""
    every = max(1, math.ceil(len(names) / 10))
    axes.set_xticks(range(0, len(names), every), names[::every], rotation=45)
    axes.set_xlabel("timestep")


def credit_map(study: Study, task: str) -> Figure | None:
    """Reward on the grid of (p, q), as a heat map; at the rate that most points have run."""
    maps = map_points(study, task)
    if not maps:
        return None
    rate, points = max(maps.items(), key=lambda item: len(item[1]))
    ps, qs = (sorted({point[axis] for point in points}) for axis in (0, 1))
    rewards = np.full((len(ps), len(qs)), math.nan)
    for (p, q), cell in points.items():
        rewards[ps.index(p), qs.index(q)] = last_reward(cell)
    scale = RewardAxis(rewards[np.isfinite(rewards)].tolist())
    figure = Figure(figsize=(WIDTH, 1.6 + 0.75 * len(ps)), layout="constrained")
    axes = figure.subplots()
    shades = -np.log(np.maximum(-rewards, scale.floor)) if scale.logarithmic else rewards
    image = axes.imshow(shades, cmap="cividis", aspect="auto", origin="lower")
    low, high = np.nanmin(shades), np.nanmax(shades)
    settings = study.tasks[task].get("settings") or {}
    flow = study.tasks[task].get("preset") == "digits-flow" and settings.get("sampler", "flow") == "flow"
    # in Flow-SDE alone |output_coef| is proportional to the interval
    names = {(1.0, -1.0): "native", (0.0, 0.0): "constant", **({(1.0, 0.0): "zeta h"} if flow else {})}
    best = max(points, key=lambda point: last_reward(points[point]))
    for p, q in points:
        row, column = ps.index(p), qs.index(q)
        name = names.get((p, q), "")
        text = f"{rewards[row, column]:.3f}" + (f"\n{name}" if name else "")
        dark = high == low or (shades[row, column] - low) / (high - low) < 0.5
        weight = "bold" if (p, q) == best else "normal"
        axes.text(
            column, row, text, ha="center", va="center", fontsize=9, color="white" if dark else "black", weight=weight
        )
    axes.set_xticks(range(len(qs)), [f"{q:g}" for q in qs])
    axes.set_yticks(range(len(ps)), [f"{p:g}" for p in ps])
    axes.set(xlabel="q, the power of the step's noise std", ylabel="p, the power of |output_coef|")
    bar = figure.colorbar(image, ax=axes, label="reward at the end")
    if scale.logarithmic:
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{-math.exp(-value):.3f}"))
    counts = sorted({len(cell.curves) for cell in points.values()})
    n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    axes.set_title(
        f"{_plain(study.task_title(task))}: credit ~ |output_coef|^p std^q\n"
        f"mean reward at the end, rate {show_rate(rate)}, n = {n} seeds; bold: the highest",
        fontsize=10,
    )
    return figure


BAND = "bands: 95% bootstrap intervals of the mean over seeds, at each algorithm's best learning rate"


def _band(axes: Axes, places: Array, rows: Array, to_axis: Callable[[Array], Array], **look: Any) -> None:
    """The mean of rows (N, L) at places (L,), with its interval; no band with fewer than three rows."""
    intervals = [mean_interval(column) for column in rows.T]
    mean = to_axis(np.array([interval.estimate for interval in intervals]))
    axes.plot(places, mean, linewidth=1.6, **look)
    if all(interval.known for interval in intervals):
        low, high = (to_axis(np.array([getattr(interval, end) for interval in intervals])) for end in ("low", "high"))
        axes.fill_between(places, low, high, color=look["color"], alpha=0.18, linewidth=0)


def _look(study: Study, task: str, algorithm: str) -> tuple[str, str]:
    """Colour and line style of an algorithm: the same in every figure."""
    if algorithm == study.baseline(task):
        return BASELINE, "-"
    baselines = {study.baseline(name) for name in study.tasks}
    shown = [name for name in study.algorithms if name not in baselines and not study.is_map_point(name)]
    # a baseline of another task has a colour behind all others
    shown += [name for name in study.algorithms if name not in shown]
    index = shown.index(algorithm)
    return OTHERS[index % len(OTHERS)], STYLES[index // len(OTHERS) % len(STYLES)]


def _named(study: Study, cell: Cell) -> str:
    return f"{_plain(study.algorithm_title(cell.algorithm))}, {show_rate(cell.learning_rate)}, n = {len(cell.curves)}"


def _most(found: Mapping[str, Sequence[Any]]) -> int:
    """The largest number of curves that a task has."""
    return max(map(len, found.values()), default=0)


def _panels(count: int, entries: int) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels, two in a row, with room for the `entries` of a legend below each."""
    rows, height = max(1, math.ceil(count / 2)), 3.0 + 0.17 * entries
    figure = Figure(figsize=(WIDTH if count != 1 else WIDTH * 0.75, height * rows + 0.5), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, min(2, max(1, count)), squeeze=False)).ravel().tolist()
    for spare in axes[count:]:
        spare.set_visible(False)
    return figure, axes[:count]


def _plain(title: str) -> str:
    """A title as it is written: text between two dollars would be set as a formula."""
    return title.replace("$", r"\$")


def _finish(axes: Axes, title: str, legend: bool = True) -> None:
    axes.set_title(textwrap.fill(_plain(title), 52), fontsize=9)
    axes.grid(True, color="0.92", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    axes.xaxis.label.set_fontsize(9)
    axes.yaxis.label.set_fontsize(9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if legend and axes.get_legend_handles_labels()[0]:
        # below the panel and its labels, where it hides nothing
        figure = axes.get_figure(root=True)
        assert figure is not None
        below = axes.transAxes + ScaledTranslation(0, -0.6, figure.dpi_scale_trans)
        axes.legend(
            fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below, borderpad=0
        )


def _titled(figure: Figure, title: str, drawn: bool, note: str) -> Figure | None:
    if not drawn:
        return None
    figure.suptitle(f"{title}\n{note}", fontsize=9.5)
    return figure


def _png(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


FIGURES: dict[str, Callable[[Study], Figure | None]] = {
    "gain": gain,
    "reward_epochs": reward_epochs,
    "reward_seconds": reward_seconds,
    "quality_reward": quality_reward,
    "learning_rates": learning_rates,
    "steps": steps,
    "gradients": gradients,
}
