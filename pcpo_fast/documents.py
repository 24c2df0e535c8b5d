"""Text, JSON and YAML that a user wrote: every error names the file, and the line where there is one."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import Any

from pcpo_fast.errors import SettingError


def read_text(path: Path, setting: str) -> str:
    """The text of a file in UTF-8, without a byte order mark, and with "\\n" at the end of every line.

    Raises:
        SettingError: with the name `setting`, for a file that cannot be read, is empty or is not UTF-8, and for
            anything but a file: a pipe can be read only once.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
            raise SettingError(setting, f"cannot read {path}: it is {kind}; give a text file")
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise SettingError(
            setting, f"cannot read {path}: line {line} is not UTF-8; save it with that encoding"
        ) from error
    except OSError as error:
        raise SettingError(setting, f"cannot read {path}: {error.strerror or error}") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise SettingError(
            setting, f"cannot read {path}: line {line} holds a zero byte; save it as text, with the encoding UTF-8"
        )
    if not text.strip():
        raise SettingError(setting, f"cannot read {path}: it is empty")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(text: str) -> Any:
    """The content of a JSON document.

    Raises:
        ValueError: for what is no JSON, and for a key that is written twice.
    """

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is written twice; keep one")
        return found

    try:
        return json.loads(text, object_pairs_hook=distinct)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_yaml(text: str) -> Any:
    """The content of a YAML document, with 1e-4 as a number.

    Raises:
        ValueError: for what is no YAML, and for a key that is written twice.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML 1.1 reads 1e-4 as a string. PyYAML keeps the last of two equal keys, which YAML forbids."""

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            seen = set()
            for key, _ in node.value:
                if isinstance(key.value, str) and key.value in seen:
                    line = key.start_mark.line + 1
                    raise ValueError(f"line {line}: {key.value!r} is written twice; keep one of the two")
                seen.add(key.value if isinstance(key.value, str) else None)
            return node

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
    try:
        return yaml.load(text, Loader)
    except ValueError:
        raise
    # PyYAML makes no error of its own of a tag whose value is none of its kind, such as !!bool 3
    except Exception as error:
        text = str(error) if isinstance(error, yaml.YAMLError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"it is not YAML, or holds a value that does not fit its tag: {text}") from error
