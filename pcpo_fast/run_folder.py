"""The folder of a run: a free one or the one given, locked by one process."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout

from pcpo_fast.config import Config, read_config
from pcpo_fast.errors import SettingError
from pcpo_fast.files import write_atomically, writing
from pcpo_fast.terminal import warn

# locked for as long as the run lives; holds its process id and the name of its machine
LOCK = ".lock"
SETTINGS, HISTORY = "config.json", "config-history.jsonl"


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
        if not resume and (folder / SETTINGS).exists():
            raise SettingError(
                "output_dir", f"{folder} already holds a run; add --resume to continue it, or give another folder"
            )
        try:
            yield folder
        finally:
            if made and folder.is_dir() and [path.name for path in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
                folder.rmdir()


def saved_settings(folder: Path) -> dict[str, Any]:
    """The settings of the run in `folder`; none if that run was killed before it had finished any file.

    Raises:
        SettingError: if the folder holds no run.
    """
    if os.path.lexists(folder / SETTINGS):
        try:
            return read_config(folder / SETTINGS)
        except SettingError as error:
            raise SettingError(
                "output_dir",
                f"{folder} cannot be resumed without its settings: {error.reason}; mend {SETTINGS}, or write it anew "
                "with the settings that the run had",
            ) from error
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


def settings_of(config: Config) -> dict[str, Any]:
    """What decides a run, as JSON reads it: all settings but where it is and whether it is resumed."""
    settings = json.loads(config.to_json())
    return {name: value for name, value in settings.items() if name not in ("output_dir", "resume")}


def save_settings(folder: Path, config: Config, epoch: int, before: Mapping[str, Any] | None = None) -> None:
    """Writes the settings of a run, and says and notes what a resumed run changes.

    Args:
        epoch: how many epochs are finished.
        before: the settings of those epochs, as `settings_of` gives them, where they are known.

    Raises:
        SettingError: if the folder cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    now = settings_of(config)
    changed = {name: [before.get(name), now[name]] for name in now if now[name] != before.get(name)} if before else {}
    if changed:
        listing = ", ".join(f"{name} from {old!r} to {new!r}" for name, (old, new) in changed.items())
        warn(f"settings change after epoch {epoch}: {listing}; noted in {folder / HISTORY}")
        line = json.dumps({"epoch": epoch, "changed": changed}) + "\n"
        with writing(folder / HISTORY):
            noted = (folder / HISTORY).read_bytes() if (folder / HISTORY).exists() else b""
        write_atomically(folder / HISTORY, noted + line.encode())
    # without `resume`, so that other runs can start from it
    write_atomically(folder / SETTINGS, config.replace(resume=False).to_json().encode())


def _lock(folder: Path) -> AcquireReturnProxy:
    """Locks the folder until the result is left as a context."""
    try:
        lock = FileLock(folder / LOCK).acquire(timeout=0)
    except Timeout as error:
        raise SettingError("output_dir", f"{folder} is in use by {_owner(folder / LOCK)}") from error
    (folder / LOCK).write_text(f"{os.getpid()} {socket.gethostname()}\n", encoding="utf-8")
    return lock


def _owner(lock: Path) -> str:
    """Which process holds a lock, and what to do."""
    noted, _, host = lock.read_text(encoding="utf-8", errors="replace").strip().partition(" ")
    wait = "wait until it has finished, or give another folder"
    # the system tells which of its own processes have a file open
    holders = set()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if descriptor.samefile(lock):
                holders.add(descriptor.parts[2])
    if not holders:
        return f"process {noted or '(unknown)'}{f' on {host}' if host else ''}; {wait}"
    listing = " and ".join(sorted(holders, key=int))
    if noted in holders or not noted:
        return f"process {noted or listing}; {wait}"
    return (
        f"process {listing}, whose lock names process {noted}; end {listing} if a killed run left it behind, or {wait}"
    )


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
