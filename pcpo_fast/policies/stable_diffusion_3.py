"""Stable Diffusion 3 and 3.5 (StableDiffusion3Pipeline): a transformer that predicts a velocity."""

from __future__ import annotations

import math

from pcpo_fast.errors import SettingError
from pcpo_fast.policies import Conditioning
from pcpo_fast.policies.diffusers import DiffusersPolicy


class StableDiffusion3Policy(DiffusersPolicy):
    """StableDiffusion3Pipeline, with or without its third text encoder, a T5."""

    denoiser_class = "SD3Transformer2DModel"
    # as Flow-GRPO has them (Liu et al., arXiv 2505.05470)
    lora_target_modules = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )
    transformer_blocks = ("JointTransformerBlock",)
    optional_settings = ("max_sequence_length", "t5")

    @classmethod
    def check(cls, settings, config, scale):
        super().check(settings, config, scale)
        # without a limit, positions are made for any size
        largest = (config.get("pos_embed_max_size") or math.inf) * cls.patch_size(config) * scale
        for name in ("resolution", "height", "width"):
            side = getattr(settings, name) or 0
            if side > largest:
                raise SettingError(
                    name, f"{side} is more than the {largest} that this model has positions for; lower it"
                )
        if settings.attention == "xformers" and settings.tuning == "full" and settings.dtype != "fp32":
            raise SettingError(
                "attention",
                "xformers wants queries, keys and values of one dtype, and the norms of SD3 leave two when all of it "
                "is trained in half precision; use sdpa, or tuning lora",
            )

    @classmethod
    def load_arguments(cls, settings):
        return {} if settings.t5 else {"text_encoder_3": None, "tokenizer_3": None}

    @classmethod
    def patch_size(cls, config):
        return config.get("patch_size", 2)

    def embed(self, prompt):
        embeddings, _, pooled, _ = self.encode_prompt(
            prompt,
            prompt_2=prompt,
            prompt_3=prompt,
            do_classifier_free_guidance=False,
            max_sequence_length=self.settings.max_sequence_length,
        )
        return Conditioning(embeddings=embeddings, pooled=pooled)

    def denoise(self, denoiser, sample, timestep, conditioning):
        return denoiser(
            sample,
            timestep=timestep,
            encoder_hidden_states=conditioning.embeddings,
            pooled_projections=conditioning.pooled,
        ).sample
