"""What a run leaves to look at: metrics as JSON lines and TensorBoard, curves and sample grids as PNG."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pcpo_fast.checkpoint import write_atomically

Record = dict[str, Any]


class Metrics:
    """A JSON object per epoch and one per evaluation in `metrics.jsonl`, flushed to the disk; the same in TensorBoard.

    Values are numbers or lists with one number per sampler step; what is not finite is written as null. Keys under
    `time/` are seconds or rates of this machine; all others are the same whenever the run is repeated.
    """

    def __init__(self, folder: Path, resume_epoch: int | None = None) -> None:
        """Starts empty, or with `resume_epoch` keeps the records up to that epoch: later ones will be made again."""
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        self.records: list[Record] = []
        if resume_epoch is not None:
            self.records = [record for record in _read(self.path) if record["epoch"] <= resume_epoch]
        write_atomically(self.path, "".join(_line(record) for record in self.records).encode())
        # TensorBoard forgets what it was told of this epoch and of later ones
        first_new = 0 if resume_epoch is None else resume_epoch + 1
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_new)

    def write(self, record: Record) -> None:
        record = {key: _finite(value) for key, value in record.items()}
        self.records.append(record)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())
        for key, value in record.items():
            if isinstance(value, int | float) and key != "epoch":
                self.writer.add_scalar(key, value, record["epoch"])
        self.writer.flush()

    def series(self, key: str) -> tuple[list[int], list[Any]]:
        """The epochs at which `key` was recorded, and its values there."""
        found = [(record["epoch"], record[key]) for record in self.records if key in record]
        return [epoch for epoch, _ in found], [value for _, value in found]

    def close(self) -> None:
        self.writer.close()


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Writes float images (N, 3, H, W) in [0, 1] as one PNG, row by row, small ones enlarged without smoothing."""
    from PIL import Image

    count, channels, height, width = images.shape
    columns = min(columns, count)
    rows, gap = math.ceil(count / columns), 2
    grid = torch.ones(channels, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for index, image in enumerate(images.cpu()):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        grid[:, top : top + height, left : left + width] = image
    picture = Image.fromarray((grid * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
    scale = max(1, 64 // width)
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    file = io.BytesIO()
    picture.save(file, format="PNG")
    write_atomically(path, file.getvalue())


def save_curves(metrics: Metrics, timesteps: Sequence[float], eval_keys: Sequence[str], path: Path) -> None:
    """Draws reward, the scores `eval_keys` and the clip fraction per timestep over epochs as one PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    reward_axes, eval_axes, clip_axes = figure.subplots(1, 3)

    epochs, _ = metrics.series("reward/mean")
    # as floats, null is NaN and leaves a gap
    mean, std = (np.array(metrics.series(key)[1], float) for key in ("reward/mean", "reward/std"))
    reward_axes.plot(epochs, mean, color="tab:blue", label="training")
    reward_axes.fill_between(epochs, mean - std, mean + std, color="tab:blue", alpha=0.15, linewidth=0, label="± 1 std")
    reward_axes.plot(*metrics.series("eval/reward"), "o-", color="tab:orange", label="evaluation")
    reward_axes.set(title="Reward", xlabel="epoch", ylabel="reward")
    reward_axes.legend()

    for key in eval_keys:
        eval_axes.plot(*metrics.series(key), "o-", label=key.removeprefix("eval/"))
    eval_axes.set(title="Evaluation on scores not trained on", xlabel="epoch", ylabel="score")
    if eval_keys:
        eval_axes.legend()

    epochs, fractions = metrics.series("update/clip_fraction_per_step")
    if epochs:
        # untrained steps have no fraction and stay white, as do epochs with another number of steps
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
    write_atomically(path, file.getvalue())


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(record: Record) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _read(path: Path) -> list[Record]:
    """The records of a metrics file; a last line that was cut off by a kill is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]
