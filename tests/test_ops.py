"""What the ops share: registration, compilation, dispatch, and what they need to be installed."""

import itertools
import subprocess
import sys

import pytest
import torch

from pcpo_fast import (
    Guidance,
    NoiseKey,
    Reference,
    StoredStates,
    policy_loss,
    ratio_stats,
    reference,
    sample_noise,
    sampler_step,
    step_log_prob,
    step_log_ratio,
)

ROWS, SHAPE = 3, (3, 2, 4, 5)
SOURCES = ("noise", "key", "states", "states and noise", "states and key")


@pytest.fixture
def inputs(device):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(SHAPE, generator=generator).to(device) for _ in range(4)]
    return *tensors, torch.tensor([4, 19, 0], device=device), torch.tensor([1.0, -1.0, 0.5], device=device)


def check(name: str, given: dict) -> None:
    """opcheck with arguments by name; what is left out is None."""
    operator = getattr(torch.ops.pcpo_fast, name).default
    names = [argument.name for argument in operator._schema.arguments]
    assert set(given) <= set(names)
    torch.library.opcheck(operator, [given.get(name) for name in names])


def sources(inputs, table) -> dict[str, dict]:
    """What the losses' operators take z and m_old from, by name."""
    m, other, x, z, step, _ = inputs
    old, states = {"old_model_output": other}, {"sample": x, "prev_sample": z}
    noise, key = {"noise": z}, {"seed": torch.tensor(3, device=m.device), "sample_index": torch.arange(3).to(m.device)}
    given = {
        "noise": old | noise,
        "key": old | key,
        "states": old | states,
        "states and noise": states | noise,
        "states and key": states | key,
    }
    assert tuple(given) == SOURCES
    return {name: {"table": table.rows, "step": step, **tensors} for name, tensors in given.items()}


@pytest.mark.parametrize("name", SOURCES)
def test_opcheck_of_the_losses(name, inputs, table, impl):
    m, _, x, z, _, advantages = inputs
    m_grad, uncond = (t.clone().requires_grad_() for t in (m, z))
    given = {"model_output": m_grad, "with_gradient": True, "impl": impl, **sources(inputs, table)[name]}
    for reduction in ("mean", "sum"):
        check("step_log_ratio", {**given, "reduction": reduction})
    given |= {"advantages": advantages, "clip_below": 0.5, "clip_above": 0.4, "reduction": "mean", "kl_weight": 0.1}
    kl = {"ref_model_output": x}
    asked = (
        {"row_reduction": "mean"},
        {"row_reduction": "sum", **kl},
        {"row_reduction": "none", "row_weights": advantages, "uncond_output": uncond},
        {"row_reduction": "none", **kl, "kl_weights": advantages.abs(), "uncond_output": uncond},
    )
    for objective, settings in zip(itertools.cycle(reference.OBJECTIVES), asked, strict=False):
        check("policy_loss", {**given, "guidance_scale": 3.0, "objective": objective, **settings})


def test_opcheck_of_the_rest(inputs, table, impl):
    m, other, x, z, step, advantages = inputs
    seed, index = torch.tensor(3, device=m.device), torch.arange(ROWS, device=m.device)
    at = {"table": table.rows, "step": step, "impl": impl}
    guided = {"uncond_output": other, "guidance_scale": 5.0, "noise": z, "return_noise": True, "return_mean": True}
    check("sampler_step", {"model_output": m, "sample": x, **guided, **at})
    drawn = {"guidance_scale": 1.0, "seed": seed, "sample_index": index, "return_noise": False, "return_mean": False}
    check("sampler_step", {"model_output": m, "sample": x.half(), **drawn, **at, "step": step.int()})
    states = {"sample": x, "prev_sample": other, "reduction": "mean", "with_gradient": True}
    check("step_log_prob", {"model_output": m.clone().requires_grad_(), **states, **at})
    states = {"sample": x.mT, "prev_sample": other.mT, "reduction": "sum", "with_gradient": False}
    check("step_log_prob", {"model_output": m.half().mT, **states, **at})
    noise = {"seed": seed, "sample_index": index, "step": step, "num_steps": len(table), "numel": 7, "impl": impl}
    check("sample_noise", noise)
    gradient = {"direction": m, "coefficients": advantages[:, None], "guidance_scale": 3.0, "impl": impl}
    check("gradient", {**gradient, "grad_output": advantages, "uncond_output": z})
    both = torch.stack([advantages, advantages], 1)
    check("gradient", {**gradient, "coefficients": both, "grad_output": advantages[0], "model_output": m,
                       "ref_model_output": x})  # fmt: skip


def test_compiles_as_one_graph(inputs, table, impl):
    m, other, x, z, step, advantages = inputs
    index, per_row = torch.arange(ROWS, device=m.device), torch.rand(ROWS).to(m.device)
    one = torch.tensor(3, dtype=torch.int32, device=m.device)

    def everything(m):
        key, guidance = NoiseKey(5, index), Guidance(other, 2.0)
        out = sampler_step(m, x, table, step, key, guidance=guidance, return_mean=True, impl=impl)
        log_prob = step_log_prob(m, x, out.prev_sample, table, 3, impl=impl)
        log_ratio = step_log_ratio(m, other, key, table, one, impl=impl)
        drawn = sample_noise(SHAPE, table, step, key, stream=1, impl=impl)
        loss = log_prob.sum() + log_ratio.sum()
        outputs = [*out, log_prob, log_ratio, drawn]
        states = StoredStates(x, out.prev_sample)
        given = {
            "noise": (out.model_output, out.noise),
            "key": (out.model_output, key),
            "states": (out.model_output, states),
            "states and noise": (None, states._replace(noise=out.noise)),
            "states and key": (None, states._replace(noise=key)),
        }
        assert tuple(given) == SOURCES
        asked = itertools.cycle(
            (
                {"kl": Reference(z, 0.1)},
                {"row_reduction": "sum", "row_weights": per_row, "clip_range": (0.4, 0.5)},
                {"row_reduction": "none", "kl": Reference(z, per_row), "guidance": guidance},
            )
        )
        for (old, noise), objective in itertools.product(given.values(), reference.OBJECTIVES):
            settings = {"objective": objective, "clip_range": 0.5, "impl": impl, **next(asked)}
            policy = policy_loss(m, old, noise, table, step, advantages, **settings)
            loss = loss + policy.loss.sum()
            outputs += [policy.loss, policy.log_ratio, policy.clipped, policy.old_kl]
            outputs += [] if policy.kl is None else [policy.kl]
        return loss, *outputs

    results = []
    for function in (everything, torch.compile(everything, fullgraph=True)):
        m_grad = m.clone().requires_grad_()
        out = function(m_grad)
        out[0].backward()
        results.append((*out, m_grad.grad))
    eager, compiled = results
    # the ops give the same bits; what is between them, inductor may fuse
    total, *outputs, gradient = zip(eager, compiled, strict=True)
    torch.testing.assert_close(*total)
    torch.testing.assert_close(*gradient)
    assert all(torch.equal(a, b) for a, b in outputs)


def test_numbers_that_change_between_calls_compile(inputs, table, impl):
    """From the second value on torch.compile makes a number symbolic."""
    m, other, x, z, step, advantages = inputs

    def numbers(number, count):
        guidance = Guidance(other, number)
        out = sampler_step(m, x, table, count, z, guidance=guidance, impl=impl)
        settings = {"clip_range": (number, 2 * number), "guidance": guidance, "kl": Reference(z, number), "impl": impl}
        loss = policy_loss(m, out.model_output, NoiseKey(count, step), table, step, advantages, **settings)
        return *out, *loss, *ratio_stats(loss.log_ratio, number)

    compiled = torch.compile(numbers, fullgraph=True, backend="aot_eager")
    for count, number in enumerate((0.1, 0.2, 0.3)):
        pairs = zip(numbers(number, count), compiled(number, count), strict=True)
        assert all(a is b is None or torch.equal(a, b) for a, b in pairs)


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
from pcpo_fast import NoiseKey, StepTable, policy_loss, sampler_step, step_log_prob

table = StepTable([0], [0.9], [-0.3], [0.5])
x, key = torch.randn(2, 8), NoiseKey(1, torch.arange(2))
out = sampler_step(x, x, table, 0, key)
m = x.clone().requires_grad_()
loss = policy_loss(m, out.model_output, out.noise, table, 0, torch.ones(2)).loss
(loss + step_log_prob(m, x, out.prev_sample, table, 0).sum()).backward()
assert m.grad.isfinite().all()
assert "triton" not in sys.modules and "diffusers" not in sys.modules
try:
    sampler_step(x, x, table, 0, key, impl="triton")
except ImportError as error:
    print(error)
"""
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert "needs the package triton" in result.stdout


def test_the_public_names():
    import pcpo_fast

    assert set(pcpo_fast.__all__) >= {
        "StepTable", "NoiseKey", "StoredStates", "Guidance", "Reference", "sampler_step", "step_log_prob",
        "step_log_ratio", "policy_loss", "sample_noise", "ratio_stats", "shifted_sigmas",
    }  # fmt: skip
    assert all(hasattr(pcpo_fast, name) for name in pcpo_fast.__all__)


def test_importing_the_ops_loads_no_triton():
    result = run_python(
        "import sys, pcpo_fast, pcpo_fast.ops; print('triton' in sys.modules, 'diffusers' in sys.modules)"
    )
    assert result.stdout.split() == ["False", "False"], result.stderr


def test_triton_does_not_fall_back_on_the_cpu():
    code = """
import torch
from pcpo_fast import NoiseKey, StepTable, sample_noise

try:
    sample_noise((1, 4), StepTable([0], [0.9], [-0.3], [0.5]), 0, NoiseKey(1, torch.arange(1)), impl="triton")
except RuntimeError as error:
    print(error)
"""
    assert "set TRITON_INTERPRET=1" in run_python(code).stdout


@pytest.mark.parametrize("impl", ["triton"])
def test_triton_refuses_float64(inputs, table, impl):
    m, other, x, *_ = inputs
    with pytest.raises(ValueError, match="use impl='torch'"):
        step_log_prob(m.double(), x, other, table, 0, impl=impl)
