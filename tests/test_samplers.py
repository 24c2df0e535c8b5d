"""The sampler that the settings of a run ask for, and a sampler of one's own."""

import re
from pathlib import Path

import pytest
import torch

from pcpo_fast.samplers import StepTable
from sampler_cases import *


def test_the_documented_example_is_ddpm_s_sampler():
    """docs/samplers.md builds a table by hand: the mean of DDIM at eta = 1, the variance beta."""
    page = Path(__file__).parents[1] / "docs" / "samplers.md"
    (example,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    names: dict = {}
    exec(example, names)
    table, betas = names["table"], names["betas"]
    ddim = StepTable.ddim(torch.cumprod(1 - betas, 0), table.timesteps, final_alpha_cumprod=1.0)
    torch.testing.assert_close(table.sample_coef, ddim.sample_coef, rtol=1e-12, atol=0)
    torch.testing.assert_close(table.output_coef, ddim.output_coef, rtol=1e-9, atol=1e-12)
    assert bool((table.std[:-1] > ddim.std[:-1]).all()) and float(table.std[-1]) == 0
    assert bool(torch.isfinite(names["x"]).all()) and names["x"].shape == (2, 4, 8, 8)

    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(beta_schedule="linear", clip_sample=False, variance_type="fixed_large")
    scheduler.set_timesteps(50)
    assert torch.equal(scheduler.timesteps, table.timesteps)
    scheduler.alphas_cumprod = torch.cumprod(1 - betas, 0)
    scheduler.one = scheduler.one.double()
    x, m = torch.randn(2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for row, timestep in enumerate(scheduler.timesteps):
        z = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(row))
        own = torch.Generator().manual_seed(row)
        theirs = scheduler.step(m, timestep, x, generator=own, return_dict=False)[0]
        ours = table.sample_coef[row] * x + table.output_coef[row] * m + table.std[row] * z
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)
