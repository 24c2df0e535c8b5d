"""Pipelines with random weights that tests build, save and train: real structure, small width.

Test modules import from here before pytest loads the fixtures (PYTEST_DONT_REWRITE).
"""

import json
import shutil
import string
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from pcpo_fast import train
from pcpo_fast.config import Config
from pcpo_fast.digits.models import build_tokenizer
from pcpo_fast.policies import Policy, load_policy
from pcpo_fast.presets import PRESETS
from pcpo_fast.rewards import Reward
from pcpo_fast.train import TrainerT
from pcpo_fast.trainer import Trainer

SD15_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}


def clip(tokenizer: CLIPTokenizer, with_projection: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    return (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            projection_dim=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def t5() -> tuple[T5EncoderModel, T5TokenizerFast]:
    vocab = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>", "\u2581")]
    tokenizer = T5TokenizerFast(vocab=vocab + [(letter, -3.0) for letter in string.ascii_lowercase], extra_ids=0)
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return T5EncoderModel(config), tokenizer


def autoencoder(**settings) -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=64,
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=4,
        **{"latent_channels": 4, **settings},
    )


def stable_diffusion(**scheduler_settings) -> StableDiffusionPipeline:
    """Stable Diffusion 1.5's blocks, four levels deep, 8 channels wide: 64x64 pixels, 8x8 latents."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    text_encoder = clip(tokenizer)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16, 16, 16),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=2,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    return StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**{**SD15_SCHEDULER, **scheduler_settings}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(**settings) -> StableDiffusionXLPipeline:
    """SDXL's three levels, both text encoders and the picture's size as an input: 64x64 pixels, 8x8 latents."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 2),
        layers_per_block=2,
        norm_num_groups=4,
        cross_attention_dim=32,
        attention_head_dim=(1, 2, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=16 + 6 * 4,
    )
    return StableDiffusionXLPipeline(
        vae=autoencoder(force_upcast=True),
        text_encoder=clip(tokenizer),
        text_encoder_2=clip(tokenizer, with_projection=True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**SD15_SCHEDULER),
        add_watermarker=False,
        **settings,
    )


def stable_diffusion_3(third_encoder: bool = False, **scheduler_settings) -> StableDiffusion3Pipeline:
    """SD3.5's blocks, two layers deep, one of them with two attentions: 64x64 pixels, 8x8 latents."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    text_encoder_3, tokenizer_3 = t5() if third_encoder else (None, None)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        vae=autoencoder(scaling_factor=1.5, shift_factor=0.06),
        text_encoder=clip(tokenizer, with_projection=True),
        text_encoder_2=clip(tokenizer, with_projection=True),
        text_encoder_3=text_encoder_3,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=tokenizer_3,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler_settings}),
    )


def flux(guidance_embeds: bool = True) -> FluxPipeline:
    """FLUX.1's blocks, two of each kind, with dynamic shifting: 64x64 pixels are 8x8 latents, packed to 16 tokens."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    text_encoder_2, tokenizer_2 = t5()
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    return FluxPipeline(
        vae=autoencoder(scaling_factor=0.4, shift_factor=0.1),
        text_encoder=clip(tokenizer),
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


# preset -> structure of its model
FAMILIES: dict[str, Callable[..., DiffusionPipeline]] = {
    "sd15": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "sd35": stable_diffusion_3,
    "flux": flux,
}


def save_stable_diffusion(folder: Path, **scheduler_settings) -> Path:
    """Saves `stable_diffusion(...)` as an ordinary diffusers folder and returns it."""
    stable_diffusion(**scheduler_settings).save_pretrained(folder)
    return folder


# settings of the smallest run in which everything happens
SMALL = {
    "tuning": "lora",
    "prompts": "animals",
    "rewards": ("jpeg_compressibility",),
    "eval_rewards": ("jpeg_incompressibility",),
    "epochs": 2,
    "prompts_per_epoch": 2,
    "group_size": 2,
    "micro_batch_size": 4,
    "num_inference_steps": 3,
    "gradient_accumulation_steps": 2,
    "eval_samples": 2,
    "eval_every": 0,
}


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """The folders of the saved `FAMILIES`."""
    folder = tmp_path_factory.mktemp("models")
    for name, build in FAMILIES.items():
        build().save_pretrained(folder / name)
    return {name: folder / name for name in FAMILIES}


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """The folder of a saved `stable_diffusion()`."""
    return save_stable_diffusion(tmp_path_factory.mktemp("model") / "sd15")


@pytest.fixture
def bare(models, tmp_path) -> Callable[[str], Path]:
    """A function that copies the folder of one of `FAMILIES` without its weights."""
    without = shutil.ignore_patterns("*.safetensors")
    return lambda family: Path(shutil.copytree(models[family], tmp_path / family, ignore=without))


def edit(path: Path, **entries) -> None:
    """Changes entries of a JSON file, which may not be there yet."""
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | entries))


@pytest.fixture
def one_thread():
    """Models this small are slower with more threads, and much slower where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_trainer(
    model: Path | str,
    folder: Path,
    policy: Policy | None = None,
    functions: Mapping[str, Reward] | None = None,
    **settings,
) -> Trainer:
    """A Trainer with SMALL settings and `settings` over them, as the command line makes it; or with a given policy, or
    with functions as its rewards."""
    config = Config().replace(model=str(model), output_dir=str(folder), **(SMALL | settings)).resolved()
    torch.manual_seed(config.run.seed)
    if policy is None:
        decode_batch, keep_reference = config.run.micro_batch_size, config.loss.kl_weight > 0
        policy = load_policy(config.model, decode_batch=decode_batch, keep_reference=keep_reference)
    return Trainer(config, policy, folder, functions)


# few images of the embedded models, and one optimizer step an epoch
FEW = {
    "prompts_per_epoch": 2,
    "group_size": 4,
    "micro_batch_size": 4,
    "num_inference_steps": 3,
    "gradient_accumulation_steps": 100,
    "epochs": 2,
    "eval_every": 1,
    "eval_samples": 4,
}


def make_preset_trainer(preset: str, folder: Path, kind: type[TrainerT] = Trainer, **settings) -> TrainerT:
    """A trainer of an embedded model with the settings of its preset, as the command line makes it, with FEW images."""
    config = PRESETS[preset].replace(output_dir=str(folder), **FEW | settings)
    return train.make_trainer(config, kind=kind)


def command(model: Path, folder: Path, **settings) -> list[str]:
    """The command line of a run with SMALL settings and `settings` over them."""
    arguments = []
    for name, value in ({"model": model, "output_dir": folder} | SMALL | settings).items():
        arguments.append("--" + name.replace("_", "-"))
        if value is not True:
            arguments += map(str, value if isinstance(value, tuple) else [value])
    return arguments


def records(folder: Path) -> list[dict]:
    """A run's metrics without what differs from one machine to the next; anything but strict JSON is an error."""

    def refuse(constant):
        raise ValueError(f"{constant} in {folder}/metrics.jsonl")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line, parse_constant=refuse) for line in lines]
    return [{key: value for key, value in record.items() if not key.startswith("time/")} for record in parsed]


def at_call(count: int, file: str | tuple[str, ...], act: Callable[[], object], function: str | None = None) -> None:
    """Calls `act` at the `count`-th call that the code of a file makes or takes, or that its `function` does.

    `file` is the end of its path, or several. Holds until sys.setprofile(None).
    """

    def profile(frame, event, argument):
        nonlocal count
        code = frame.f_code
        if event in ("call", "c_call") and code.co_filename.endswith(file) and function in (None, code.co_name):
            count -= 1
            if count == 0:
                act()

    sys.setprofile(profile)
