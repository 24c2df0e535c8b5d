"""The kernels compile for real GPUs. No GPU is needed: a stand-in driver names the target."""

import os
import re
import subprocess
import sys

import pytest

CAPABILITIES = (80, 90, 100)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiles(capability):
    # a process of its own: here the kernels may be decorated for the interpreter
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, __file__, str(capability)], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert len(lines) == 12
    for name, wide_loads, wide_stores in lines:
        # kernels over elements move 128 bits at a time, kernels over rows move scalars
        if "rows" not in name:
            assert int(wide_stores) > 0
            assert int(wide_loads) > 0 or "noise" in name


def compile_all(capability):
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import MockTensor

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    triton.runtime.driver.set_active(Driver())

    from pcpo_fast.kernels.launch import REDUCE_WARPS, launch
    from pcpo_fast.kernels.philox import _sample_noise_kernel
    from pcpo_fast.kernels.policy_loss import _policy_loss_fwd_kernel, _policy_loss_rows_kernel
    from pcpo_fast.kernels.sampler_step import _sampler_step_kernel
    from pcpo_fast.kernels.step_log_prob import _step_log_prob_fwd_kernel, log_prob_rows_kernel

    half, single, index, flag = map(MockTensor, (torch.bfloat16, torch.float32, torch.int64, torch.bool))
    numel = 16384
    (block, num_warps), splits = launch(numel)

    def over_elements(kernel, *args):
        report(kernel, kernel.warmup(*args, numel, SPLITS=splits, BLOCK=block, num_warps=num_warps, grid=(1,)))

    def over_rows(kernel, *args, **constants):
        constants |= {"SPLITS": splits, "SPLITS_BLOCK": splits, "num_warps": REDUCE_WARPS}
        report(kernel, kernel.warmup(*args, **constants, grid=(1,)))

    for ref in (half, None):
        over_elements(_policy_loss_fwd_kernel, half, half, single, ref, single, index, half, single)
        for objective in ("pcpo", "ppo"):
            over_rows(
                _policy_loss_rows_kernel, single, single, index, single, single, single, flag, single,
                *(1e-4, 1e-4, 1e-4, 1e-4, -1e-4, 0.1), OBJECTIVE=objective, HAS_REF=ref is not None,
            )  # fmt: skip
    over_elements(_step_log_prob_fwd_kernel, half, single, single, single, index, half, single)
    for coefficient in (single, None):
        over_rows(log_prob_rows_kernel, single, single, index, single, coefficient, numel, 1e-4)
    for uncond, noise, seed in ((half, None, index), (None, single, None)):
        over_elements(
            _sampler_step_kernel, half, uncond, single, noise, seed, seed, single, index, single, half, single, single,
            5.0, 50,
        )  # fmt: skip
    over_elements(_sample_noise_kernel, index, index, index, single, 50)


def report(kernel, compiled):
    ptx = compiled.asm["ptx"]
    wide = (len(re.findall(rf"{access}\.global\.v(?:4\.b32|2\.b64)", ptx)) for access in ("ld", "st"))
    print(kernel.fn.__name__, *wide)


if __name__ == "__main__":
    compile_all(int(sys.argv[1]))
