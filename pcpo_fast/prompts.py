"""Prompts: the built-in lists, and text files with one prompt per line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from pcpo_fast.errors import SettingError

PACKAGE = Path(__file__).parent
BUILT_IN = {"digits": PACKAGE / "digits" / "prompts.txt", "animals": PACKAGE / "animals.txt"}


def load_prompts(prompts: str) -> list[str]:
    """The prompts of a built-in list ("digits", "animals") or of a text file, one per line; blank lines are skipped.

    Raises:
        SettingError: if there is no such list or file, or it holds no prompt.
    """
    path = BUILT_IN.get(prompts, Path(prompts).expanduser())
    if not path.is_file():
        raise SettingError(
            "prompts",
            f"{prompts!r} is neither a file nor a built-in list; give a text file with one prompt per line, or one of "
            + ", ".join(BUILT_IN),
        )
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError("prompts", f"{path} cannot be read as UTF-8 text: {error}") from error
    lines = [line for line in lines if line]
    if not lines:
        raise SettingError("prompts", f"the file {path} is empty; write one prompt per line")
    return lines


def draw_prompts(prompts: Sequence[str], count: int, group_size: int, generator: torch.Generator) -> list[str]:
    """`count` prompts, each `group_size` times in a row; they are distinct while there are enough."""
    indices: list[int] = []
    while len(indices) < count:
        indices += torch.randperm(len(prompts), generator=generator).tolist()
    return [prompts[index] for index in indices[:count] for _ in range(group_size)]
