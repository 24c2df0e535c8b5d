"""Pipelines of the structure of real models, with random weights: as they are on a GPU, reduced for a CPU."""

from __future__ import annotations

from typing import Any

import torch

_SD_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
_CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
# preset -> structure: stable-diffusion-v1-5, stable-diffusion-xl-base-1.0, stable-diffusion-3.5-medium
PARTS: dict[str, dict[str, dict[str, Any]]] = {
    # the UNet keeps its defaults
    "sd15": {"unet": {"sample_size": 64, "cross_attention_dim": 768}, "vae": _SD_VAE, "text_encoder": _CLIP_L},
    "sdxl": {
        "unet": {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "use_linear_projection": True,
        },
        "vae": _SD_VAE | {"scaling_factor": 0.13025},
        "text_encoder": _CLIP_L,
        "text_encoder_2": _CLIP_G,
    },
    "sd35": {
        "transformer": {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        "vae": _SD_VAE
        | {
            "latent_channels": 16,
            "sample_size": 1024,
            "scaling_factor": 1.5305,
            "shift_factor": 0.0609,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
        "text_encoder": _CLIP_L,
        "text_encoder_2": _CLIP_G,
        "text_encoder_3": {
            "vocab_size": 32128,
            "d_model": 4096,
            "d_kv": 64,
            "d_ff": 10240,
            "num_layers": 24,
            "num_heads": 64,
            "feed_forward_proj": "gated-gelu",
        },
    },
}
_REDUCED_UNET = {"attention_head_dim": 2, "layers_per_block": 1, "norm_num_groups": 4}
# small enough for seconds on a CPU
REDUCED: dict[str, dict[str, Any]] = {
    "unet": {
        "sd15": _REDUCED_UNET | {"block_out_channels": (8, 16, 16, 16)},
        "sdxl": _REDUCED_UNET | {"block_out_channels": (8, 16, 16), "transformer_layers_per_block": 1},
    },
    "transformer": {
        "num_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 1,
        "caption_projection_dim": 16,
        "pos_embed_max_size": 64,
        "dual_attention_layers": (0,),
    },
    "vae": {"block_out_channels": (4, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4},
    "text_encoder": {"num_hidden_layers": 1, "vocab_size": 512},
    "text_encoder_2": {"num_hidden_layers": 1, "vocab_size": 512},
    "text_encoder_3": {"num_layers": 1, "num_heads": 8, "d_ff": 512, "vocab_size": 512},
}
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
# the tokenizers know no other tokens: every word is the second
CLIP_TOKENS = {"<|startoftext|>": 0, "<|endoftext|>": 1}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}


def make_parts(model: str, reduced: bool, reduced_text: bool = False) -> dict[str, torch.nn.Module]:
    """The pipeline's networks by name, on PyTorch's default device and in its default dtype; all of them reduced, or
    the text encoders alone."""
    import diffusers
    import transformers

    parts = {}
    for name, settings in PARTS[model].items():
        if reduced or (reduced_text and name in TEXT_ENCODERS):
            less = REDUCED[name]
            settings = settings | less.get(model, less)
        if name == "transformer":
            parts[name] = diffusers.SD3Transformer2DModel(**settings)
        elif name == "unet":
            parts[name] = diffusers.UNet2DConditionModel(**settings)
        elif name == "vae":
            parts[name] = diffusers.AutoencoderKL(**settings)
        elif name == "text_encoder_3":
            parts[name] = transformers.T5EncoderModel(transformers.T5Config(**settings))
        else:
            # Stable Diffusion 1.5 and XL take the first encoder's states as they are
            plain = name == "text_encoder" and model != "sd35"
            kind = transformers.CLIPTextModel if plain else transformers.CLIPTextModelWithProjection
            config = transformers.CLIPTextConfig(**settings, bos_token_id=0, eos_token_id=1, pad_token_id=1)
            parts[name] = kind(config)
    return parts


def make_pipeline(model: str, device: torch.device, reduced_text: bool = False) -> Any:
    """On a GPU in bfloat16, on a CPU reduced and in float32."""
    import diffusers
    from transformers import CLIPTokenizer, T5TokenizerFast

    torch.manual_seed(0)
    dtype, default = torch.bfloat16 if device.type == "cuda" else torch.float32, torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            parts: dict[str, Any] = make_parts(model, device.type == "cpu", reduced_text)
            # a table of positions is float32 whatever the default
            parts = {name: part.to(dtype) for name, part in parts.items()}
    finally:
        torch.set_default_dtype(default)
    clip = CLIPTokenizer(vocab=CLIP_TOKENS, merges=[], model_max_length=77)
    parts["tokenizer"] = clip
    if model == "sd15":
        unused = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return diffusers.StableDiffusionPipeline(**parts, **unused, scheduler=diffusers.DDIMScheduler(**SCHEDULER))
    parts["tokenizer_2"] = clip
    if model == "sdxl":
        scheduler = diffusers.DDIMScheduler(**SCHEDULER)
        return diffusers.StableDiffusionXLPipeline(**parts, scheduler=scheduler, add_watermarker=False)
    vocab = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>", "\u2581")]
    parts["tokenizer_3"] = T5TokenizerFast(vocab=vocab, extra_ids=0)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.StableDiffusion3Pipeline(**parts, scheduler=scheduler)
