"""Sampler step with guidance and log-probability: the usual formula against `sampler_step`."""

import dataclasses
import functools
import math

import pytest
import torch

from bench.cases import (
    COMPETITORS,
    GUIDANCE,
    Inputs,
    Op,
    Outputs,
    assert_close,
    cases,
    check_guided_output,
    coefficients,
    gaussian_log_prob,
    guidance_slack,
    guided,
)
from bench.measure import RECORDED
from pcpo_fast import Guidance, sample_noise, sampler_step


def formula(cond_output, uncond_output, sample, usual_step, schedule, step, noise):
    """Guidance, the step and its log-probability, as trainers write them."""
    model_output = guided(cond_output, uncond_output)
    mean, std = usual_step(model_output, sample, schedule, step)
    prev_sample = mean + std * noise
    log_prob = gaussian_log_prob(prev_sample, mean, std)
    return {"prev_sample": prev_sample, "guided": model_output, "log_prob": log_prob}


def drawing_formula(cond_output, uncond_output, sample, usual_step, schedule, step):
    return formula(cond_output, uncond_output, sample, usual_step, schedule, step, torch.randn_like(sample))


@torch.no_grad()
def usual_given(i: Inputs, formula) -> Outputs:
    return formula(i.cond_output, i.uncond_output, i.sample, i.usual_step, i.schedule, i.step, i.noise)


@torch.no_grad()
def usual_drawn(i: Inputs, formula) -> Outputs:
    return formula(i.cond_output, i.uncond_output, i.sample, i.usual_step, i.schedule, i.step)


def our_step(i: Inputs, impl: str, *, drawn: bool, return_noise: bool = False) -> Outputs:
    out = sampler_step(
        i.cond_output,
        i.sample,
        i.table,
        i.step,
        i.key if drawn else i.noise,
        guidance=Guidance(i.uncond_output, GUIDANCE),
        return_noise=return_noise,
        impl=impl,
    )
    outputs = {"prev_sample": out.prev_sample, "guided": out.model_output, "log_prob": out.log_prob}
    return {**outputs, "noise": out.noise} if return_noise else outputs


def check_step(i: Inputs, outputs: Outputs, competitor: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Checks all but where the noise comes from; returns that of the stored x' in float64 and its tolerance."""
    model_output = outputs["guided"]
    check_guided_output(i, model_output)
    a, b, s = coefficients(i.table, i.step, i.sample)
    assert outputs["prev_sample"].dtype == i.sample.dtype
    noise = (outputs["prev_sample"].double() - a * i.sample - b * model_output.double()) / s
    # torch.compile goes on with what it has not yet rounded
    slack = (b / s).abs() * guidance_slack(i) if competitor == "compile" else torch.zeros_like(noise)
    log_prob = -noise.square().flatten(1).mean(1) / 2 - math.log(2 * math.pi) / 2 - s.flatten().log()
    log_prob_slack = 1e-4 + (slack * noise.abs()).flatten(1).mean(1)
    assert_close("log_prob", outputs["log_prob"], log_prob, scale=log_prob_slack, tolerance=1.0)
    # x' is rounded to float32, which is up to 1e-5 of its noise at these steps
    slack = slack + 1e-4 * (1 + noise.abs())
    if "noise" in outputs:
        assert_close("noise", outputs["noise"], noise, scale=slack, tolerance=1.0)
    return noise, slack


def check_given(i: Inputs, outputs: Outputs, competitor: str) -> None:
    noise, slack = check_step(i, outputs, competitor)
    assert_close("noise of prev_sample", noise, i.noise.double(), scale=slack, tolerance=1.0)


def check_drawn(i: Inputs, outputs: Outputs, competitor: str) -> None:
    noise, slack = check_step(i, outputs, competitor)
    if competitor.startswith("ours"):
        drawn = sample_noise(tuple(noise.shape), i.table, i.step, i.key, impl="torch").double()
        assert_close("noise of prev_sample", noise, drawn, scale=slack, tolerance=1.0)
    # six standard errors of the mean and of the variance
    assert noise.mean().abs() < 6 / noise.numel() ** 0.5
    assert (noise.var() - 1).abs() < 6 * (2 / noise.numel()) ** 0.5


GIVEN = Op(
    name="sampler step, noise given",
    reads=("cond_output", "uncond_output", "sample", "noise"),
    writes={"prev_sample": "sample", "guided": "cond_output"},
    formula=formula,
    usual=usual_given,
    ours=functools.partial(our_step, drawn=False),
    check=check_given,
)
DRAWN = dataclasses.replace(
    GIVEN,
    name="sampler step, noise drawn",
    reads=("cond_output", "uncond_output", "sample"),
    formula=drawing_formula,
    usual=usual_drawn,
    ours=functools.partial(our_step, drawn=True),
    check=check_drawn,
)
# the usual code keeps states and returns no noise, so it writes less than this
RETURNED = dataclasses.replace(
    DRAWN,
    name="sampler step, noise drawn and returned",
    writes={**DRAWN.writes, "noise": "noise"},
    ours=functools.partial(our_step, drawn=True, return_noise=True),
)


@pytest.mark.benchmark(timer=RECORDED.read)
@pytest.mark.parametrize("competitor", COMPETITORS)
@pytest.mark.parametrize("case", cases(GIVEN, DRAWN, variants=(RETURNED,)))
def test_sampler_step(case, competitor, suite, benchmark):
    suite.run(case, competitor, benchmark)
