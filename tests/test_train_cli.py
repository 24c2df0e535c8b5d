import ast
import dataclasses
import functools
import importlib.metadata
import inspect
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from pipelines import SMALL, at_call, command, records, save_stable_diffusion
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pcpo_fast import __version__, train, trainer
from pcpo_fast.__main__ import main as pcpo
from pcpo_fast.config import Config, read_config
from pcpo_fast.errors import SettingError
from pcpo_fast.presets import PRESETS
from pcpo_fast.run_folder import LOCK
from pcpo_fast.train import main, parse

pytest_plugins = "pipelines"
pytestmark = pytest.mark.usefixtures("one_thread")

EPOCHS = 5
LORA = "pytorch_lora_weights.safetensors"
UNET = "diffusion_pytorch_model.safetensors"


def final_weights(folder, name=LORA):
    return load_file(sorted((folder / "checkpoints").iterdir())[-1] / "weights" / name)


def assert_same_run(folder, expected, name=LORA):
    """Metrics and the whole last checkpoint but the settings, bit for bit."""
    assert records(folder) == records(expected)
    last, expected_last = (sorted((run / "checkpoints").iterdir())[-1] for run in (folder, expected))
    assert last.name == expected_last.name
    for file in ("random.safetensors", "optimizer.safetensors"):
        assert (last / file).read_bytes() == (expected_last / file).read_bytes(), file
    state, expected_state = (json.loads((path / "state.json").read_text()) for path in (last, expected_last))
    assert state | {"settings": None} == expected_state | {"settings": None}
    ours, theirs = final_weights(folder, name), final_weights(expected, name)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


# training, from a folder, by the command line


@pytest.mark.parametrize(
    "settings",
    [
        {"tuning": "lora"},
        {"tuning": "full"},
        {"tuning": "lora", "dtype": "bf16", "objective": "ppo", "credit": "native"},
    ],
    ids=["pcpo-lora", "pcpo-full", "ddpo-lora-bf16"],
)
def test_two_epochs(model, tmp_path, settings):
    run = tmp_path / "run"
    assert main(command(model, run, keep_checkpoints=3, **settings)) == 0
    before, first, second, after = records(run)
    assert [record["epoch"] for record in records(run)] == [0, 1, 2, 2]
    for record in (first, second):
        assert record["update/first_abs_log_ratio"] == 0
        # some steps may have had no row before the first update
        assert set(record["update/first_abs_log_ratio_per_step"]) <= {0, None}
        assert record["update/abs_log_ratio"] > 0
        assert record["update/grad_norm"] > 0
        assert record["update/skipped_steps"] == record["reward/not_finite"] == 0
    assert (
        before.keys()
        == after.keys()
        == {"epoch", "eval/reward"} | {f"eval/jpeg_{what}" for what in ("compressibility", "incompressibility")}
    )

    checkpoints = sorted((run / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["epoch-000001", "epoch-000002"]
    name = UNET if settings["tuning"] == "full" else LORA
    one, two = (load_file(path / "weights" / name) for path in checkpoints)
    if settings["tuning"] == "full":
        start = load_file(model / "unet" / name)
    else:
        # the half of an adapter that starts at 0
        start = {key: torch.zeros_like(value) for key, value in one.items() if "lora_B" in key}
    for old, new in ((start, one), (one, two)):
        unchanged = {key for key, value in old.items() if torch.equal(value, new[key])}
        # self-attention over the one position of the lowest level has no gradient for its queries and keys
        assert all(re.search(r"mid_block.*attn1\.to_[qk]", key) for key in unchanged)


def test_frozen_weights_do_not_change(model, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(train, "_announce", made.append)
    assert main(command(model, tmp_path / "run")) == 0
    (run,) = made
    pipeline = run.policy.pipeline
    for part, file in (("unet", UNET), ("vae", UNET), ("text_encoder", "model.safetensors")):
        saved = load_file(model / part / file)
        now = {
            key.replace(".base_layer", "").removeprefix("text_model."): value
            for key, value in getattr(pipeline, part).state_dict().items()
            if "lora_" not in key
        }
        saved = {key.removeprefix("text_model."): value for key, value in saved.items()}
        assert now.keys() >= saved.keys()
        assert all(torch.equal(now[key], value) for key, value in saved.items())


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Few enough that every prompt comes back, and its buffer matters."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("cat\ndog\na horse\n")
    return path


@pytest.fixture(scope="module")
def long(model, prompts):
    """Builds the command line of the run that the tests below cut off; each wants its own folder."""
    settings = {
        "prompts": prompts,
        "epochs": EPOCHS,
        "advantage": "prompt",
        "prompt_buffer_size": 5,
        "prompt_buffer_min": 3,
        "eval_every": 2,
    }
    return lambda folder, **others: command(model, folder, **(settings | others))


@pytest.fixture(scope="module")
def whole(long, tmp_path_factory):
    """That run's folder, never cut off, made by a fresh process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = subprocess.run(
        [sys.executable, "-m", "pcpo_fast.train", *long(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "before and" in done.stdout
    assert f"pictures, curves and weights: {folder}" in done.stdout
    return folder


def assert_every_scalar_is_in_tensorboard_once(run):
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        for key, value in record.items():
            if isinstance(value, int | float) and key != "epoch":
                (scalar,) = (event.value for event in events.Scalars(key) if event.step == record["epoch"])
                # TensorBoard keeps float32
                assert scalar == pytest.approx(value, rel=1e-6)
                tags = [tag for tag in tags if tag != key]
    assert tags == []


def test_metrics_are_in_tensorboard_too(whole):
    assert_every_scalar_is_in_tensorboard_once(whole)


def test_pictures(whole):
    """Two images of 64x64 with a gap of 2, and the figure; none is blank, and training changed the images."""
    sizes = {"samples_before.png": (130, 64), "samples_after.png": (130, 64), "curves.png": (1328, 1184)}
    for name, size in sizes.items():
        with Image.open(whole / name) as image:
            image.load()
            assert image.format == "PNG"
            assert image.size == size
            assert max(high - low for low, high in image.convert("RGB").getextrema()) > 20
    assert (whole / "samples_before.png").read_bytes() != (whole / "samples_after.png").read_bytes()


# cut off and resumed


def run_until(arguments, file, function, count):
    """Runs a command line and dies of SIGKILL at the `count`-th call in the file's `function`, or anywhere in it."""
    torch.set_num_threads(1)
    at_call(count, file, functools.partial(os.kill, os.getpid(), signal.SIGKILL), function)
    sys.exit(main(arguments))


def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(long, whole, tmp_path):
    """Each kill comes at a random call, of which there are more before a process has finished two epochs."""
    kills = [
        ("pcpo_fast/rollout.py", None, 200),
        ("pcpo_fast/files.py", "flush", 30),
        ("pcpo_fast/trainer.py", None, 120),
        ("pcpo_fast/checkpoint.py", None, 300),
        ("pcpo_fast/metrics.py", None, 150),
    ]
    generator = random.Random(0)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pcpo_fast.train", "diffusers", "peft", "torch.utils.tensorboard"])
    run = tmp_path / "run"
    left = []
    for index, (file, function, bound) in enumerate(kills):
        arguments = long(run, resume=True) if index else long(run)
        process = context.Process(target=run_until, args=(arguments, file, function, generator.randint(1, bound)))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        left += run.glob("checkpoints/*.partial")
    # some died while a checkpoint was being written
    assert left
    assert main(long(run, resume=True)) == 0
    assert_same_run(run, whole)
    assert not list(run.rglob("*.partial"))
    assert (run / "config.json").read_text() == (whole / "config.json").read_text().replace(str(whole), str(run))


@pytest.mark.parametrize(
    ("number", "file", "function", "count"),
    [
        # the first epoch's rollout comes after the evaluation's, which has 3 steps of one batch
        (signal.SIGINT, "pcpo_fast/rollout.py", "_advance", 2),
        (signal.SIGTERM, "pcpo_fast/policies/diffusers.py", "_guided", 60),
        (signal.SIGINT, "pcpo_fast/ops.py", "policy_loss", 20),
        (signal.SIGTERM, "pcpo_fast/pictures.py", "save_curves", 5),
    ],
    ids=["evaluation", "rollout", "update", "between"],
)
def test_signals_save_and_leave(long, whole, tmp_path, capfd, number, file, function, count):
    run = tmp_path / "run"
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    at_call(count, file, functools.partial(signal.raise_signal, number), function)
    try:
        # no checkpoint is due in the middle of the run
        status = main(long(run, checkpoint_every=100))
    finally:
        sys.setprofile(None)
    assert status == 128 + number
    output = "".join(capfd.readouterr())
    assert f"{number.name}: saving, then exiting" in output
    (checkpoint,) = (run / "checkpoints").iterdir()
    epoch = json.loads((checkpoint / "state.json").read_text())["epoch"]
    assert epoch < EPOCHS
    assert f"Stopped after epoch {epoch}; continue with --output-dir {run} --resume" in output
    assert [record["epoch"] for record in records(run)][-1:] in ([epoch], [])
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert main(long(run, resume=True)) == 0
    assert_same_run(run, whole)


class Fault(Exception):
    """Any error: a reward's server that does not answer, a full disk."""


def fail():
    raise Fault


@pytest.mark.parametrize(
    ("file", "function", "count", "epoch"),
    [
        # a trial scores once before the run, and so do an evaluation and an epoch
        ("pcpo_fast/rewards/jpeg.py", "compressibility", 1, None),
        ("pcpo_fast/rewards/jpeg.py", "compressibility", 2, 0),
        ("pcpo_fast/rewards/jpeg.py", "compressibility", 4, 1),
        ("pcpo_fast/rewards/jpeg.py", "compressibility", 5, 2),
        ("pcpo_fast/rewards/jpeg.py", "compressibility", 10, EPOCHS),
        ("pcpo_fast/pictures.py", "save_curves", 1, 0),
        ("pcpo_fast/ops.py", "policy_loss", 1, None),
    ],
    ids=["trial", "first evaluation", "epoch", "evaluation", "last evaluation", "curves", "update"],
)
def test_an_error_costs_nothing_that_was_finished(long, whole, tmp_path, capsys, file, function, count, epoch):
    """The checkpoint is of the last finished epoch; in the midst of an update there is none to be had. An error of a
    reward is one line."""
    run = tmp_path / "run"
    at_call(count, file, fail, function)
    try:
        if function == "compressibility":
            assert main(long(run, checkpoint_every=100)) == 2
            assert re.search(
                r"^error: .*'jpeg_compressibility' \(setting rewards\) failed: Fault \(test_train_cli.py, line \d+, in "
                "fail",
                capsys.readouterr().err,
                re.MULTILINE,
            )
        else:
            with pytest.raises(Fault):
                main(long(run, checkpoint_every=100))
    finally:
        sys.setprofile(None)
    saved = [json.loads(path.read_text())["epoch"] for path in run.glob("checkpoints/*/state.json")]
    assert saved == ([] if epoch is None else [epoch])
    assert main(long(run, **({"resume": True} if run.exists() else {}))) == 0
    assert_same_run(run, whole)
    assert_every_scalar_is_in_tensorboard_once(run)


def test_a_second_signal_leaves_at_once(long, tmp_path):
    def twice():
        signal.raise_signal(signal.SIGINT)
        # while other threads run, a signal may wait for its handler, and two of a kind become one
        while signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            time.sleep(1e-3)
        signal.raise_signal(signal.SIGINT)

    # a shell's background job ignores SIGINT
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    at_call(60, "pcpo_fast/policies/diffusers.py", twice, "_guided")
    try:
        with pytest.raises(KeyboardInterrupt):
            main(long(tmp_path / "run"))
    finally:
        sys.setprofile(None)
        signal.signal(signal.SIGINT, before)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.parametrize(
    "settings",
    [
        {"tuning": "full", "dtype": "fp16"},
        {"tuning": "full", "channels_last": True, "ema_decay": 0.5},
        {"dtype": "bf16"},
        {"ema_decay": 0.5, "kl_weight": 0.1, "objective": "guard", "window_size": 2, "window": "random"},
    ],
    ids=["full-fp16", "full-channels-last", "bf16", "extras"],
)
def test_resuming_at_every_epoch(long, tmp_path, settings):
    name = UNET if settings.get("tuning") == "full" else LORA
    whole = tmp_path / "whole"
    assert main(long(whole, epochs=3, keep_checkpoints=9, **settings)) == 0
    for epoch in (1, 2):
        run = shutil.copytree(whole, tmp_path / str(epoch))
        for later in range(epoch + 1, 4):
            shutil.rmtree(run / "checkpoints" / f"epoch-{later:06d}")
        assert main(long(run, epochs=3, keep_checkpoints=9, resume=True, **settings)) == 0
        assert_same_run(run, whole, name)


def test_resuming_repairs_the_metrics_and_needs_only_the_folder(whole, tmp_path):
    """The saved settings are used; a line that a kill cut off is dropped; partial checkpoints are removed."""
    run = shutil.copytree(whole, tmp_path / "run")
    last = run / "checkpoints" / f"epoch-{EPOCHS:06d}"
    last.rename(last.with_suffix(".partial"))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 6, "rew')
    assert main(["--output-dir", str(run), "--resume"]) == 0
    assert_same_run(run, whole)
    assert not list(run.rglob("*.partial"))


def test_resuming_a_finished_run_changes_nothing(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    assert main(["--output-dir", str(run), "--resume"]) == 0
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert_same_run(run, whole)


def test_resuming_with_more_epochs_and_another_learning_rate(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    assert main(["--output-dir", str(run), "--resume", "--epochs", "6", "--learning-rate", "1e-12"]) == 0
    assert [record["epoch"] for record in records(run)] == [0, 1, 2, 2, 3, 4, 4, 5, 5, 6, 6]
    assert records(run)[: len(records(whole))] == records(whole)
    before, after = final_weights(whole), final_weights(run)
    assert all((after[key] - value).abs().max() < 1e-9 for key, value in before.items())


def test_noise_is_never_used_twice(model, tmp_path, monkeypatch):
    """Also where a resumed run samples more or less per epoch than before."""
    run, ranges, rollout = tmp_path / "run", [], trainer.RolloutEngine.__call__

    def watched(engine, table, conditioning, prompt, *, first_index, **settings):
        if settings["record"]:
            ranges.append((first_index, first_index + len(prompt)))
        return rollout(engine, table, conditioning, prompt, first_index=first_index, **settings)

    monkeypatch.setattr(trainer.RolloutEngine, "__call__", watched)
    assert main(command(model, run, epochs=2)) == 0
    for epochs, group_size in ((3, 4), (5, 2)):
        assert main([*command(model, run, epochs=epochs, group_size=group_size), "--resume"]) == 0
    assert ranges == [(0, 4), (4, 8), (8, 16), (16, 20), (20, 24)]


def test_resuming_with_another_number_of_steps(model, tmp_path, monkeypatch):
    """Epochs of all numbers are in one picture, and no image draws noise that an earlier one has drawn."""
    run, drawn, rollout = tmp_path / "run", [], trainer.RolloutEngine.__call__

    def watched(engine, table, conditioning, prompt, *, first_index, **settings):
        if settings["record"]:
            counters = len(table) * math.ceil(math.prod(engine.policy.latent_shape) / 4)
            drawn.append((first_index * counters, (first_index + len(prompt)) * counters))
        return rollout(engine, table, conditioning, prompt, first_index=first_index, **settings)

    monkeypatch.setattr(trainer.RolloutEngine, "__call__", watched)
    for epochs, steps, resolution in ((1, 3, 32), (2, 4, 32), (3, 2, 32), (4, 3, 16), (5, 3, 16)):
        settings = {"epochs": epochs, "num_inference_steps": steps, "resolution": resolution}
        assert main([*command(model, run, **settings), *(["--resume"] if epochs > 1 else [])]) == 0
    lengths = [len(record["update/clip_fraction_per_step"]) for record in records(run) if "reward/mean" in record]
    assert lengths == [3, 4, 2, 3, 3]
    assert len(drawn) == 5 and all(end <= start for (_, end), (start, _) in itertools.pairwise(drawn))


def test_evaluating_more_often_changes_nothing_else(model, tmp_path, own_rewards):
    runs = {eval_every: tmp_path / str(eval_every) for eval_every in (0, 1)}
    for eval_every, run in runs.items():
        assert main(command(model, run, eval_every=eval_every, rewards=("my_rewards:noisy",))) == 0
    rare, often = (final_weights(run) for run in runs.values())
    assert all(torch.equal(often[key], value) for key, value in rare.items())


# errors


@pytest.fixture
def own_rewards(tmp_path, monkeypatch):
    """A module beside the user, with rewards of all kinds."""
    (tmp_path / "my_rewards.py").write_text(
        "import builtins, collections, math, sys, time\n"
        "import torch\n"
        "calls = collections.Counter()\n"
        "def red(images, prompts): return images[:, 0].mean(dim=(1, 2))\n"
        "def nan(images, prompts): return [math.nan] * len(prompts)\n"
        "def one(images, prompts): return 1.0\n"
        "def noisy(images, prompts): return torch.rand(len(prompts))\n"
        "def exits(images, prompts): sys.exit(0)\n"
        # an epoch has four images, an evaluation and the trial have two
        "def leaves(images, prompts):\n"
        "    calls['leaves'] += len(prompts) == 4\n"
        "    if calls['leaves'] == 2: sys.exit(0)\n"
        "    return red(images, prompts)\n"
        "def late(images, prompts):\n"
        "    calls['late'] += len(prompts) == 4\n"
        "    if calls['late'] == 3: {}['score']\n"
        "    return red(images, prompts)\n"
        "def sees(images, prompts):\n"
        "    builtins.my_rewards_seen.append((tuple(images.shape), list(prompts)))\n"
        "    return red(images, prompts)\n"
        "def slow(images, prompts):\n"
        "    time.sleep(0.1)\n"
        "    return [1.0] * len(prompts)\n"
        "def half(images, prompts): return [math.nan, *range(len(prompts) // 2 - 1)] * 2\n"
        "def hangs(images, prompts):\n"
        "    calls['hangs'] += 1\n"
        "    time.sleep({1: 0.5, 3: 60}.get(calls['hangs'], 0))\n"
        "    return red(images, prompts)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    # another test may have had a module of this name, in another folder
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    yield
    sys.modules.pop("my_rewards", None)


def test_a_reward_of_the_users_own(model, tmp_path, own_rewards):
    run = tmp_path / "run"
    rewards = ("my_rewards:red=10", "jpeg_compressibility=0.5")
    assert main(command(model, run, rewards=rewards, epochs=1)) == 0
    record = records(run)[1]
    parts = 10 * record["reward/my_rewards:red"] + 0.5 * record["reward/jpeg_compressibility"]
    assert record["reward/mean"] == pytest.approx(parts, rel=1e-5)


@pytest.mark.parametrize(
    ("reward", "message", "epoch"),
    [
        ("nan", "every reward of epoch 1 is NaN or infinite", 0),
        (
            "leaves",
            r"'my_rewards:leaves' \(setting rewards\) failed: SystemExit: 0 \(my_rewards.py, line \d+, in leaves",
            1,
        ),
        (
            "late",
            r"'my_rewards:late' \(setting rewards\) failed: KeyError: 'score' \(my_rewards.py, line \d+, in late",
            2,
        ),
    ],
)
def test_rewards_that_fail_in_the_run_are_named(model, tmp_path, own_rewards, capfd, reward, message, epoch):
    """In one line; and the run can go on, with another reward say. A call to sys.exit is a failure like any other."""
    run = tmp_path / "run"
    assert main(command(model, run, rewards=(f"my_rewards:{reward}",), epochs=3, checkpoint_every=100)) == 2
    output = capfd.readouterr()
    (error,) = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert re.search(message, error)
    assert "Traceback" not in output.err
    assert f"Stopped after epoch {epoch}; continue with --output-dir {run} --resume" in output.out
    assert [record["epoch"] for record in records(run)][-1] == epoch
    assert main(["--output-dir", str(run), "--resume", "--rewards", "my_rewards:red"]) == 0


@pytest.mark.parametrize(
    ("setting", "reward", "message"),
    [
        (
            "rewards",
            "my_rewards:one",
            r"\(setting rewards\): returned shape \(\) for 2 images; it must return one number",
        ),
        (
            "eval_rewards",
            "digit_accuracy",
            r"\(setting eval_rewards\): the prompt '\w+' names no digit: write exactly one",
        ),
        ("rewards", "my_rewards:exits", r"failed: SystemExit: 0 \(my_rewards.py, line \d+, in exits\)"),
    ],
)
def test_rewards_are_tried_out_before_the_model_is_loaded(
    model, tmp_path, own_rewards, no_weights, capsys, setting, reward, message
):
    assert main(command(model, tmp_path / "run", **{setting: (reward,)})) == 2
    error = capsys.readouterr().err
    assert re.search(f"^error: --{setting.replace('_', '-')}: the reward '{reward}' .*{message}", error)
    assert "This was a trial before the run, on two images" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_trial_has_the_runs_prompts_and_size_and_changes_no_number(model, tmp_path, own_rewards, monkeypatch):
    """A reward that draws random numbers draws the same ones in a run without a trial."""
    rewards, seen = ("my_rewards:noisy", "my_rewards:sees"), []
    monkeypatch.setattr("builtins.my_rewards_seen", seen, raising=False)
    assert main(command(model, tmp_path / "tried", rewards=rewards)) == 0
    assert seen[0] == ((2, 3, 64, 64), ["cat", "dog"])
    monkeypatch.setattr(train, "_try_out", lambda *arguments: None)
    assert main(command(model, tmp_path / "not", rewards=rewards)) == 0
    assert records(tmp_path / "tried") == records(tmp_path / "not")
    # other noise in every epoch
    first, second = records(tmp_path / "tried")[1:3]
    assert first["reward/my_rewards:noisy"] != second["reward/my_rewards:noisy"]


def test_rewards_are_timed_and_counted(model, tmp_path, own_rewards, capfd):
    run = tmp_path / "run"
    assert main(command(model, run, rewards=("my_rewards:slow", "my_rewards:half=2"))) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in lines[1:3]:
        assert 0.1 <= record["time/reward/my_rewards:slow"] <= record["time/reward"]
        assert record["time/reward/my_rewards:half"] < 0.1
        assert record["reward/not_finite"] == record["reward/not_finite/my_rewards:half"] == 2
        assert record["reward/not_finite/my_rewards:slow"] == 0
    for record in (lines[0], lines[-1]):
        assert record["time/eval/my_rewards:slow"] >= 0.1
        assert "time/eval/jpeg_incompressibility" in record
    output = capfd.readouterr()
    assert re.search(r"my_rewards:slow +│ +1.000 +│ +1.000 +│ +0\.1\d", output.out)
    assert "excluded: 4 images without a finite reward, 4 of my_rewards:half, 0 updates" in output.out
    assert "time/reward=0.1" in output.err
    # said once
    warning = "warning: the reward 'my_rewards:slow' gave all images that are compared with one another the same score"
    assert output.out.count(warning) == 1


def test_a_reward_that_takes_too_long_ends_the_run(model, tmp_path, own_rewards, capfd):
    """It is saved, and goes on with more time. The trial, in which a reward may load a model, is not timed."""
    run = tmp_path / "run"
    started = time.monotonic()
    assert main(command(model, run, rewards=("my_rewards:hangs",), reward_timeout=0.2)) == 2
    assert time.monotonic() - started < 30
    message = (
        "'my_rewards:hangs' .* took more than the 0.2 seconds of reward_timeout; raise it, or make the reward faster"
    )
    assert re.search(message, capfd.readouterr().err)
    assert main(["--output-dir", str(run), "--resume", "--rewards", "my_rewards:red"]) == 0


@pytest.fixture
def files(tmp_path):
    """Input files that cannot be used."""
    (tmp_path / "empty.txt").write_text(" \n\n")
    for name, text in {
        "broken": '{"epochs": 3',
        "list": "[1]",
        "unknown": '{"epoch": 3}',
        "type": '{"epochs": "ten"}',
        "half": '{"epochs": 2.5}',
        "choice": '{"objective": "grpo"}',
        "null": '{"seed": null}',
        "text": '{"rewards": "jpeg_compressibility"}',
        "pair": '{"window_size": 1, "window_range": [1]}',
        "true": '{"epochs": true}',
    }.items():
        (tmp_path / f"{name}.json").write_text(text)
    (tmp_path / "broken.yaml").write_text("epochs: [3")
    (tmp_path / "range.yaml").write_text("clip_range: -1e-4")
    (tmp_path / "binary.txt").write_bytes(b"a cat\xff")
    return tmp_path


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "--prompts nofile.txt",
            "--prompts: 'nofile.txt' is neither a file nor a built-in list; give a text file .*animals",
        ),
        ("--prompts empty.txt", "--prompts: cannot read empty.txt: it is empty"),
        (
            "--model nowhere",
            "--model: 'nowhere' is not a diffusers pipeline: nowhere/model_index.json not found; give a folder",
        ),
        ("--model owner/not-there-at-all", "owner/not-there-at-all"),
        ("--device gpu", "--device: gpu is not supported; choose auto, cpu, cuda or cuda:N"),
        ("--device cuda:99", "--device: cuda:99 is not there: this machine shows .*; use auto or cpu"),
        ("--rewards nothing", "no reward is named 'nothing'; choose one of digit_alignment"),
        ("--rewards not_there:f", "needs the module 'not_there'"),
        ("--rewards math:nothing", "module 'math' has no function 'nothing'"),
        (
            "--group-size 3",
            "--micro-batch-size: 4 does not divide the 6 images .*group_size 3.*: choose a divisor of 6",
        ),
        (
            "--group-size 1 --micro-batch-size 2",
            "--group-size: 1 leaves advantage group nothing to compare with; set it to at least 2, or",
        ),
        (
            "--advantage batch --prompts-per-epoch 1 --group-size 1 --micro-batch-size 1",
            "--advantage: batch compares .* is a single image; raise either",
        ),
        (
            "--advantage prompt --prompt-buffer-size 1",
            "--prompt-buffer-size: 1 leaves advantage prompt .* set it to at least 2",
        ),
        ("--num-inference-steps 1001", "--num-inference-steps: 1001 must lie between 1 and the schedule's 1000"),
        (
            "--credit proportionate --target-weight 1e-3",
            "--target-weight: 0.001 is below .*: the smallest that some step reaches is",
        ),
        ("--eta 0", "--sampler: every step is deterministic, .* raise eta"),
        ("--eta 0 --credit native", "--sampler: every step is deterministic, .* raise eta"),
        ("--shift 3", "--shift: .*is for flow models and DDIMScheduler is a diffusion scheduler; leave it out"),
        ("--lora-target-modules to_q nosuch", "--lora-target-modules: nosuch names no layer of UNet2DConditionModel"),
        ("--tuning full --lora-target-modules to_q", "--lora-target-modules: applies to tuning lora, and"),
        ("--max-sequence-length 513", "--max-sequence-length: 513 was given; it must be less than or equal to 512"),
        ("--config pair.json", r"--config: pair.json: window_range: \[1\] was given; it needs more values"),
        ("--epochs 0", "--epochs: 0 was given; it must be greater than 0"),
        ("--learning-rate nan", "--learning-rate: nan was given; it must be a finite number"),
        ("--clip-range -1", "--clip-range: -1.0 was given; it must be greater than 0"),
        ("--seed -1", "--seed: -1 was given; it must be greater than or equal to 0"),
        ("--adam-beta2 1", "--adam-beta2: 1.0 was given; it must be less than 1"),
        ("--guidance-scale 0.5", "--guidance-scale: 0.5 was given; it must be greater than or equal to 1"),
        ("--timestep-fraction 0", "--timestep-fraction: 0.0 was given; it must be greater than 0"),
        ("--resolution 0", "--resolution: 0 was given; it must be greater than 0"),
        ("--prompt-buffer-min 20", "--prompt-buffer-min: 20 is never reached with prompt_buffer_size 16"),
        ("--config none.json", "--config: cannot read none.json: .*No such file"),
        ("--config broken.json", "--config: cannot read broken.json: .*line 1"),
        ("--config list.json", "--config: list.json must hold settings by name"),
        ("--config unknown.json", "--config: unknown.json: epoch: no setting has this name; did you mean epochs"),
        ("--config type.json", "--config: type.json: epochs: 'ten' was given; it must be a valid integer"),
        ("--config half.json", "--config: half.json: epochs: 2.5 was given; it must be a valid integer"),
        ("--config choice.json", "objective: 'grpo' was given; it must be 'pcpo', 'ppo' or 'guard'"),
        ("--config true.json", "--config: true.json: epochs: true was given; it must be a valid integer"),
        ("--config broken.yaml", "--config: cannot read broken.yaml: .*line 1"),
        ("--config range.yaml", "--config: range.yaml: clip_range: -0.0001 was given; it must be greater than 0"),
        ("--prompts binary.txt", "--prompts: cannot read binary.txt: line 1 is not UTF-8"),
        ("--output-dir empty.txt", "--output-dir: cannot be used as a run folder: .*empty.txt"),
        ("--window random", "--window: places a window of steps, and window_size is not set"),
        ("--window-size 9", "--window-size: 9 is more than the 3 steps from 0 to 3"),
        ("--eval-rewards nothing", "--eval-rewards: no reward is named 'nothing'"),
        ("--config null.json", "--config: null.json: seed: null was given; it must be a valid integer"),
        ("--config text.json", "--config: text.json: rewards: 'jpeg_compressibility' was given; it must be a list"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_made(model, files, monkeypatch, capsys, given, message):
    monkeypatch.chdir(files)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    settings = {name: value for name, value in SMALL.items() if not given.startswith("--config")}
    run = files / "run"
    arguments = ["--model", str(model), "--output-dir", str(run)]
    if settings:
        arguments = command(model, run)
    assert main([*arguments, *given.split()]) == 2
    error = capsys.readouterr().err
    assert re.search("error: .*" + message, error, re.DOTALL), error
    assert not run.exists()
    assert not (files / "runs").exists()


def test_xformers_that_is_not_installed_is_refused(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(command(model, tmp_path / "run", attention="xformers")) == 2
    error = capsys.readouterr().err
    assert (
        "--attention: xformers needs the package xformers, which is not installed; pip install 'pcpo-fast[xf" in error
    )
    assert not (tmp_path / "run").exists()


def test_a_scheduler_that_is_not_affine_is_refused(tmp_path, capsys):
    folder = save_stable_diffusion(tmp_path / "model", thresholding=True)
    assert main(command(folder, tmp_path / "run")) == 2
    assert "thresholding=True" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [["--epoch", "3"], ["--objective", "grpo"], ["--epochs", "x"], ["3"]])
def test_unknown_flags_and_values_are_refused(model, tmp_path, capsys, arguments):
    with pytest.raises(SystemExit) as error:
        main([*command(model, tmp_path / "run"), *arguments])
    assert error.value.code == 2
    assert arguments[0] in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_unknown_presets_are_refused(capsys):
    assert main(["sd14", "--epochs", "3"]) == 2
    error = capsys.readouterr().err
    assert (
        "preset: 'sd14' does not exist; choose one of digits, digits-flow, sd15, sdxl, sd35, flux, or give none"
        in error
    )


def test_a_folder_that_holds_a_run_is_not_overwritten(whole, long, capsys):
    before = (whole / "metrics.jsonl").read_bytes()
    assert main(long(whole)) == 2
    assert f"--output-dir: {whole} already holds a run; add --resume to continue it" in capsys.readouterr().err
    assert (whole / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--lora-rank 8", "--lora-rank: 8 was given, and the checkpoints in .* depend on 4; leave the setting out, or"),
        ("--lora-alpha 8", "--lora-alpha: 8 was given, .* depend on 4"),
        ("--tuning full", "--tuning: 'full' was given, .* depend on 'lora'"),
        ("--lora-target-modules to_q", "--lora-target-modules: "),
        ("--model digits", "--model: 'digits' .*; if it is the same model in another place, .*config.json"),
    ],
)
def test_resuming_with_another_adapter_is_refused(whole, capsys, given, message):
    before = (whole / "metrics.jsonl").read_bytes()
    assert main(["--output-dir", str(whole), "--resume", *given.split()]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_a_model_that_moved_is_told_to_the_run(model, tmp_path):
    run, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(model, moved)
    assert main(command(moved, run, epochs=1)) == 0
    config = run / "config.json"
    moved.rename(tmp_path / "again")
    config.write_text(config.read_text().replace(str(moved), str(tmp_path / "again")))
    assert main(["--output-dir", str(run), "--resume", "--epochs", "2"]) == 0


def test_a_run_in_fp32_may_go_on_in_fp16(whole, tmp_path):
    """It has no state of a loss scaler."""
    run = shutil.copytree(whole, tmp_path / "run")
    assert main(["--output-dir", str(run), "--resume", "--dtype", "fp16", "--epochs", "6"]) == 0


@pytest.mark.parametrize(
    ("there", "named"), [(None, "the folder does not exist"), ("notes.txt", "it has no config.json, but notes.txt")]
)
def test_resuming_what_is_no_run_is_refused(model, tmp_path, capsys, there, named):
    """It is a mistyped folder rather than a new run."""
    run = tmp_path / "run"
    if there is not None:
        run.mkdir()
        (run / there).touch()
    assert main(command(model, run, resume=True)) == 2
    error = capsys.readouterr().err
    assert f"--output-dir: {run} holds no run to resume: " in error
    assert named in error
    assert "or leave --resume out to begin one there" in error
    assert ([path.name for path in run.iterdir()] if there else run.exists()) == ([there] if there else False)


def test_a_run_that_was_killed_before_it_began_begins(model, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / LOCK).touch()
    assert main(command(model, run, resume=True, epochs=1)) == 0
    assert (run / "config.json").is_file()


def test_resume_needs_a_folder(capsys):
    assert main(["--resume"]) == 2
    assert "--resume: needs output_dir, the folder of the run to continue" in capsys.readouterr().err


# settings


def test_the_command_line_overrides_the_file_which_overrides_the_preset(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"seed": 7, "epochs": 3, "rewards": ["jpeg_incompressibility=2"], "target_weight": 1}')
    for spelling in (["--config", str(file)], [f"--config={file}"]):
        preset, config = parse(["sd15", *spelling, "--epochs", "4", "--group_size", "8"])
        assert preset == "sd15"
        expected = PRESETS["sd15"].replace(
            seed=7,
            epochs=4,
            group_size=8,
            rewards=("jpeg_incompressibility=2",),
            target_weight=1,
            learning_rate=3e-4,
        )
        assert config == expected
    assert parse([]) == ("digits", PRESETS["digits"].resolved())


@pytest.mark.parametrize(("tuning", "learning_rate"), [("lora", 3e-4), ("full", 1e-5)])
def test_the_learning_rate_depends_on_the_tuning(tuning, learning_rate):
    assert parse(["sd15", "--tuning", tuning])[1].optimizer.learning_rate == learning_rate
    assert parse(["sd15", "--tuning", tuning, "--learning-rate", "0.5"])[1].optimizer.learning_rate == 0.5


def test_what_was_resolved_is_saved(whole, long, tmp_path):
    _, resolved = parse(long(whole))
    saved = Config().replace(**read_config(whole / "config.json"))
    assert saved == resolved
    # and another run can start from it
    assert parse(["--config", str(whole / "config.json")])[1] == resolved
    for preset in PRESETS.values():
        (tmp_path / "preset.json").write_text(preset.to_json())
        assert Config().replace(**read_config(tmp_path / "preset.json")) == preset


def test_resuming_uses_the_saved_settings(whole):
    _, saved = parse(["--config", str(whole / "config.json")])
    assert parse(["--output-dir", str(whole), "--resume"])[1] == saved.replace(resume=True)
    other = parse(["--output-dir", str(whole), "--resume", "--epochs", "9", "--seed=3"])[1]
    assert other == saved.replace(resume=True, epochs=9, seed=3)


def test_run_folders_do_not_collide(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = command(model, tmp_path, epochs=1)
    place = arguments.index("--output-dir")
    arguments = arguments[:place] + arguments[place + 2 :]
    for folder in ("runs/digits", "runs/digits-2"):
        assert main(arguments) == 0
        assert (tmp_path / folder / "config.json").is_file()


def test_runs_that_start_together_have_folders_of_their_own(model, tmp_path, monkeypatch):
    """The second starts while the first loads its model."""
    monkeypatch.chdir(tmp_path)
    arguments = command(model, tmp_path, epochs=1)
    place = arguments.index("--output-dir")
    arguments = arguments[:place] + arguments[place + 2 :]

    def start_another(config):
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        assert main(arguments) == 0

    # called between the making of the folder and the loading of the model
    monkeypatch.setattr(train, "_set_globals", start_another)
    assert main(arguments) == 0
    for folder in ("runs/digits", "runs/digits-2"):
        assert len(records(tmp_path / folder)) == 3


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_in_which_a_run_goes_on_is_refused(model, tmp_path, monkeypatch, capsys, resume):
    run, statuses = tmp_path / "run", []
    others = command(model, run, resume=True) if resume else command(model, run)
    monkeypatch.setattr(train, "_announce", lambda trainer: statuses.append(main(others)))
    assert main(command(model, run, epochs=1)) == 0
    assert statuses == [2]
    assert f"--output-dir: {run} is in use by process {os.getpid()}; wait" in capsys.readouterr().err
    assert len(records(run)) == 3
    # and free again behind it
    monkeypatch.undo()
    assert main(command(model, run, resume=True, epochs=2)) == 0


def test_an_error_leaves_what_it_found(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "mine"
    mine.mkdir()
    assert main(command(model, mine, rewards=("nothing",))) == 2
    assert mine.exists()
    assert main(["--rewards", "nothing"]) == 2
    assert not list(tmp_path.glob("runs/*"))


def test_a_gpu_is_asked_for_the_same_bits_every_time(model, tmp_path, monkeypatch):
    """A CPU is not asked: its kernels are deterministic."""
    names = [
        (torch.backends.cudnn, "deterministic", True),
        (torch.backends.cudnn, "benchmark", False),
        (torch.utils.deterministic, "fill_uninitialized_memory", False),
    ]
    for owner, name, value in names:
        monkeypatch.setattr(owner, name, not value)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for device, asked in (("cpu", False), ("cuda", True)):
        monkeypatch.setattr(train, "find_device", lambda name, device=device: torch.device(device))
        try:
            assert main(command(model, tmp_path / device, device="cpu", epochs=1)) == 0
            assert torch.are_deterministic_algorithms_enabled() == asked
            assert [getattr(owner, name) == value for owner, name, value in names] == [asked] * 3
            assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == asked
        finally:
            torch.use_deterministic_algorithms(False)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_is_a_setting_of_the_process(monkeypatch, tf32):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(train, "find_device", lambda name: torch.device("cuda"))
    # a build of PyTorch for CPUs has no such flag to read
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=not tf32))
    for name in ("allow_tf32", "deterministic", "benchmark"):
        monkeypatch.setattr(torch.backends.cudnn, name, not tf32)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    try:
        train._set_globals(Config().replace(tf32=tf32))
        assert [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32] == [tf32, tf32]
    finally:
        torch.use_deterministic_algorithms(False)


def test_dynamo_has_room_for_all_variants_of_a_compiled_block():
    for before, after in ((8, train.RECOMPILE_LIMIT), (1000, 1000)):
        with torch._dynamo.config.patch(recompile_limit=before):
            train._set_globals(Config().replace(device="cpu"))
            assert torch._dynamo.config.recompile_limit == before
            train._set_globals(Config().replace(device="cpu", compile=True))
            assert torch._dynamo.config.recompile_limit == after


@pytest.fixture
def no_weights(monkeypatch):
    """Makes every way in which weights are read an error."""

    def refuse(*arguments, **settings):
        raise AssertionError("weights were read")

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", refuse)
    monkeypatch.setattr("diffusers.ModelMixin.from_pretrained", refuse)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)
    monkeypatch.setattr("safetensors.torch.load_file", refuse)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("--prompts nofile.txt", "prompts"),
        ("--rewards nothing", "rewards"),
        ("--rewards digit_alignment:f", "rewards"),
        ("--eval-rewards nothing", "eval-rewards"),
        ("--sampler ddmi", "sampler"),
        ("--sampler flow", "sampler"),
        ("--eta 0", "sampler"),
        ("--noise-level 0.5", "noise-level"),
        ("--num-inference-steps 1001", "num-inference-steps"),
        ("--window-size 99", "window-size"),
        ("--device cuda:99", "device"),
        ("--output-dir {here}", "output-dir"),
    ],
)
def test_what_needs_no_weights_is_checked_before_they_are_read(tmp_path, no_weights, capsys, given, name):
    (tmp_path / "config.json").write_text("{}")
    assert main([*given.format(here=tmp_path).split(), "--model", "digits"]) == 2
    assert f"error: --{name}: " in capsys.readouterr().err


def test_a_typo_is_reported_without_the_libraries_of_the_models(tmp_path):
    """They take seconds to import; prompts and rewards are checked before, and so are samplers."""
    code = (
        "import sys\n"
        "from pcpo_fast.train import main\n"
        "assert main(sys.argv[1:]) == 2\n"
        "print([name for name in ('transformers.modeling_utils', 'peft', 'accelerate') if name in sys.modules])"
    )
    for given in ("--prompts nofile.txt", "--rewards nothing", "--sampler ddmi"):
        done = subprocess.run(
            [sys.executable, "-c", code, *given.split()], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.stdout.strip() == "[]", (given, done.stderr)


def test_errors_of_our_own_keep_their_traceback(model, tmp_path, monkeypatch):
    def broken(config):
        raise ValueError("a fault of the program")

    monkeypatch.setattr(train, "_set_globals", broken)
    with pytest.raises(ValueError, match="a fault of the program"):
        main(command(model, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_yaml_files(tmp_path):
    """Numbers such as 1e-4, which YAML 1.1 takes for text, are numbers."""
    file = tmp_path / "config.yaml"
    file.write_text("clip_range: 1e-4\nlearning_rate: 3E-5\nrewards: [jpeg_compressibility]\nseed: 7\nresume: false\n")
    config = parse(["sd15", "--config", str(file)])[1]
    expected = {"clip_range": 1e-4, "learning_rate": 3e-5, "rewards": ("jpeg_compressibility",), "seed": 7}
    assert config == PRESETS["sd15"].replace(**expected).resolved()


def test_unknown_settings_are_refused_with_the_nearest_name():
    with pytest.raises(SettingError, match=r"groupsize: no setting has this name; did you mean group_size\?"):
        Config().replace(groupsize=3)
    with pytest.raises(SettingError, match=r"xyz: no setting has this name$"):
        Config().replace(xyz=3)


def settings_groups():
    return {field.name: type(field.default) for field in dataclasses.fields(Config)}


def documented(group):
    bodies = [ast.parse(inspect.getsource(kind)).body[0].body for kind in reversed(group.__mro__[:-1])]
    return {
        node.target.id: " ".join(doc.value.value.split())
        for body in bodies
        for node, doc in itertools.pairwise(body)
        if isinstance(node, ast.AnnAssign) and isinstance(doc, ast.Expr)
    }


def test_help_documents_every_setting_under_its_group(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as status:
        main(["--help"])
    assert status.value.code == 0
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]|-{9,}", " ", capsys.readouterr().out).split())
    titles = documented(Config)
    assert list(titles) == list(settings_groups())
    end = 0
    for group, settings in settings_groups().items():
        # the groups follow one another, each with its title and all of its settings
        start = text.index(f"{group} options {titles[group]}")
        assert start > end
        docs = documented(settings)
        assert list(docs) == [field.name for field in dataclasses.fields(settings)]
        for name, doc in docs.items():
            end = text.index(f"--{name.replace('_', '-')}", start)
            assert doc in text[end:]
    assert "--config FILE" in text


def test_no_setting_has_two_places():
    names = [field.name for group in settings_groups().values() for field in dataclasses.fields(group)]
    assert len(names) == len(set(names))
    assert list(Config().flat()) == names


def test_the_command_pcpo(model, tmp_path, capsys):
    assert pcpo(["--version"]) == 0
    assert capsys.readouterr().out == f"pcpo-fast {__version__}\n"
    for arguments in ([], ["--help"], ["-h"]):
        assert pcpo(arguments) == 0
        assert "train         align" in capsys.readouterr().out
    assert pcpo(["trian"]) == 2
    assert "error: there is no command 'trian'" in capsys.readouterr().err
    assert pcpo(["train", *command(model, tmp_path / "run", epochs=1)]) == 0
    assert len(records(tmp_path / "run")) == 3


def test_the_version_is_the_packages():
    assert importlib.metadata.version("pcpo-fast") == __version__


def test_files_are_short_enough_to_read():
    """No file of the package is longer than 420 lines, and the loop is at most 260."""
    package = Path(train.__file__).parent
    lengths = {
        path.relative_to(package).as_posix(): len(path.read_text().splitlines()) for path in package.rglob("*.py")
    }
    assert {path: length for path, length in lengths.items() if length > 420} == {}
    assert lengths["trainer.py"] <= 260
