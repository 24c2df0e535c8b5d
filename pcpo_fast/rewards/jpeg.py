"""JPEG file size as a reward, the first benchmark of DDPO (Black et al., arXiv 2305.13301, section 5)."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from torch import Tensor

from pcpo_fast.rewards.pixels import to_pictures

QUALITY = 95


def incompressibility(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Size of each image as a JPEG file of quality 95, in kilobytes (1000 bytes).

    Args:
        images: float (N, 3, H, W) in [0, 1].
        prompts: not used.

    Returns:
        float32 (N,).
    """
    sizes = []
    for picture in to_pictures(images):
        file = io.BytesIO()
        picture.save(file, format="JPEG", quality=QUALITY)
        sizes.append(file.tell() / 1000)
    return torch.tensor(sizes)


def compressibility(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Minus the size of each image as a JPEG file, in kilobytes; see `incompressibility`."""
    return -incompressibility(images, prompts)
