"""Data of the digits models: the prompts, and scikit-learn's handwritten digits as pictures."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pcpo_fast.digits.rewards import DIGIT_WORDS, IMAGE_SIZE

PROMPT_TEMPLATES = (
    "a handwritten {word}",
    "a handwritten {numeral}",
    "the digit {word}",
    "the digit {numeral}",
    "a photo of the number {word}",
    "the number {numeral} on a black background",
    "{word}, written by hand",
    "a drawing of a {word}",
)


def prompts() -> list[str]:
    """The training prompts: every template for zero, then every template for one, and so on (80 in all)."""
    return [
        template.format(word=word, numeral=numeral)
        for numeral, word in enumerate(DIGIT_WORDS)
        for template in PROMPT_TEMPLATES
    ]


def load_data() -> tuple[Tensor, Tensor]:
    """The real digits as white ink on black.

    Returns:
        images, (1797, 3, 32, 32) float32 in [-1, 1], and the digits they show, (1797,) int64.
    """
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    ink = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    # a margin before the enlargement, so that strokes end inside the picture
    ink = F.interpolate(F.pad(ink, (1, 1, 1, 1)), (IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", align_corners=False)
    ink = ((ink - 0.15) / 0.7).clamp(0, 1)
    ink = ink * ink * (3 - 2 * ink)
    return (ink * 2 - 1).expand(-1, 3, -1, -1).contiguous(), torch.tensor(data.target)


def split_halves(digits: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of two disjoint halves, each with half of every digit: for the reward and for the eval classifier."""
    generator = torch.Generator().manual_seed(seed)
    halves: tuple[list[Tensor], list[Tensor]] = ([], [])
    for digit in range(10):
        indices = (digits == digit).nonzero().squeeze(1)
        indices = indices[torch.randperm(len(indices), generator=generator)]
        for half, part in zip(halves, (indices[::2], indices[1::2]), strict=True):
            half.append(part)
    return torch.cat(halves[0]).sort().values, torch.cat(halves[1]).sort().values


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn by up to 8 degrees, scale by up to 8%, and shift by up to 1.3 pixels, each picture on its own.

    Args:
        images: (N, 3, 32, 32) in [-1, 1], black outside.

    Returns:
        The same shape and range.
    """
    angle, scale, shift_x, shift_y = (torch.rand(4, len(images), generator=generator) * 2 - 1) * 0.08
    angle = angle * (math.pi / 180 * 100)
    cos, sin = angle.cos() * (1 + scale), angle.sin() * (1 + scale)
    theta = torch.stack([torch.stack([cos, -sin, shift_x], 1), torch.stack([sin, cos, shift_y], 1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1
