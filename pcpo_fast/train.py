"""The command line of training: `pcpo train [preset] [--setting value ...]`, or `python -m pcpo_fast.train`."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch

from pcpo_fast import samplers
from pcpo_fast.config import Config, read_config
from pcpo_fast.errors import SettingError
from pcpo_fast.policies import ModelSource, find_device, find_model
from pcpo_fast.presets import PRESETS
from pcpo_fast.prompts import load_prompts
from pcpo_fast.rewards import RewardError, Rewards, RewardSet, is_own, reward_sets
from pcpo_fast.run_folder import run_folder, saved_settings
from pcpo_fast.terminal import one_line, printable, say
from pcpo_fast.trainer import Trainer
from pcpo_fast.windows import WindowSchedule

DESCRIPTION = f"""Align a text-to-image diffusion or flow pipeline with policy gradients: PCPO by default; DDPO,
DanceGRPO or Flow-GRPO with --objective ppo --credit native. The first argument may name a preset
({", ".join(PRESETS)}; digits by default), whose settings are the defaults shown here. The credit of all, and the
learning rates and epochs of digits and digits-flow, are what `pcpo study evidence` found best. --config FILE reads
settings from a JSON or YAML file, such as another run's config.json; it overrides the preset, and the command line
overrides both. Functions of your own (module:function) that come from such a file, or from the run that is resumed, are
imported only if the command line names them, too, or has --trust-rewards."""

TrainerT = TypeVar("TrainerT", bound=Trainer)

# settings that a resumed run cannot change
KEPT = ("model", "tuning", "lora_path", "lora_rank", "lora_alpha", "lora_target_modules")
# settings that may name functions of the user's own, as module:function, or servers
OWN = ("rewards", "eval_rewards", "sampler", "reward_servers")
# dynamo recompiles: block kinds x latent shapes x {grad, no grad}, with headroom
RECOMPILE_LIMIT = 64


def parse(arguments: Sequence[str]) -> tuple[str, Config]:
    """The preset's name and the resolved settings of a command line.

    Raises:
        SettingError: for settings that cannot be run, and for functions of the user's own that the command line does
            not name.
        SystemExit: after --help, and for flags that do not exist.
    """
    import tyro

    rest = list(arguments)
    named = bool(rest) and not rest[0].startswith("-")
    preset = rest.pop(0) if named else "digits"
    if preset not in PRESETS:
        raise SettingError("preset", f"{preset!r} does not exist; choose one of {', '.join(PRESETS)}, or give none")
    # these decide the defaults of all other settings
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    # no setting: a file cannot give it
    early.add_argument("--trust-rewards", "--trust_rewards", action="store_true")
    file, rest = early.parse_known_args(rest)
    early.add_argument("--output-dir", "--output_dir")
    early.add_argument("--resume", action=argparse.BooleanOptionalAction)
    for name in OWN:
        early.add_argument(f"--{name.replace('_', '-')}", f"--{name}", nargs="*", default=argparse.SUPPRESS)
    peeked = vars(early.parse_known_args(rest)[0])

    given = {} if file.config is None else read_config(file.config)
    given |= {name: peeked[name] for name in ("output_dir", "resume") if peeked[name] is not None}
    default, saved = PRESETS[preset], {}
    builtin = default.data
    if given.get("resume") and given.get("output_dir") is not None:
        saved = saved_settings(Path(given["output_dir"]).expanduser())
    models = [known.model.model for known in PRESETS.values() if named]
    if saved.get("model") in models and saved["model"] != default.model.model:
        raise SettingError(
            "preset",
            f"{preset!r} was given, and the run in {given['output_dir']} trains {saved['model']!r}; leave the preset "
            "out to resume that run, or give another folder",
        )
    default = default.replace(**saved | given)
    config = tyro.cli(
        tyro.conf.OmitArgPrefixes[Config],
        prog="pcpo train [preset]",
        description=DESCRIPTION,
        args=rest,
        default=default,
    )
    if not file.trust_rewards:
        check_trust(config, [spec for name in OWN for spec in peeked.get(name, ())])
    if config.data.prompts != builtin.prompts and "eval_rewards" not in peeked.keys() | given.keys() | saved.keys():
        # they belong to the preset's prompts
        config = config.replace(eval_rewards=())
    for name in KEPT:
        kept = config.flat()[name]
        if saved.get(name, kept) != kept:
            folder = config.run.output_dir
            moved = f"; if it is the same model in another place, write that into {folder}/config.json"
            raise SettingError(
                name,
                f"{kept!r} was given, and the checkpoints in {folder} depend on {saved[name]!r}; leave the setting "
                "out, or start another run" + (moved if name == "model" else ""),
            )
    return preset, config.resolved()


def check_trust(config: Config, named: Sequence[str] | None = None) -> None:
    """Refuses what a file gives and the command line has not `named`, where it can: functions of the user's own, since
    importing one runs a program, and servers, which are sent all prompts and images.

    Raises:
        SettingError: with the name of the setting.
    """
    known = {*(named or ()), *(spec.partition("=")[0] for spec in named or ())}
    for name in OWN:
        value = config.flat()[name]
        specs = value if isinstance(value, tuple) else (value or "",)
        for spec in specs:
            function = spec.partition("=")[0]
            if name == "reward_servers":
                given, danger = spec, "it is sent all prompts and images"
            elif is_own(function) or (name == "sampler" and ":" in function):
                given, danger = function, "to import it is to run that program"
            else:
                continue
            if given not in known:
                flag = f"name it on the command line (--{name.replace('_', '-')} {shlex.join(specs)}), or "
                raise SettingError(
                    name,
                    f"{given!r} comes from a file, and {danger}; if you trust it, "
                    f"{'' if named is None else flag}add --trust-rewards",
                )


def check(config: Config, rewards: Rewards | None = None) -> ModelSource:
    """Finds the model, and checks everything that can be checked before its weights are loaded.

    Raises:
        SettingError: for a setting that cannot be run.
    """
    load_prompts(config.data.prompts)
    RewardSet(config.data.rewards if rewards is None else rewards, options=config.data)
    RewardSet(config.data.eval_rewards, setting="eval_rewards", options=config.data)
    source = find_model(config.model)
    WindowSchedule(config, source.schedule())
    samplers.build_for_evaluation(config.sampler, source.schedule())
    return source


def make_trainer(
    config: Config,
    rewards: Rewards | None = None,
    *,
    source: ModelSource | None = None,
    kind: type[TrainerT] = Trainer,
) -> TrainerT:
    """A trainer as the command line makes it, for programs and notebooks: seeds, the model, and the run folder.

    Args:
        config: the settings, with an output_dir.
        rewards: functions (images, prompts) -> scores by name, with weights or without, in the place of the settings'.
        source: the model, if it was found before.
        kind: the class of the trainer.

    Raises:
        SettingError: for a setting that cannot be run.
    """
    config = config.resolved()
    if config.run.output_dir is None:
        raise SettingError("output_dir", "is not set; give the folder of the run")
    if source is None:
        source = check(config, rewards)
    _set_globals(config)
    # before the weights are read, and after the process is set up for the same bits every time
    _try_out(config, source, rewards)
    policy = source.load(decode_batch=config.run.micro_batch_size, keep_reference=config.loss.kl_weight > 0)
    return kind(config, policy, Path(config.run.output_dir).expanduser(), rewards)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line. Returns 0, or 2 for input that cannot be run and rewards that fail, or 128 + n after signal
    n."""
    with contextlib.ExitStack() as stack:
        try:
            preset, config = parse(sys.argv[1:] if arguments is None else arguments)
            source = check(config)
            folder = stack.enter_context(run_folder(config.run.output_dir, preset, resume=config.run.resume))
            trainer = make_trainer(config.replace(output_dir=str(folder)), source=source)
        except SettingError as error:
            return _complain(error)
        data = PRESETS[preset].data
        if config.data.prompts != data.prompts and data.eval_rewards and not config.data.eval_rewards:
            names = " ".join(data.eval_rewards)
            say(f"with prompts of your own {names} is left out; --eval-rewards {names} measures it")
        _announce(trainer)
        try:
            received = trainer.train()
            status = 0 if received is None else 128 + received
        except (RewardError, SettingError) as error:
            status = _complain(error)
        if status == 0:
            _report(trainer)
        else:
            # after a full disk, say, the trainer is ahead of it
            epoch = trainer.checkpoints.latest_epoch()
            say(f"Stopped after epoch {epoch}; continue with --output-dir {folder} --resume")
        return status


def _complain(error: RewardError | SettingError) -> int:
    """Prints an error as one line. Returns the exit status."""
    text = str(error)
    if isinstance(error, SettingError):
        text = f"{error.name if error.name == 'preset' else '--' + error.name.replace('_', '-')}: {error.reason}"
    say(f"error: {one_line(text)}", error=True)
    return 2


def _try_out(config: Config, source: ModelSource, rewards: Rewards | None) -> None:
    """Calls every reward once, so that one which fails does so before the model is loaded. There is no time limit: a
    reward may load a model at its first call."""
    for functions in reward_sets(config.data, rewards):
        functions.try_out(load_prompts(config.data.prompts), source.size, source.device)


def _set_globals(config: Config) -> None:
    """Sets what is global to the process: seeds, and PyTorch's modes."""
    from accelerate.utils import set_seed

    # adapters are initialised from this one; the loop draws from its own generators
    set_seed(config.run.seed % 2**32)
    if config.model.compile:
        from torch._dynamo import config as dynamo

        dynamo.recompile_limit = max(dynamo.recompile_limit, RECOMPILE_LIMIT)
    if find_device(config.model.device).type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.model.tf32
        # the same bits every time, where CUDA's libraries can: read when they start
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        # operators without a deterministic variant warn and run
        torch.use_deterministic_algorithms(True, warn_only=True)
        # filling would cost a pass over every new tensor
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def _announce(trainer: Trainer) -> None:
    config, policy = trainer.config, trainer.policy
    parameters = sum(parameter.numel() for parameter in policy.trainable_parameters())
    start = f"from the checkpoint of epoch {trainer.epoch}" if trainer.epoch else "from the beginning"
    tuning = config.model.tuning + (f" from {config.model.lora_path}" if config.model.lora_path is not None else "")
    say(
        f"{config.model.model} on {policy.device}, {config.model.dtype}, {tuning} ({parameters:,} trained "
        f"parameters), objective {config.loss.objective}, credit {config.sampler.credit}, rewards "
        f"{', '.join(trainer.rewards.rewards)}; also measured: {', '.join(trainer.eval_rewards.rewards) or 'nothing'}",
        f"{config.run.epochs} epochs of {config.run.samples_per_epoch} images, {start}; run folder {trainer.folder}",
    )


def _report(trainer: Trainer) -> None:
    """Prints what the run changed."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    metrics = trainer.metrics
    records = [record for record in metrics.records if "eval/reward" in record]
    # only where the metrics file was damaged
    if not records or records[0]["epoch"]:
        say(f"the evaluation before training is lost from {metrics.path}; weights: {trainer.folder}")
        return
    before, after = records[0], records[-1]
    table = Table(title=f"{trainer.config.run.eval_samples} images with the same seeds, before and after")
    for heading in ("", "before", "after", "seconds per call"):
        table.add_column(heading, justify="left" if not heading else "right")
    # a resumed run may have other rewards
    for name in [key.removeprefix("eval/") for key in after if key.startswith("eval/") and key in before]:
        values = (record[f"eval/{name}"] for record in (before, after))
        # the sum of all rewards is no call of its own
        seconds = metrics.series(f"time/reward/{name}")[1] or metrics.series(f"time/eval/{name}")[1]
        table.add_row(
            escape(printable(name)),
            *("none finite" if value is None else f"{value:.3f}" for value in values),
            f"{sum(seconds) / len(seconds):.2f}" if seconds else "",
        )
    Console().print(table)
    _, rates = metrics.series("time/images_per_second")
    skipped = sum(metrics.series("update/skipped_steps")[1])
    not_finite = sum(metrics.series("reward/not_finite")[1])
    if skipped or not_finite:
        counts = {name: sum(metrics.series(f"reward/not_finite/{name}")[1]) for name in trainer.rewards.rewards}
        of_each = "".join(f", {count} of {name}" for name, count in counts.items() if count)
        say(
            f"excluded: {not_finite} images without a finite reward{of_each}, {skipped} updates without a finite "
            "gradient"
        )
    if rates:
        say(f"{sum(rates) / len(rates):.1f} images per second, sampled, scored and trained on")
    say(f"pictures, curves and weights: {trainer.folder}")


if __name__ == "__main__":
    sys.exit(main())
