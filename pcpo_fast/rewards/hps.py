"""HPS v2.1, a CLIP ViT-H/14 trained on people's choices between images (Wu et al., arXiv 2306.09341).

The score is the cosine of an image and its prompt. The `hpsv2` package asks for old releases of others, so open_clip,
of which that package holds a copy, runs the published weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from pcpo_fast.errors import RewardError
from pcpo_fast.policies import DTYPES
from pcpo_fast.rewards.clip import Encoder, EncoderReward
from pcpo_fast.rewards.weights import check_hub, need

PUBLISHED = ("xswu/HPSv2", "HPS_v2.1_compressed.pt")
ARCHITECTURE = "ViT-H-14"


class HpsV2(EncoderReward):
    """The cosine of an image and its prompt, by HPS v2.1. Weights of one's own are a file such as
    HPS_v2.1_compressed.pt, or the folder that holds it."""

    def find(self) -> None:
        need("hps", "open_clip")
        self._file: Path | None = None
        if self.weights is None:
            check_hub(*PUBLISHED)
            return
        path = Path(self.weights).expanduser()
        self._file = path / PUBLISHED[1] if path.is_dir() else path
        if not self._file.is_file():
            raise RewardError(
                f"looks for {self._file}, which is not there; give the file {PUBLISHED[1]}, or the folder that holds it"
            )

    def load(self, device: torch.device) -> Encoder:
        import open_clip  # pyright: ignore[reportMissingImports]
        from huggingface_hub import hf_hub_download

        dtype = DTYPES[self.options.dtype]
        model, _, preprocess = open_clip.create_model_and_transforms(
            ARCHITECTURE,
            pretrained=str(self._file or hf_hub_download(*PUBLISHED)),
            # images that are not square are filled up with black, as in HPS
            image_resize_mode="longest",
            weights_only=True,
        )
        model = model.eval().requires_grad_(False).to(device, dtype)
        tokenizer = open_clip.get_tokenizer(ARCHITECTURE)

        def images(pictures: list[Image.Image]) -> Tensor:
            return model.encode_image(torch.stack([preprocess(picture) for picture in pictures]).to(device, dtype))

        def texts(prompts: list[str]) -> Tensor:
            return model.encode_text(tokenizer(prompts).to(device))

        return Encoder(images, texts, model.logit_scale.float().exp().item())

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.cosines(images, prompts)
