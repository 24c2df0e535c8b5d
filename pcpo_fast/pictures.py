"""Pictures of a run: sample grids and curves, as PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from pcpo_fast.files import write_atomically
from pcpo_fast.metrics import Metrics

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


def save_curves(metrics: Metrics, timesteps: Sequence[float], held_out: Iterable[str], folder: Path) -> None:
    """Draws the reward, the scores `held_out` and the clip fraction per timestep over epochs, as `curves.png`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    reward_axes, eval_axes, clip_axes = figure.subplots(1, 3)

    epochs, _ = metrics.series("reward/mean")
    # null becomes NaN, which leaves a gap
    mean, std = (np.array(metrics.series(key)[1], float) for key in ("reward/mean", "reward/std"))
    reward_axes.plot(epochs, mean, color="tab:blue", label="training")
    reward_axes.fill_between(epochs, mean - std, mean + std, color="tab:blue", alpha=0.15, linewidth=0, label="± 1 std")
    reward_axes.plot(*metrics.series("eval/reward"), "o-", color="tab:orange", label="evaluation")
    reward_axes.set(title="Reward", xlabel="epoch", ylabel="reward")
    reward_axes.legend()

    for name in held_out:
        eval_axes.plot(*metrics.series(f"eval/{name}"), "o-", label=name)
    eval_axes.set(title="Evaluation on scores not trained on", xlabel="epoch", ylabel="score")
    if eval_axes.lines:
        eval_axes.legend()

    epochs, fractions = metrics.series("update/clip_fraction_per_step")
    if epochs:
        # untrained steps have no fraction and stay white; so do epochs with another number of steps
        untrained = [None] * len(timesteps)
        rows = [row if len(row) == len(timesteps) else untrained for row in fractions]
        image = clip_axes.imshow(
            np.array(rows, float).T,
            aspect="auto",
            interpolation="nearest",
            vmin=0,
            extent=(epochs[0] - 0.5, epochs[-1] + 0.5, len(timesteps) - 0.5, -0.5),
        )
        ticks = range(0, len(timesteps), max(1, len(timesteps) // 10))
        clip_axes.set_yticks(ticks, [f"{timesteps[tick]:.0f}" for tick in ticks])
        figure.colorbar(image, ax=clip_axes)
    clip_axes.set(title="Clipped rows per timestep", xlabel="epoch", ylabel="timestep")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    write_atomically(folder / "curves.png", file.getvalue())
