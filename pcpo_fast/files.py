"""Writing files so that a reader, or a run that is killed at any moment, finds a complete one.

What the file system refuses is one error that names the path and says what to do.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from pcpo_fast.errors import SettingError
from pcpo_fast.terminal import warn

ADVICE = {
    errno.ENOSPC: "make room on that disk, and go on with --resume",
    errno.EDQUOT: "make room in your quota, and go on with --resume",
    errno.ENOENT: "it or its folder was removed or moved; put it back and go on with --resume, or start another run",
    errno.EACCES: "let this user write there, or give another folder",
    errno.EPERM: "let this user write there, or give another folder",
    errno.EROFS: "that disk is read-only; make it writable, or give another folder",
}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes an error of the file system a SettingError, which names `path` and says what to do."""
    try:
        yield
    except Exception as error:
        # safetensors tells the errors of the system as text
        by_text = re.search(r"([^:]*) \(os error (\d+)\)", str(error))
        if isinstance(error, OSError):
            number, reason = error.errno, error.strerror or str(error)
        elif by_text is not None:
            number, reason = int(by_text[2]), by_text[1].strip()
        else:
            raise
        advice = ADVICE.get(number or 0, "mend that and go on with --resume, or give another folder")
        raise SettingError("output_dir", f"{path} could not be written ({reason}): {advice}") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces the file `path` in one step: a reader finds the old content or the new one.

    Raises:
        SettingError: if it cannot be written; nothing but the old content is left then.
    """
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        try:
            partial.write_bytes(content)
            flush(partial)
            os.replace(partial, path)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise


def flush(path: Path) -> None:
    """Waits until the file or folder `path` is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def delete(path: Path) -> None:
    """Deletes a file, a folder with all that it holds, or a link and not what it leads to.

    What cannot be deleted is a warning: nothing depends on it.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        warn(f"{path} could not be deleted ({error}); the run does not need it, so delete it when you can")
