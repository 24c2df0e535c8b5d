"""FLUX.1 (FluxPipeline): packed latents, and a guidance scale that is an input of the model."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from pcpo_fast.errors import SettingError
from pcpo_fast.policies import Conditioning
from pcpo_fast.policies.diffusers import DiffusersPolicy


def _sigmas(num_inference_steps: int) -> list[float]:
    return np.linspace(1.0, 1 / num_inference_steps, num_inference_steps).tolist()


class FluxPolicy(DiffusersPolicy):
    """FluxPipeline. Its latents are packed: 2x2 of the autoencoder's cells are one token."""

    denoiser_class = "FluxTransformer2DModel"
    # the packing of the latents is the pipeline's
    served: ClassVar = {"patch_size": (1,)}
    cells_per_token = 4
    lora_target_modules = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )
    transformer_blocks = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    optional_settings = ("max_sequence_length",)
    attention_packages = ("xformers", "flash")
    sigmas = staticmethod(_sigmas)

    @classmethod
    def check(cls, settings, config, scale):
        if not config.get("guidance_embeds", False) and settings.guidance_scale != 1:
            raise SettingError(
                "guidance_scale",
                f"{settings.guidance_scale} has no meaning for this FLUX model, which takes no guidance "
                "(guidance_embeds is off); use 1",
            )
        if settings.negative_prompt is not None:
            raise SettingError(
                "negative_prompt",
                f"{settings.model} ({cls.__name__}) has no second output to steer away from: its guidance is an input; "
                "leave this setting out",
            )
        super().check(settings, config, scale)

    @classmethod
    def default_size(cls, config, scale):
        # FluxPipeline.default_sample_size, which no file holds
        return 128 * scale, 128 * scale

    @classmethod
    def patch_size(cls, config):
        return 2

    def uses_cfg(self):
        return False

    def latent_shape_at(self, rows, columns):
        return ((rows // 2) * (columns // 2), self.denoiser.config.in_channels)

    def embed(self, prompt):
        embeddings, pooled, _ = self.encode_prompt(prompt, max_sequence_length=self.settings.max_sequence_length)
        return Conditioning(embeddings=embeddings, pooled=pooled)

    def denoise(self, denoiser, sample, timestep, conditioning):
        sides = [side // self.pipeline.vae_scale_factor // 2 for side in (self.height, self.width)]
        row, column = torch.meshgrid(*[torch.arange(cells, device=sample.device) for cells in sides], indexing="ij")
        image_ids = torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1)
        guidance = None
        if denoiser.config.guidance_embeds:
            guidance = torch.full((len(sample),), self.guidance_scale, device=sample.device)
        return denoiser(
            sample,
            # rounded first, as the pipeline does
            timestep=timestep.to(sample.dtype) / self.pipeline.scheduler.config.num_train_timesteps,
            guidance=guidance,
            encoder_hidden_states=conditioning.embeddings,
            pooled_projections=conditioning.pooled,
            txt_ids=sample.new_zeros(conditioning.embeddings.shape[1], 3),
            img_ids=image_ids.to(sample.dtype),
        ).sample

    def unpack(self, latents):
        return self.pipeline._unpack_latents(latents, self.height, self.width, self.pipeline.vae_scale_factor)

    def use_attention_package(self, denoiser, name):
        denoiser.set_attention_backend(name)
