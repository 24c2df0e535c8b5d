import errno
import itertools
import json
import os
import random
import shutil
import sys

import numpy as np
import pytest
import torch
from pipelines import at_call
from safetensors.torch import load_file, save_file

from pcpo_fast import checkpoint, files, manifest
from pcpo_fast.checkpoint import Checkpoints, get_random_state, set_random_state
from pcpo_fast.config import OptimizerSettings
from pcpo_fast.errors import SettingError
from pcpo_fast.files import write_atomically
from pcpo_fast.manifest import find_damage
from pcpo_fast.metrics import Metrics
from pcpo_fast.optimizer import Optimizer


class Policy:
    """One trained weight, saved as a policy saves its own."""

    def __init__(self):
        self.weight = torch.nn.Parameter(torch.zeros(3))

    def trainable_parameters(self):
        return [self.weight]

    def save(self, folder):
        folder.mkdir()
        save_file({"weight": self.weight.detach()}, folder / "weights.safetensors")

    def load(self, folder):
        with torch.no_grad():
            self.weight.copy_(load_file(folder / "weights.safetensors")["weight"])


def make_state(learning_rate=0.1):
    policy = Policy()
    return policy, Optimizer([policy.weight], OptimizerSettings(learning_rate=learning_rate, max_grad_norm=1e9))


def train(policy, optimizer):
    """One step, on a gradient that the global random states decide."""
    policy.weight.grad = torch.randn(3) + random.random() + np.random.rand()
    optimizer.step()


def save(checkpoints, epoch, policy, optimizer):
    return checkpoints.save(epoch, policy, optimizer, {"advantages": {"cat": [epoch + 0.1]}}, get_random_state())


class Death(BaseException):
    """In the place of SIGKILL: nothing in the program catches it."""


def die():
    raise Death


def test_a_resumed_state_continues_bit_for_bit(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    policy, optimizer = make_state()
    for _ in range(3):
        train(policy, optimizer)
    path = save(checkpoints, 3, policy, optimizer)
    assert path == checkpoints.latest() == tmp_path / "epoch-000003"
    # odd, so that NumPy's and Python's generators hold half a pair
    for _ in range(3):
        train(policy, optimizer)

    resumed, resumed_optimizer = make_state()
    state = checkpoints.load(path, resumed, resumed_optimizer)
    assert state["epoch"] == 3
    assert state["advantages"] == {"cat": [3.1]}
    for _ in range(3):
        train(resumed, resumed_optimizer)
    assert torch.equal(resumed.weight, policy.weight)
    for name, value in optimizer.adamw.state_dict()["state"][0].items():
        assert torch.equal(value, resumed_optimizer.adamw.state_dict()["state"][0][name])


def test_all_tensors_are_safetensors_and_the_rest_is_json(tmp_path):
    policy, optimizer = make_state()
    train(policy, optimizer)
    path = save(Checkpoints(tmp_path, keep=1), 1, policy, optimizer)
    files = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    tensors = {"weights/weights.safetensors", "optimizer.safetensors", "random.safetensors"}
    assert files == {*tensors, "state.json", "manifest.json"}
    assert set(load_file(path / "optimizer.safetensors")) == {"0.step", "0.exp_avg", "0.exp_avg_sq"}
    assert json.loads((path / "state.json").read_text())["epoch"] == 1


def test_a_resumed_run_may_have_another_learning_rate(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    policy, optimizer = make_state(learning_rate=0.1)
    train(policy, optimizer)
    path = save(checkpoints, 1, policy, optimizer)
    resumed, resumed_optimizer = make_state(learning_rate=0.01)
    checkpoints.load(path, resumed, resumed_optimizer)
    assert resumed_optimizer.adamw.param_groups[0]["lr"] == 0.01
    assert resumed_optimizer.adamw.state[resumed.weight]["step"] == 1


def test_random_states_survive_a_round_trip():
    random.gauss(0, 1), np.random.randn(), torch.randn(1)
    state = get_random_state()

    def draw():
        return [random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), torch.randn(1).item()]

    first = draw()
    assert draw() != first
    state = {"torch": state["torch"], **json.loads(json.dumps({key: state[key] for key in ("python", "numpy")}))}
    set_random_state(state)
    assert draw() == first


def test_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest() is None
    for epoch in (8, 9, 10, 11):
        save(checkpoints, epoch, *make_state())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch-000010", "epoch-000011"]
    assert checkpoints.latest() == tmp_path / "epoch-000011"


def test_what_a_killed_run_left_is_ignored_and_removed(tmp_path):
    policy, optimizer = make_state()
    path = save(Checkpoints(tmp_path, keep=2), 1, policy, optimizer)
    partial = shutil.copytree(path, tmp_path / "epoch-000002.partial")
    (partial / "state.json").write_text('{"epoch": 2, "advan')
    assert Checkpoints(tmp_path, keep=2).latest() == path
    assert not partial.exists()


def test_a_run_that_dies_at_any_point_of_saving_has_a_whole_checkpoint(tmp_path):
    """Dies at the first call that saving makes, then at the second, and so on to the last."""
    before, after = make_state(), make_state()
    for _ in range(2):
        train(*after)
    weights = {1: before[0].weight, 2: after[0].weight}
    seen = []
    for count in itertools.count(1):
        folder = tmp_path / str(count)
        checkpoints = Checkpoints(folder, keep=1)
        save(checkpoints, 1, *before)
        try:
            at_call(count, (checkpoint.__file__, files.__file__, manifest.__file__), die)
            save(checkpoints, 2, *after)
            break
        except Death:
            pass
        finally:
            sys.setprofile(None)
        restarted = Checkpoints(folder, keep=1)
        assert not list(folder.glob("*.partial"))
        policy, optimizer = make_state()
        state = restarted.load(restarted.latest(), policy, optimizer)
        assert torch.equal(policy.weight, weights[state["epoch"]])
        seen.append(state["epoch"])
        # and it can go on
        save(restarted, 3, policy, optimizer)
        assert restarted.latest() == folder / "epoch-000003"
    # first the old one, then the new one, and there were many moments of both
    assert seen == sorted(seen)
    assert min(seen.count(1), seen.count(2)) > 5


def full(path):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_what_could_not_be_saved_may_be_saved_later(tmp_path, monkeypatch):
    checkpoints, (policy, optimizer) = Checkpoints(tmp_path, keep=1), make_state()
    with (
        monkeypatch.context() as patch,
        pytest.raises(SettingError, match=r"000001 .*No space left.*: make room"),
    ):
        patch.setattr(checkpoint, "flush", full)
        save(checkpoints, 1, policy, optimizer)
    assert checkpoints.latest() is None
    assert list(tmp_path.iterdir()) == []
    assert save(checkpoints, 1, policy, optimizer) == checkpoints.latest()


def test_a_file_is_replaced_at_once(tmp_path):
    path = tmp_path / "file"
    for count in itertools.count(1):
        path.write_bytes(b"old")
        try:
            at_call(count, files.__file__, die)
            write_atomically(path, b"new")
            break
        except Death:
            assert path.read_bytes() in (b"old", b"new")
        finally:
            sys.setprofile(None)
    assert path.read_bytes() == b"new"
    assert count > 5


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_metrics_file_that_was_cut_off_is_repaired(tmp_path, cut):
    metrics = Metrics(tmp_path)
    for epoch in range(4):
        metrics.write({"epoch": epoch, "reward/mean": epoch / 3})
    metrics.close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    resumed = Metrics(tmp_path, kept=4)
    # the first cut takes nothing but a line break
    assert [record["epoch"] for record in resumed.records] == ([0, 1, 2, 3] if cut == 1 else [0, 1, 2])
    if cut > 1:
        resumed.write({"epoch": 3, "reward/mean": 1.0})
    resumed.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"epoch": epoch, "reward/mean": epoch / 3} for epoch in range(4)]


def test_metrics_after_the_checkpoint_are_dropped(tmp_path):
    metrics = Metrics(tmp_path)
    for epoch in range(4):
        metrics.write({"epoch": epoch})
    metrics.close()
    resumed = Metrics(tmp_path, kept=3)
    resumed.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"epoch": 0}\n{"epoch": 1}\n{"epoch": 2}\n'
    fresh = Metrics(tmp_path)
    fresh.close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_metrics_are_strict_json(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.write({"epoch": 1, "loss": float("nan"), "norm": float("inf"), "per_step": [0.5, float("nan"), None]})
    metrics.close()
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"epoch": 1, "loss": null, "norm": null, "per_step": [0.5, null, null]}\n'
    )


def test_saving_an_epoch_again_replaces_its_state_alone(tmp_path):
    """An evaluation that failed at first may be made later: the weights are the same, what is noted of it is not."""
    checkpoints, (policy, optimizer) = Checkpoints(tmp_path, keep=2), make_state()
    train(policy, optimizer)
    path = checkpoints.save(1, policy, optimizer, {"evaluated": 0}, get_random_state())
    files_before = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}
    for count in itertools.count(1):
        (path / "state.json.partial").unlink(missing_ok=True)
        try:
            at_call(count, (files.__file__, manifest.__file__), die)
            assert checkpoints.save(1, policy, optimizer, {"evaluated": 1}, get_random_state()) == path
            break
        except Death:
            assert json.loads((path / "state.json").read_text())["evaluated"] in (0, 1)
            assert find_damage(path) is None
        finally:
            sys.setprofile(None)
    state = Checkpoints(tmp_path, keep=2).load(path, *make_state())
    assert (state["epoch"], state["evaluated"]) == (1, 1)
    changed = [file.name for file, time in files_before.items() if file.stat().st_mtime_ns != time]
    assert sorted(changed) == ["manifest.json", "state.json"]
    assert find_damage(path) is None


def test_an_unfinished_state_file_is_removed(tmp_path):
    path = save(Checkpoints(tmp_path, keep=2), 1, *make_state())
    (path / "state.json.partial").write_text('{"ep')
    assert Checkpoints(tmp_path, keep=2).latest() == path
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    "file", ["state.json", "optimizer.safetensors", "random.safetensors", "weights/weights.safetensors"]
)
@pytest.mark.parametrize("content", [None, b"", b"\xff\xff"])
def test_a_damaged_file_of_an_old_checkpoint_is_named(tmp_path, file, content):
    """One without a manifest, which is not checked before it is read."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    path = save(checkpoints, 3, *make_state())
    (path / file).unlink()
    if content is not None:
        (path / file).write_bytes(content)
    named = path / file if "weights" not in file else path / "weights"
    with pytest.raises(SettingError, match=f"^resume: {named} is damaged; remove its checkpoint to continue from"):
        checkpoints.load(path, *make_state())


def test_a_checkpoint_of_another_version_is_named(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    path = save(checkpoints, 3, *make_state())
    with pytest.raises(SettingError, match=f"{path} was written by another version of pcpo-fast, without evaluated;"):
        checkpoints.load(path, *make_state(), expected=("epoch", "evaluated"))


def test_a_new_run_does_not_start_among_checkpoints(tmp_path):
    """It would take the weights of their epochs for its own, since an epoch that is there is not written again."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.find(resume=False) is None
    path = save(checkpoints, 1, *make_state())
    assert checkpoints.find(resume=True) == path
    with pytest.raises(SettingError, match=f"^output_dir: {path} is there already; add resume"):
        checkpoints.find(resume=False)
