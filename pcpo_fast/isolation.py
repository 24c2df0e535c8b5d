"""Limits around code of the user's own: what it changes is put back, and it may be given a time limit."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import numpy as np
import torch


class OutOfTime(BaseException):
    """The time limit has passed. Not an Exception, so that code which retries after any Exception does not go on."""


@contextlib.contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raises OutOfTime inside, once, as soon as Python code runs after `seconds`.

    An alarm of the operating system interrupts Python code and waiting in the main thread. A call into a library that
    does not return, and code in another thread, are not interrupted.
    """
    if seconds is None or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def out_of_time(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    previous = signal.signal(signal.SIGALRM, out_of_time)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, previous)


@contextlib.contextmanager
def kept_globals() -> Iterator[None]:
    """Puts back what the code inside changes of the whole process.

    These are PyTorch's gradient mode, default dtype and device, number of threads, determinism, TF32 and cuDNN flags;
    the random states of PyTorch, NumPy and Python; NumPy's error handling; warning filters; the current folder.
    """
    before = [(_try(read), read, write) for read, write in _GLOBALS]
    try:
        with torch.random.fork_rng(_gpus()), np.errstate(), torch.set_grad_enabled(torch.is_grad_enabled()):
            yield
    finally:
        for value, read, write in before:
            if None not in (value, now := _try(read)) and now != value:
                # the folder may have been removed
                with contextlib.suppress(OSError):
                    write(value)


def seed_generators(seed: int) -> None:
    """Seeds the global generators of PyTorch, NumPy and Python."""
    # torch.manual_seed would also leave a seed for GPUs that are not in use yet
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _gpus() -> range:
    return range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)


def _try(read: Callable[[], Any]) -> Any:
    """What is read, or None: the folder may have been removed, and PyTorch refuses to tell an older flag where a newer
    one of the same meaning was set."""
    try:
        return read()
    except (OSError, RuntimeError):
        return None


def _numpy_state() -> list[Any]:
    name, keys, *rest = np.random.get_state()
    # arrays do not compare as a whole
    return [name, np.asarray(keys).tolist(), *rest]


def _set_filters(filters: list[Any]) -> None:
    # in place: the interpreter keeps the list, and catch_warnings would show all earlier warnings anew
    warnings.filters[:] = filters  # pyright: ignore[reportIndexIssue]


def _flag(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


# how each is read and written; only what has changed is written
_GLOBALS: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
    (torch.get_default_dtype, torch.set_default_dtype),
    # None is the CPU, too, without a mode that every later call would pass through
    (torch.get_default_device, lambda device: torch.set_default_device(None if device.type == "cpu" else device)),
    (torch.get_num_threads, torch.set_num_threads),
    (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda flags: torch.use_deterministic_algorithms(flags[0], warn_only=flags[1]),
    ),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    *(_flag(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic", "allow_tf32")),
    _flag(torch.backends.cuda.matmul, "allow_tf32"),
    # after the older flags, which change these, too
    _flag(torch.backends.cuda.matmul, "fp32_precision"),
    _flag(torch.backends.cudnn.conv, "fp32_precision"),  # pyright: ignore[reportAttributeAccessIssue]
    (random.getstate, random.setstate),
    (_numpy_state, lambda state: np.random.set_state(tuple(state))),
    (os.getcwd, os.chdir),
    (lambda: list(warnings.filters), _set_filters),
]
