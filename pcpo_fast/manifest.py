"""Checksums of the files in a folder, by which every damage to it is seen."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pcpo_fast.files import write_atomically

# the size and SHA-256 of every other file by its path; two of them while one file is replaced
MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Notes size and checksum of every file in `folder`."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST]
    sums = {path.relative_to(folder).as_posix(): [_checksum(path)] for path in files}
    (folder / MANIFEST).write_bytes(_json(sums))


def replace_file(folder: Path, name: str, content: bytes) -> None:
    """Replaces a file of `folder`. At every moment the manifest, where there is one, has the checksum of what is there.

    Raises:
        SettingError: if it cannot be written.
    """
    if not (folder / MANIFEST).exists():
        write_atomically(folder / name, content)
        return
    files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    new = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_atomically(folder / MANIFEST, _json(files | {name: [*files[name], new]}))
    write_atomically(folder / name, content)
    write_atomically(folder / MANIFEST, _json(files | {name: [new]}))


def find_damage(folder: Path) -> str | None:
    """Names the first file of `folder` that is not as its manifest says, and what is wrong; None if all are whole."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if not files:
            return f"{MANIFEST} names no file"
        for name, known in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is {'no file' if path.exists() else 'missing'}"
            sizes, size = [entry["bytes"] for entry in known], path.stat().st_size
            if size not in sizes:
                return f"{name} has {size} of {sizes[0]} bytes"
            if _checksum(path) not in known:
                return f"{name} has changed since it was written"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        name = str(error.filename or folder / MANIFEST).removeprefix(f"{folder}/")
        return f"{name} cannot be read ({error.strerror})"
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        return f"{MANIFEST} is damaged"
    return None


def _json(files: dict[str, Any]) -> bytes:
    return (json.dumps(files, indent=1) + "\n").encode()


def _checksum(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
