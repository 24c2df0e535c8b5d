"""Presets: whole sets of settings by name, each the starting point of a command line."""

from __future__ import annotations

from pcpo_fast.config import Config

# shared by the embedded models; `pcpo study evidence` found constant credit, the default, and their learning rates
# best, and after 16 epochs most of the reward is gained
_DIGITS = Config().replace(
    tuning="full",
    num_inference_steps=10,
    # it bounds means over the latent's elements: 256 here, a 64th of Stable Diffusion's, so it is wider
    clip_range=1e-3,
    epochs=16,
    prompts_per_epoch=8,
    group_size=32,
    micro_batch_size=64,
    gradient_accumulation_steps=10,
    eval_every=4,
    eval_samples=320,
)
# shared by the models from a hub
_HUB = Config().replace(
    dtype="bf16",
    prompts="animals",
    rewards=("jpeg_compressibility",),
    eval_rewards=(),
    epochs=100,
    prompts_per_epoch=8,
    eval_every=10,
    eval_samples=32,
)

PRESETS: dict[str, Config] = {
    "digits": _DIGITS.replace(guidance_scale=1.5, learning_rate=2e-4),
    # the embedded flow model, which needs no guidance
    "digits-flow": _DIGITS.replace(model="digits-flow", guidance_scale=1.0, max_sequence_length=16, learning_rate=4e-4),
    "sd15": _HUB.replace(
        model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        lora_rank=16,
        lora_alpha=16,
        num_inference_steps=50,
        guidance_scale=5.0,
        group_size=16,
        micro_batch_size=8,
        gradient_accumulation_steps=100,
    ),
    "sdxl": _HUB.replace(
        model="stabilityai/stable-diffusion-xl-base-1.0",
        release_text_encoders=True,
        learning_rate=1e-4,
        lora_rank=16,
        lora_alpha=16,
        num_inference_steps=50,
        guidance_scale=5.0,
        group_size=16,
        micro_batch_size=4,
        gradient_accumulation_steps=200,
    ),
    "sd35": _HUB.replace(
        model="stabilityai/stable-diffusion-3.5-medium",
        release_text_encoders=True,
        lora_rank=32,
        lora_alpha=64,
        num_inference_steps=10,
        sampler="flow",
        shift=3.0,
        guidance_scale=4.5,
        group_size=24,
        micro_batch_size=8,
        gradient_accumulation_steps=54,
    ),
    "flux": _HUB.replace(
        model="black-forest-labs/FLUX.1-dev",
        release_text_encoders=True,
        lora_rank=32,
        lora_alpha=64,
        num_inference_steps=16,
        sampler="dance",
        shift=3.0,
        guidance_scale=3.5,
        group_size=12,
        micro_batch_size=4,
        gradient_accumulation_steps=90,
    ),
}
