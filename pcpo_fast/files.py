"""Writing files so that a reader, or a run that is killed at any moment, finds a complete one."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces the file `path` in one step: a reader finds the old content or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    flush(partial)
    os.replace(partial, path)


def flush(path: Path) -> None:
    """Waits until the file or folder `path` is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
