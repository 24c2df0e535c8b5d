"""Errors that name a setting, and what is told of the errors of others."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path


class SettingError(ValueError):
    """A setting cannot be used.

    Args:
        name: the setting, as Python spells it: "group_size". The command line makes `--group-size` of it.
        reason: what was given, what is accepted, and what to change.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


class RewardError(ValueError):
    """A reward cannot score its images or prompts, or its result is not a score per image."""


def describe_error(error: BaseException) -> str:
    """The kind, the text and the place of an error in code of the user's own: "KeyError: 3 (score.py, line 7, in f)".

    The place is the last one that is neither here nor in an installed package.
    """
    libraries = (
        str(Path(__file__).parent),
        *(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")),
    )
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    own = [frame for frame in frames if not frame.filename.startswith(libraries)]
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    if not own:
        return text
    return f"{text} ({Path(own[-1].filename).name}, line {own[-1].lineno}, in {own[-1].name})"
