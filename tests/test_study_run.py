"""One run of a study: what it writes and when, and that one which was stopped ends with the same numbers."""

import functools
import json
import os
import shutil
import signal
import sys

import pytest
import torch
from pipelines import FEW
from safetensors.torch import load_file, save_file

pytest.importorskip("torchmetrics")

from pcpo_fast.errors import SettingError
from pcpo_fast.presets import PRESETS
from pcpo_fast.study import gradients, run

pytest_plugins = "pipelines"
pytestmark = pytest.mark.usefixtures("one_thread")

EPOCHS = 2
BASE = "base_images.safetensors"


@pytest.fixture(scope="module", autouse=True)
def few():
    """Gradients of few images, real digits that are read once, and a parent that is there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradients, "BATCHES", 2)
        patch.setattr(run, "Quality", functools.cache(run.Quality))
        patch.setenv(run.PARENT, str(os.getppid()))
        yield


def prepared(folder, *, measured=True, **settings):
    """A folder as a study makes it for a run, of two prompts with two images each in an evaluation."""
    folder.mkdir()
    prompts = folder / "prompts.txt"
    prompts.write_text("the digit 3\nthe digit 7\n")
    config = PRESETS["digits-flow"].replace(**FEW | {"epochs": EPOCHS, "prompts": str(prompts)} | settings)
    flat = {name: value for name, value in config.flat().items() if name not in ("output_dir", "resume")}
    (folder / run.SETTINGS).write_text(json.dumps({"settings": flat, "gradients": measured}))
    return folder


def start(folder):
    """The exit status of the run's process, which is this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["run", str(folder)])
        return run.main()


def result_of(folder):
    """The result without seconds; anything but strict JSON is an error."""

    def refuse(constant):
        raise ValueError(constant)

    def strip(value):
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if key != "seconds"}
        return [strip(item) for item in value] if isinstance(value, list) else value

    return strip(json.loads((folder / run.RESULT).read_text(), parse_constant=refuse))


def orphaned_at(monkeypatch, collection):
    """The parent is gone when the images of a `collection`, counted from 1, are about to be sampled."""
    parents, parent = iter([os.getppid()] * (collection - 1)), -1
    monkeypatch.setattr(os, "getppid", lambda: next(parents, parent))


@pytest.fixture(scope="module")
def whole(few, tmp_path_factory):
    """A run that was never stopped."""
    folder = prepared(tmp_path_factory.mktemp("whole") / "run")
    assert start(folder) == 0
    return folder


def test_a_result(whole):
    result = result_of(whole)
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in result["evaluations"]] == [0, 1, 2]
    assert [row["epoch"] for row in result["steps"]] == [1, 2]
    for row, record in zip(result["evaluations"], (r for r in records if "eval/reward" in r), strict=True):
        assert row["images"] == 8 * row["epoch"] == 8 * record["epoch"]
        assert row["reward"] == pytest.approx(record["eval/reward"], rel=1e-5)
        assert row["accuracy"] == record["eval/digit_accuracy"]
        for name in run.QUALITIES:
            assert row[name] == pytest.approx(record[f"eval/{name}"], rel=1e-5)
    first, last = result["evaluations"][0], result["evaluations"][-1]
    assert first["pixel_shift"] == first["feature_shift"] == 0 < last["pixel_shift"]
    updates = [record for record in records if "update/loss" in record]
    assert result["training"]["grad_norm"] == pytest.approx([r["update/grad_norm"] for r in updates], rel=1e-5)
    assert result["training"]["reward"] == pytest.approx([r["reward/mean"] for r in updates], rel=1e-5)
    assert [row["epoch"] for row in result["gradients"]] == [0, EPOCHS]
    # no digit of a number is beyond the sixth
    assert all(float(f"{value:.6g}") == value for value in last.values())


@pytest.mark.parametrize("collection", [2, 4, 6])
def test_a_run_without_its_parent_ends_and_can_be_continued(whole, tmp_path, monkeypatch, collection):
    """Each of the two measurements of gradients collects twice, and each epoch once."""
    folder = prepared(tmp_path / "run")
    with monkeypatch.context() as patch:
        orphaned_at(patch, collection)
        assert start(folder) == 1
    assert not (folder / run.RESULT).exists()
    assert start(folder) == 0
    assert result_of(folder) == result_of(whole)
    assert (folder / BASE).read_bytes() == (whole / BASE).read_bytes()


def test_a_run_that_a_signal_stopped_ends_with_the_same_numbers(whole, tmp_path, monkeypatch):
    folder = prepared(tmp_path / "run")
    update = run.StudyTrainer.update

    def stopped(trainer, batch):
        os.kill(os.getpid(), signal.SIGTERM)
        return update(trainer, batch)

    with monkeypatch.context() as patch:
        patch.setattr(run.StudyTrainer, "update", stopped)
        assert start(folder) == 1
    assert not (folder / run.RESULT).exists() and (folder / "checkpoints" / "epoch-000001").is_dir()
    assert start(folder) == 0
    assert result_of(folder) == result_of(whole)
    # to run it once more changes nothing
    assert start(folder) == 0
    assert result_of(folder) == result_of(whole)


def test_a_continued_run_measures_against_the_base_images_that_are_there(tmp_path, monkeypatch):
    folder = prepared(tmp_path / "run", measured=False)
    with monkeypatch.context() as patch:
        orphaned_at(patch, 2)
        assert start(folder) == 1
    images = load_file(folder / BASE)["images"]
    assert images.shape == (4, 3, 32, 32) and 0 <= images.min() < images.max() <= 1
    # as far away as can be
    save_file({"images": torch.full_like(images, 100.0)}, folder / BASE)
    before = (folder / BASE).read_bytes()
    assert start(folder) == 0
    assert (folder / BASE).read_bytes() == before
    assert [row["pixel_shift"] > 50 for row in result_of(folder)["evaluations"]] == [False, False, True]


def test_the_result_is_written_last_and_has_no_number_that_is_none(tmp_path, monkeypatch):
    """No two images have a prompt in common, so there is no diversity; and a gradient that overflowed."""
    folder, written, write = prepared(tmp_path / "run", epochs=1, prompts="digits"), [], run.write_atomically

    def watched(path, content):
        write(path, content)
        written.append(path.name)
        if path.name == run.RESULT:
            last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
            assert last["epoch"] == 1 and "eval/reward" in last
            assert (folder / "checkpoints" / "epoch-000001").is_dir()

    monkeypatch.setattr(run, "write_atomically", watched)
    monkeypatch.setattr(run, "step_gradients", lambda trainer: {"signal": [float("inf"), float("nan"), 1.0]})
    assert start(folder) == 0
    assert written == ["gradients-000000.json", BASE, "gradients-000001.json", run.RESULT]
    result = result_of(folder)
    assert [row["signal"] for row in result["gradients"]] == [[None, None, 1.0]] * 2
    assert [(row["pixel_diversity"], row["feature_diversity"]) for row in result["evaluations"]] == [(None, None)] * 2


def test_a_run_whose_metrics_are_lost_says_so(whole, tmp_path):
    """Its result would lack them."""
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / run.RESULT).unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(line for line in lines if '"epoch": 1,' not in line))
    with pytest.raises(SettingError, match=rf"^output_dir: {folder}/metrics.jsonl lacks .*; remove {folder}, and the"):
        run.run(folder)
