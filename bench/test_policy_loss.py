"""Clipped policy loss of one sampler step per row: the usual formula with autograd against `policy_loss`."""

import dataclasses

import pytest
import torch
from cases import CLIP_RANGE, COMPETITORS, Inputs, Op, Outputs, assert_close, cases, row_rms, usual_log_prob
from measure import RECORDED

from pcpo_fast import policy_loss
from pcpo_fast.reference.policy_loss import policy_loss_oracle


def formula(model_output, sample, prev_sample, table, step, old_log_prob, advantages):
    """Proximal policy optimisation as DDPO's and GRPO's trainers write it, on stored states."""
    ratio = torch.exp(usual_log_prob(model_output, sample, prev_sample, table, step) - old_log_prob)
    unclipped = -advantages * ratio
    clipped = -advantages * torch.clamp(ratio, 1 - CLIP_RANGE, 1 + CLIP_RANGE)
    return torch.mean(torch.maximum(unclipped, clipped))


def usual_loss(i: Inputs, formula) -> Outputs:
    arguments = (i.sample, i.prev_sample, i.table.rows, i.step, i.old_log_prob, i.advantages)
    return {"loss": formula(i.model_output, *arguments)}


def our_loss(i: Inputs, impl: str, **settings) -> Outputs:
    out = policy_loss(
        i.model_output,
        i.old_model_output,
        i.noise,
        i.table,
        i.step,
        i.advantages,
        objective="ppo",
        clip_range=CLIP_RANGE,
        impl=impl,
        **settings,
    )
    return {"loss": out.loss, "log_ratio": out.log_ratio}


def with_gradient(run):
    def run_with_gradient(i: Inputs, how) -> Outputs:
        outputs = run(i, how)
        (gradient,) = torch.autograd.grad(outputs["loss"], i.model_output)
        return {**outputs, "gradient": gradient}

    return run_with_gradient


def check(i: Inputs, outputs: Outputs) -> None:
    new = i.model_output.detach().double().requires_grad_()
    arguments = (i.old_model_output, i.noise, i.table.rows, i.step, i.advantages)
    loss, log_ratio, clipped = policy_loss_oracle(new, *arguments, objective="ppo", clip_range=CLIP_RANGE)
    (gradient,) = torch.autograd.grad(loss, new)
    assert 0 < clipped.sum() < len(clipped) or len(clipped) == 1
    # exp of a difference of float32 log-probabilities of order 1 is right to about 1e-6
    assert_close("loss", outputs["loss"], loss.detach(), scale=i.advantages.abs().mean(), tolerance=1e-5)
    if "log_ratio" in outputs:
        assert_close("log_ratio", outputs["log_ratio"], log_ratio, scale=log_ratio.abs() + 1e-5, tolerance=1e-3)
    if "gradient" in outputs:
        # z is recovered from x' to about eps |x'| / s, and s is above 0.05 at these steps
        assert_close("gradient", outputs["gradient"], gradient, scale=row_rms(gradient), tolerance=1e-4)


FORWARD = Op(
    name="policy loss",
    reads=("model_output", "old_model_output", "noise"),
    writes={},
    formula=formula,
    usual=torch.no_grad()(usual_loss),
    ours=torch.no_grad()(our_loss),
    check=check,
)
WITH_GRADIENT = dataclasses.replace(
    FORWARD,
    name="policy loss with gradient",
    writes={"gradient": "model_output"},
    usual=with_gradient(usual_loss),
    ours=with_gradient(our_loss),
)


@pytest.mark.benchmark(timer=RECORDED.read)
@pytest.mark.parametrize("competitor", COMPETITORS)
@pytest.mark.parametrize("case", cases(WITH_GRADIENT, FORWARD))
def test_policy_loss(case, competitor, suite, benchmark):
    suite.run(case, competitor, benchmark)
