"""The kernels compile for real GPUs, spill nothing and move 128 bits at a time. No GPU is needed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pcpo_fast import (
    Guidance,
    NoiseKey,
    Reference,
    StepTable,
    StoredStates,
    policy_loss,
    sample_noise,
    sampler_step,
    step_log_prob,
    step_log_ratio,
)

RESOURCES = Path(__file__).parents[1] / "bench" / "resources.py"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@pytest.fixture(scope="module")
def resources():
    """The rows that `bench/resources.py` prints for each target."""
    # processes of their own: here the kernels may be decorated for the interpreter
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    command = [sys.executable, RESOURCES, "--json"]
    # at the same time
    processes = [subprocess.Popen([*command, target], **settings) for target in TARGETS]
    tables = {}
    for process in processes:
        out, errors = process.communicate()
        assert process.returncode == 0, errors
        tables |= json.loads(out)
    return tables


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_at_every_setting(target, resources):
    kernels = {"policy_loss", "step_log_prob", "sampler_step", "gradient", "sample_noise"}
    assert {row["kernel"] for row in resources[target]} == kernels
    assert {(row["block"], row["warps"]) for row in resources[target]} == {(256, 1), (1024, 4), (2048, 4), (4096, 8)}


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_spilled(target, resources):
    assert [row for row in resources[target] if row["spills"]] == []


@pytest.mark.parametrize("target", [target for target in TARGETS if target.startswith("sm_")])
def test_every_byte_of_an_aligned_row_moves_in_128_bit_accesses(target, resources):
    for row in resources[target]:
        elements_per_thread = row["block"] // (32 * row["warps"])
        assert 16 * row["wide_loads"] == elements_per_thread * row["bytes_read"], row
        assert 16 * row["wide_stores"] == elements_per_thread * row["bytes_written"], row


@pytest.mark.parametrize("target", [target for target in TARGETS if target.startswith("sm_")])
def test_arithmetic_leaves_the_memory_the_bottleneck(target, resources):
    """A GPU has time for 9 (A100, H100) or 4 (B200) instructions per byte; only drawing noise needs as many."""
    for row in resources[target]:
        if row["block"] >= 2048:
            per_byte = row["instructions_per_element"] / (row["bytes_read"] + row["bytes_written"])
            assert per_byte < (12 if row["kernel"] == "sample_noise" or "key" in row["case"] else 3), row


def launched(monkeypatch, device) -> dict:
    """What the kernels are launched with by the op calls that the cases stand for, by kernel and case."""
    seen = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*arguments, **settings):
                constants = {key: settings[key] for key in settings.keys() & {"OBJECTIVE"}}
                seen.append((self.kernel, signature(arguments[:-1]), constants))
                return self.kernel[grid](*arguments, **settings)

            return launch

    for file, name in (
        ("policy_loss", "policy_loss_fwd_kernel"),
        ("sampler_step", "sampler_step_kernel"),
        ("step_log_prob", "step_log_prob_fwd_kernel"),
        ("gradient", "gradient_kernel"),
        ("philox", "sample_noise_kernel"),
    ):
        # the package has functions of the files' names
        module = importlib.import_module(f"pcpo_fast.kernels.{file}")
        monkeypatch.setattr(module, name, Recorder(getattr(module, name)))

    table = StepTable([1, 0], [0.9, 0.9], [-0.3, -0.3], [0.5, 0.4]).to(device)
    m, old, uncond, ref = (torch.ones((2, 8), dtype=torch.bfloat16, device=device) for _ in range(4))
    x, noise, per_row = (torch.ones(shape, device=device) for shape in ((2, 8), (2, 8), 2))
    key, step = NoiseKey(3, torch.arange(2, device=device)), torch.zeros(2, dtype=torch.int64, device=device)
    states = StoredStates(x, x)
    guidance, kl = Guidance(uncond, 5.0), Reference(ref, 0.1)
    m.requires_grad_()

    def loss(noise, objective="pcpo", old=old, **settings):
        return policy_loss(m, old, noise, table, step, per_row, objective=objective, impl="triton", **settings).loss

    def sample(noise, **settings):
        return sampler_step(m, x, table, step, noise, impl="triton", **settings)

    def backward(**settings):
        total = loss(noise, **settings)
        seen.clear()
        total.backward()

    rows = {"row_weights": per_row, "row_reduction": "none"}
    calls = {
        ("policy_loss_fwd_kernel", "noise, pcpo"): lambda: loss(noise),
        ("policy_loss_fwd_kernel", "noise, ppo"): lambda: loss(noise, "ppo"),
        ("policy_loss_fwd_kernel", "noise, log_ratio"): lambda: step_log_ratio(
            m, old, noise, table, step, impl="triton"
        ),
        ("policy_loss_fwd_kernel", "key, pcpo"): lambda: loss(key),
        ("policy_loss_fwd_kernel", "states, pcpo"): lambda: loss(states),
        ("policy_loss_fwd_kernel", "states and noise, old absent, pcpo"): lambda: loss(
            states._replace(noise=noise), old=None
        ),
        ("policy_loss_fwd_kernel", "states and key, old absent, pcpo"): lambda: loss(
            states._replace(noise=key), old=None
        ),
        ("policy_loss_fwd_kernel", "noise, pcpo, KL"): lambda: loss(noise, kl=kl),
        ("policy_loss_fwd_kernel", "noise, pcpo, KL, per row"): lambda: loss(noise, kl=Reference(ref, per_row), **rows),
        ("policy_loss_fwd_kernel", "key, pcpo, guidance, KL"): lambda: loss(key, kl=kl, guidance=guidance),
        ("step_log_prob_fwd_kernel", ""): lambda: step_log_prob(m, x, x, table, step, impl="triton"),
        ("sampler_step_kernel", "noise"): lambda: sample(noise),
        ("sampler_step_kernel", "key"): lambda: sample(key, return_noise=False),
        ("sampler_step_kernel", "key, guidance"): lambda: sample(key, guidance=guidance, return_noise=False),
        ("sampler_step_kernel", "key, guidance, noise kept"): lambda: sample(key, guidance=guidance),
        ("sampler_step_kernel", "key, mean kept"): lambda: sample(key, return_noise=False, return_mean=True),
        ("gradient_kernel", ""): backward,
        ("gradient_kernel", "guidance"): lambda: backward(guidance=guidance),
        ("gradient_kernel", "guidance, KL"): lambda: backward(guidance=guidance, kl=kl),
        ("sample_noise_kernel", ""): lambda: sample_noise((2, 8), table, step, key, impl="triton"),
    }
    launches = {}
    for case, call in calls.items():
        seen.clear()
        call()
        (launches[case],) = seen
    return launches


def signature(arguments) -> list:
    """What decides how a kernel is compiled: dtypes, what is left out, and the types of numbers."""
    return [argument.dtype if hasattr(argument, "dtype") else type(argument) for argument in arguments]


def test_the_cases_are_what_the_ops_launch(monkeypatch):
    """In number, order and type of all arguments, so that what compiles here is what runs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    spec = importlib.util.spec_from_file_location("resources", RESOURCES)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cases = {(kernel.__name__, case): (kernel, signature(arguments), constants)
             for case, kernel, arguments, constants, _ in module.cases()}  # fmt: skip
    launches = launched(monkeypatch, device)
    assert cases.keys() == launches.keys()
    for case, compiled in cases.items():
        assert launches[case] == compiled, case
