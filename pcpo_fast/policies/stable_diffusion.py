"""Stable Diffusion 1.x, 2.x (StableDiffusionPipeline) and XL (StableDiffusionXLPipeline): UNets with DDIM."""

from __future__ import annotations

from typing import Any

import torch

from pcpo_fast.policies import Conditioning
from pcpo_fast.policies.diffusers import DiffusersPolicy


class StableDiffusionPolicy(DiffusersPolicy):
    """StableDiffusionPipeline: a UNet that predicts epsilon or v."""

    denoiser_name = "unet"
    lora_target_modules = ("to_q", "to_k", "to_v", "to_out.0")
    transformer_blocks = ("BasicTransformerBlock",)
    optional_settings = ("channels_last",)

    @classmethod
    def load_arguments(cls, settings):
        return {"requires_safety_checker": False}

    def embed(self, prompt):
        embeddings, _ = self.encode_prompt(prompt, num_images_per_prompt=1, do_classifier_free_guidance=False)
        return Conditioning(embeddings=embeddings)

    def denoise(self, denoiser, sample, timestep, conditioning):
        return denoiser(sample, timestep, conditioning.embeddings).sample


class StableDiffusionXLPolicy(StableDiffusionPolicy):
    """StableDiffusionXLPipeline: two text encoders, pooled embeddings, and the picture's size as time ids."""

    def __init__(self, pipeline: Any, settings: Any, **options: Any) -> None:
        super().__init__(pipeline, settings, **options)
        # original size, top left corner of the crop, target size
        time_ids = [[self.side, self.side, 0, 0, self.side, self.side]]
        self._time_ids = torch.tensor(time_ids, dtype=self.dtype, device=self.device)

    @classmethod
    def load_arguments(cls, settings):
        return {}

    def embed(self, prompt):
        embeddings, _, pooled, _ = self.encode_prompt(prompt, do_classifier_free_guidance=False)
        return Conditioning(embeddings=embeddings, pooled=pooled)

    def embed_empty(self):
        # zeros or the empty prompt's, as the pipeline's own setting says
        _, embeddings, _, pooled = self.encode_prompt("", do_classifier_free_guidance=True)
        return Conditioning(embeddings=embeddings, pooled=pooled)

    def denoise(self, denoiser, sample, timestep, conditioning):
        added = {"text_embeds": conditioning.pooled, "time_ids": self._time_ids.expand(len(sample), -1)}
        return denoiser(sample, timestep, conditioning.embeddings, added_cond_kwargs=added).sample
