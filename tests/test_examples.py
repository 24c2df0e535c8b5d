"""The examples run, and do what their pages say."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_ops_in_a_loop_of_ones_own_raise_the_reward():
    first, *_, last = load("own_loop").main(epochs=3)
    assert last > first


def test_a_sampler_of_ones_own():
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    settings = SimpleNamespace(num_inference_steps=10)
    table = load("new_sampler").ddpm_large_variance(settings, SimpleNamespace(scheduler=scheduler))
    ddim = type(table).from_scheduler(scheduler, 10, eta=1.0)
    # the mean of DDIM at eta = 1, and more noise
    torch.testing.assert_close(table.sample_coef[:-1], ddim.sample_coef[:-1])
    torch.testing.assert_close(table.output_coef[:-1], ddim.output_coef[:-1])
    assert (table.std[:-1] > ddim.std[:-1]).all()
    assert table.std[-1] == 0


def test_a_python_function_as_a_reward(tmp_path):
    (reward,) = load("python_reward").main(tmp_path / "run", epochs=1)
    assert 0 < reward < 1


def test_flow_grpos_loss_replaced():
    apart = load("flow_grpo_loss").main()
    assert apart["loss"] < 1e-6
    assert apart["gradient"] < 1e-5
    assert apart["our first log-ratio, latents cast"] == 0 < apart["their first log-ratio, latents cast"]


@pytest.mark.parametrize("page", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_every_example_is_tested_and_listed(page):
    name = page.removesuffix(".py")
    assert f'"{name}"' in Path(__file__).read_text(encoding="utf-8")
    assert page in (EXAMPLES.parent / "docs" / "README.md").read_text(encoding="utf-8")
