"""The command line: `python -m pcpo_fast.train [preset] [--setting value ...]`."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pcpo_fast.checkpoint import write_atomically
from pcpo_fast.config import PRESETS, Config, read_config, to_json
from pcpo_fast.policies import StableDiffusionPolicy
from pcpo_fast.rewards import RewardError
from pcpo_fast.trainer import Trainer

DESCRIPTION = f"""Align a text-to-image diffusion pipeline with policy gradients: PCPO by default, DDPO with
--objective ppo --credit native. The first argument may name a preset ({", ".join(PRESETS)}; digits if there is none),
whose settings are the defaults shown here. --config FILE reads settings from a JSON file, such as another run's
config.json; it overrides the preset, and the command line overrides both."""

# settings that a resumed run cannot change
KEPT = ("tuning", "lora_rank", "lora_alpha", "lora_target_modules")


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
    if peeked.resume and peeked.output_dir is not None and (peeked.output_dir / "config.json").is_file():
        saved = read_config(peeked.output_dir / "config.json")
        default = dataclasses.replace(default, **saved)
    if early_config.config is not None:
        default = dataclasses.replace(default, **read_config(early_config.config))
    config = tyro.cli(
        Config, prog="python -m pcpo_fast.train [preset]", description=DESCRIPTION, args=rest, default=default
    )
    for name in KEPT:
        given = getattr(config, name)
        if saved.get(name, given) != given:
            raise ValueError(
                f"the run in {config.output_dir} has {name} {saved[name]!r}, which its checkpoints depend on, and was "
                f"to be resumed with {given!r}; leave the setting out, or start another run"
            )
    return preset, config.resolved()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line. Returns 0, or 2 for input that cannot be run, or 128 + n after signal n."""
    try:
        preset, config = parse(sys.argv[1:] if arguments is None else arguments)
        folder = _run_folder(preset, config)
        config.output_dir = str(folder)
        # adapters start from these; the loop itself draws from generators of its own
        random.seed(config.seed)
        np.random.seed(config.seed % 2**32)
        torch.manual_seed(config.seed)
        policy = StableDiffusionPolicy.from_pretrained(config)
        trainer = Trainer(config, policy, folder)
        # resuming is no setting of the run: another run may start from this file
        write_atomically(folder / "config.json", to_json(dataclasses.replace(config, resume=False)).encode())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _announce(trainer)
    try:
        received = trainer.train()
    except RewardError as error:
        print(f"error: {error}", file=sys.stderr)
        print(f"Stopped after epoch {trainer.epoch}; continue with --output-dir {folder} --resume")
        return 2
    if received is not None:
        print(f"Stopped after epoch {trainer.epoch}; continue with --output-dir {folder} --resume")
        return 128 + received
    _report(trainer)
    return 0


def _run_folder(preset: str, config: Config) -> Path:
    if config.output_dir is None:
        names = itertools.chain([preset], (f"{preset}-{number}" for number in itertools.count(2)))
        return next(folder for name in names if not (folder := Path("runs") / name).exists())
    folder = Path(config.output_dir)
    if not config.resume and (folder / "config.json").exists():
        raise ValueError(f"--output-dir {folder} holds a run already; add --resume to continue it, or give another")
    return folder


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
