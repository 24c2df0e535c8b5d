"""The measuring and the gate before it, on cases whose answer is known."""

from types import SimpleNamespace

import pytest
import torch

from bench.cases import default_device, make_inputs
from bench.measure import RecordedTimes, peak_extra_bytes, take_turns
from bench.test_policy_loss import FORWARD, GRADIENT, GUIDED, KEY, STATES, WITHOUT_OLD
from bench.test_sampler_step import DRAWN, GIVEN, RETURNED
from bench.test_step_log_prob import RATIO, WITH_GRADIENT

MIB = 2**20
OPS = (FORWARD, GRADIENT, STATES, KEY, WITHOUT_OLD, GUIDED, GIVEN, DRAWN, RETURNED, WITH_GRADIENT, RATIO)


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


def damage(outputs, name):
    tensor = outputs[name].clone()
    flat = tensor.view(-1)
    return {
        "one element": {
            **outputs,
            name: flat.index_put((torch.tensor(-1),), flat[-1] + flat.abs().max()).view_as(tensor),
        },
        "a NaN": {**outputs, name: flat.index_put((torch.tensor(0),), flat[0] * float("nan")).view_as(tensor)},
        "the scale": {**outputs, name: tensor * 1.05},
    }


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_the_gate_closes(op):
    """Right outputs pass, and outputs of which any one is wrong do not."""
    inputs = make_inputs(4, (4, 16, 16), torch.device("cpu"), seed=1)
    for competitor in ("eager", "ours-torch"):
        outputs = op.usual(inputs, op.formula) if competitor == "eager" else op.ours(inputs, "torch")
        outputs = {name: value.detach() for name, value in outputs.items()}
        op.check(inputs, outputs, competitor)
        for name in outputs:
            for what, wrong in damage(outputs, name).items():
                with pytest.raises(AssertionError):
                    op.check(inputs, wrong, competitor)
                    pytest.fail(f"{what} of {competitor}'s {name} went unnoticed")
