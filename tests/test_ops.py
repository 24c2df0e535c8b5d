"""What the three ops share: registration, compilation, dispatch, and what they need to be installed."""

import subprocess
import sys

import pytest
import torch

from pcpo_fast import ops

ROWS, SHAPE = 3, (3, 2, 4, 5)


@pytest.fixture
def inputs(device):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(SHAPE, generator=generator).to(device) for _ in range(4)]
    return *tensors, torch.tensor([4, 19, 0], device=device), torch.tensor([1.0, -1.0, 0.5], device=device)


def test_opcheck(inputs, table, impl):
    m, other, x, z, step, advantages = inputs
    m_grad = m.clone().requires_grad_()
    seed, index = torch.tensor(3, device=m.device), torch.arange(ROWS, device=m.device)
    namespace = torch.ops.pcpo_fast
    calls = [
        (namespace.sampler_step, (m, x, table.rows, step, other, 5.0, z, None, None, True, impl)),
        (namespace.sampler_step, (m, x.half(), table.rows, step, None, 1.0, None, seed, index, False, impl)),
        (namespace.step_log_prob, (m_grad, x, other, table.rows, step, "mean", True, impl)),
        (namespace.step_log_prob, (m.half(), x.mT, other.mT, table.rows, step, "sum", False, impl)),
        (namespace.sample_noise, (seed, index, step, len(table.rows), 7, impl)),
    ]
    sources = [(z, None, None, None, None), (None, seed, index, None, None), (None, None, None, x, z)]
    for source in sources:
        calls.append((namespace.step_log_ratio, (m_grad, other, *source, table.rows, step, "mean", True, impl)))
        for objective in ("pcpo", "ppo", "guard"):
            for ref, uncond in ((None, None), (x, None), (x, z)):
                uncond = None if uncond is None else uncond.clone().requires_grad_()
                arguments = (table.rows, step, advantages, ref, objective, 0.5, "mean", 0.1, True, impl)
                calls.append((namespace.policy_loss, (m_grad, uncond, 3.0, other, *source, *arguments)))
    calls.append((namespace.gradient, (m, advantages[:, None], advantages, None, z, 3.0, None, impl)))
    for op, arguments in calls:
        torch.library.opcheck(op.default, arguments)


def test_compiles_as_one_graph(inputs, table, impl):
    m, other, x, z, step, advantages = inputs

    def everything(m):
        out = ops.sampler_step(m, x, table, step, uncond_output=other, guidance_scale=2.0, seed=5, impl=impl)
        log_prob = ops.step_log_prob(m, x, out.prev_sample, table, 3, impl=impl)
        ratios = []
        log_ratio = ops.step_log_ratio(m, other, None, table, 3, seed=5, impl=impl)
        loss = log_prob.sum() + log_ratio.sum()
        for objective in ("pcpo", "ppo", "guard"):
            policy = ops.policy_loss(
                m, out.model_output, out.noise, table, step, advantages, objective=objective, clip_range=0.5,
                ref_model_output=z, kl_weight=0.1, impl=impl,
            )  # fmt: skip
            loss = loss + policy.loss
            ratios += [policy.log_ratio, policy.clipped]
        return loss, *out, log_prob, log_ratio, *ratios

    results = []
    for function in (everything, torch.compile(everything, fullgraph=True)):
        m_grad = m.clone().requires_grad_()
        out = function(m_grad)
        out[0].backward()
        results.append((*out, m_grad.grad))
    eager, compiled = results
    # the ops give the same bits; what is between them, inductor may fuse
    *outputs, gradient = zip(eager, compiled, strict=True)
    torch.testing.assert_close(*outputs[0])
    torch.testing.assert_close(*gradient)
    assert all(torch.equal(a, b) for a, b in outputs[1:])


def run_python(code, **environment):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


BLOCK_IMPORTS = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "diffusers"):
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
"""


def test_the_cpu_path_needs_neither_triton_nor_diffusers():
    code = (
        BLOCK_IMPORTS
        + """
import torch
from types import SimpleNamespace
from pcpo_fast import ops

table = SimpleNamespace(rows=torch.tensor([[0.9, -0.3, 0.5, 0.6, 0.6, 1.0, 1.0, -0.2]]))
x = torch.randn(2, 8)
out = ops.sampler_step(x, x, table, 0, seed=1)
m = x.clone().requires_grad_()
loss = ops.policy_loss(m, out.model_output, out.noise, table, 0, torch.ones(2)).loss
(loss + ops.step_log_prob(m, x, out.prev_sample, table, 0).sum()).backward()
assert m.grad.isfinite().all()
assert "triton" not in sys.modules and "diffusers" not in sys.modules
try:
    ops.sampler_step(x, x, table, 0, seed=1, impl="triton")
except ImportError as error:
    print(error)
"""
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert "needs the package triton" in result.stdout


def test_importing_the_ops_loads_no_triton():
    result = run_python(
        "import sys, pcpo_fast, pcpo_fast.ops; print('triton' in sys.modules, 'diffusers' in sys.modules)"
    )
    assert result.stdout.split() == ["False", "False"], result.stderr


def test_triton_does_not_fall_back_on_the_cpu():
    code = """
import torch
from types import SimpleNamespace
from pcpo_fast import ops

try:
    ops.sample_noise((1, 4), SimpleNamespace(rows=torch.zeros(1, 8)), 0, seed=1, impl="triton")
except RuntimeError as error:
    print(error)
"""
    assert "set TRITON_INTERPRET=1" in run_python(code).stdout


@pytest.mark.parametrize("impl", ["triton"])
def test_triton_refuses_float64(inputs, table, impl):
    m, other, x, *_ = inputs
    with pytest.raises(ValueError, match="use impl='torch'"):
        ops.step_log_prob(m.double(), x, other, table, 0, impl=impl)
