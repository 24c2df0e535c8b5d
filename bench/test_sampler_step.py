"""Sampler step with guidance and log-probability: the usual eager formula against `sampler_step`."""

import pytest
import torch

from pcpo_fast import sampler_step

GUIDANCE = 5.0


@pytest.mark.benchmark(group="sampler step with guidance and log-prob, 8 x 4x64x64 float32")
@pytest.mark.parametrize("which", ["usual", "pcpo_fast"])
def test_sampler_step(which, benchmark, table, latents, usual_log_prob):
    x, cond, uncond, z = latents
    step = torch.arange(0, 16, 2)
    a, b, std = (column.view(-1, 1, 1, 1) for column in table.rows[step].unbind(1)[:3])

    @torch.no_grad()
    def usual():
        model_output = uncond + GUIDANCE * (cond - uncond)
        prev_x = a * x + b * model_output + std * z
        return prev_x, usual_log_prob(model_output, x, prev_x, step)

    def ours():
        out = sampler_step(cond, x, table, step, uncond_output=uncond, guidance_scale=GUIDANCE, noise=z)
        return out.prev_sample, out.log_prob

    for mine, theirs in zip(ours(), usual(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    benchmark(usual if which == "usual" else ours)
