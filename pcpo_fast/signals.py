"""Ctrl-C and SIGTERM as a flag that the training loop asks for."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from pcpo_fast.terminal import say


class Signals:
    """First Ctrl-C or SIGTERM: finish and save. Second: exit immediately."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        # handlers can be set in the main thread only; a caller in another thread has its own ways to stop
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def stop(self) -> bool:
        """Whether a signal has arrived."""
        return self.received is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()
        say(f"{signal.Signals(number).name}: saving, then exiting; a second one exits now, without saving")

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def never() -> bool:
    """For callers that do not stop."""
    return False
