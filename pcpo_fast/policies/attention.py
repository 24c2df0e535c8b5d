"""Attention backends of a denoiser: PyTorch's own, as a whole or one kernel of it, and other packages."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch.nn.attention import SDPBackend

from pcpo_fast.errors import SettingError

# the kernels of PyTorch's own attention, which picks one where none is named
SDPA_KERNELS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
# setting -> module, and the package to install
PACKAGES = {"xformers": ("xformers", "'pcpo-fast[xformers]'"), "flash": ("flash_attn", "flash-attn")}


def check_package(attention: str, device: torch.device, offered: Sequence[str], model: str) -> None:
    """Refuses a package that this machine lacks, or that diffusers does not offer for `model`.

    Raises:
        SettingError: naming what to use instead.
    """
    if attention not in offered:
        raise SettingError(
            "attention", f"{attention} is not available for {model}; use PyTorch's own: sdpa, {', '.join(SDPA_KERNELS)}"
        )
    module, package = PACKAGES[attention]
    if importlib.util.find_spec(module) is None:
        raise SettingError(
            "attention",
            f"{attention} needs the package {module}, which is not installed; pip install {package}, or use sdpa",
        )
    if device.type != "cuda":
        raise SettingError("attention", f"{attention} runs on a GPU and the device is {device}; use sdpa")
