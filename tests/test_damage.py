"""Damaged run folders: what is damaged is seen and named, and a run goes on from what is whole."""

import errno
import json
import os
import random
import shutil
import stat
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pipelines import command, make_trainer, records
from safetensors.torch import load_file, save_file
from test_checkpoint import make_state, save, train
from test_own_policy import MaskedPolicy, weights

from pcpo_fast import checkpoint, trainer
from pcpo_fast.checkpoint import Checkpoints
from pcpo_fast.config import Config
from pcpo_fast.errors import SettingError
from pcpo_fast.files import write_atomically, writing
from pcpo_fast.metrics import Metrics
from pcpo_fast.rewards import RewardError
from pcpo_fast.run_folder import saved_settings
from pcpo_fast.train import main
from pcpo_fast.trainer import Trainer

pytest_plugins = "pipelines"
pytestmark = pytest.mark.usefixtures("one_thread")

FILES = ("state.json", "optimizer.safetensors", "random.safetensors", "weights/weights.safetensors", "manifest.json")


def flip(path, bit=100):
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


def make_folder(path):
    path.unlink()
    path.mkdir()


DAMAGE = {
    "truncate": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "empty": lambda path: path.write_bytes(b""),
    "zero": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "flip": flip,
    "remove": lambda path: path.unlink(),
    "folder": make_folder,
    "lengthen": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
}


def two_checkpoints(folder, keep=2):
    folder.mkdir(exist_ok=True)
    checkpoints, state = Checkpoints(folder, keep=keep), make_state()
    for epoch in (1, 2):
        train(*state)
        save(checkpoints, epoch, *state)
    return folder / "epoch-000001", folder / "epoch-000002"


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_left_out_and_named(tmp_path, capfd, file, damage):
    old, new = two_checkpoints(tmp_path)
    DAMAGE[damage](new / file)
    assert Checkpoints(tmp_path, keep=2).find(resume=True) == old
    warning = capfd.readouterr().err
    # a flipped bit of the manifest may be seen by the file that it is about
    named = file if (file, damage) != ("manifest.json", "flip") else ""
    assert f"resuming from {old}, the newest checkpoint that is whole; not from {new.name}, where {named}" in warning
    if (file, damage) == ("optimizer.safetensors", "truncate"):
        size = (old / file).stat().st_size
        assert f"{file} has {size - 7} of {size} bytes\n" in warning
    DAMAGE[damage](old / file)
    with pytest.raises(SettingError, match=f"^resume: no checkpoint in {tmp_path} is whole: {new.name}, where {named}"):
        Checkpoints(tmp_path, keep=2).find(resume=True)


@pytest.mark.parametrize("file", FILES)
def test_a_file_of_another_run_is_damage(tmp_path, capfd, file):
    old, new = two_checkpoints(tmp_path / "run")
    random.seed(1)
    _, other = two_checkpoints(tmp_path / "other")
    shutil.copy(other / file, new / file)
    assert Checkpoints(new.parent, keep=2).find(resume=True) == old
    assert f"not from {new.name}, where " in capfd.readouterr().err


def test_a_manifest_that_names_nothing_vouches_for_nothing(tmp_path):
    old, new = two_checkpoints(tmp_path)
    (new / "manifest.json").write_text("{}")
    assert Checkpoints(tmp_path, keep=2).find(resume=True) == old


def test_whole_checkpoints_are_not_warned_of(tmp_path, capfd):
    _, new = two_checkpoints(tmp_path)
    (new / "notes.txt").write_text("somebody's own file")
    assert Checkpoints(tmp_path, keep=2).find(resume=True) == new
    assert capfd.readouterr().err == ""


def test_a_checkpoint_of_an_earlier_version_is_not_checked(tmp_path):
    old, new = two_checkpoints(tmp_path)
    (new / "manifest.json").unlink()
    assert Checkpoints(tmp_path, keep=2).find(resume=True) == old
    state = json.loads((new / "state.json").read_text())
    del state["manifest"]
    (new / "state.json").write_text(json.dumps(state))
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.find(resume=True) == new
    policy, optimizer = make_state()
    assert checkpoints.load(new, policy, optimizer)["epoch"] == 2
    # and what a resumed run finds out about it can be noted there
    checkpoints.save(2, policy, optimizer, {"evaluated": 2}, checkpoint.get_random_state())
    assert json.loads((new / "state.json").read_text()) == state | {"evaluated": 2}


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_checkpoint_is_replaced_by_the_resumed_run(tmp_path, keep):
    """And does not count as one of those that are kept."""
    folder = tmp_path / "checkpoints"
    old, new = two_checkpoints(folder)
    (new / "optimizer.safetensors").unlink()
    checkpoints, (policy, optimizer) = Checkpoints(folder, keep=keep), make_state()
    checkpoints.load(checkpoints.find(resume=True), policy, optimizer)
    assert save(checkpoints, 1, policy, optimizer) == old
    assert Checkpoints(folder, keep=keep).find(resume=True) == old
    train(policy, optimizer)
    save(checkpoints, 2, policy, optimizer)
    assert Checkpoints(folder, keep=keep).find(resume=True) == new
    assert old.exists() == (keep == 2)


def test_an_optimizer_of_another_model_is_refused(tmp_path):
    _, new = two_checkpoints(tmp_path)
    save_file({"0.exp_avg": torch.zeros(4)}, new / "optimizer.safetensors")
    with pytest.raises(SettingError, match=r"^resume: .*optimizer.safetensors is damaged; .*shape \(4,\)"):
        Checkpoints(tmp_path, keep=2).load(new, *make_state())


# deleting


def test_a_linked_checkpoint_resumes_and_is_unlinked(tmp_path, capfd):
    folder = tmp_path / "checkpoints"
    _, new = two_checkpoints(folder)
    elsewhere = tmp_path / "elsewhere"
    shutil.move(new, elsewhere)
    new.symlink_to(elsewhere)
    checkpoints, state = Checkpoints(folder, keep=1), make_state()
    assert checkpoints.find(resume=True) == new
    assert checkpoints.load(new, *state)["epoch"] == 2
    save(checkpoints, 3, *state)
    assert [path.name for path in folder.iterdir()] == ["epoch-000003"]
    assert (elsewhere / "state.json").exists()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("call", ["os.replace", "shutil.rmtree"])
def test_checkpoints_that_cannot_be_deleted_stop_nothing(tmp_path, monkeypatch, capfd, call):
    """NFS keeps files that somebody has open."""
    two_checkpoints(tmp_path)
    checkpoints, state = Checkpoints(tmp_path, keep=1), make_state()
    module, name = call.split(".")
    real = getattr(getattr(checkpoint, module), name)

    def busy(path, *arguments, **others):
        # os.replace of a finished checkpoint works
        if call == "shutil.rmtree" or not str(path).endswith(".partial"):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        return real(path, *arguments, **others)

    with monkeypatch.context() as patch:
        if call == "os.replace":
            patch.setattr(shutil, "rmtree", busy)
        patch.setattr(getattr(checkpoint, module), name, busy)
        assert save(checkpoints, 3, *state).exists()
        assert "could not be deleted ([Errno 16] Device or resource busy" in capfd.readouterr().err
        # nor do their remains
        again = Checkpoints(tmp_path, keep=1)
        assert again.find(resume=True) == tmp_path / "epoch-000003"
    Checkpoints(tmp_path, keep=1)
    assert not list(tmp_path.glob("*.partial"))


def test_checkpoints_that_are_no_folder_are_refused(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("checkpoints", "link"):
        with pytest.raises(SettingError, match=f"^output_dir: {tmp_path / name} is not a folder; move it away"):
            Checkpoints(tmp_path / name, keep=1).find(resume=True)


# writing


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        two_checkpoints(tmp_path)
        write_atomically(tmp_path / "file", b"")
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~mask, path


def test_an_error_of_safetensors_is_one_of_the_system(tmp_path):
    """It comes as text."""
    message = r"here could not be written \(No such file or directory\): .* was removed"
    with pytest.raises(SettingError, match=message), writing(tmp_path / "here"):
        save_file({"a": torch.zeros(1)}, tmp_path / "nowhere" / "file")


def reward(images, prompts):
    return images[:, 0].mean(dim=(1, 2))


def tiny(folder, function=reward, epochs=3, **others):
    """A trainer of a model that trains in milliseconds."""
    return make_trainer(
        "masked", folder, MaskedPolicy(), {"red": function}, epochs=epochs, keep_checkpoints=9, **others
    )


@pytest.fixture
def no_curves(monkeypatch):
    monkeypatch.setattr(trainer, "save_curves", lambda *arguments: None)


@pytest.mark.parametrize(
    ("file", "named", "number"),
    [
        ("epoch-000002.partial", "checkpoints/epoch-000002", errno.ENOSPC),
        ("epoch-000002.partial", "checkpoints/epoch-000002", errno.EACCES),
        ("epoch-000002.partial", "checkpoints/epoch-000002", errno.EIO),
        ("metrics.jsonl", "metrics.jsonl", errno.ENOSPC),
        ("curves.png", "curves.png", errno.ENOSPC),
        ("samples_before.png", "samples_before.png", errno.ENOSPC),
        ("config.json", "config.json", errno.EROFS),
    ],
)
def test_what_cannot_be_written_is_one_error_and_loses_nothing(tmp_path, monkeypatch, file, named, number):
    if file != "curves.png":
        monkeypatch.setattr(trainer, "save_curves", lambda *arguments: None)
    run, fsync = tmp_path / "run", os.fsync
    tiny(run, epochs=1).train()
    shutil.copytree(run, tmp_path / "whole")

    def refuse(descriptor):
        if file in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    with monkeypatch.context() as patch, pytest.raises(SettingError) as error:
        patch.setattr(os, "fsync", refuse)
        if file == "samples_before.png":
            shutil.rmtree(run)
        tiny(run, resume=True).train()
    assert error.value.name == "output_dir"
    advice = {errno.ENOSPC: "make room", errno.EACCES: "let this user write", errno.EROFS: "that disk is read-only"}
    reason = f"{run / named} could not be written ({os.strerror(number)}): {advice.get(number, 'mend that and go on')}"
    assert error.value.reason.startswith(reason)
    assert not list(run.rglob("*.partial"))
    if run.joinpath("checkpoints/epoch-000001").exists():
        assert Checkpoints(run / "checkpoints", keep=9).find(resume=True)
    # with room it goes on
    resumed, whole = tiny(run, resume=True), tiny(tmp_path / "whole", resume=True)
    for each in (resumed, whole):
        each.train()
    assert torch.equal(weights(resumed.policy), weights(whole.policy))


def test_the_epoch_to_continue_from_is_that_of_the_checkpoint(model, tmp_path, monkeypatch, capsys):
    """The trainer is an epoch ahead when its checkpoint cannot be written."""
    run, fsync = tmp_path / "run", os.fsync

    def refuse(descriptor):
        if "epoch-000002" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    assert main(command(model, run, epochs=3)) == 2
    output = capsys.readouterr()
    assert "checkpoints/epoch-000002 could not be written (No space left on device): make room" in output.err
    assert f"Stopped after epoch 1; continue with --output-dir {run} --resume" in output.out


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_a_removed_run_folder_does_not_come_back(tmp_path, no_curves, calls):
    """Removed while the first evaluation is scored, or an epoch, or the next."""
    run, counted = tmp_path / "run", []

    def removing(images, prompts):
        counted.append(len(images))
        if len(counted) == calls:
            shutil.rmtree(run)
        return reward(images, prompts)

    with pytest.raises(
        SettingError, match=f"^output_dir: {run}.* could not be written .* was removed or moved; put it"
    ):
        tiny(run, removing).train()
    assert not run.exists()


# metrics


def write_metrics(folder, epochs):
    written = Metrics(folder)
    for epoch in range(epochs):
        written.write({"epoch": epoch, "reward/mean": epoch / 3})
    written.close()
    return folder / "metrics.jsonl"


@pytest.mark.parametrize(
    "line", [b"", b"{", b"[1]", b"7", b"\xff", b'{"epoch": "x"}', b'{"a": 1}', b'{"epoch": 1, "a": "b"}']
)
def test_a_broken_line_of_metrics_costs_itself(tmp_path, capfd, line):
    path = write_metrics(tmp_path, 5)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:1], line, *lines[2:]]))
    kept = 4 if line else 3
    resumed = Metrics(tmp_path, kept=4, epoch=3)
    resumed.close()
    assert [record["epoch"] for record in resumed.records] == [0, 2, 3]
    warning = capfd.readouterr().err
    assert f"{path} has 3 of the 4 records up to the checkpoint" in warning
    assert ("the last 1 records, whose epochs no checkpoint has, are dropped" in warning) == (kept == 4)
    assert len(path.read_text().splitlines()) == 3


def test_metrics_that_nobody_misses_are_not_warned_of(tmp_path, capfd):
    write_metrics(tmp_path, 4)
    Metrics(tmp_path, kept=4, epoch=3).close()
    assert capfd.readouterr().err == ""


def test_removed_metrics_are_written_anew(tmp_path):
    written = Metrics(tmp_path)
    written.write({"epoch": 0})
    (tmp_path / "metrics.jsonl").unlink()
    written.write({"epoch": 1})
    written.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"epoch": 0}\n{"epoch": 1}\n'


@pytest.mark.parametrize("tensorboard", ["removed", "file"])
def test_a_run_goes_on_without_tensorboard(tmp_path, monkeypatch, capfd, tensorboard):
    tracebacks = []
    monkeypatch.setattr(threading, "excepthook", tracebacks.append)
    if tensorboard == "file":
        (tmp_path / "tensorboard").write_text("")
    written = Metrics(tmp_path)
    if tensorboard == "removed":
        shutil.rmtree(tmp_path / "tensorboard")
    written.write({"epoch": 0, "a": 1})
    written.write({"epoch": 1, "a": 1})
    written.close()
    error = capfd.readouterr().err
    assert error.count("warning: the run goes on without TensorBoard (") == 1
    assert tracebacks == []
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("left", ["removed", "emptied", "half"])
def test_a_run_without_its_metrics_resumes_and_ends(tmp_path, capfd, left):
    run = tmp_path / "run"
    whole = tiny(run, epochs=2)
    whole.train()
    path = run / "metrics.jsonl"
    if left == "removed":
        path.unlink()
    else:
        path.write_bytes(b"" if left == "emptied" else path.read_bytes()[: path.stat().st_size // 2])
    resumed = tiny(run, epochs=2, resume=True)
    resumed.train()
    assert "of the 4 records up to the checkpoint; the others are lost" in capfd.readouterr().err
    assert torch.equal(weights(resumed.policy), weights(whole.policy))
    assert not list(run.rglob("*.partial"))


# settings


def test_what_a_resumed_run_changes_is_said_and_noted(tmp_path, capfd, no_curves):
    run = tmp_path / "run"
    tiny(run, epochs=1).train()
    tiny(run, epochs=2, resume=True).train()
    tiny(run, epochs=2, resume=True, learning_rate=1e-5).train()
    tiny(run, epochs=2, resume=True, learning_rate=1e-5).train()
    noted = [json.loads(line) for line in (run / "config-history.jsonl").read_text().splitlines()]
    rate = noted[1]["changed"]["learning_rate"]
    assert noted == [
        {"epoch": 1, "changed": {"epochs": [1, 2]}},
        {"epoch": 2, "changed": {"learning_rate": [rate[0], 1e-5]}},
    ]
    warning = capfd.readouterr().err
    assert f"settings change after epoch 1: epochs from 1 to 2; noted in {run / 'config-history.jsonl'}" in warning
    assert warning.count("settings change") == 2


@pytest.mark.parametrize("damage", ["truncate", "empty", "zero", "folder"])
def test_damaged_settings_are_named(tmp_path, no_curves, damage):
    run = tmp_path / "run"
    tiny(run, epochs=1)
    DAMAGE[damage](run / "config.json")
    with pytest.raises(
        SettingError, match=f"^output_dir: {run} cannot be resumed without its settings: .*{run}/config.js"
    ):
        saved_settings(run)


# at random


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two epochs, and the weights, the optimizer and the metrics of undamaged resumes from each of them."""
    run, expected = tmp_path_factory.mktemp("fuzz") / "run", {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "save_curves", lambda *arguments: None)
        tiny(run, epochs=2).train()
        for epoch in (1, 2):
            copy = shutil.copytree(run, run.with_name(str(epoch)))
            if epoch == 1:
                shutil.rmtree(copy / "checkpoints" / "epoch-000002")
            expected[epoch] = end_of(copy)
    return run, expected


def end_of(run):
    """The bits of the run in a folder, which goes on to three epochs with its own settings."""
    config = Config().replace(**saved_settings(run) | {"output_dir": str(run), "epochs": 3, "resume": True})
    Trainer(config, MaskedPolicy(), run, {"red": reward}).train()
    last = run / "checkpoints" / "epoch-000003"
    return [load_file(path) for path in sorted(last.rglob("*.safetensors"))]


def equal(ours, theirs):
    return all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(ours, theirs, strict=True)
    )


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_damage_is_survived_or_named(finished, tmp_path_factory, capfd, data):
    """The right run goes on, or one error names a damaged file. TensorBoard and pictures are no input."""
    whole, expected = finished
    run = shutil.copytree(whole, tmp_path_factory.mktemp("damaged") / "run")
    files = sorted(path for path in run.rglob("*") if path.suffix in (".json", ".jsonl", ".safetensors"))
    damaged = data.draw(st.lists(st.sampled_from(files), min_size=1, max_size=3, unique=True))
    for path in damaged:
        kind = data.draw(st.sampled_from([*DAMAGE, "other"]))
        if kind == "flip":
            flip(path, data.draw(st.integers(0, 8 * path.stat().st_size - 1)))
        elif kind == "other":
            path.write_bytes((whole / data.draw(st.sampled_from(files)).relative_to(run)).read_bytes())
        else:
            DAMAGE[kind](path)
    names = {path.name for path in damaged}
    capfd.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "save_curves", lambda *arguments: None)
        patch.setattr(Metrics, "_show", lambda *arguments: None)
        try:
            found = end_of(run)
        except SettingError as error:
            # a flipped bit may leave a value that is none of the setting's
            assert any(name in str(error) for name in names) or "config.json" in names, error
            return
        except RewardError:
            # or one with which training diverges
            assert "config.json" in names
            return
    warning = capfd.readouterr().err
    taken = 1 if "resuming from" in warning else 2
    if f"settings change after epoch {taken}: epochs from 2 to 3; noted" in warning:
        assert equal(found, expected[taken])
    else:
        assert "config.json" in names and "settings change" in warning
    if not any("epoch-000002" in path.parts for path in damaged):
        assert taken == 2
    elif taken == 1:
        assert "not from epoch-000002, where " in warning
    if "metrics.jsonl" not in names and taken == 2:
        assert [record["epoch"] for record in records(run)] == [0, 1, 2, 2, 3, 3]
