"""Checkpoints, complete at every moment.

A checkpoint is a folder `epoch-000012` with the trained weights and their moving average if there is one (as diffusers
reads them), the optimizer's tensors, the random states, the rest of the state as JSON, and a manifest with a checksum
of each file. It is written to a temporary folder, flushed to the disk and renamed, so a run that is killed at any
moment has a complete one. Damage that comes later is seen by the checksums, and the newest whole one is taken.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pcpo_fast.errors import SettingError
from pcpo_fast.files import delete, flush, writing
from pcpo_fast.manifest import MANIFEST, find_damage, replace_file, write_manifest
from pcpo_fast.optimizer import Optimizer
from pcpo_fast.policies import Policy
from pcpo_fast.terminal import warn

STATE, OPTIMIZER, RANDOM = "state.json", "optimizer.safetensors", "random.safetensors"


class Checkpoints:
    """The checkpoints of a run folder; the newest `keep` are kept."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        # the one that was saved or loaded last, and its state
        self._current: tuple[Path, dict[str, Any]] | None = None
        # a killed run may have left unfinished ones
        for partial in [*folder.glob("*.partial"), *folder.glob("*/*.partial")]:
            delete(partial)

    def find(self, *, resume: bool) -> Path | None:
        """The checkpoint that a run starts from: the newest whole one, or None where there is none at all.

        Newer ones that are damaged are left out with a warning, and replaced when the run comes to their epochs.

        Raises:
            SettingError: for a new run in a folder that has checkpoints, with whose weights it would go on; and for a
                resumed one all of whose checkpoints are damaged.
        """
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            raise SettingError(
                "output_dir",
                f"{self.folder} is not a folder; move it away, or put the folder of the run's checkpoints there",
            )
        damaged: list[str] = []
        for path in reversed(self._all()):
            if not resume:
                raise SettingError(
                    "output_dir", f"{path} is there already; add resume to continue that run, or give another folder"
                )
            damage = _damage(path)
            if damage is None:
                if damaged:
                    warn(f"resuming from {path}, the newest checkpoint that is whole; not from {'; '.join(damaged)}")
                return path
            damaged.append(f"{path.name}, where {damage}")
        if damaged:
            raise SettingError(
                "resume",
                f"no checkpoint in {self.folder} is whole: {'; '.join(damaged)}. Bring one back from a copy, or remove "
                f"{self.folder} to begin the run anew",
            )
        return None

    def latest(self) -> Path | None:
        """The newest checkpoint, or None."""
        return self._all()[-1] if self._all() else None

    def latest_epoch(self) -> int:
        """The epoch of the newest checkpoint, or 0."""
        latest = self.latest()
        return 0 if latest is None else int(latest.name.removeprefix("epoch-"))

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("epoch-" + "[0-9]" * 6))

    def save(
        self,
        epoch: int,
        policy: Policy,
        optimizer: Optimizer,
        state: dict[str, Any],
        random_state: dict[str, Any],
    ) -> Path:
        """Writes the state after `epoch` epochs and returns its folder.

        Where the run has saved or loaded that epoch already, only `state` is written: nothing else can have changed.

        Args:
            state: what the trainer wants to find again, JSON-able.
            random_state: from `get_random_state`.

        Raises:
            SettingError: if it cannot be written; older checkpoints stay, and nothing of this one.
        """
        target = self.folder / f"epoch-{epoch:06d}"
        with writing(target):
            # a run folder that was removed does not come back
            self.folder.mkdir(exist_ok=True)
            if self._current is not None and self._current[0] == target and target.exists():
                state = self._current[1] | state
                if _json(state) != _json(self._current[1]):
                    replace_file(target, STATE, _json(state))
            else:
                state = self._write(target, epoch, policy, optimizer, state, random_state)
                flush(self.folder)
        self._current = target, state
        for old in [path for path in self._all() if path.name < target.name][::-1][self.keep - 1 :]:
            _set_aside(old)
        return target

    def _write(
        self,
        target: Path,
        epoch: int,
        policy: Policy,
        optimizer: Optimizer,
        state: dict[str, Any],
        random_state: dict[str, Any],
    ) -> dict[str, Any]:
        """Writes a whole checkpoint, in the place of a damaged one if one is there. Returns its JSON part."""
        from safetensors.torch import save_file

        partial = target.with_suffix(".partial")
        try:
            partial.mkdir()
            policy.save(partial / "weights")
            if optimizer.ema is not None:
                with optimizer.averaged():
                    policy.save(partial / "ema")
            optimizer_state = optimizer.adamw.state_dict()
            tensors = {
                f"{index}.{name}": value.contiguous()
                for index, values in optimizer_state["state"].items()
                for name, value in values.items()
            }
            save_file(tensors, partial / OPTIMIZER)
            save_file(random_state["torch"], partial / RANDOM)
            state = {
                "epoch": epoch,
                # a checkpoint without a manifest was written before there were any, or is damaged
                "manifest": MANIFEST,
                "ema_steps": None if optimizer.ema is None else optimizer.ema.optimization_step,
                "scaler": optimizer.scaler.state_dict(),
                "param_groups": optimizer_state["param_groups"],
                "python_random": random_state["python"],
                "numpy_random": random_state["numpy"],
                **state,
            }
            (partial / STATE).write_bytes(_json(state))
            write_manifest(partial)
            mode = (partial / STATE).stat().st_mode
            for path in [*partial.rglob("*"), partial]:
                # safetensors lets nobody else read its files, whatever the umask
                if path.is_file() and path.stat().st_mode != mode:
                    path.chmod(mode)
                flush(path)
            delete(target)
            os.replace(partial, target)
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return state

    def load(self, path: Path, policy: Policy, optimizer: Optimizer, expected: Iterable[str] = ()) -> dict[str, Any]:
        """Restores weights, their average, optimizer and random states from `path`.

        Args:
            expected: keys that the JSON part must have.

        Returns:
            The JSON part, which has "epoch" too.

        Raises:
            SettingError: for a file that is missing or damaged, a missing key, or weights that do not fit the policy.
        """
        from safetensors.torch import load_file

        with _reading(path / STATE):
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
        own = ("epoch", "scaler", "param_groups", "python_random", "numpy_random")
        missing = [key for key in dict.fromkeys([*own, *expected]) if key not in state]
        if missing:
            raise SettingError(
                "resume",
                f"the checkpoint {path} was written by another version of pcpo-fast, without {', '.join(missing)}; "
                "resume with that version, or start another run",
            )
        ema = optimizer.ema
        if ema is not None:
            # a run without an average starts one at its weights
            steps = state.get("ema_steps")
            average = path / ("weights" if steps is None else "ema")
            with _reading(average):
                policy.load(average)
            ema.optimization_step = steps or 0
            for shadow, parameter in zip(ema.shadow_params, policy.trainable_parameters(), strict=True):
                shadow.copy_(parameter.detach())
        with _reading(path / "weights"):
            policy.load(path / "weights")
        with _reading(path / OPTIMIZER):
            _load_optimizer(load_file(path / OPTIMIZER), state, policy.trainable_parameters(), optimizer)
        with _reading(path / RANDOM):
            random_tensors = load_file(path / RANDOM)
            set_random_state(
                {"torch": random_tensors, "python": state["python_random"], "numpy": state["numpy_random"]}
            )
        self._current = path, state
        return state


def _load_optimizer(
    tensors: dict[str, torch.Tensor],
    state: dict[str, Any],
    parameters: list[torch.nn.Parameter],
    optimizer: Optimizer,
) -> None:
    """Gives the optimizer its tensors, named "3.exp_avg", and what the JSON part of the checkpoint has of it."""
    per_parameter: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        like = parameters[int(index)]
        if tensor.shape == like.shape:
            # in the parameter's memory format
            tensor = torch.empty_like(like, device=tensor.device).copy_(tensor)
        elif tensor.ndim:
            raise ValueError(f"{key} has shape {tuple(tensor.shape)}, and the weight {tuple(like.shape)}")
        per_parameter.setdefault(int(index), {})[name] = tensor
    # hyperparameters come from the config: a resumed run may have another learning rate
    groups = [
        {**current, "params": saved["params"]}
        for current, saved in zip(optimizer.adamw.state_dict()["param_groups"], state["param_groups"], strict=True)
    ]
    optimizer.adamw.load_state_dict({"state": per_parameter, "param_groups": groups})
    # a run in another dtype has no state of the scaler
    if state["scaler"]:
        optimizer.scaler.load_state_dict(state["scaler"])


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None. One of an earlier version has no manifest and is not checked."""
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        if isinstance(state, dict) and "manifest" not in state and not (path / MANIFEST).exists():
            return None
    except FileNotFoundError:
        return f"{STATE} is missing"
    except (OSError, ValueError) as error:
        return f"{STATE} cannot be read ({error})"
    return find_damage(path)


def _set_aside(path: Path) -> None:
    """Deletes a checkpoint, or warns that it cannot be deleted. It loses its name first, so that an interrupted
    deletion leaves no incomplete checkpoint under a valid name."""
    doomed = path.with_suffix(".partial")
    try:
        os.replace(path, doomed)
    except OSError:
        doomed = path
    delete(doomed)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Makes errors of damaged files name them."""
    from safetensors import SafetensorError

    try:
        yield
    except SettingError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
        raise SettingError(
            "resume", f"{path} is damaged; remove its checkpoint to continue from the one before ({error})"
        ) from error


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """Restores the global random states afterwards."""
    state = get_random_state()
    try:
        yield
    finally:
        set_random_state(state)


def get_random_state() -> dict[str, Any]:
    """The global random states of PyTorch (tensors by device), Python and NumPy (JSON-able)."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    name, keys, *rest = np.random.get_state()
    return {"torch": states, "python": random.getstate(), "numpy": [name, np.asarray(keys).tolist(), *rest]}


def set_random_state(state: dict[str, Any]) -> None:
    """Restores what `get_random_state` returned, also after a round through JSON and safetensors."""
    for device, tensor in state["torch"].items():
        if device == "cpu":
            torch.set_rng_state(tensor)
        elif torch.device(device).index < torch.cuda.device_count():
            torch.cuda.set_rng_state(tensor, device)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))


def _json(state: dict[str, Any]) -> bytes:
    return (json.dumps(state) + "\n").encode()
