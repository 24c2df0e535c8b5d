"""Metrics of a run, as JSON lines and in TensorBoard."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pcpo_fast.errors import SettingError
from pcpo_fast.files import write_atomically, writing
from pcpo_fast.terminal import warn

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Record = dict[str, Any]


class Metrics:
    """A JSON object per epoch and one per evaluation in `metrics.jsonl`, flushed to the disk; the same in TensorBoard.

    Values are numbers, or lists with one number per sampler step or quantile. A number that is not finite is written as
    null. Keys under `time/` are seconds or rates of this machine; all others are the same whenever the run is repeated.
    """

    def __init__(self, folder: Path, kept: int = 0, epoch: int | None = None) -> None:
        """Keeps the first `kept` records of the folder's file, as far as `epoch`; later ones will be made again.

        What is lost is a warning. So is a TensorBoard folder that cannot be written.

        Raises:
            SettingError: if the file cannot be read or written.
        """
        self.path, self.tensorboard = folder / "metrics.jsonl", folder / "tensorboard"
        self.records = _read(self.path, kept, epoch)
        write_atomically(self.path, "".join(map(_line, self.records)).encode())
        # TensorBoard drops this epoch and later ones; a kill may have come before it got the last records
        last = self.records[-1]["epoch"] if self.records else 0
        self.writer: SummaryWriter | None = None
        with self._warned():
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.tensorboard), purge_step=last)
        self._show([record for record in self.records if record["epoch"] == last])

    def write(self, record: Record) -> None:
        """Appends a record.

        Raises:
            SettingError: if it cannot be written.
        """
        record = {key: _finite(value) for key, value in record.items()}
        self.records.append(record)
        with writing(self.path):
            # all of a file that somebody removed
            lines = [record] if self.path.exists() else self.records
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(map(_line, lines))
                file.flush()
                os.fsync(file.fileno())
        self._show([record])

    def series(self, key: str) -> tuple[list[int], list[Any]]:
        """The epochs at which `key` was recorded, and its values there."""
        found = [(record["epoch"], record[key]) for record in self.records if key in record]
        return [epoch for epoch, _ in found], [value for _, value in found]

    def close(self) -> None:
        with self._warned():
            if self.writer is not None:
                self.writer.close()

    def _show(self, records: list[Record]) -> None:
        """Writes records to TensorBoard, as long as its folder is there."""
        with self._warned():
            if self.writer is None:
                return
            # its writer has a thread of its own, which would print a traceback
            if not self.tensorboard.is_dir():
                raise FileNotFoundError(f"{self.tensorboard} was removed")
            for record in records:
                for key, value in record.items():
                    if isinstance(value, int | float) and key != "epoch":
                        self.writer.add_scalar(key, value, record["epoch"])
            self.writer.flush()

    @contextlib.contextmanager
    def _warned(self) -> Iterator[None]:
        """TensorBoard is a copy of the metrics: without it the run goes on."""
        try:
            yield
        except OSError as error:
            self.writer = None
            warn(f"the run goes on without TensorBoard ({error}); its numbers are in {self.path}, too")


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(record: Record) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _read(path: Path, kept: int, epoch: int | None) -> list[Record]:
    """The first `kept` records of a metrics file, as far as `epoch`, and what is wrong with the file as a warning."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        content = b""
    except OSError as error:
        raise SettingError("output_dir", f"{path} cannot be read ({error.strerror}); move it away") from error
    # a broken line has its place among the others
    lines = [line for line in content.split(b"\n") if line.strip()]
    records = [record for record in map(_parse, lines[:kept]) if record is not None]
    records = [record for record in records if epoch is None or record["epoch"] <= epoch]
    if len(records) < kept:
        warn(f"{path} has {len(records)} of the {kept} records up to the checkpoint; the others are lost")
    if len(lines) > kept:
        warn(f"{path}: the last {len(lines) - kept} records, whose epochs no checkpoint has, are dropped")
    return records


def _parse(line: bytes) -> Record | None:
    """The record of a line, or None for a line that holds none."""
    try:
        record = json.loads(line)
        numbers = [item for value in record.values() for item in (value if isinstance(value, list) else [value])]
        whole = all(number is None or math.isfinite(number) for number in numbers)
        return record if whole and isinstance(record["epoch"], int) else None
    except (ValueError, AttributeError, KeyError, TypeError, OverflowError):
        return None
