"""The kernels compile for real GPUs, spill nothing and move 128 bits at a time. No GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
