import math

import pytest
import torch

from pcpo_fast import ddim_table

# one row per sample, as a Stable Diffusion 1.5 latent
SHAPE = (8, 4, 64, 64)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def table():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return ddim_table((1 - betas).cumprod(0), torch.arange(981, 0, -20))


@pytest.fixture
def latents():
    """Sample, old output, a slightly changed output, noise: (8, 4, 64, 64) float32 each."""
    generator = torch.Generator().manual_seed(0)
    x, m_old, change, z = (torch.randn(SHAPE, generator=generator) for _ in range(4))
    return x, m_old, m_old + 1e-3 * change, z


@pytest.fixture
def usual_log_prob(table):
    """The log-probability of a DDIM step as policy-gradient trainers write it."""

    def log_prob(model_output, sample, prev_sample, step):
        a, b, std = (column.view(-1, 1, 1, 1) for column in table.rows[step].unbind(1)[:3])
        mean = a * sample + b * model_output
        log_prob = -((prev_sample.detach() - mean) ** 2) / (2 * std**2)
        log_prob = log_prob - torch.log(std) - torch.log(torch.sqrt(2 * torch.as_tensor(math.pi)))
        return log_prob.mean(dim=(1, 2, 3))

    return log_prob
