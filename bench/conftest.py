"""Options, the order of the cases, the correctness gate, and the table at the end of a run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import measure, report
from bench.cases import COMPETITORS, SHAPES, Case, default_device, make_inputs

STARTED = time.perf_counter()
# per group of competitors, of timing alone
SECONDS_PER_GROUP = {"cpu": 4.0, "cuda": 1.0}


def pytest_addoption(parser):
    group = parser.getgroup("pcpo-fast")
    group.addoption(
        "--save-results",
        nargs="?",
        const=str(report.RESULTS),
        help="write JSON, Markdown and a picture to a folder per device in this one (default: bench/results)",
    )
    group.addoption(
        "--quick",
        action="store_true",
        help="one shape, timed for a moment: to check the benchmarks themselves",
    )
    group.addoption("--time-budget", type=float, help="seconds after which no further case is begun")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.option.benchmark_columns = ["median", "iqr", "rounds"]


def pytest_collection_modifyitems(config, items):
    def case_of(item):
        return item.callspec.params.get("case") if hasattr(item, "callspec") else None

    # the most important ones first, in case the time runs out
    items.sort(key=lambda item: case_of(item).priority if case_of(item) else -1)
    if config.getoption("--quick"):
        kept = [item for item in items if case_of(item) is None or case_of(item).shape == next(iter(SHAPES))]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


class Suite:
    """Checks and measures the competitors of one case at a time, and keeps what was measured."""

    def __init__(self, budget: float | None, quick: bool) -> None:
        self.device = default_device()
        self.budget = budget
        self.seconds = 0.1 if quick else SECONDS_PER_GROUP[self.device.type]
        self.copy_bandwidth = measure.copy_bandwidth(self.device)
        self.cannot_compile = _why_not_compile(self.device)
        self.records: list[dict[str, Any]] = []
        # reason to what was skipped, in order
        self.skipped: dict[str, list[str]] = {}
        self.failed: list[str] = []
        self._case: Case | None = None
        self._outcomes: dict[str, measure.Measured | Exception] = {}

    def run(self, case: Case, competitor: str, benchmark: Any) -> None:
        """One competitor's test: fails if its outputs are wrong, else hands its times to pytest-benchmark."""
        reason = self._why_skip(case, competitor)
        if reason is None and case != self._case and self._time_is_up():
            reason = f"the time budget of {self.budget:g} s was spent"
        if reason is not None:
            self.skipped.setdefault(reason, []).append(f"{competitor}: {case.name}")
            pytest.skip(reason)
        if case != self._case:
            self._case, self._outcomes = case, {}
            self._outcomes = self._measure(case)
        outcome = self._outcomes[competitor]
        if isinstance(outcome, Exception):
            self.failed.append(f"{competitor}: {case.name}: {outcome}")
            raise outcome
        benchmark.group = case.name
        measure.RECORDED.replay(benchmark, outcome.seconds)

    def _time_is_up(self) -> bool:
        return self.budget is not None and time.perf_counter() - STARTED > self.budget

    def _why_skip(self, case: Case, competitor: str) -> str | None:
        if competitor == "ours-triton" and self.device.type != "cuda":
            return "the Triton kernels need a GPU"
        if competitor == "compile":
            if self.cannot_compile:
                return self.cannot_compile
            if not case.compiled:
                return "torch.compile joins at the most rows only, to save time"
        return None

    def _measure(self, case: Case) -> dict[str, measure.Measured | Exception]:
        op, shape = case.op, SHAPES[case.shape]
        slots = [make_inputs(case.rows, shape, self.device, seed=0)]
        floor = op.bytes(slots[0])
        outcomes: dict[str, measure.Measured | Exception] = {}
        calls: dict[str, measure.Call] = {}
        for competitor in COMPETITORS:
            if self._why_skip(case, competitor):
                continue
            call = _call(case, competitor)
            try:
                op.check(slots[0], call(slots[0]), competitor)
                calls[competitor] = call
            except Exception as error:
                # raised again by this competitor's test
                outcomes[competitor] = error
        if not calls:
            return outcomes

        if self.device.type == "cuda":
            beyond_cache = 3 * torch.cuda.get_device_properties(self.device).L2_cache_size
            number = max(2, -(-beyond_cache // floor))
            slots += [slots[0].copy() for _ in range(1, number)]
        resources = {
            name: (
                measure.peak_extra_bytes(call, slots[0], self.device),
                measure.launches(call, slots[0], self.device),
            )
            for name, call in calls.items()
        }
        # a copy of as many bytes takes turns with them, for comparison
        times = measure.take_turns({**calls, "copy": measure.copy_call(floor // 8)}, slots, self.seconds)
        for name, measured in times.items():
            peak, launched = resources.get(name, (None, None))
            eager = times["eager"].seconds if "eager" in times else None
            self.records.append(
                report.record(
                    case, name, measured, floor=floor, eager=eager, peak=peak, launches=launched,
                    copy_bandwidth=self.copy_bandwidth,
                )
            )  # fmt: skip
        outcomes.update({name: times[name] for name in calls})
        return outcomes


def _call(case: Case, competitor: str) -> measure.Call:
    op = case.op
    if competitor.startswith("ours-"):
        impl = competitor.removeprefix("ours-")
        return lambda i: op.ours(i, impl)
    formula = op.formula
    if competitor == "compile":
        torch._dynamo.reset()
        formula = torch.compile(op.formula, dynamic=False)
    return lambda i: op.usual(i, formula)


def _why_not_compile(device: torch.device) -> str | None:
    try:
        torch.compile(lambda t: t.sin() + 1)(torch.ones(64, device=device))
    except Exception as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return f"torch.compile does not work here: {cause}"
    return None


@pytest.fixture(scope="session")
def suite(request):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    suite = Suite(request.config.getoption("--time-budget"), request.config.getoption("--quick"))
    request.config.stash[SUITE] = suite
    yield suite
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def summary(request):
    """Markdown of other measurements, shown when the run is over."""
    return request.config.stash.setdefault(SUMMARY, [])


SUITE = pytest.StashKey[Suite]()
SUMMARY = pytest.StashKey[list[str]]()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    for text in config.stash.get(SUMMARY, []):
        terminalreporter.write_line("\n" + text)
    suite = config.stash.get(SUITE, None)
    if suite is None:
        return
    results = report.results(suite.device, suite.copy_bandwidth, suite.records, suite.skipped, suite.failed)
    terminalreporter.write_line("")
    terminalreporter.write_line(report.markdown(results))
    folder = config.getoption("--save-results")
    if folder:
        terminalreporter.write_line(f"written: {report.save(results, Path(folder))}")
