"""Rewards of the CLIP family: how near an image is to its prompt, or to what people like.

A model turns images and texts into vectors of length 1, whose product is their cosine.

    clip_score   100 cos                       Hessel et al., arXiv 2104.08718, on the scale of torchmetrics
    pickscore    exp(logit_scale) cos / 26     Kirstain et al., arXiv 2305.01569; a 26th, as Flow-GRPO trains on it
    aesthetic    MLP(image vector)             LAION's improved aesthetic predictor, 1 to 10
    hpsv2        cos                           Wu et al., arXiv 2306.09341; see hps.py

Images are rounded to 8 bits first: the published numbers are of files.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from pcpo_fast.errors import RewardError
from pcpo_fast.policies import DTYPES
from pcpo_fast.rewards.pixels import to_pictures
from pcpo_fast.rewards.weights import check_hub, find_weights

VIT_L = "openai/clip-vit-large-patch14"
VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
# a folder of a model and its processor holds at least these
CLIP_FILES = ("config.json", "preprocessor_config.json")
# LAION's head; the weights are those of sac+logos+ava1-l14-linearMSE.pth
AESTHETIC_HEAD = ("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")
# Flow-GRPO divides PickScore by it
PICKSCORE_SCALE = 26


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """How the model of a reward runs.

    Attributes:
        batch_size: images, or texts, that are encoded at a time.
        dtype: precision of the model: "fp32", "bf16" or "fp16".
        device: where the model goes; None for the images' device.
    """

    batch_size: int = 8
    dtype: str = "fp32"
    device: torch.device | None = None


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A model that was loaded.

    Attributes:
        images: vectors (N, D) of N pictures.
        texts: vectors (N, D) of N texts.
        scale: exp(logit_scale), the inverse temperature it was trained with.
        head: a score (N, 1) of float32 image vectors of length 1, for a reward that has one.
    """

    images: Callable[[list[Image.Image]], Tensor]
    texts: Callable[[list[str]], Tensor]
    scale: float
    head: nn.Module | None = None


class EncoderReward(ABC):
    """A reward computed from the vectors of a model, which is loaded at the first call, once for each device.

    Args:
        weights: a local path or a hub name; None for the published weights.
        options: how the model runs.

    Raises:
        RewardError: for weights that are not there, and packages that are missing.
    """

    def __init__(self, weights: str | None = None, options: ModelOptions | None = None) -> None:
        self.weights, self.options = weights, options or ModelOptions()
        self._encoders: dict[torch.device, Encoder] = {}
        self.find()

    @abstractmethod
    def find(self) -> None:
        """Checks that the weights are there, without reading them."""

    @abstractmethod
    def load(self, device: torch.device) -> Encoder:
        """Reads the weights."""

    @abstractmethod
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores, float32 (N,), of float images (N, 3, H, W) in [0, 1] and N prompts."""

    def encoder(self, images: Tensor) -> Encoder:
        device = self.options.device or images.device
        if device not in self._encoders:
            self._encoders[device] = self.load(device)
        return self._encoders[device]

    def image_vectors(self, images: Tensor) -> Tensor:
        """float32 (N, D), each of length 1."""
        return self._vectors(self.encoder(images).images, to_pictures(images))

    def cosines(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosines of images and their prompts, float32 (N,). Each distinct prompt is encoded once."""
        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        texts = self._vectors(self.encoder(images).texts, list(rows))
        return (self.image_vectors(images) * texts[[rows[prompt] for prompt in prompts]]).sum(dim=1)

    def _vectors(self, encode: Callable[[list[Any]], Tensor], inputs: list[Any]) -> Tensor:
        size = self.options.batch_size
        parts = [encode(inputs[start : start + size]) for start in range(0, len(inputs), size)]
        return F.normalize(torch.cat(parts).float(), dim=1)


class ClipScore(EncoderReward):
    """100 times the cosine of an image and its prompt, by OpenAI's CLIP ViT-L/14.

    The weights are a folder as `CLIPModel.save_pretrained` and `CLIPProcessor.save_pretrained` write it, or a hub name.
    """

    published, processor = VIT_L, VIT_L

    def find(self) -> None:
        places = (self.published, self.processor) if self.weights is None else (self.weights, self.weights)
        self._model, self._processor = find_weights(places[0], CLIP_FILES[:1]), find_weights(places[1], CLIP_FILES)

    def load(self, device: torch.device) -> Encoder:
        return load_clip(self._model, self._processor, device, DTYPES[self.options.dtype])

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return 100 * self.cosines(images, prompts)


class PickScore(ClipScore):
    """PickScore of an image and its prompt, over 26: a CLIP ViT-H/14 trained on people's choices between two images."""

    published, processor = "yuvalkirstain/PickScore_v1", VIT_H

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.encoder(images).scale / PICKSCORE_SCALE * self.cosines(images, prompts)


class Aesthetic(ClipScore):
    """LAION's aesthetic score of an image, from CLIP ViT-L/14 and a linear head of five layers. Prompts are not used.

    Weights of one's own are a folder with the CLIP model, its processor, and the head as the only .pth file.
    """

    def find(self) -> None:
        super().find()
        if isinstance(self._model, Path) and self.weights is not None:
            heads = sorted(self._model.glob("*.pth"))
            if len(heads) != 1:
                raise RewardError(
                    f"looks for LAION's head in {self.weights}, which holds {len(heads)} .pth files; put "
                    f"{AESTHETIC_HEAD[1]} there, alone"
                )
            self._head: Path | None = heads[0]
        else:
            check_hub(*AESTHETIC_HEAD)
            self._head = None

    def load(self, device: torch.device) -> Encoder:
        from huggingface_hub import hf_hub_download

        state = torch.load(self._head or hf_hub_download(*AESTHETIC_HEAD), map_location="cpu", weights_only=True)
        head = aesthetic_head(state["layers.0.weight"].shape[1])
        head.load_state_dict({name.removeprefix("layers."): value for name, value in state.items()})
        return dataclasses.replace(super().load(device), head=head.float().eval().requires_grad_(False).to(device))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        head = self.encoder(images).head
        assert head is not None
        return head(self.image_vectors(images)).squeeze(1)


def aesthetic_head(width: int) -> nn.Sequential:
    """LAION's head for vectors of this length: linear layers, with nothing but dropout between them."""
    return nn.Sequential(
        nn.Linear(width, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )


def load_clip(model_at: Path | str, processor_at: Path | str, device: torch.device, dtype: torch.dtype) -> Encoder:
    """A CLIP model of transformers and its processor.

    Raises:
        RewardError: for weights that lack some of the model's.
        OSError: for files that cannot be read.
    """
    import transformers

    loaded: Any = transformers.CLIPModel.from_pretrained(model_at, dtype=dtype, output_loading_info=True)
    model, report = loaded
    if report["missing_keys"]:
        raise RewardError(f"the weights in {model_at} lack {', '.join(sorted(report['missing_keys'])[:3])}")
    model = model.eval().requires_grad_(False).to(device)
    # newer releases resize with torchvision where it is installed, which gives other pixels
    processor_class = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    processor = processor_class.from_pretrained(processor_at)
    tokenizer = transformers.AutoTokenizer.from_pretrained(processor_at)
    length = model.config.text_config.max_position_embeddings

    def images(pictures: list[Image.Image]) -> Tensor:
        pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
        # get_image_features returns other things in other releases
        return model.visual_projection(model.vision_model(pixels.to(device, dtype)).pooler_output)

    def texts(prompts: list[str]) -> Tensor:
        # a prompt's vector does not depend on how long the others are
        tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        ids, mask = (tokens[name].to(device) for name in ("input_ids", "attention_mask"))
        return model.text_projection(model.text_model(input_ids=ids, attention_mask=mask).pooler_output)

    return Encoder(images, texts, model.logit_scale.float().exp().item())
