"""Whole runs against recorded numbers: two epochs of the embedded models by the command line.

golden.json holds each run's rewards, losses, ratios and gradient norms, and for every trained tensor what training
added to it: the norm, and the inner product with a fixed vector of signs. `python tests/test_golden.py` records all of
it anew; do that only for a change that is meant to alter training.

The tolerances come from runs in which every element of every gradient was moved by one float32 rounding. Another order
of the same operations may do that; a wrong formula does more. On another instruction set the denoiser itself rounds
otherwise. golden.json therefore holds a digest of the machine's arithmetic; where it differs, the tolerances are wider.
"""

import functools
import hashlib
import json
import math
import re
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from pipelines import records
from safetensors.torch import load_file

import pcpo_fast
from pcpo_fast.train import main

pytest_plugins = "pipelines"
pytestmark = pytest.mark.usefixtures("one_thread")

GOLDEN = Path(__file__).with_name("golden.json")
DENOISER = "diffusion_pytorch_model.safetensors"

# Adam makes a step of the whole learning rate even of a gradient that is all rounding, unless its epsilon lies above it
COMMON = (
    "--device cpu --tuning full --credit native --epochs 2 --prompts-per-epoch 4 --group-size 8 "
    "--num-inference-steps 4 --micro-batch-size 16 --gradient-accumulation-steps 4 --eval-every 0 --eval-samples 40 "
    "--adam-epsilon 1e-2"
)
DIGITS = "digits --learning-rate 1e-3 --clip-range 2e-3"
FLOW = "digits-flow --learning-rate 3e-3 --clip-range 1e-3"
RUNS = {
    "digits-pcpo": f"{DIGITS} --objective pcpo",
    "digits-ppo": f"{DIGITS} --objective ppo",
    "digits-guard": f"{DIGITS} --objective guard",
    "digits-pcpo-kl": f"{DIGITS} --objective pcpo --kl-weight 0.1",
    "digits-ppo-eta-ema": f"{DIGITS} --objective ppo --eta 0.5 --ema-decay 0.5",
    "digits-lora": f"{DIGITS} --objective pcpo --tuning lora --learning-rate 0.1",
    "digits-passes": f"{DIGITS} --objective ppo --inner-epochs 2 --timestep-fraction 0.5 --advantage prompt "
    "--prompt-buffer-min 4",
    "digits-random-window": f"{DIGITS} --objective pcpo --window-size 2 --window random "
    "--gradient-accumulation-steps 2",
    "flow-pcpo": f"{FLOW} --objective pcpo",
    "flow-ppo-kl": f"{FLOW} --objective ppo --kl-weight 0.1",
    "flow-guard": f"{FLOW} --objective guard",
    "flow-dance-ema": f"{FLOW} --objective ppo --sampler dance --ema-decay 0.5",
    "flow-cps": f"{FLOW} --objective ppo --sampler cps --no-normalized-log-prob --clip-range 2e-4",
    "flow-cps-guard": f"{FLOW} --objective guard --sampler cps --no-normalized-log-prob --clip-range 5e-4",
    "flow-lora": f"{FLOW} --objective pcpo --tuning lora --learning-rate 0.1",
    "flow-sliding-window": f"{FLOW} --objective ppo --window-size 2 --window sliding --gradient-accumulation-steps 2",
}

# (relative tolerance, smallest scale) by a part of the number's name
TOLERANCES = {
    # log-probabilities of order 1; one rounding per gradient element moved them by at most 5e-7
    "reward": (1e-6, 1.0),
    "eval/": (1e-6, 1.0),
    # a mean of -A rho, whose terms of order 1 cancel; moved by at most 1e-7
    "update/loss": (1e-6, 1.0),
    # relative to rho = 1 this is below 1e-6; a log-ratio itself comes from the difference of two rounded outputs, which
    # moved it by at most 8e-6
    "update/abs_log_ratio": (2e-5, 0.0),
    "update/first_abs_log_ratio": (0.0, 0.0),
    "update/clip_fraction": (1e-6, 0.0),
    # moved by at most 2e-6
    "update/grad_norm": (1e-5, 0.0),
}
# moved by at most 2e-5. What training adds is at most 1e-2 of the weights, so that the weights agree to 5e-7
CHANGE_TOLERANCE = 5e-5
# with the instruction sets of AVX2 and SSE, and with two threads, nothing moved by more than 2 times its tolerance
ELSEWHERE = 10


def run(name: str, folder: Path) -> dict[str, dict]:
    """Makes the run and returns its numbers, and for each tensor the norm and inner product of its change."""
    # a flag that is given twice has its last value
    preset, *flags = RUNS[name].split()
    assert main([preset, *COMMON.split(), *flags, "--output-dir", str(folder)]) == 0
    numbers = {
        f"{index} {key}": value
        for index, record in enumerate(records(folder))
        for key, value in record.items()
        if isinstance(value, float)
    }
    first_checkpoint, last_checkpoint = sorted((folder / "checkpoints").iterdir())
    changes = {}
    for kind in ("weights", "ema"):
        if not (last_checkpoint / kind).is_dir():
            continue
        (path,) = (last_checkpoint / kind).glob("*.safetensors")
        if path.name == DENOISER:
            start = load_file(embedded("transformer" if preset == "digits-flow" else "unet"))
        else:
            # an adapter's second factor starts at 0; its first one is drawn, and learns from the second step on
            start = {key: value for key, value in load_file(first_checkpoint / kind / path.name).items() if "A" in key}
        for key, value in load_file(path).items():
            change = value.double() - start.get(key, torch.zeros(1)).double()
            # a generator whose stream NumPy keeps for good
            signs = np.random.RandomState(zlib.crc32(key.encode())).choice([-1.0, 1.0], change.numel())
            changes[f"{kind} {key}"] = [change.norm().item(), (change.flatten() @ torch.from_numpy(signs)).item()]
    return {"numbers": numbers, "changes": changes}


def embedded(part: str) -> Path:
    """An embedded denoiser's weights, wherever the package keeps them."""
    (path,) = Path(pcpo_fast.__file__).parent.rglob(f"{part}/{DENOISER}")
    return path


@functools.cache
def arithmetic() -> str:
    """A digest that two machines share if a denoiser, elementary functions and sums have the same bits on both."""
    unet = UNet2DConditionModel.from_pretrained(embedded("unet").parent)
    draw = np.random.RandomState(0)
    sample, context = (
        torch.from_numpy(draw.standard_normal(shape)).float()
        for shape in ((16, 4, 8, 8), (16, 16, unet.config.cross_attention_dim))
    )
    output = unet(sample, torch.full((16,), 500), context).sample
    output.square().mean().backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in unet.parameters()])
    positive = sample.abs() + 1
    elementary = [function(positive) for function in (torch.exp, torch.log, torch.cos, torch.rsqrt)]
    sums = [
        gradients.norm(),
        sample.sum(),
        sample.flatten(1).sum(dim=1),
        sample.std(),
        sample.flatten(1).softmax(dim=1),
    ]
    bits = [tensor.detach().numpy().tobytes() for tensor in (output, gradients, *elementary, *sums)]
    return hashlib.sha256(b"".join(bits)).hexdigest()


@pytest.mark.parametrize("name", RUNS)
def test_run_is_the_recorded_one(name, tmp_path):
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    expected, got = golden[name], run(name, tmp_path)
    wider = 1 if golden["arithmetic"] == arithmetic() else ELSEWHERE
    assert got["numbers"].keys() >= expected["numbers"].keys()
    assert got["changes"].keys() == expected["changes"].keys()
    for key, value in expected["numbers"].items():
        relative, scale = next(bounds for part, bounds in TOLERANCES.items() if part in key)
        tolerance = wider * relative * max(abs(value), scale)
        assert abs(got["numbers"][key] - value) <= tolerance, key
    # a tensor whose gradient is next to nothing has nothing but the rounding of its weights
    typical = math.sqrt(sum(norm**2 for norm, _ in expected["changes"].values()) / len(expected["changes"]))
    for key, (norm, product) in expected["changes"].items():
        tolerance = wider * CHANGE_TOLERANCE * max(norm, typical)
        assert abs(got["changes"][key][0] - norm) <= tolerance, key
        assert abs(got["changes"][key][1] - product) <= tolerance, key


def save() -> None:
    """Makes all runs and writes golden.json, one number or tensor a line."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: run(name, Path(folder) / name) for name in RUNS}
    nine_digits = json.loads(json.dumps(runs), parse_float=lambda digits: float(f"{float(digits):.9g}"))
    text = json.dumps({"arithmetic": arithmetic(), **nine_digits}, indent=1)
    # pairs on one line
    text = re.sub(r"\[\s+(\S+)\s+(\S+)\s+\]", r"[\1 \2]", text)
    GOLDEN.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    save()
