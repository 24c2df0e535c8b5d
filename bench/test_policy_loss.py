"""Clipped policy loss of one sampler step per row: the usual formula with autograd against `policy_loss`."""

import dataclasses
import functools
from typing import Any

import pytest
import torch

from bench.cases import (
    CLIP_RANGE,
    COMPETITORS,
    GUIDANCE,
    Inputs,
    Op,
    Outputs,
    assert_close,
    cases,
    check_guided_output,
    ddim_step,
    guided,
    lean_ddim_step,
    row_rms,
    usual_log_prob,
)
from bench.measure import RECORDED
from pcpo_fast import Guidance, StoredStates, policy_loss
from pcpo_fast.reference.policy_loss import policy_loss_oracle

# the usual steps that can be had for less
LEAN = {ddim_step: lean_ddim_step}


def formula(model_output, sample, prev_sample, usual_step, schedule, step, old_log_prob, advantages):
    """Proximal policy optimisation as DDPO's and GRPO's trainers write it, on stored states."""
    log_prob = usual_log_prob(model_output, sample, prev_sample, usual_step, schedule, step)
    ratio = torch.exp(log_prob - old_log_prob)
    unclipped = -advantages * ratio
    clipped = -advantages * torch.clamp(ratio, 1 - CLIP_RANGE, 1 + CLIP_RANGE)
    return torch.mean(torch.maximum(unclipped, clipped))


def guided_formula(cond_output, uncond_output, *arguments):
    model_output = guided(cond_output, uncond_output)
    return formula(model_output, *arguments), model_output


def stored(i: Inputs) -> tuple[Any, ...]:
    """What the usual formula needs beside the model's output."""
    return i.sample, i.prev_sample, i.usual_step, i.schedule, i.step, i.old_log_prob, i.advantages


def usual_loss(i: Inputs, formula) -> Outputs:
    return {"loss": formula(i.model_output, *stored(i))}


def usual_gradient(i: Inputs, formula) -> Outputs:
    loss = formula(i.model_output, *stored(i))
    return {"loss": loss, "gradient": torch.autograd.grad(loss, i.model_output)[0]}


def lean_gradient(i: Inputs, formula) -> Outputs:
    return usual_gradient(dataclasses.replace(i, usual_step=LEAN.get(i.usual_step, i.usual_step)), formula)


def usual_guided_gradients(i: Inputs, formula) -> Outputs:
    loss, model_output = formula(i.cond_output, i.uncond_output, *stored(i))
    cond, uncond = torch.autograd.grad(loss, (i.cond_output, i.uncond_output))
    return {"loss": loss, "guided": model_output.detach(), "cond_gradient": cond, "uncond_gradient": uncond}


def our_loss(i: Inputs, impl: str, model_output="model_output", source="noise", **settings) -> Outputs:
    noise = {
        "noise": i.noise,
        "key": i.key,
        "states": StoredStates(i.sample, i.prev_sample),
        "states and key": StoredStates(i.sample, i.prev_sample, i.key),
    }[source]
    out = policy_loss(
        getattr(i, model_output),
        None if source == "states and key" else i.old_model_output,
        noise,
        i.table,
        i.step,
        i.advantages,
        objective="ppo",
        clip_range=CLIP_RANGE,
        impl=impl,
        **settings,
    )
    return {"loss": out.loss, "log_ratio": out.log_ratio}


def our_gradient(i: Inputs, impl: str, source: str = "noise") -> Outputs:
    outputs = our_loss(i, impl, source=source)
    return {**outputs, "gradient": torch.autograd.grad(outputs["loss"], i.model_output)[0]}


def our_guided_gradients(i: Inputs, impl: str) -> Outputs:
    outputs = our_loss(i, impl, "cond_output", guidance=Guidance(i.uncond_output, GUIDANCE))
    cond, uncond = torch.autograd.grad(outputs["loss"], (i.cond_output, i.uncond_output))
    return {**outputs, "cond_gradient": cond, "uncond_gradient": uncond}


def check(i: Inputs, outputs: Outputs, competitor: str) -> None:
    check_at(i.model_output, i, outputs)


def check_without_old(i: Inputs, outputs: Outputs, competitor: str) -> None:
    # the rounding of the stored x' stands in the place of the old output's
    check_at(i.model_output, i, outputs, slack=1e-7)


def check_guided(i: Inputs, outputs: Outputs, competitor: str) -> None:
    # the usual code rounds twice; ours rounds once
    rounded_once = guided(i.cond_output.detach().float(), i.uncond_output.detach().float()).to(i.cond_output.dtype)
    model_output = outputs.get("guided", rounded_once)
    check_guided_output(i, model_output)
    # torch.compile goes on with what it has not yet rounded, and float32 rounds a few elements of ours to a neighbour
    unit = torch.finfo(i.cond_output.dtype).eps
    gradient = check_at(model_output, i, outputs, unit if competitor == "compile" else 1e-3 * unit)
    for name, factor in (("cond_gradient", GUIDANCE), ("uncond_gradient", 1 - GUIDANCE)):
        # the gradient that the guided output gets is rounded, and so is its product
        expected = factor * gradient
        assert_close(name, outputs[name], expected, scale=row_rms(expected), tolerance=1e-4 + 4 * unit)


def check_at(model_output: torch.Tensor, i: Inputs, outputs: Outputs, slack: float = 0.0) -> torch.Tensor:
    """Checks against float64 and returns its gradient with respect to the model's output. `slack`: of a log-ratio."""
    new = model_output.detach().double().requires_grad_()
    arguments = (i.old_model_output, i.noise, i.table.rows, i.step, i.advantages, i.table.weight)
    rows = policy_loss_oracle(new, *arguments, objective="ppo", clip_range=(CLIP_RANGE, CLIP_RANGE))
    loss, log_ratio, clipped = rows["loss"].mean(), rows["log_ratio"], rows["clipped"]
    (gradient,) = torch.autograd.grad(loss, new)
    assert 0 < clipped.sum() < len(clipped)
    # exp of a difference of float32 log-probabilities of order 1 is right to about 1e-6
    assert_close("loss", outputs["loss"], loss.detach(), scale=i.advantages.abs().mean(), tolerance=1e-5 + slack)
    if "log_ratio" in outputs:
        tolerance = 1e-3 * log_ratio.detach().abs() + 1e-8 + slack
        assert_close("log_ratio", outputs["log_ratio"], log_ratio.detach(), scale=tolerance, tolerance=1.0)
    if "gradient" in outputs:
        # z is recovered from x' to about eps |x'| / s, and s is above 0.05 at these steps
        assert_close("gradient", outputs["gradient"], gradient, scale=row_rms(gradient), tolerance=1e-4)
    return gradient


FORWARD = Op(
    name="policy loss",
    reads=("model_output", "old_model_output", "noise"),
    writes={},
    formula=formula,
    usual=torch.no_grad()(usual_loss),
    ours=torch.no_grad()(our_loss),
    check=check,
)
GRADIENT = dataclasses.replace(
    FORWARD,
    name="policy loss with gradient",
    writes={"gradient": "model_output"},
    usual=usual_gradient,
    ours=our_gradient,
)
LEAN_GRADIENT = dataclasses.replace(
    GRADIENT, name="policy loss with gradient, usual formula with roots per row", usual=lean_gradient
)
STATES = dataclasses.replace(
    GRADIENT,
    name="policy loss with gradient, z from stored states",
    reads=("model_output", "old_model_output", "sample", "prev_sample"),
    ours=functools.partial(our_gradient, source="states"),
)
KEY = dataclasses.replace(
    GRADIENT,
    name="policy loss with gradient, z drawn again",
    reads=("model_output", "old_model_output"),
    ours=functools.partial(our_gradient, source="key"),
)
# for trainers that keep states: the old output is made from them
WITHOUT_OLD = dataclasses.replace(
    GRADIENT,
    name="policy loss with gradient, without the old output",
    reads=("model_output", "sample", "prev_sample"),
    ours=functools.partial(our_gradient, source="states and key"),
    check=check_without_old,
)
GUIDED = dataclasses.replace(
    GRADIENT,
    name="policy loss with two gradients through guidance",
    reads=("cond_output", "uncond_output", "old_model_output", "noise"),
    writes={"cond_gradient": "cond_output", "uncond_gradient": "uncond_output"},
    formula=guided_formula,
    usual=usual_guided_gradients,
    ours=our_guided_gradients,
    check=check_guided,
)


@pytest.mark.benchmark(timer=RECORDED.read)
@pytest.mark.parametrize("competitor", COMPETITORS)
@pytest.mark.parametrize("case", cases(GRADIENT, FORWARD, variants=(LEAN_GRADIENT, STATES, KEY, WITHOUT_OLD, GUIDED)))
def test_policy_loss(case, competitor, suite, benchmark):
    suite.run(case, competitor, benchmark)
