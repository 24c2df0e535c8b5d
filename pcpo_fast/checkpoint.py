"""Checkpoints, complete at every moment.

A checkpoint is a folder `epoch-000012` with the trained weights and their moving average if there is one (as diffusers
reads them), the optimizer's tensors, the random states and the rest of the state as JSON. It is written to a temporary
folder, flushed to the disk and renamed, so a run that is killed at any moment has a complete one.
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
from pcpo_fast.files import flush, write_atomically
from pcpo_fast.optimizer import Optimizer
from pcpo_fast.policies import Policy

STATE = "state.json"


class Checkpoints:
    """The checkpoints of a run folder; the newest `keep` are kept."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        # a killed run may have left unfinished ones
        for partial in [*folder.glob("*.partial"), *folder.glob("*/*.partial")]:
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()

    def find(self, *, resume: bool) -> Path | None:
        """The checkpoint that a run starts from, or None.

        Raises:
            SettingError: for a new run in a folder that has checkpoints; it would go on with their weights.
        """
        latest = self.latest()
        if latest is not None and not resume:
            raise SettingError(
                "output_dir", f"{latest} is there already; add resume to continue that run, or give another folder"
            )
        return latest

    def latest(self) -> Path | None:
        """The newest checkpoint, or None."""
        return self._all()[-1] if self._all() else None

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

        Where that epoch has a checkpoint already, only `state` is written: nothing else can have changed.

        Args:
            state: what the trainer wants to find again, JSON-able.
            random_state: from `get_random_state`.
        """
        from safetensors.torch import save_file

        target = self.folder / f"epoch-{epoch:06d}"
        if target.exists():
            saved = json.loads((target / STATE).read_text(encoding="utf-8"))
            if saved | state != saved:
                write_atomically(target / STATE, _json(saved | state))
            return target
        partial = target.with_suffix(".partial")
        # a full disk may have stopped an earlier attempt
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
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
        save_file(tensors, partial / "optimizer.safetensors")
        save_file(random_state["torch"], partial / "random.safetensors")
        rest = {
            "epoch": epoch,
            "ema_steps": None if optimizer.ema is None else optimizer.ema.optimization_step,
            "scaler": optimizer.scaler.state_dict(),
            "param_groups": optimizer_state["param_groups"],
            "python_random": random_state["python"],
            "numpy_random": random_state["numpy"],
            **state,
        }
        (partial / STATE).write_bytes(_json(rest))
        for path in [*partial.rglob("*"), partial]:
            flush(path)
        os.replace(partial, target)
        flush(self.folder)
        for old in self._all()[: -self.keep]:
            # renamed first, so that an interrupted deletion leaves no incomplete checkpoint under a valid name
            doomed = old.with_suffix(".partial")
            os.replace(old, doomed)
            shutil.rmtree(doomed)
        return target

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

        with _reading(path):
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
        missing = [key for key in expected if key not in state]
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
            with _reading(path):
                policy.load(path / ("weights" if steps is None else "ema"))
            ema.optimization_step = steps or 0
            for shadow, parameter in zip(ema.shadow_params, policy.trainable_parameters(), strict=True):
                shadow.copy_(parameter.detach())
        with _reading(path):
            policy.load(path / "weights")
            tensors = load_file(path / "optimizer.safetensors")
            random_tensors = load_file(path / "random.safetensors")
        parameters = policy.trainable_parameters()
        per_parameter: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            index, name = key.split(".", 1)
            like = parameters[int(index)]
            if tensor.shape == like.shape:
                # in the parameter's memory format
                tensor = torch.empty_like(like, device=tensor.device).copy_(tensor)
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
        set_random_state(
            {
                "torch": random_tensors,
                "python": state["python_random"],
                "numpy": state["numpy_random"],
            }
        )
        return state


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Makes errors of damaged files name the checkpoint."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SettingError(
            "resume", f"the checkpoint {path} is damaged; remove it to continue from the one before ({error})"
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
