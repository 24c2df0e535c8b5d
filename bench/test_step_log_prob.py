"""Log-probability of a stored step, and its change, with gradient: the usual formula with autograd against
`step_log_prob` and `step_log_ratio`."""

import dataclasses

import pytest
import torch

from bench.cases import COMPETITORS, Inputs, Op, Outputs, assert_close, cases, row_rms, usual_log_prob
from bench.measure import RECORDED
from pcpo_fast import step_log_prob, step_log_ratio
from pcpo_fast.reference.policy_loss import policy_loss_oracle
from pcpo_fast.reference.step_log_prob import step_log_prob_oracle


def with_gradient(log_prob: torch.Tensor, i: Inputs) -> Outputs:
    (gradient,) = torch.autograd.grad(log_prob, i.model_output, i.advantages)
    return {"log_prob": log_prob, "gradient": gradient}


def usual(i: Inputs, formula) -> Outputs:
    return with_gradient(formula(i.model_output, i.sample, i.prev_sample, i.usual_step, i.schedule, i.step), i)


def ours(i: Inputs, impl: str) -> Outputs:
    return with_gradient(step_log_prob(i.model_output, i.sample, i.prev_sample, i.table, i.step, impl=impl), i)


def usual_ratio(i: Inputs, formula) -> Outputs:
    log_prob = formula(i.model_output, i.sample, i.prev_sample, i.usual_step, i.schedule, i.step)
    return with_gradient(log_prob - i.old_log_prob, i)


def our_ratio(i: Inputs, impl: str) -> Outputs:
    return with_gradient(step_log_ratio(i.model_output, i.old_model_output, i.noise, i.table, i.step, impl=impl), i)


def check(i: Inputs, outputs: Outputs, competitor: str) -> None:
    m = i.model_output.detach().double().requires_grad_()
    log_prob = step_log_prob_oracle(m, i.sample, i.prev_sample, i.table.rows, i.step)
    (gradient,) = torch.autograd.grad(log_prob, m, i.advantages.double())
    assert_close("log_prob", outputs["log_prob"], log_prob.detach(), scale=1.0, tolerance=1e-4)
    assert_close("gradient", outputs["gradient"], gradient, scale=row_rms(gradient), tolerance=1e-4)


def check_ratio(i: Inputs, outputs: Outputs, competitor: str) -> None:
    m = i.model_output.detach().double().requires_grad_()
    arguments = (i.old_model_output, i.noise, i.table.rows, i.step, i.advantages, i.table.weight)
    log_ratio = policy_loss_oracle(m, *arguments)["log_ratio"]
    (gradient,) = torch.autograd.grad(log_ratio, m, i.advantages.double())
    # subtracting leaves the rounding of log-probabilities of order 1
    scale = 1e-3 * log_ratio.detach().abs() + 1e-8 if competitor.startswith("ours") else 1e-5
    assert_close("log_ratio", outputs["log_prob"], log_ratio.detach(), scale=scale, tolerance=1.0)
    assert_close("gradient", outputs["gradient"], gradient, scale=row_rms(gradient), tolerance=1e-4)


WITH_GRADIENT = Op(
    name="step log-prob with gradient",
    reads=("model_output", "sample", "prev_sample"),
    writes={"gradient": "model_output"},
    formula=usual_log_prob,
    usual=usual,
    ours=ours,
    check=check,
)
RATIO = dataclasses.replace(
    WITH_GRADIENT,
    name="step log-ratio with gradient",
    reads=("model_output", "old_model_output", "noise"),
    usual=usual_ratio,
    ours=our_ratio,
    check=check_ratio,
)


@pytest.mark.benchmark(timer=RECORDED.read)
@pytest.mark.parametrize("competitor", COMPETITORS)
@pytest.mark.parametrize("case", cases(WITH_GRADIENT, variants=(RATIO,)))
def test_step_log_prob(case, competitor, suite, benchmark):
    suite.run(case, competitor, benchmark)
