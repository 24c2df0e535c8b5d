"""Prompts: the built-in lists, text files with one prompt per line, and JSON with what else is known about a prompt."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pcpo_fast.documents import read_json, read_text
from pcpo_fast.errors import SettingError

PACKAGE = Path(__file__).parent
BUILT_IN = {"digits": PACKAGE / "digits" / "prompts.txt", "animals": PACKAGE / "animals.txt"}


class Prompts(list[str]):
    """Prompts in their order.

    Attributes:
        metadata: what else is known about some of them, by prompt.
    """

    def __init__(self, prompts: Sequence[str], metadata: Mapping[str, dict[str, Any]]) -> None:
        super().__init__(prompts)
        self.metadata = metadata

    def about(self, prompts: Sequence[str]) -> list[dict[str, Any]]:
        """The metadata of each of some prompts, empty where there is none."""
        return [self.metadata.get(prompt, {}) for prompt in prompts]


def load_prompts(prompts: str) -> Prompts:
    """The prompts of a built-in list ("digits", "animals") or of a file, in UTF-8.

    The suffix says what the file is. ".jsonl": each line is a text, or an object with a text "prompt" whose other
    entries are the prompt's metadata. ".json": a list of such. Another: every line is a prompt, whatever it begins
    with. Blanks around a prompt, and blank lines, are left out.

    Raises:
        SettingError: if there is no such list or file, or it is not as above; it names the file and the line.
    """
    # Path.expanduser refuses a ~ of nobody
    path = BUILT_IN.get(prompts, Path(os.path.expanduser(prompts)))
    if not os.path.exists(path):
        raise SettingError(
            "prompts",
            f"{prompts!r} is neither a file nor a built-in list; give a text file with one prompt per line, or one of "
            + ", ".join(BUILT_IN),
        )
    # splitlines would also cut at characters that a prompt may hold, such as U+2028
    lines = {f"line {number}": line for number, line in enumerate(read_text(path, "prompts").split("\n"), 1)}
    kind = path.suffix.lower()
    if kind == ".json":
        listed = _json(path, "", "\n".join(lines.values()))
        if not isinstance(listed, list):
            raise SettingError("prompts", f"{path} holds no list; give a list of texts, or of objects with a prompt")
        entries = {f"entry {number}": entry for number, entry in enumerate(listed, 1)}
    elif kind == ".jsonl":
        entries = {place: _json(path, place, line) for place, line in lines.items() if line.strip()}
    else:
        entries = {place: line for place, line in lines.items() if line.strip()}
    found, metadata = [], {}
    for place, entry in entries.items():
        more = dict(entry) if isinstance(entry, dict) else {}
        prompt = more.pop("prompt", None) if isinstance(entry, dict) else entry
        if not isinstance(prompt, str) or not prompt.strip():
            raise SettingError("prompts", f"{path}, {place} is no prompt; give a text, or an object with a text prompt")
        found.append(prompt.strip())
        if metadata.setdefault(found[-1], more) != more:
            raise SettingError(
                "prompts", f"{path}, {place} has a prompt that was there before with other entries; make them equal"
            )
    if not found:
        raise SettingError("prompts", f"{path} holds no prompt; give at least one")
    return Prompts(found, metadata)


def _json(path: Path, place: str, text: str) -> Any:
    try:
        return read_json(text)
    except ValueError as error:
        # the line that it names is that of the text
        reason = error.msg if place and isinstance(error, json.JSONDecodeError) else error
        raise SettingError("prompts", f"{path}{place and f', {place}'} is not JSON: {reason}") from error


def draw_prompts(prompts: Sequence[str], count: int, group_size: int, generator: torch.Generator) -> list[str]:
    """`count` prompts, each `group_size` times in a row; they are distinct while there are enough."""
    indices: list[int] = []
    while len(indices) < count:
        indices += torch.randperm(len(prompts), generator=generator).tolist()
    return [prompts[index] for index in indices[:count] for _ in range(group_size)]
