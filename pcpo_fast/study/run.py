"""One run of a study, in a process of its own: `python -m pcpo_fast.study.run FOLDER`.

It reads the settings from FOLDER/study_run.json, trains in that folder, and writes FOLDER/result.json at the very end.
Started again, it continues where it was stopped.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

import pcpo_fast
from pcpo_fast.batch import Batch
from pcpo_fast.config import Config
from pcpo_fast.errors import SettingError
from pcpo_fast.files import write_atomically
from pcpo_fast.metrics import Record
from pcpo_fast.rollout import Interrupted
from pcpo_fast.run_folder import run_folder
from pcpo_fast.signals import never
from pcpo_fast.study.gradients import step_gradients
from pcpo_fast.study.measure import Quality
from pcpo_fast.study.measures import QUALITY
from pcpo_fast.study.results import RESULT, SETTINGS
from pcpo_fast.study.runner import PARENT
from pcpo_fast.train import make_trainer
from pcpo_fast.trainer import Trainer

# the eval reward gives the accuracy
QUALITIES = (*(name for name in QUALITY if name != "accuracy"), "pixel_shift")


class StudyTrainer(Trainer):
    """A trainer whose evaluations also measure the quality of the images, and which counts processor seconds."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.quality = Quality(self.policy.device)

    def collect(self, stop: Callable[[], bool] = never) -> Batch:
        if os.environ.get(PARENT) not in (None, str(os.getppid())):
            raise Interrupted
        started = time.process_time()
        batch = super().collect(stop)
        batch.record["time/processor"] = time.process_time() - started
        return batch

    def update(self, batch: Batch) -> Record:
        started = time.process_time()
        record = super().update(batch)
        record["time/processor"] += time.process_time() - started
        return record

    def assess(self, images: Tensor, prompts: list[str]) -> Record:
        record, base = super().assess(images, prompts), self.folder / "base_images.safetensors"
        # in another memory format the classifier would round otherwise, and equal images would differ
        images = images.contiguous()
        if self.epoch == 0:
            write_atomically(base, save({"images": images.cpu()}))
        measured = self.quality(images, prompts, load_file(base, device=str(images.device))["images"])
        return record | {f"eval/{name}": measured[name] for name in QUALITIES}


def run(folder: Path) -> dict[str, Any] | None:
    """Trains in `folder` and returns the result, or None if the run was stopped before its end."""
    plan = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    begun = (folder / "config.json").exists()
    config = Config().replace(**plan["settings"]).replace(output_dir=str(folder), resume=begun)
    # gradients are measured outside of training, which ends by itself
    with run_folder(str(folder), folder.name, resume=begun), suppress(Interrupted):
        trainer = make_trainer(config, kind=StudyTrainer)
        if plan["gradients"] and trainer.epoch == 0:
            _measure_gradients(trainer)
        if trainer.train() is not None or trainer.epoch < config.run.epochs:
            return None
        if plan["gradients"]:
            _measure_gradients(trainer)
        return _result(trainer)
    return None


def _measure_gradients(trainer: Trainer) -> None:
    path = trainer.folder / f"gradients-{trainer.epoch:06d}.json"
    if not path.exists():
        found = {"epoch": trainer.epoch, **step_gradients(trainer)}
        write_atomically(path, json.dumps(found).encode())


def _result(trainer: Trainer) -> dict[str, Any]:
    samples = trainer.config.run.samples_per_epoch
    records = [record for record in trainer.metrics.records if "update/loss" in record]
    if [record["epoch"] for record in records] != list(range(1, trainer.epoch + 1)):
        raise SettingError(
            "output_dir",
            f"{trainer.metrics.path} lacks records of the {trainer.epoch} epochs, and they cannot be measured again; "
            f"remove {trainer.folder}, and the study repeats the run",
        )
    seconds = torch.tensor([record["time/processor"] for record in records], dtype=torch.float64).cumsum(0).tolist()
    accuracy = next(iter(trainer.eval_rewards.rewards), None)
    evaluations = [
        {
            "epoch": record["epoch"],
            "images": record["epoch"] * samples,
            "seconds": seconds[record["epoch"] - 1] if record["epoch"] else 0.0,
            "reward": record["eval/reward"],
            "accuracy": record.get(f"eval/{accuracy}"),
            **{name: record[f"eval/{name}"] for name in QUALITIES},
        }
        for record in trainer.metrics.records
        if "eval/reward" in record
    ]
    shown = sorted({1, (len(records) + 1) // 2, len(records)})
    return {
        "evaluations": evaluations,
        "training": {
            "reward": [record["reward/mean"] for record in records],
            "seconds": seconds,
            **{
                name: [record[f"update/{name}"] for record in records]
                for name in ("clip_fraction", "grad_norm", "taylor_error")
            },
        },
        "steps": [
            {
                "epoch": epoch,
                "timesteps": trainer.windows.tables[0].timesteps.tolist(),
                "clip_fraction": records[epoch - 1]["update/clip_fraction_per_step"],
                "gradient_norm_mean": records[epoch - 1]["update/output_grad_norm_per_step"],
                "gradient_norm_variance": records[epoch - 1]["update/output_grad_norm_variance_per_step"],
                "log_ratio_quantiles": records[epoch - 1]["update/log_ratio_quantiles"],
            }
            for epoch in shown
        ],
        "gradients": [json.loads(path.read_text()) for path in sorted(trainer.folder.glob("gradients-*.json"))],
        "environment": {
            "pcpo_fast": pcpo_fast.__version__,
            "torch": torch.__version__.partition("+")[0],
            "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        },
    }


def main() -> int:
    """Runs FOLDER. Returns 0 once the result is written, or 1 if the run was stopped."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    result = run(folder)
    if result is None:
        return 1
    write_atomically(folder / RESULT, (json.dumps(_rounded(result), allow_nan=False) + "\n").encode())
    return 0


def _rounded(value: Any) -> Any:
    """Six significant digits: what a study prints and compares. A number that is not finite is null."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


if __name__ == "__main__":
    sys.exit(main())
