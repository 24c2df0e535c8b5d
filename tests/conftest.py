import dataclasses
import os

import pytest
import torch

# fixed when triton is first imported: without a GPU the kernels run in Triton's interpreter
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from pcpo_fast import StepTable

# the step of `table` that is deterministic
DETERMINISTIC = 19


@pytest.fixture(params=["torch", "triton"])
def impl(request):
    return request.param


@pytest.fixture
def device(impl):
    return "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"


@pytest.fixture
def table(device):
    """20 DDIM steps of Stable Diffusion 1.x with v-prediction, so that no two steps have a weight in common. The loss's
    weights are not the sampler's own, the intervals are uneven, and the last step is deterministic."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    settings = {"prediction_type": "v_prediction", "credit": "constant", "window": (0, DETERMINISTIC)}
    sampler = StepTable.ddim((1 - betas).cumprod(0), torch.arange(951, 0, -50), **settings)
    return dataclasses.replace(sampler, interval=torch.linspace(0.02, 0.08, 20)).to(device)


@pytest.fixture
def native_table(table):
    """The same steps with the sampler's own weights."""
    return dataclasses.replace(table, credit="native", target_weight=None)


@pytest.fixture
def unnormalized_table(table):
    """The same steps with -(x' - a x - b m)^2 for a log-probability."""
    return dataclasses.replace(table, normalized=False)


@pytest.fixture
def poisoned():
    """Fresh memory is filled with NaN, so that what an op leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
