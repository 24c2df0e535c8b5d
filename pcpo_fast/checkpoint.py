"""Checkpoints: complete, and either whole or not there at all.

A checkpoint is a folder `epoch-000012` with the trained weights and their moving average, if there is one (as diffusers
reads them), the optimiser's tensors, the random states and the rest of the state. It is written under another name,
flushed to the disk and then renamed, which a file system does at once or not at all: whatever moment a run is killed
at, the newest folder of that name is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pcpo_fast.policies import Policy


class Checkpoints:
    """The checkpoints of a run folder; the newest `keep` are kept."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        # what a killed run left unfinished
        for partial in folder.glob("*.partial"):
            shutil.rmtree(partial)

    def latest(self) -> Path | None:
        """The newest whole checkpoint, or None."""
        return self._all()[-1] if self._all() else None

    @staticmethod
    def epoch_of(path: Path) -> int:
        """The number of epochs after which the checkpoint `path` was written."""
        return int(path.name.removeprefix("epoch-"))

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("epoch-" + "[0-9]" * 6))

    def save(
        self,
        epoch: int,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        random_state: dict[str, Any],
        ema: Any = None,
    ) -> Path:
        """Writes the state after `epoch` epochs; `state` is JSON-able, `ema` a diffusers EMAModel or None. Returns the
        folder."""
        from safetensors.torch import save_file

        target = self.folder / f"epoch-{epoch:06d}"
        partial = target.with_suffix(".partial")
        # of an attempt that failed, on a full disk say
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        policy.save(partial / "weights")
        if ema is not None:
            with averaged(policy, ema):
                policy.save(partial / "ema")
        optimizer_state = optimizer.state_dict()
        tensors = {
            f"{index}.{name}": value.contiguous()
            for index, values in optimizer_state["state"].items()
            for name, value in values.items()
        }
        save_file(tensors, partial / "optimizer.safetensors")
        save_file(random_state["torch"], partial / "random.safetensors")
        rest = {
            "epoch": epoch,
            "ema_steps": None if ema is None else ema.optimization_step,
            "param_groups": optimizer_state["param_groups"],
            "python_random": random_state["python"],
            "numpy_random": random_state["numpy"],
            **state,
        }
        (partial / "state.json").write_text(json.dumps(rest) + "\n", encoding="utf-8")
        for path in [*partial.rglob("*"), partial]:
            _flush(path)
        os.replace(partial, target)
        _flush(self.folder)
        for old in self._all()[: -self.keep]:
            # renamed first: a deletion that is cut off must not leave half a checkpoint under a checkpoint's name
            doomed = old.with_suffix(".partial")
            os.replace(old, doomed)
            shutil.rmtree(doomed)
        return target

    def load(self, path: Path, policy: Policy, optimizer: torch.optim.Optimizer, ema: Any = None) -> dict[str, Any]:
        """Restores weights, their average, optimiser and random states from `path`; returns the JSON part, with
        "epoch"."""
        from safetensors.torch import load_file

        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if ema is not None:
            # a run that had no average begins one at its weights
            steps = state.get("ema_steps")
            policy.load(path / ("weights" if steps is None else "ema"))
            ema.optimization_step = steps or 0
            for shadow, parameter in zip(ema.shadow_params, policy.trainable_parameters(), strict=True):
                shadow.copy_(parameter.detach())
        policy.load(path / "weights")
        parameters = policy.trainable_parameters()
        per_parameter: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in load_file(path / "optimizer.safetensors").items():
            index, name = key.split(".", 1)
            like = parameters[int(index)]
            if tensor.shape == like.shape:
                # laid out as the parameter is
                tensor = torch.empty_like(like, device=tensor.device).copy_(tensor)
            per_parameter.setdefault(int(index), {})[name] = tensor
        # hyperparameters are the config's: a resumed run may have been given another learning rate
        groups = [
            {**current, "params": saved["params"]}
            for current, saved in zip(optimizer.state_dict()["param_groups"], state["param_groups"], strict=True)
        ]
        optimizer.load_state_dict({"state": per_parameter, "param_groups": groups})
        set_random_state(
            {
                "torch": load_file(path / "random.safetensors"),
                "python": state["python_random"],
                "numpy": state["numpy_random"],
            }
        )
        return state


@contextlib.contextmanager
def averaged(policy: Policy, ema: Any) -> Iterator[None]:
    """The average of the weights that a diffusers EMAModel holds in the place of the policy's weights."""
    parameters = policy.trainable_parameters()
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


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


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces the file `path` at once: a reader, or a run that is killed here, finds the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    _flush(partial)
    os.replace(partial, path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
