"""Sampler step with guidance and log-probability: the usual formula against `sampler_step`."""

import dataclasses

import pytest
import torch
from cases import COMPETITORS, GUIDANCE, Inputs, Op, Outputs, assert_close, cases, per_row, usual_log_prob
from measure import RECORDED

from pcpo_fast import sampler_step
from pcpo_fast.ops import sample_noise


def formula(model_output, uncond_output, sample, table, step, noise):
    """Guidance in the model's dtype, the step and its log-probability, as trainers write them."""
    guided = uncond_output + GUIDANCE * (model_output - uncond_output)
    a, b, std = per_row(table, step, sample)
    prev_sample = a * sample + b * guided + std * noise
    return prev_sample, guided, usual_log_prob(guided, sample, prev_sample, table, step)


def formula_with_draw(model_output, uncond_output, sample, table, step):
    return formula(model_output, uncond_output, sample, table, step, torch.randn_like(sample))


@torch.no_grad()
def usual_given(i: Inputs, formula) -> Outputs:
    prev_sample, guided, log_prob = formula(i.model_output, i.uncond_output, i.sample, i.table.rows, i.step, i.noise)
    return {"prev_sample": prev_sample, "guided": guided, "log_prob": log_prob}


@torch.no_grad()
def usual_drawn(i: Inputs, formula) -> Outputs:
    prev_sample, guided, log_prob = formula(i.model_output, i.uncond_output, i.sample, i.table.rows, i.step)
    return {"prev_sample": prev_sample, "guided": guided, "log_prob": log_prob}


def our_step(i: Inputs, impl: str, **settings) -> Outputs:
    out = sampler_step(
        i.model_output,
        i.sample,
        i.table,
        i.step,
        uncond_output=i.uncond_output,
        guidance_scale=GUIDANCE,
        impl=impl,
        **settings,
    )
    return {"prev_sample": out.prev_sample, "guided": out.model_output, "noise": out.noise, "log_prob": out.log_prob}


def our_given(i: Inputs, impl: str) -> Outputs:
    return our_step(i, impl, noise=i.noise)


def our_drawn(i: Inputs, impl: str) -> Outputs:
    return our_step(i, impl, seed=i.seed, sample_index=i.sample_index)


def check_step(i: Inputs, outputs: Outputs) -> torch.Tensor:
    """Checks all but the noise's origin; returns the noise of the stored x', in float64."""
    cond, uncond = i.model_output.detach().double(), i.uncond_output.double()
    # the usual code rounds the difference, its product and the sum, ours the result alone
    unit = torch.finfo(i.model_output.dtype).eps
    size = uncond.abs() + GUIDANCE * (cond - uncond).abs()
    guided = outputs["guided"]
    assert_close("guided", guided, uncond + GUIDANCE * (cond - uncond), scale=size, tolerance=2 * unit)

    a, b, s = (column.double() for column in per_row(i.table.rows, i.step, i.sample))
    prev_sample = outputs["prev_sample"].double()
    noise = (prev_sample - a * i.sample - b * guided.double()) / s
    log_prob = torch.distributions.Normal(0.0, 1.0).log_prob(noise).flatten(1).mean(1) - s.flatten().log()
    assert_close("log_prob", outputs["log_prob"], log_prob, scale=1.0, tolerance=1e-4)
    if "noise" in outputs:
        assert_close("noise", outputs["noise"], noise, scale=1.0, tolerance=1e-4)
    return noise


def check_given(i: Inputs, outputs: Outputs) -> None:
    noise = check_step(i, outputs)
    # x' is rounded to float32, which is up to 1e-5 of its noise at these steps
    assert_close("noise of prev_sample", noise, i.noise.double(), scale=1 + noise.abs(), tolerance=1e-4)


def check_drawn(i: Inputs, outputs: Outputs) -> None:
    noise = check_step(i, outputs)
    if "noise" in outputs:
        drawn = sample_noise(
            tuple(noise.shape), i.table, i.step, seed=i.seed, sample_index=i.sample_index, impl="torch"
        ).double()
        assert_close("noise of prev_sample", noise, drawn, scale=1 + noise.abs(), tolerance=1e-4)
    # six standard errors of the mean and of the variance
    assert noise.mean().abs() < 6 / noise.numel() ** 0.5
    assert (noise.var() - 1).abs() < 6 * (2 / noise.numel()) ** 0.5


GIVEN = Op(
    name="sampler step, noise given",
    reads=("model_output", "uncond_output", "sample", "noise"),
    writes={"prev_sample": "sample", "guided": "model_output", "noise": "noise"},
    formula=formula,
    usual=usual_given,
    ours=our_given,
    check=check_given,
)
DRAWN = dataclasses.replace(
    GIVEN,
    name="sampler step, noise drawn",
    reads=("model_output", "uncond_output", "sample"),
    formula=formula_with_draw,
    usual=usual_drawn,
    ours=our_drawn,
    check=check_drawn,
)


@pytest.mark.benchmark(timer=RECORDED.read)
@pytest.mark.parametrize("competitor", COMPETITORS)
@pytest.mark.parametrize("case", cases(GIVEN, DRAWN))
def test_sampler_step(case, competitor, suite, benchmark):
    suite.run(case, competitor, benchmark)
