"""The processes of a study: each runs one run with one thread, and a study that was stopped goes on where it was.

A process gets the folder of its run, `runs/ID`, which holds `study_run.json`; it writes `metrics.jsonl` as it goes and
`result.json` when it has finished. It stops by itself when the process that started it is gone.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from pcpo_fast.run_folder import LOCK
from pcpo_fast.signals import Signals
from pcpo_fast.terminal import say

from .measures import best_learning_rate
from .plan import Plan, Run
from .results import Results, prepare

COMMAND = (sys.executable, "-m", "pcpo_fast.study.run")
# tells a run the process whose end is its own end
PARENT = "PCPO_STUDY_PARENT"
LOG = "log.txt"
# lines of a log that a failure quotes
QUOTED = 10
# names of runs beside the bar
SHOWN = 4
# seconds between two looks at the processes
PAUSE = 0.2
# seconds that a run of an earlier, killed study has to notice that it is alone
PATIENCE = 60.0


def processors() -> int:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Study:
    """The runs of a study, and the processes that run them.

    Args:
        plan: the study.
        results: its finished runs.
        processes: how many run at a time.
        command: what is run with the folder of a run as its last argument.

    Attributes:
        runs: all runs that are known, in the order in which they start.
        waiting: (task, algorithm, seed) of runs whose learning rate is not known before the sweep has finished.
        failed: ids of the runs that failed.
    """

    def __init__(
        self, plan: Plan, results: Results, *, processes: int | None = None, command: Sequence[str] = COMMAND
    ) -> None:
        self.plan, self.results = plan, results
        self.processes, self.command = processes or processors(), command
        self.failed: list[str] = []
        self._running: dict[str, tuple[Run, subprocess.Popen[bytes]]] = {}
        # epochs by run, and the size of the metrics file at which they were counted
        self._epochs: dict[str, tuple[int, int]] = {}
        # when a folder was first found locked by another process
        self._locked: dict[str, float] = {}
        self._best: dict[tuple[str, str], float] = {}
        self.runs: list[Run] = []
        self.waiting: list[tuple[str, str, int]] = []
        self._plan_runs()

    @property
    def finished(self) -> list[Run]:
        """The runs that have finished."""
        return [run for run in self.runs if run.id in self.results.finished]

    @property
    def total(self) -> int:
        """All runs, known or waiting."""
        return len(self.runs) + len(self.waiting)

    def run(self) -> int:
        """Runs what has not finished, and writes study.json whenever a run has.

        Returns:
            0, or 1 if runs failed, or 128 + n after signal n.
        """
        self.results.keep_replaced()
        self.results.save(self.runs)
        with Signals() as signals, tqdm(desc="epochs", unit="epoch", dynamic_ncols=True, initial=self._done()) as bar:
            try:
                while not signals.stop():
                    self._collect()
                    self._start_next()
                    self._show(bar)
                    if not self._running and next(self._open(), None) is None:
                        break
                    time.sleep(PAUSE)
                stopped = signals.received
                if stopped is not None:
                    self._stop()
                while self._running:
                    self._collect(stopping=True)
                    self._show(bar)
                    time.sleep(PAUSE)
            finally:
                # only after an error, or a second signal
                self._stop()
        if stopped is not None:
            return 128 + stopped
        return 1 if len(self.finished) < self.total else 0

    def _plan_runs(self) -> None:
        """Finds all runs, those that have finished, and the best learning rates of sweeps that have."""
        while True:
            self.runs, self.waiting = self.plan.runs(self._best)
            self.results.take(self.runs)
            known = len(self._best)
            finished = self.results.finished
            for task, algorithm in dict.fromkeys(pair[:2] for pair in self.waiting):
                sweep = self.plan.sweep(task, algorithm)
                if all(name in finished for name in sweep):
                    entries = [{"learning_rate": rate, **finished[name]} for name, rate in sweep.items()]
                    self._best[task, algorithm] = best_learning_rate(entries, self.plan.frechet_limit(task))
            if len(self._best) == known:
                return

    def _open(self) -> Iterator[Run]:
        """The runs that are still to be started."""
        for run in self.runs:
            if not (run.id in self.results.finished or run.id in self._running or run.id in self.failed):
                yield run

    def _start_next(self) -> None:
        """Starts as many runs as there are free processes."""
        for run in list(self._open()):
            if len(self._running) >= self.processes:
                return
            self._start(run)

    def _start(self, run: Run) -> None:
        """Starts a run, or leaves it for later while a process of an earlier study still has its folder."""
        folder = self.results.run_folder(run)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / LOCK).acquire(timeout=0):
                prepare(folder, run)
        except Timeout:
            since = self._locked.setdefault(run.id, time.monotonic())
            if time.monotonic() - since > PATIENCE:
                self._fail(run, f"{folder} is in use by another process; wait until that has finished, or end it")
            return
        environment = {**os.environ, "OMP_NUM_THREADS": "1", PARENT: str(os.getpid())}
        with (folder / LOG).open("ab") as log:
            process = subprocess.Popen(
                [*self.command, str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                # Ctrl-C reaches this process alone, which passes it on once: a second one would end a run unsaved
                start_new_session=True,
            )
        self._running[run.id] = run, process

    def _collect(self, *, stopping: bool = False) -> None:
        """Takes the results of processes that have ended. One that was told to stop has not failed."""
        for run, process in list(self._running.values()):
            status = process.poll()
            if status is None:
                continue
            del self._running[run.id]
            # the plan may ask for more of it by now
            run = next((planned for planned in self.runs if planned.id == run.id), run)
            if status == 0:
                wrong = self.results.read(run)
            else:
                wrong = f"status {status}" if status > 0 else f"ended by {signal.Signals(-status).name}"
            if wrong is None:
                # it may have been the last one of a sweep
                if self.waiting:
                    self._plan_runs()
                self.results.save(self.runs)
                say(f"{run.id} has finished ({len(self.finished)} of {self.total} runs)")
            elif not stopping:
                log = self.results.run_folder(run) / LOG
                self._fail(run, f"{wrong}; its log {log} ends with", *(f"    {line}" for line in _last_lines(log)))

    def _fail(self, run: Run, reason: str, *quoted: str) -> None:
        self.failed.append(run.id)
        say(f"{run.id} failed: {reason}", *quoted, error=True)

    def _stop(self) -> None:
        for _, process in self._running.values():
            if process.poll() is None:
                process.terminate()

    def _show(self, bar: tqdm) -> None:
        ahead = sum(self.plan.configs[task, algorithm].run.epochs for task, algorithm, _ in self.waiting)
        bar.total = ahead + sum(run.config.run.epochs for run in self.runs)
        names = list(self._running)
        running = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        state = f"{len(self.finished)}/{self.total} runs; running {running or 'none'}"
        done, before = self._done() - bar.n, bar.postfix
        if done:
            bar.update(done)
        bar.set_postfix_str(state, refresh=bool(done) or state != before)

    def _done(self) -> int:
        """Epochs of all runs so far."""
        done = 0
        for run in self.runs:
            epochs = run.config.run.epochs
            done += epochs if run.id in self.results.finished else min(epochs, self._count(run))
        return done

    def _count(self, run: Run) -> int:
        """The last epoch of a run that has not finished."""
        path = self.results.run_folder(run) / "metrics.jsonl"
        if run.id not in self._running and run.id in self._epochs:
            return self._epochs[run.id][0]
        epochs, counted = self._epochs.get(run.id, (0, 0))
        try:
            size = path.stat().st_size
            if size != counted:
                # the text after the last line break is not complete yet
                lines = path.read_bytes().split(b"\n")[:-1]
                epochs = _epoch(lines[-1]) if lines else 0
        except FileNotFoundError:
            epochs = size = 0
        self._epochs[run.id] = epochs, size
        return epochs


def _epoch(line: bytes) -> int:
    """The epoch of a line of metrics; 0 where a failure of the machine left none."""
    try:
        return int(json.loads(line)["epoch"])
    except (ValueError, KeyError, TypeError):
        return 0


def _last_lines(path: Path) -> list[str]:
    """The end of a log, without its empty lines. A progress bar writes all of its states as one line with returns."""
    if not path.is_file():
        return []
    text = path.read_bytes()[-20_000:].decode(errors="replace")
    return [line.rstrip() for line in text.splitlines() if line.strip()][-QUOTED:]
