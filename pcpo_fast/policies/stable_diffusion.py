"""Stable Diffusion 1.x, 2.x (StableDiffusionPipeline) and XL (StableDiffusionXLPipeline): UNets with DDIM."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from pcpo_fast.errors import SettingError
from pcpo_fast.policies import Conditioning
from pcpo_fast.policies.diffusers import DiffusersPolicy


class StableDiffusionPolicy(DiffusersPolicy):
    """StableDiffusionPipeline: a UNet that predicts epsilon or v."""

    denoiser_name = "unet"
    denoiser_class = "UNet2DConditionModel"
    served: ClassVar = {
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "addition_embed_type": (None,),
        # a projection of the prompt's embeddings inside of the model
        "encoder_hid_dim_type": (None, "text_proj"),
        "time_cond_proj_dim": (None,),
        "attention_type": ("default",),
        "dual_cross_attention": (False,),
    }
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

    served: ClassVar = {**StableDiffusionPolicy.served, "addition_embed_type": ("text_time",)}

    def __init__(self, pipeline: Any, settings: Any, **options: Any) -> None:
        super().__init__(pipeline, settings, **options)
        # original size, top left corner of the crop, target size
        time_ids = [[self.height, self.width, 0, 0, self.height, self.width]]
        self._time_ids = torch.tensor(time_ids, dtype=self.dtype, device=self.device)

    @classmethod
    def load_arguments(cls, settings):
        return {}

    @classmethod
    def check_parts(cls, model, configs):
        config, pooled = configs["unet"], configs.get("text_encoder_2", {}).get("projection_dim")
        total, each = config.get("projection_class_embeddings_input_dim"), config.get("addition_time_embed_dim")
        if pooled is None or total != pooled + 6 * (each or 0):
            raise SettingError(
                "model",
                f"{model!r} has projection_class_embeddings_input_dim={total!r} in unet/config.json, which leaves "
                "other time ids than two sizes and a corner, as the refiner does; give a base one",
            )

    def embed(self, prompt):
        embeddings, _, pooled, _ = self.encode_prompt(prompt, do_classifier_free_guidance=False)
        return Conditioning(embeddings=embeddings, pooled=pooled)

    def embed_negative(self):
        # without one, zeros or the empty prompt's, as the pipeline's own setting says
        negative = self.settings.negative_prompt
        _, embeddings, _, pooled = self.encode_prompt("", negative_prompt=negative, do_classifier_free_guidance=True)
        return Conditioning(embeddings=embeddings, pooled=pooled)

    def denoise(self, denoiser, sample, timestep, conditioning):
        added = {"text_embeds": conditioning.pooled, "time_ids": self._time_ids.expand(len(sample), -1)}
        return denoiser(sample, timestep, conditioning.embeddings, added_cond_kwargs=added).sample
