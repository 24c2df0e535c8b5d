"""Images as files hold them."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor


def to_pictures(images: Tensor) -> list[Image.Image]:
    """N pictures of 8 bits per channel from float images (N, 3, H, W) in [0, 1], rounded as for a file."""
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]
