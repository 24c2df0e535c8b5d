"""The parts of both digits models before any training, and pictures through the autoencoder."""

import json

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from pcpo_fast.digits.data import prompts
from pcpo_fast.digits.rewards import IMAGE_SIZE

MAX_PROMPT_TOKENS = 16
LATENT_SHAPE = (4, 8, 8)


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE with merges learnt from the prompts.

    Every byte has a token of its own, within a word and at its end, so that any text can be encoded.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    learner.train_from_iterator(
        prompts(), trainers.BpeTrainer(vocab_size=2000, end_of_word_suffix="</w>", show_progress=False)
    )
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_PROMPT_TOKENS)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids, (len(texts), 16) int64, padded as the pipeline pads them."""
    batch = tokenizer(texts, padding="max_length", max_length=MAX_PROMPT_TOKENS, truncation=True, return_tensors="pt")
    return batch.input_ids


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained text encoder: two layers, 64 wide."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            projection_dim=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=MAX_PROMPT_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_autoencoder() -> AutoencoderKL:
    """An untrained autoencoder, 3x32x32 to 4x8x8."""
    return AutoencoderKL(
        sample_size=IMAGE_SIZE,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=LATENT_SHAPE[0],
    )


def build_denoiser() -> UNet2DConditionModel:
    """An untrained denoiser: convolutions at 8x8, self- and cross-attention at 4x4, and no more, for speed."""
    return UNet2DConditionModel(
        sample_size=LATENT_SHAPE[1],
        in_channels=LATENT_SHAPE[0],
        out_channels=LATENT_SHAPE[0],
        block_out_channels=(16, 48),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type=None,
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=64,
        # diffusers reads this as the number of heads
        attention_head_dim=3,
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    )


def build_flow_text_encoder(text_encoder: CLIPTextModel) -> CLIPTextModelWithProjection:
    """The text encoder as Stable Diffusion 3 takes it: with a projection of the last token, here the identity."""
    projected = CLIPTextModelWithProjection(text_encoder.config)
    # transformers 5 dropped the module between the model and its layers
    layers = getattr(text_encoder, "text_model", text_encoder)
    projected.text_model.load_state_dict(layers.state_dict())
    torch.nn.init.eye_(projected.text_projection.weight)
    return projected.eval().requires_grad_(False)


def build_flow_transformer() -> SD3Transformer2DModel:
    """An untrained velocity predictor: 16 patches of 2x2 latents attend with the prompt's tokens."""
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SHAPE[1],
        patch_size=2,
        in_channels=LATENT_SHAPE[0],
        out_channels=LATENT_SHAPE[0],
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        # two text encoders, side by side
        joint_attention_dim=128,
        pooled_projection_dim=128,
        caption_projection_dim=64,
        pos_embed_max_size=8,
    )
    # every block starts as the identity, as in DiT
    modulations = [transformer.norm_out.linear, transformer.proj_out]
    for block in transformer.transformer_blocks:
        modulations += [block.norm1.linear, block.norm1_context.linear]
    for linear in modulations:
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    return transformer


def build_flow_pipeline(autoencoder: AutoencoderKL, text_encoder: CLIPTextModel) -> StableDiffusion3Pipeline:
    """An untrained flow pipeline around the denoiser's autoencoder and text encoder, which it leaves as they are."""
    # Stable Diffusion 3 adds a shift, which must be a number
    shifted = build_autoencoder().eval().requires_grad_(False)
    shifted.load_state_dict(autoencoder.state_dict())
    shifted.register_to_config(scaling_factor=autoencoder.config.scaling_factor, shift_factor=0.0)
    tokenizer = build_tokenizer()
    projected = build_flow_text_encoder(text_encoder)
    return StableDiffusion3Pipeline(
        vae=shifted,
        text_encoder=projected,
        text_encoder_2=projected,
        text_encoder_3=None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=None,
        transformer=build_flow_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


@torch.no_grad()
def encode(autoencoder: AutoencoderKL, images: Tensor, scale: float | None = None) -> Tensor:
    """Mean latents of (N, 3, 32, 32) pictures, (N, 4, 8, 8), times `scale` (by default the scaling factor)."""
    scale = autoencoder.config.scaling_factor if scale is None else scale
    return torch.cat([autoencoder.encode(batch).latent_dist.mean for batch in images.split(128)]) * scale


@torch.no_grad()
def decode(autoencoder: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pictures, (N, 3, 32, 32) in [-1, 1], of scaled latents (N, 4, 8, 8)."""
    latents = latents / autoencoder.config.scaling_factor
    return torch.cat([autoencoder.decode(batch).sample for batch in latents.split(128)]).clamp(-1, 1)
