"""The measuring itself, on cases whose answer is known."""

from types import SimpleNamespace

import pytest
import torch
from cases import default_device
from measure import RecordedTimes, peak_extra_bytes, take_turns

MIB = 2**20


def test_peak_memory_is_the_peak_and_not_the_total():
    device = default_device()

    def three_in_turn_two_at_a_time(slot):
        first = torch.empty(MIB // 4, device=device)
        second = torch.neg(first)
        del first
        third = torch.neg(second)
        del second
        return third

    assert peak_extra_bytes(three_in_turn_two_at_a_time, None, device) == 2 * MIB


def test_peak_memory_with_autograd():
    device = default_device()
    leaf = torch.rand(MIB // 4, device=device, requires_grad=True)

    def saves_its_result(slot):
        # exp keeps its output for the backward pass; the gradient of the sum is one number, spread without memory
        return torch.autograd.grad(torch.exp(leaf).sum(), leaf)

    assert 2 * MIB <= peak_extra_bytes(saves_its_result, None, device) < 2 * MIB + 4096


def test_a_slower_call_takes_longer():
    slots = [SimpleNamespace(sample=torch.rand(1, 400_000, device=default_device()))]

    def four_times(slot):
        for _ in range(4):
            slot.sample.exp()

    calls = {"once": lambda slot: slot.sample.exp(), "four times": four_times}
    seconds = {name: sorted(measured.seconds) for name, measured in take_turns(calls, slots, 0.2).items()}
    once, four = (times[len(times) // 2] for times in seconds.values())
    assert 2 * once < four < 8 * once


RECORDED = RecordedTimes()


@pytest.mark.benchmark(timer=RECORDED.read)
def test_pytest_benchmark_takes_over_recorded_times(benchmark):
    RECORDED.replay(benchmark, [3.0, 1.0, 2.0])
    if benchmark.enabled:
        assert benchmark.stats.stats.median == pytest.approx(2.0)
        assert benchmark.stats.stats.rounds == 3
