"""How things are measured: time, memory, launches, host overhead and the device's copy bandwidth.

Competitors take turns, so that a slow spell of the machine meets all of them. On a CPU a turn is a few calls in a
row. On a GPU it is one replay of a CUDA graph of calls on rotating inputs, timed by events: device time, without
launch gaps.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import dataclasses
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

Call = Callable[[Any], Any]

ROUNDS = (9, 200)
# timed calls per turn
CPU_CALLS = 4
CPU_WARMUPS = 2
GPU_ROUNDS = 30
GPU_WARMUPS = 3
# long enough that the gap before a replay's first kernel does not count
GPU_REPLAY_SECONDS = 2e-3
MAX_GRAPH_CALLS = 1000
# few enough calls that the launch queue never fills up
HOST_CALLS = 15
# marks the parts of a profile
PHASE = "phase: "
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}


@dataclasses.dataclass
class Measured:
    """Seconds per call, one per round; seconds the host takes to hand over a call (GPU); how it was timed."""

    seconds: list[float]
    host_seconds: float | None
    timed_by: str


class RecordedTimes:
    """A clock that shows times measured before.

    pytest-benchmark measures one test after the other; with this as its timer it takes over what was measured with
    the competitors taking turns.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def read(self) -> float:
        return self.now

    def replay(self, benchmark: Any, seconds: Sequence[float]) -> None:
        remaining = iter(seconds)

        def spend() -> None:
            self.now += next(remaining)

        benchmark.pedantic(spend, rounds=len(seconds), iterations=1)


RECORDED = RecordedTimes()


def take_turns(calls: dict[str, Call], slots: Sequence[Any], seconds: float) -> dict[str, Measured]:
    """Times each call, in rounds of one turn each. `slots`: sets of inputs to rotate through; a call takes one."""
    device = slots[0].sample.device
    return (_take_turns_gpu if device.type == "cuda" else _take_turns_cpu)(calls, slots, seconds)


def _take_turns_cpu(calls: dict[str, Call], slots: Sequence[Any], seconds: float) -> dict[str, Measured]:
    one_round = 0.0
    for call in calls.values():
        for slot in (slots * CPU_WARMUPS)[: max(CPU_WARMUPS, len(slots))]:
            start = time.perf_counter()
            call(slot)
        one_round += (1 + CPU_CALLS) * (time.perf_counter() - start)
    rounds = max(ROUNDS[0], min(ROUNDS[1], int(seconds / one_round)))
    times = collections.defaultdict(list)
    names = list(calls)
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            slot = slots[turn % len(slots)]
            # nobody always comes after the same one
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                # the first call of a turn meets the caches as another competitor left them, and is not counted
                calls[name](slot)
                start = time.perf_counter()
                for _ in range(CPU_CALLS):
                    calls[name](slot)
                times[name].append((time.perf_counter() - start) / CPU_CALLS)
    finally:
        gc.enable()
    return {name: Measured(times[name], None, "wall time of a call") for name in names}


def _take_turns_gpu(calls: dict[str, Call], slots: Sequence[Any], seconds: float) -> dict[str, Measured]:
    replays, sizes, hosts = {}, {}, {}
    # all of it on one stream: autograd remembers which stream a leaf was used on, and capture allows no other
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for name, call in calls.items():
            for slot in slots:
                call(slot)
            torch.cuda.synchronize()
            hosts[name] = _host_seconds(call, slots)
            replays[name], sizes[name] = _captured(call, slots, stream)
        return _replayed(replays, sizes, hosts, seconds)


def _replayed(
    replays: dict[str, Callable[[], None]], sizes: dict[str, int], hosts: dict[str, float], seconds: float
) -> dict[str, Measured]:
    """Times the replays in turns. `sizes`: calls per replay."""
    times = collections.defaultdict(list)
    names = list(replays)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    deadline = time.perf_counter() + seconds
    for turn in range(GPU_ROUNDS):
        if turn >= ROUNDS[0] and time.perf_counter() > deadline:
            break
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start.record()
            replays[name]()
            stop.record()
            stop.synchronize()
            times[name].append(start.elapsed_time(stop) * 1e-3 / sizes[name])
    graphs = {name: isinstance(replays[name].__self__, torch.cuda.CUDAGraph) for name in names}
    return {
        name: Measured(times[name], hosts[name], "CUDA graph replays" if graphs[name] else "events around calls")
        for name in names
    }


class _DirectCalls:
    """In place of a graph, for a call that cannot be captured."""

    def __init__(self, call: Call, slots: Sequence[Any], number: int) -> None:
        self.call, self.slots, self.number = call, slots, number

    def replay(self) -> None:
        for turn in range(self.number):
            self.call(self.slots[turn % len(self.slots)])


def _captured(call: Call, slots: Sequence[Any], stream: torch.cuda.Stream) -> tuple[Callable[[], None], int]:
    """A replay of many calls on rotating inputs, and how many."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for turn in range(GPU_WARMUPS):
        call(slots[turn % len(slots)])
    stop.record()
    stop.synchronize()
    once = start.elapsed_time(stop) * 1e-3 / GPU_WARMUPS
    number = min(MAX_GRAPH_CALLS, max(len(slots), round(GPU_REPLAY_SECONDS / once)))
    # outputs live as long as those of a whole rotation do, so that they are not written to the same memory
    outputs: collections.deque[Any] = collections.deque(maxlen=len(slots))
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for turn in range(number):
                outputs.append(call(slots[turn % len(slots)]))
        replay = graph.replay
    except RuntimeError:
        torch.cuda.synchronize()
        replay = _DirectCalls(call, slots, number).replay
    outputs.clear()
    replay()
    torch.cuda.synchronize()
    return replay, number


def _host_seconds(call: Call, slots: Sequence[Any]) -> float:
    """Median wall time of a call that waits for nothing."""
    times = []
    for _ in range(3):
        torch.cuda.synchronize()
        for turn in range(HOST_CALLS):
            start = time.perf_counter()
            call(slots[turn % len(slots)])
            times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times)


class PeakMemory:
    """The most memory that was held at any moment of a block beyond what was held before it.

    On a GPU as PyTorch's allocator counts it, on a CPU by the record that the allocator leaves in a profile. That does
    not have what the block gives back of what was held before it: blocks that do so are measured right on a GPU only.

    Attributes:
        peak: bytes, of the whole block; once it is over.
        phases: the same of the parts of the block that ran under `phase(name)`, by name.
        left: bytes held at the end of each of them, beyond what was held before the block.
    """

    def __init__(self, device: torch.device) -> None:
        self.peak = 0
        self.phases: dict[str, int] = {}
        self.left: dict[str, int] = {}
        self._before = 0
        self._profile: profile | None = None
        if device.type == "cpu":
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> PeakMemory:
        if self._profile is not None:
            self._profile.__enter__()
        else:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._profile is not None:
            self._profile.__exit__(*error)
            self._read(self._profile)
        else:
            torch.cuda.synchronize()
            self._since_reset()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self._profile is not None:
            with record_function(PHASE + name):
                yield
        else:
            self._since_reset()
            torch.cuda.reset_peak_memory_stats()
            yield
            self.phases[name] = self._since_reset()
            self.left[name] = torch.cuda.memory_allocated() - self._before

    def _since_reset(self) -> int:
        peak = torch.cuda.max_memory_allocated() - self._before
        self.peak = max(self.peak, peak)
        return peak

    def _read(self, profiled: profile) -> None:
        events = profiled.profiler.kineto_results.events()
        # the allocator's own record, in order: bytes taken, or given back as a negative number
        records = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
        times = [record.start_ns() for record in records]
        held = [0, *itertools.accumulate(record.nbytes() for record in records)]
        self.peak = max(held)
        for event in events:
            if event.name().startswith(PHASE):
                name = event.name().removeprefix(PHASE)
                first, last = bisect.bisect_left(times, event.start_ns()), bisect.bisect_right(times, event.end_ns())
                # from what was held when it began
                self.phases[name], self.left[name] = max(held[first : last + 1]), held[last]


def peak_extra_bytes(call: Call, slot: Any, device: torch.device) -> int:
    """The most memory that was held at any moment of the call beyond what was held before, results included."""
    call(slot)
    with PeakMemory(device) as memory:
        result = call(slot)
    del result
    return memory.peak


def held_bytes(device: torch.device) -> int:
    """Bytes of the tensors that are alive; on a CPU of those that Python knows, every storage once."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and o.device.type == "cpu"]
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())


def launches(call: Call, slot: Any, device: torch.device) -> int | None:
    """How many kernels, copies and fills one call puts on the GPU; None where that cannot be counted."""
    if device.type != "cuda":
        return None
    call(slot)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        call(slot)
        torch.cuda.synchronize()
    events = profiled.profiler.kineto_results.events()
    count = sum(e.device_type() == torch.autograd.DeviceType.CUDA for e in events)
    return count or None


def copy_call(numbers: int) -> Call:
    """A copy that reads `numbers` float32 and writes as many, made for a slot on first use."""
    buffers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def copy(slot: Any) -> None:
        if id(slot) not in buffers:
            source = torch.ones(numbers, device=slot.sample.device)
            buffers[id(slot)] = source, torch.zeros_like(source)
        source, target = buffers[id(slot)]
        target.copy_(source)

    return copy


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of one copy far larger than any cache."""
    source = torch.randn(COPY_BYTES[device.type] // 4, device=device)
    target = torch.zeros_like(source)
    times = []
    for _ in range(GPU_WARMUPS + 15):
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            target.copy_(source)
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) * 1e-3)
        else:
            started = time.perf_counter()
            target.copy_(source)
            times.append(time.perf_counter() - started)
    return 2 * source.numel() * source.element_size() / statistics.median(times[GPU_WARMUPS:])
