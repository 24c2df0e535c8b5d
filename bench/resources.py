"""What the compiled kernels need, for real GPUs and without one: registers, shared memory, spills, access widths.

Every kernel is compiled for every entry of the launch table and every target. A stand-in driver names the target, so
this runs anywhere; the kernels must not have been decorated for the interpreter (TRITON_INTERPRET unset).

    python -m bench.resources [--json] [target ...]        targets: sm_80 sm_90 sm_100 gfx942
"""

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import MockTensor

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
COLUMNS = ("kernel", "case", "block", "warps", "registers", "spills", "shared", "wide_loads", "wide_stores")
COLUMNS += ("bytes_read", "bytes_written", "instructions_per_element")


class Driver:
    """As much of a driver as compiling asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def cases():
    """(case, kernel, arguments before the row's length, constants, bytes read and written per element).

    Outputs of the model are bfloat16, latents and noise float32."""
    from pcpo_fast.kernels.gradient import gradient_kernel
    from pcpo_fast.kernels.philox import sample_noise_kernel
    from pcpo_fast.kernels.policy_loss import OBJECTIVES, policy_loss_fwd_kernel
    from pcpo_fast.kernels.sampler_step import sampler_step_kernel
    from pcpo_fast.kernels.step_log_prob import step_log_prob_fwd_kernel

    half, single, index, count, flag = map(
        MockTensor, (torch.bfloat16, torch.float32, torch.int64, torch.int32, torch.bool)
    )
    size = {half: 2, single: 4, None: 0}
    # the kernel's arguments noise, seed, sample index, sample, previous sample; and their bytes
    sources = {
        "noise": ((single, None, None, None, None), 4),
        "key": ((None, index, index, None, None), 0),
        "states": ((None, None, None, single, single), 8),
        "states and noise": ((single, None, None, single, single), 12),
        "states and key": ((None, index, index, single, single), 8),
    }

    def policy_loss(source, objective, uncond=None, ref=None, old=half, weights=None, loss=single):
        given, bytes_given = sources[source]
        # the log-ratio alone is a kernel without advantages and a loss
        advantages, loss = (single, loss) if objective in OBJECTIVES else (None, None)
        inputs = (half, uncond, old, *given, ref, single, index, advantages, weights, weights if ref else None)
        outputs = (half, single, count, single, loss, single, flag, single if ref else None, single, single)
        scalars = (5.0, 1e-4, 1e-4, 2e-4, -1e-4, 2e-4, 0.1, 8.0, 1, 50, 8)
        read = 2 + size[old] + size[uncond] + size[ref] + bytes_given
        constants = {"OBJECTIVE": OBJECTIVES.get(objective)}
        return policy_loss_fwd_kernel, (*inputs, *outputs, *scalars), constants, (read, 2)

    for objective in ("pcpo", "ppo", "log_ratio"):
        yield f"noise, {objective}", *policy_loss("noise", objective)
    for source in ("key", "states"):
        yield f"{source}, pcpo", *policy_loss(source, "pcpo")
    for source in ("states and noise", "states and key"):
        yield f"{source}, old absent, pcpo", *policy_loss(source, "pcpo", old=None)
    yield "noise, pcpo, KL", *policy_loss("noise", "pcpo", ref=half)
    yield "noise, pcpo, KL, per row", *policy_loss("noise", "pcpo", ref=half, weights=single, loss=None)
    yield "key, pcpo, guidance, KL", *policy_loss("key", "pcpo", uncond=half, ref=half)

    arguments = (half, single, single, single, index, half, single, count, single, single, 1e-4, 1, 50)
    yield "", step_log_prob_fwd_kernel, arguments, {}, (10, 2)

    for case, uncond, noise, seed, stored, mean in (
        ("noise", None, single, None, single, None),
        ("key", None, None, index, None, None),
        ("key, guidance", half, None, index, None, None),
        ("key, guidance, noise kept", half, None, index, single, None),
        ("key, mean kept", None, None, index, None, single),
    ):
        inputs = (half, uncond, single, noise, seed, seed, single, index)
        arguments = (*inputs, single, half, stored, mean, single, count, single, 5.0, 1e-4, 1, 50)
        written = 4 + size[uncond] + size[stored] + size[mean]
        yield case, sampler_step_kernel, arguments, {}, (6 + size[uncond] + size[noise], written)

    for case, uncond, ref in (("", None, None), ("guidance", half, None), ("guidance, KL", half, half)):
        arguments = (half, single, single, None if ref is None else half, uncond, ref, half, uncond, 5.0, 0)
        yield case, gradient_kernel, arguments, {}, (2 if ref is None else 8, 2 + size[uncond])
    yield "", sample_noise_kernel, (index, index, index, single, 1, 50), {}, (0, 4)


def resources(target: str) -> list[dict]:
    """A row per kernel, case and launch setting."""
    from pcpo_fast.kernels.launch import TABLE, launch

    triton.runtime.driver.set_active(Driver(TARGETS[target]))
    inspect = inspect_nvidia if target.startswith("sm_") else inspect_amd
    rows = []
    for case, kernel, arguments, constants, (read, written) in cases():
        for entry in TABLE:
            numel = entry.longest or 262_144
            settings, splits = launch(numel)
            compiled = kernel.warmup(*arguments, numel, **constants, **settings, grid=(splits,))
            name = kernel.fn.__name__.removesuffix("_kernel").removesuffix("_fwd")
            row = {"kernel": name, "case": case, "block": entry.block, "warps": entry.num_warps}
            row |= {"bytes_read": read, "bytes_written": written, "shared": compiled.metadata.shared}
            rows.append(row | inspect(compiled, entry.block))
    return rows


def inspect_nvidia(compiled, block: int) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = run(NVIDIA_TOOLS / "cuobjdump", "-res-usage", file.name)
        sass = run(NVIDIA_TOOLS / "nvdisasm", "-c", file.name)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    # local memory is where registers are spilled to
    spills = found["STACK"] + found["LOCAL"]
    code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", sass)
    return {"registers": found["REG"], "spills": spills} | count(
        code, block // (32 * compiled.metadata.num_warps), r"\bLDG\..*\.128", r"\bSTG\..*\.128", r"\bATOM|\bEXIT"
    )


def inspect_amd(compiled, block: int) -> dict:
    assembly = compiled.asm["amdgcn"]
    found = {name: int(value) for name, value in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", assembly)}
    code = re.findall(r"^\t([a-z]\w+.*)", assembly, flags=re.MULTILINE)
    return {"registers": found["vgpr_count"], "spills": found["vgpr_spill_count"]} | count(
        code, block // (64 * compiled.metadata.num_warps), r"_load_dwordx4", r"_store_dwordx4", r"_atomic_|s_endpgm"
    )


def count(code: list[str], elements_per_thread: int, load: str, store: str, end: str) -> dict:
    """128-bit loads and stores, and the instructions per element until a program has done its part of the row."""
    length = max(i for i, line in enumerate(code) if re.search(end, line))
    length = next((i for i, line in enumerate(code) if re.search(end.split("|")[0], line)), length)
    return {
        "wide_loads": sum(bool(re.search(load, line)) for line in code),
        "wide_stores": sum(bool(re.search(store, line)) for line in code),
        "instructions_per_element": round(length / elements_per_thread, 1),
    }


def run(*command) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("targets", nargs="*", default=list(TARGETS), help=", ".join(TARGETS))
    parser.add_argument("--json", action="store_true", help="print JSON, a list of rows per target")
    options = parser.parse_args()
    tables = {target: resources(target) for target in options.targets}
    if options.json:
        print(json.dumps(tables))
        return
    for target, rows in tables.items():
        print(f"\n## {target}\n\n| {' | '.join(COLUMNS).replace('_', ' ')} |\n|{'---|' * len(COLUMNS)}")
        for row in rows:
            print(f"| {' | '.join(str(row[column]) for column in COLUMNS)} |")


if __name__ == "__main__":
    main()
