"""The command line: `python -m pcpo_fast.train [preset] [--setting value ...]`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import os
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pcpo_fast.config import PRESETS, Config, read_config
from pcpo_fast.policies import find_device, load_policy
from pcpo_fast.policies.diffusers import COMPILED_VARIANTS
from pcpo_fast.rewards import RewardError
from pcpo_fast.trainer import Trainer

DESCRIPTION = f"""Align a text-to-image diffusion or flow pipeline with policy gradients: PCPO by default; DDPO,
DanceGRPO or Flow-GRPO with --objective ppo --credit native. The first argument may name a preset
({", ".join(PRESETS)}; digits if there is none), whose settings are the defaults shown here. --config FILE reads
settings from a JSON file, such as another run's config.json; it overrides the preset, and the command line overrides
both."""

# settings that a resumed run cannot change
KEPT = ("model", "tuning", "lora_rank", "lora_alpha", "lora_target_modules")
# the file in a run folder that a run holds locked for as long as it lives
LOCK = ".lock"


def parse(arguments: Sequence[str]) -> tuple[str, Config]:
    """The preset's name and the resolved settings of a command line.

    Raises:
        ValueError, FileNotFoundError: for settings that cannot be run.
        SystemExit: after --help, and for flags that do not exist.
    """
    import tyro

    rest = list(arguments)
    preset = rest.pop(0) if rest and not rest[0].startswith("-") else "digits"
    if preset not in PRESETS:
        raise ValueError(f"no preset is named {preset!r}; choose one of {', '.join(PRESETS)}, or give none for digits")
    # these decide the defaults of all other settings
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    early_config, rest = early.parse_known_args(rest)
    early.add_argument("--output-dir", "--output_dir", type=Path)
    early.add_argument("--resume", action="store_true")
    peeked, _ = early.parse_known_args(rest)

    default, saved = PRESETS[preset], {}
    if peeked.resume and peeked.output_dir is not None:
        saved = _saved_settings(peeked.output_dir)
        default = dataclasses.replace(default, **saved)
    if early_config.config is not None:
        default = dataclasses.replace(default, **read_config(early_config.config))
    config = tyro.cli(
        Config, prog="python -m pcpo_fast.train [preset]", description=DESCRIPTION, args=rest, default=default
    )
    for name in KEPT:
        given = getattr(config, name)
        if saved.get(name, given) != given:
            moved = f"; if that is the same model in another place, write it into {config.output_dir}/config.json"
            raise ValueError(
                f"the run in {config.output_dir} has {name} {saved[name]!r}, which its checkpoints depend on, and was "
                f"to be resumed with {given!r}; leave the setting out, or start another run"
                + (moved if name == "model" else "")
            )
    return preset, config.resolved()


def _saved_settings(folder: Path) -> dict[str, Any]:
    """The settings of the run in `folder`; none if it was killed before it had begun, and left its lock at most."""
    if (folder / "config.json").is_file():
        return read_config(folder / "config.json")
    there = sorted(path.name for path in folder.iterdir() if path.name != LOCK) if folder.is_dir() else None
    if there == []:
        return {}
    found = "there is no such folder" if there is None else f"it has no config.json, but {', '.join(there)}"
    raise FileNotFoundError(
        f"--output-dir {folder} holds no run to resume: {found}. Give the folder of a run, or leave --resume out to "
        "begin one there"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line. Returns 0, or 2 for input that cannot be run, or 128 + n after signal n."""
    with contextlib.ExitStack() as stack:
        try:
            preset, config = parse(sys.argv[1:] if arguments is None else arguments)
            if find_device(config.device).type == "cuda":
                _make_deterministic()
                torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32
            if config.compile:
                torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_VARIANTS)
            folder = stack.enter_context(_run_folder(preset, config))
            config.output_dir = str(folder)
            # adapters start from these; the loop itself draws from generators of its own
            random.seed(config.seed)
            np.random.seed(config.seed % 2**32)
            torch.manual_seed(config.seed)
            policy = load_policy(config, decode_batch=config.micro_batch_size, keep_reference=config.kl_weight > 0)
            trainer = Trainer(config, policy, folder)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        _announce(trainer)
        try:
            received = trainer.train()
            status = 0 if received is None else 128 + received
        except RewardError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
        if status == 0:
            _report(trainer)
        else:
            print(f"Stopped after epoch {trainer.epoch}; continue with --output-dir {folder} --resume")
        return status


def _make_deterministic() -> None:
    """Asks CUDA's libraries, before they start, for the same bits every time; a step towards them, not a promise."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    # operators that have no deterministic variant warn and run
    torch.use_deterministic_algorithms(True, warn_only=True)
    # which would cost a pass over every fresh tensor
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


@contextlib.contextmanager
def _run_folder(preset: str, config: Config) -> Iterator[Path]:
    """The run's folder, locked; one that was made here and in which nothing came to be is removed again."""
    folder = Path(config.output_dir) if config.output_dir is not None else _make_free_folder(preset)
    made = config.output_dir is None or not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"--output-dir {folder} is in use by a run that goes on; wait for its end, or give another folder"
            ) from error
        if not config.resume and (folder / "config.json").exists():
            raise ValueError(f"--output-dir {folder} holds a run already; add --resume to continue it, or give another")
        try:
            yield folder
        finally:
            if made and [path.name for path in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
                folder.rmdir()


def _make_free_folder(preset: str) -> Path:
    """Makes the first of runs/<preset>, runs/<preset>-2, ... that is not there."""
    number = 1
    while True:
        folder = Path("runs") / (preset if number == 1 else f"{preset}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            # perhaps of a run that started just now
            number += 1


def _announce(trainer: Trainer) -> None:
    config, policy = trainer.config, trainer.policy
    parameters = sum(parameter.numel() for parameter in policy.trainable_parameters())
    start = f"from the checkpoint of epoch {trainer.epoch}" if trainer.epoch else "from the beginning"
    print(
        f"{config.model} on {policy.device}, {config.dtype}, {config.tuning} ({parameters:,} trained parameters), "
        f"objective {config.objective}, credit {config.credit}, rewards {', '.join(config.rewards)}\n"
        f"{config.epochs} epochs of {config.samples_per_epoch} images, {start}; run folder {trainer.folder}"
    )


def _report(trainer: Trainer) -> None:
    """A short table of what the run changed."""
    from rich.console import Console
    from rich.table import Table

    records = [record for record in trainer.metrics.records if "eval/reward" in record]
    before, after = records[0], records[-1]
    table = Table(title=f"{trainer.config.eval_samples} images with the same seeds, before and after")
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="left" if not heading else "right")
    # a resumed run may have been given other rewards
    for key in [key for key in after if key.startswith("eval/") and key in before]:
        values = (record[key] for record in (before, after))
        table.add_row(
            key.removeprefix("eval/"), *("none finite" if value is None else f"{value:.3f}" for value in values)
        )
    Console().print(table)
    _, rates = trainer.metrics.series("time/images_per_second")
    skipped = sum(trainer.metrics.series("update/skipped_steps")[1])
    not_finite = sum(trainer.metrics.series("reward/not_finite")[1])
    if skipped or not_finite:
        print(f"left out: {not_finite} images without a finite reward, {skipped} updates without a finite gradient")
    print(f"{sum(rates) / len(rates):.1f} images per second, sampled, scored and trained on")
    print(f"pictures, curves and weights: {trainer.folder}")


if __name__ == "__main__":
    sys.exit(main())
