"""Pictures of a run: sample grids and curves, as PNG."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from pcpo_fast.config import Config
from pcpo_fast.files import write_atomically
from pcpo_fast.metrics import Metrics
from pcpo_fast.reward_axis import RewardAxis
from pcpo_fast.rewards import RewardSet
from pcpo_fast.samplers import Schedule, StepTable, describe
from pcpo_fast.samplers.checks import abbreviate
from pcpo_fast.summary import REWARD_QUANTILES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GRID_COLUMNS, GRID_ROWS, GRID_GAP = 10, 4, 2
# smaller images are enlarged to at least half of this
SHOWN_SIDE = 64


def save_samples(images: Tensor, path: Path) -> None:
    """Writes up to 40 of N images as one grid, evenly spaced and running down its columns."""
    columns = min(GRID_COLUMNS, len(images))
    rows = min(GRID_ROWS, len(images) // columns)
    shown = [
        (column * rows + row) * len(images) // (rows * columns) for row in range(rows) for column in range(columns)
    ]
    save_grid(images[shown], path, columns)


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Writes float images (N, 3, H, W) in [0, 1] as one PNG, row by row; small ones are enlarged without smoothing."""
    from diffusers.utils import make_image_grid
    from PIL import Image

    # the white border of each image is the gap, and white images fill up the last row
    tiles = pad(images.cpu(), (0, GRID_GAP, 0, GRID_GAP), value=1.0)
    rows = math.ceil(len(tiles) / columns)
    blank = torch.ones(rows * columns - len(tiles), *tiles.shape[1:])
    pixels = (torch.cat([tiles, blank]) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    grid = make_image_grid([Image.fromarray(tile) for tile in pixels], rows, columns)
    grid = grid.crop((0, 0, grid.width - GRID_GAP, grid.height - GRID_GAP))
    scale = max(1, SHOWN_SIDE // images.shape[-1])
    grid = grid.resize((grid.width * scale, grid.height * scale), Image.Resampling.NEAREST)
    file = io.BytesIO()
    grid.save(file, format="PNG")
    write_atomically(path, file.getvalue())


def save_curves(
    metrics: Metrics, config: Config, schedule: Schedule, table: StepTable, rewards: RewardSet, held_out: RewardSet
) -> None:
    """Draws the run as `curves.png` beside its metrics: rewards and scores by epoch, clipping and gradient by timestep.

    Args:
        metrics: of the run.
        config: the settings, resolved.
        schedule: of the model.
        table: any sampler of the run; its timesteps are shown.
        rewards: the scores that are trained on.
        held_out: the scores that are only measured.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    file, timesteps = io.BytesIO(), [f"{timestep:.0f}" for timestep in table.timesteps.tolist()]
    low, high = (f"{quantile:.0%}" for quantile in REWARD_QUANTILES)
    # words have their size at a width of 830 pixels
    with rc_context({"font.size": 8, "axes.titlesize": 9, "legend.fontsize": 7}):
        figure = Figure(figsize=(8.3, 7.4), layout="constrained")
        FigureCanvasAgg(figure)
        # dollar signs in a path are no formula
        figure.suptitle(_title(config, schedule, rewards), fontsize=8.5, parse_math=False)
        (reward_axes, score_axes), (clip_axes, gradient_axes) = figure.subplots(2, 2)
        reward_series = {
            "training: mean": metrics.series("reward/mean"),
            f"training: {low} to {high} of the images": _lists(metrics, "reward/quantiles", len(REWARD_QUANTILES)),
            "evaluation: mean": metrics.series("eval/reward"),
        }
        _draw_scores(reward_axes, "Reward", "reward", reward_series)
        scores = {f"evaluation: mean {name}": metrics.series(f"eval/{name}") for name in held_out.rewards}
        _draw_scores(score_axes, "Scores not trained on", "score", scores)
        clipped = _lists(metrics, "update/clip_fraction_per_step", len(timesteps))
        _draw_steps(clip_axes, "Clipped rows by timestep", *clipped, timesteps, "fraction of the step's rows")
        norms = _lists(metrics, "update/output_grad_norm_per_step", len(timesteps))
        label = "mean over the step's rows: norm of the\ngradient of a row's loss at the model output"
        _draw_steps(gradient_axes, "Gradient norm by timestep", *norms, timesteps, label)
        figure.savefig(file, format="png", dpi=160)
    write_atomically(metrics.path.with_name("curves.png"), file.getvalue())


def _title(config: Config, schedule: Schedule, rewards: RewardSet) -> str:
    """What decides the run, in the names of the settings."""
    model, loss, run, credit = config.model, config.loss, config.run, config.sampler.credit
    names = [name if weight == 1 else f"{name}={weight:g}" for name, (_, weight) in rewards.rewards.items()]
    kl = f", kl_weight {loss.kl_weight:g}" if loss.kl_weight else ""
    ema = f", ema_decay {config.optimizer.ema_decay:g}" if config.optimizer.ema_decay else ""
    training, evaluation = describe(config.sampler, schedule)
    samplers = [f"training: {training}", f"evaluation: {evaluation}"]
    if training == evaluation:
        samplers = [f"training and evaluation: {training}"]
    lines = [
        f"model {model.model}, tuning {model.tuning}, rewards {' '.join(names)}",
        f"objective {loss.objective}, credit {credit if isinstance(credit, str) else abbreviate(credit)}, "
        f"learning_rate {config.learning_rate:g}, clip_range {loss.clip_range:g}{kl}",
        f"{run.samples_per_epoch} samples per epoch (prompts_per_epoch {run.prompts_per_epoch} x group_size "
        f"{run.group_size}), eval_samples {run.eval_samples}{ema}, seed {run.seed}",
        *samplers,
    ]
    return "\n".join(textwrap.fill(line, 135, break_on_hyphens=False) for line in lines)


def _lists(metrics: Metrics, key: str, length: int) -> tuple[list[int], NDArray[Any]]:
    """The trained epochs (E,), and the lists of numbers recorded as `key`, (E, length).

    NaN stands for null, and for a list that is missing or has another length.
    """
    found = {epoch: values for epoch, values in zip(*metrics.series(key), strict=True) if len(values) == length}
    epochs, _ = metrics.series("reward/mean")
    rows = [found.get(epoch, [None] * length) for epoch in epochs]
    return epochs, np.array(rows, float).reshape(-1, length)


def _draw_scores(axes: Axes, title: str, label: str, series: Mapping[str, tuple[list[int], Any]]) -> None:
    """Draws values by epoch, with gaps where they are not finite: a line for each (E,), and a band for each (E, 2)."""
    from matplotlib.ticker import MaxNLocator

    drawn = {name: (epochs, np.array(values, float)) for name, (epochs, values) in series.items()}
    scale = RewardAxis([value for _, values in drawn.values() for value in values[np.isfinite(values)]])
    for name, (epochs, values) in drawn.items():
        places = scale.to_axis(values)
        if places.ndim == 2:
            axes.fill_between(epochs, *places.T, color="C0", alpha=0.15, linewidth=0, label=name)
        else:
            axes.plot(epochs, places, "o-", markersize=3, label=name)
    scale.label(axes.yaxis)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set(title=title, xlabel="epoch", ylabel=label)
    axes.grid(color="0.92")
    if drawn:
        # below the panel, where it hides nothing
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), frameon=False)
    else:
        axes.text(0.5, 0.5, "no eval_rewards", ha="center", transform=axes.transAxes)


def _draw_steps(
    axes: Axes, title: str, epochs: list[int], rows: NDArray[Any], timesteps: Sequence[str], label: str
) -> None:
    """Draws rows (E, T) as a map of epochs and timesteps; what is NaN, as at untrained steps, stays white."""
    from matplotlib.ticker import MaxNLocator

    if np.isnan(rows).any():
        title += " (white: no value)"
    axes.set(title=title, xlabel="epoch", ylabel="timestep")
    if not np.isfinite(rows).any():
        return
    extent = (epochs[0] - 0.5, epochs[-1] + 0.5, len(timesteps) - 0.5, -0.5)
    image = axes.imshow(rows.T, aspect="auto", interpolation="nearest", vmin=0, extent=extent)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ticks = range(0, len(timesteps), math.ceil(len(timesteps) / 10))
    axes.set_yticks(ticks, [timesteps[tick] for tick in ticks])
    axes.figure.colorbar(image, ax=axes, label=label)
