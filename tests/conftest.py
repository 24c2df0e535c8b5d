import os
from types import SimpleNamespace

import pytest
import torch

# fixed when triton is first imported: without a GPU the kernels run in Triton's interpreter
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from pcpo_fast.tables import ddim_table

# the row of `table` that is made deterministic
DETERMINISTIC = 19


@pytest.fixture(params=["torch", "triton"])
def impl(request):
    return request.param


@pytest.fixture
def device(impl):
    return "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"


@pytest.fixture
def table(device):
    """20 DDIM steps of Stable Diffusion 1.x, the loss's weight not the sampler's own, the last step deterministic."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    rows = ddim_table((1 - betas).cumprod(0), torch.arange(951, 0, -50), credit="uniform").rows.clone()
    rows[DETERMINISTIC, 2:5] = rows[DETERMINISTIC, 7] = 0
    return SimpleNamespace(rows=rows.to(device))


@pytest.fixture
def unnormalized_table(table):
    """The same, with -(x' - a x - b m)^2 for a log-probability."""
    rows = table.rows.clone()
    rows[:, 6], rows[:, 7] = 2 * rows[:, 2] ** 2, 0
    return SimpleNamespace(rows=rows)


@pytest.fixture
def poisoned():
    """Fresh memory is filled with NaN, so that what an op leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
