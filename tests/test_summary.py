"""The numbers of an update, each made again of its rows with plain loops."""

import math

import numpy as np
import pytest
import torch
from sampler_cases import flow_table

from pcpo_fast.ops import PolicyLoss
from pcpo_fast.summary import QUANTILES, UpdateLog

STEPS = 5
# the last step draws no noise; step 1 is left out, and step 3 has a single row
MICRO_BATCHES = [[0, 2, 0], [2, 2, 0, 2, 0], [3], [2, 0, 0, 2]]


class Rows:
    """Random rows in micro-batches, noted in an UpdateLog: two before the first optimizer step, three steps in all."""

    def __init__(self, *, scale=1.0, dtype=torch.float32, log_ratios=None, norms=(0.5, math.inf, 1.5)):
        self.log, generator = UpdateLog(flow_table("flow", STEPS)), torch.Generator().manual_seed(0)
        self.losses, self.rows, norms = [], [], iter(norms)
        for index, steps in enumerate(MICRO_BATCHES):
            count = len(steps)
            # the gradients of the rows' own losses, which the loss of a micro-batch is the mean of
            own = torch.randn(count, 2, 3, generator=generator)
            output = torch.zeros(count, 2, 3, dtype=dtype)
            output.grad = (own * (scale / count)).to(dtype)
            ratio = 0.3 * torch.randn(count, generator=generator)
            # policies do not differ before the first optimizer step
            ratio = ratio * (index >= 2)
            if log_ratios is not None and index == 3:
                ratio[: len(log_ratios)] = torch.tensor(log_ratios)
            clipped = torch.rand(count, generator=generator) < 0.4
            loss = torch.randn((), generator=generator)
            result = PolicyLoss(loss, ratio, clipped, None, torch.zeros(count))
            self.log.rows(torch.tensor(steps), result, output, torch.tensor(scale))
            if index:
                self.log.step(torch.tensor(next(norms)))
            self.losses.append(loss.item())
            self.rows += zip(steps, ratio.tolist(), clipped.tolist(), own.flatten(1).tolist(), strict=True)

    def per_step(self, value, reduce):
        """`reduce` of the values of each step's rows, None for a step without rows."""
        found = [[value(*row) for row in self.rows if row[0] == step] for step in range(STEPS)]
        return [reduce(values) if values else None for values in found]


def mean(values):
    return sum(values) / len(values)


def variance(values):
    return mean([(value - mean(values)) ** 2 for value in values])


def norm(step, ratio, clipped, own):
    return math.sqrt(sum(element**2 for element in own))


def close(values, rel=1e-6):
    return [None if value is None else pytest.approx(value, rel=rel, abs=1e-12) for value in values]


# float16's own rounding of the gradients, 2^-11 of each, may add up in a norm and twice in its square
@pytest.mark.parametrize(
    ("scale", "dtype", "rel"), [(1.0, torch.float32, 1e-6), (512.0, torch.float32, 1e-6), (64.0, torch.float16, 2e-3)]
)
def test_every_number(scale, dtype, rel):
    rows = Rows(scale=scale, dtype=dtype)
    record = rows.log.summary()
    ratios = [ratio for _, ratio, *_ in rows.rows]
    assert record["update/loss"] == pytest.approx(mean(rows.losses), rel=1e-6)
    assert record["update/clip_fraction"] == pytest.approx(mean([clipped for _, _, clipped, _ in rows.rows]))
    fractions = rows.per_step(lambda step, ratio, clipped, own: clipped, mean)
    assert fractions[1] is fractions[4] is None and len({*fractions}) > 2
    assert record["update/clip_fraction_per_step"] == close(fractions)
    assert record["update/abs_log_ratio"] == pytest.approx(mean([abs(ratio) for ratio in ratios]), rel=1e-6)
    quantiles = np.quantile(np.array(ratios), QUANTILES)
    assert record["update/log_ratio_quantiles"] == pytest.approx(quantiles.tolist(), rel=1e-5, abs=1e-7)
    missed = sum(abs(math.expm1(ratio) - ratio) for ratio in ratios)
    assert record["update/taylor_error"] == pytest.approx(missed / sum(abs(math.expm1(r)) for r in ratios), rel=1e-9)
    assert record["update/first_abs_log_ratio"] == 0
    assert record["update/first_abs_log_ratio_per_step"] == [0, None, 0, None, None]
    norms = rows.per_step(norm, mean)
    assert record["update/output_grad_norm_per_step"] == close(norms, rel)
    spreads = rows.per_step(norm, variance)
    # a single row has no spread
    assert spreads[3] == 0 < spreads[0]
    assert record["update/output_grad_norm_variance_per_step"] == close(spreads, 20 * rel)
    # a step that was skipped is counted, and is not in the mean
    assert (record["update/skipped_steps"], record["update/grad_norm"]) == (1, 1.0)


def test_a_first_ratio_that_is_not_1_is_of_the_first_optimizer_step(capfd):
    rows = Rows()
    first = [row for row in rows.rows[:8] if row[0] == 2]
    # the second micro-batch of the two before the first optimizer step
    rows.log.seen[1][1][3] = -0.25
    record = rows.log.summary()
    assert len(first) == 4 and record["update/first_abs_log_ratio"] == 0.25
    assert record["update/first_abs_log_ratio_per_step"] == [0, None, 0.25, None, None]
    timestep = rows.log.table.timesteps[2].item()
    assert f"per timestep: {timestep:.0f}: 2.5e-01" in "".join(capfd.readouterr())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 800.0])
def test_rows_whose_ratio_is_not_finite(bad):
    """exp(800) is none either. The other rows tell how well log rho stands for rho - 1."""
    rows = Rows(log_ratios=[bad])
    record = rows.log.summary()
    ratios = [ratio for _, ratio, *_ in rows.rows]
    rest = [ratio for ratio in ratios if ratio != bad and ratio == ratio]
    assert len(rest) == len(ratios) - 1
    missed = sum(abs(math.expm1(ratio) - ratio) for ratio in rest)
    assert record["update/taylor_error"] == pytest.approx(missed / sum(abs(math.expm1(r)) for r in rest), rel=1e-9)
    with np.errstate(invalid="ignore"):
        quantiles = np.nanquantile(np.array(ratios, dtype=np.float32), QUANTILES).tolist()
    assert record["update/log_ratio_quantiles"] == pytest.approx(quantiles, rel=1e-5, abs=1e-6, nan_ok=True)
    assert record["update/clip_fraction"] == Rows().log.summary()["update/clip_fraction"]
    assert record["update/output_grad_norm_per_step"] == Rows().log.summary()["update/output_grad_norm_per_step"]


def test_without_a_finite_gradient_or_a_change_there_is_no_number():
    rows = Rows(norms=[math.nan] * 3)
    for _, ratio, *_ in rows.log.seen:
        ratio.zero_()
    record = rows.log.summary()
    assert (record["update/skipped_steps"], record["update/grad_norm"]) == (3, None)
    assert math.isnan(record["update/taylor_error"]) and record["update/abs_log_ratio"] == 0


def test_a_clipped_row_has_no_gradient_and_counts():
    rows = Rows()
    output = torch.zeros(2, 3)
    output.grad = torch.tensor([[0.0, 0.0, 0.0], [0.0, 2.0, 0.0]]) / 2
    log = UpdateLog(rows.log.table)
    result = PolicyLoss(torch.zeros(()), torch.zeros(2), torch.tensor([True, False]), None, torch.zeros(2))
    log.rows(torch.tensor([2, 2]), result, output, torch.tensor(1.0))
    log.step(torch.tensor(1.0))
    record = log.summary()
    assert record["update/output_grad_norm_per_step"] == [None, None, 1.0, None, None]
    assert record["update/output_grad_norm_variance_per_step"] == [None, None, 1.0, None, None]
