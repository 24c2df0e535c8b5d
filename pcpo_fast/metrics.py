"""Metrics of a run, as JSON lines and in TensorBoard."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from pcpo_fast.files import write_atomically

Record = dict[str, Any]


class Metrics:
    """A JSON object per epoch and one per evaluation in `metrics.jsonl`, flushed to the disk; the same in TensorBoard.

    Values are numbers, or lists with one number per sampler step or quantile. A number that is not finite is written as
    null. Keys under `time/` are seconds or rates of this machine; all others are the same whenever the run is repeated.
    """

    def __init__(self, folder: Path, kept: int = 0) -> None:
        """Keeps the first `kept` records of the folder's file; later ones will be made again."""
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        self.records = _read(self.path)[:kept]
        write_atomically(self.path, "".join(map(_line, self.records)).encode())
        # TensorBoard drops this epoch and later ones; a kill may have come before it got the last records
        last = self.records[-1]["epoch"] if self.records else 0
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=last)
        self._show([record for record in self.records if record["epoch"] == last])

    def write(self, record: Record) -> None:
        record = {key: _finite(value) for key, value in record.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())
        self.records.append(record)
        self._show([record])

    def series(self, key: str) -> tuple[list[int], list[Any]]:
        """The epochs at which `key` was recorded, and its values there."""
        found = [(record["epoch"], record[key]) for record in self.records if key in record]
        return [epoch for epoch, _ in found], [value for _, value in found]

    def close(self) -> None:
        self.writer.close()

    def _show(self, records: list[Record]) -> None:
        """Writes records to TensorBoard."""
        for record in records:
            for key, value in record.items():
                if isinstance(value, int | float) and key != "epoch":
                    self.writer.add_scalar(key, value, record["epoch"])
        self.writer.flush()


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(record: Record) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _read(path: Path) -> list[Record]:
    """The records of a metrics file, without a last line that a kill cut off."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]
