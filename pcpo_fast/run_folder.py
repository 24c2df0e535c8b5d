"""The folder of a run: a free one or the one given, locked by one process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout

from pcpo_fast.config import read_config
from pcpo_fast.errors import SettingError

# locked for as long as the run lives; holds its process id
LOCK = ".lock"


@contextlib.contextmanager
def run_folder(output_dir: str | None, name: str, *, resume: bool) -> Iterator[Path]:
    """Makes and locks the folder `output_dir`, or without one the first free of runs/<name>, runs/<name>-2, ...

    A folder that was made here and stayed empty is removed at the end.

    Raises:
        SettingError: if the folder cannot be made, is in use, or holds a run that is not to be resumed.
    """
    try:
        folder = Path(output_dir).expanduser() if output_dir is not None else _make_free_folder(name)
        made = output_dir is None or not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
    except OSError as error:
        raise SettingError("output_dir", f"cannot be used as a run folder: {error}") from error
    with lock:
        if not resume and (folder / "config.json").exists():
            raise SettingError(
                "output_dir", f"{folder} already holds a run; add --resume to continue it, or give another folder"
            )
        try:
            yield folder
        finally:
            if made and [path.name for path in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
                folder.rmdir()


def saved_settings(folder: Path) -> dict[str, Any]:
    """The settings of the run in `folder`; none if that run was killed before it had finished any file.

    Raises:
        SettingError: if the folder holds no run.
    """
    if (folder / "config.json").is_file():
        return read_config(folder / "config.json")
    there = None
    if folder.is_dir():
        there = sorted(path.name for path in folder.iterdir() if path.name != LOCK and path.suffix != ".partial")
    if there == []:
        return {}
    found = "the folder does not exist" if there is None else f"it has no config.json, but {', '.join(there)}"
    raise SettingError(
        "output_dir",
        f"{folder} holds no run to resume: {found}; give the folder of a run, or leave --resume out to begin one there",
    )


def _lock(folder: Path) -> AcquireReturnProxy:
    """Locks the folder until the result is left as a context."""
    try:
        lock = FileLock(folder / LOCK).acquire(timeout=0)
    except Timeout as error:
        owner = (folder / LOCK).read_text(encoding="utf-8").strip()
        raise SettingError(
            "output_dir",
            f"{folder} is in use by process {owner or '(unknown)'}; wait until it has finished, or give another folder",
        ) from error
    (folder / LOCK).write_text(f"{os.getpid()}\n", encoding="utf-8")
    return lock


def _make_free_folder(name: str) -> Path:
    number = 1
    while True:
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            # possibly made by a run that started at the same time
            number += 1
