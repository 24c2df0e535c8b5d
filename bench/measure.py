"""How things are measured: time, memory, launches, host overhead and the device's copy bandwidth.

Competitors take turns, so that a slow spell of the machine meets all of them. On a CPU a turn is a few calls in a
row. On a GPU it is one replay of a CUDA graph of calls on rotating inputs, timed by events: device time, without
launch gaps.
"""

from __future__ import annotations

import collections
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

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


def peak_extra_bytes(call: Call, slot: Any, device: torch.device) -> int:
    """The most memory that was held at any moment of the call beyond what was held before, results included."""
    call(slot)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(slot)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = call(slot)
    del result
    # the allocator's own record, in order: bytes taken, or given back as a negative number
    records = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for record in sorted(records, key=lambda e: e.start_ns()):
        held += record.nbytes()
        peak = max(peak, held)
    return peak


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
