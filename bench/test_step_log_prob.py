"""Log-probability of a stored step with its gradient: the usual formula with autograd against `step_log_prob`."""

import pytest
import torch
from cases import COMPETITORS, Inputs, Op, Outputs, assert_close, cases, row_rms, usual_log_prob
from measure import RECORDED

from pcpo_fast import step_log_prob
from pcpo_fast.reference.step_log_prob import step_log_prob_oracle


def with_gradient(log_prob: torch.Tensor, i: Inputs) -> Outputs:
    (gradient,) = torch.autograd.grad(log_prob, i.model_output, i.advantages)
    return {"log_prob": log_prob, "gradient": gradient}


def usual(i: Inputs, formula) -> Outputs:
    return with_gradient(formula(i.model_output, i.sample, i.prev_sample, i.table.rows, i.step), i)


def ours(i: Inputs, impl: str) -> Outputs:
    return with_gradient(step_log_prob(i.model_output, i.sample, i.prev_sample, i.table, i.step, impl=impl), i)


def check(i: Inputs, outputs: Outputs) -> None:
    m = i.model_output.detach().double().requires_grad_()
    log_prob = step_log_prob_oracle(m, i.sample, i.prev_sample, i.table.rows, i.step)
    (gradient,) = torch.autograd.grad(log_prob, m, i.advantages.double())
    assert_close("log_prob", outputs["log_prob"], log_prob.detach(), scale=1.0, tolerance=1e-4)
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


@pytest.mark.benchmark(timer=RECORDED.read)
@pytest.mark.parametrize("competitor", COMPETITORS)
@pytest.mark.parametrize("case", cases(WITH_GRADIENT))
def test_step_log_prob(case, competitor, suite, benchmark):
    suite.run(case, competitor, benchmark)
