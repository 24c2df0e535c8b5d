"""The report of a study: its tables and figures in one folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pcpo_fast.files import write_atomically
from pcpo_fast.study.figures import save_figures
from pcpo_fast.study.tables import all_tables


def write_report(study: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes the tables (Markdown) and the figures (PNG) of a study, finished or not.

    Args:
        study: the contents of study.json.
        folder: where they go; it is made if needed. A figure without any finished run is not drawn, and one that an
            earlier report left is kept.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, text in all_tables(study).items():
        write_atomically(folder / name, text.encode())
        paths.append(folder / name)
    return paths + save_figures(study, folder)
