"""A denoiser as a policy: prompts -> conditioning, latents -> model output, latents -> images.

The trainer knows a policy by these members alone: `encode`, `predict`, `decode`, `latent_shape`, `dtype`, `device`,
`trainable_parameters`, `save` and `load`. A new family of models is a new class with them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcpo_fast.config import ASSETS, Config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class StableDiffusionPolicy:
    """The UNet of a diffusers StableDiffusionPipeline, with classifier-free guidance, as a policy.

    Frozen weights are kept in the policy's dtype and trained ones in float32; with bf16 and fp16 the UNet runs under
    autocast. The guided output is combined in float32 and rounded once to the policy's dtype, by the same code at
    rollout and in training, so that the ratio before the first update is exactly 1.
    """

    def __init__(self, pipeline: Any, config: Config, device: torch.device) -> None:
        self.pipeline = pipeline
        self.unet = pipeline.unet
        self.device = device
        self.dtype = DTYPES[config.dtype]
        self.guidance_scale = config.guidance_scale
        self.tuning = config.tuning
        self.decode_batch = config.micro_batch_size

        pipeline.set_progress_bar_config(disable=True)
        for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            # eval: dropout would make the output of training differ from that of the rollout
            module.requires_grad_(False).eval().to(device)
        if config.tuning == "lora":
            self._add_adapter(config)
        else:
            self.unet.requires_grad_(True)
        if config.attention == "xformers":
            self.unet.enable_xformers_memory_efficient_attention()

        side = config.resolution or self.unet.config.sample_size * pipeline.vae_scale_factor
        if side % pipeline.vae_scale_factor:
            raise ValueError(
                f"--resolution {side} is not a multiple of {pipeline.vae_scale_factor}, the autoencoder's scale factor"
            )
        self.latent_shape = (self.unet.config.in_channels, *[side // pipeline.vae_scale_factor] * 2)
        self._uncond = self._embed([""])

    @classmethod
    def from_pretrained(cls, config: Config) -> StableDiffusionPolicy:
        """Loads the pipeline that `config.model` names: a local folder, a hub name, or "digits".

        Raises:
            ValueError: for a device or an attention backend that this machine cannot run, and for pipelines that are
                not Stable Diffusion's.
            FileNotFoundError: for a folder that is not there.
        """
        device = find_device(config.device)
        if config.attention == "xformers":
            _check_xformers(device)
        from diffusers import StableDiffusionPipeline

        model = str(ASSETS / "digits") if config.model == "digits" else config.model
        # a hub name has the form owner/name and is no path on this machine
        is_path = model.startswith((".", "/", "~")) or model.count("/") != 1 or Path(model).parent.exists()
        if is_path and not (Path(model).expanduser() / "model_index.json").is_file():
            raise FileNotFoundError(
                f"--model {config.model!r} is no diffusers pipeline: there is no {model}/model_index.json. Give a "
                "folder that DiffusionPipeline.save_pretrained wrote, a hub name (owner/name), or digits"
            )
        source = Path(model).expanduser() if is_path else model
        index: Any = StableDiffusionPipeline.load_config(source)
        kind = index["_class_name"]
        if kind != "StableDiffusionPipeline":
            raise ValueError(
                f"--model {config.model!r} is a {kind}, which this policy cannot run; give a StableDiffusionPipeline"
            )
        dtype = DTYPES[config.dtype]
        pipeline = StableDiffusionPipeline.from_pretrained(
            source,
            torch_dtype={"default": dtype, "unet": dtype if config.tuning == "lora" else torch.float32},
            safety_checker=None,
            requires_safety_checker=False,
        )
        return cls(pipeline, config, device)

    def encode(self, prompts: list[str]) -> Tensor:
        """Text embeddings (N, tokens, width) in the policy's dtype."""
        return torch.cat([self._embed([prompt]) for prompt in prompts])

    def predict(self, sample: Tensor, timestep: Tensor, conditioning: Tensor) -> Tensor:
        """The guided model output m, differentiable in the trained weights.

        Args:
            sample: float32 (rows, C, H, W), the latents x.
            timestep: int64 (rows,).
            conditioning: (rows, tokens, width), from `encode`.

        Returns:
            (rows, C, H, W) in the policy's dtype: u + guidance_scale (c - u), rounded once
            (Ho and Salimans, arXiv 2207.12598).
        """
        rows = len(sample)
        if self.guidance_scale == 1:
            return self._denoise(sample, timestep, conditioning).to(self.dtype)
        conditioning = torch.cat([self._uncond.expand(rows, -1, -1), conditioning])
        output = self._denoise(torch.cat([sample, sample]), torch.cat([timestep, timestep]), conditioning)
        uncond, cond = output.float().chunk(2)
        return (uncond + self.guidance_scale * (cond - uncond)).to(self.dtype)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images, float32 (N, 3, H, W) in [0, 1], of latents (N, C, h, w)."""
        vae = self.pipeline.vae
        images = [
            vae.decode((batch / vae.config.scaling_factor).to(self.dtype)).sample.float()
            for batch in latents.split(self.decode_batch)
        ]
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1)

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """The float32 parameters that the optimiser updates, in a fixed order."""
        return [parameter for parameter in self.unet.parameters() if parameter.requires_grad]

    def save(self, folder: Path) -> None:
        """Writes the trained weights as diffusers reads them: LoRA for `pipeline.load_lora_weights(folder)`, or the
        whole UNet for `UNet2DConditionModel.from_pretrained(folder)`."""
        if self.tuning == "full":
            self.unet.save_pretrained(folder)
            return
        from peft import get_peft_model_state_dict

        self.pipeline.save_lora_weights(
            folder,
            unet_lora_layers=get_peft_model_state_dict(self.unet),
            unet_lora_adapter_metadata=self.unet.peft_config["default"].to_dict(),
        )

    def load(self, folder: Path) -> None:
        """Reads back, bit for bit, what `save` wrote for the same model and tuning.

        Raises:
            ValueError: if the weights in `folder` are another adapter's or another model's.
        """
        if self.tuning == "full":
            state = type(self.unet).from_pretrained(folder).state_dict()
            try:
                self.unet.load_state_dict(state)
            except RuntimeError as error:
                raise ValueError(
                    f"the UNet in {folder} is not built as this model's; resume with the run's own --model"
                ) from error
            return
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        prefix = f"{self.pipeline.unet_name}."
        state = {
            name.removeprefix(prefix): tensor
            for name, tensor in load_file(folder / "pytorch_lora_weights.safetensors").items()
        }
        try:
            result = set_peft_model_state_dict(self.unet, state)
        except RuntimeError as error:
            raise ValueError(f"the adapter in {folder} does not fit this model and --lora-rank: {error}") from error
        if result is not None and result.unexpected_keys:
            raise ValueError(
                f"the adapter in {folder} has layers that this model's adapter has not ({result.unexpected_keys[0]}, "
                "...); resume with the run's own --model and --lora-target-modules"
            )

    def _denoise(self, sample: Tensor, timestep: Tensor, conditioning: Tensor) -> Tensor:
        mixed = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype) if mixed else contextlib.nullcontext():
            return self.unet(sample.to(self.dtype), timestep, conditioning).sample

    @torch.no_grad()
    def _embed(self, prompts: list[str]) -> Tensor:
        embeddings, _ = self.pipeline.encode_prompt(prompts, self.device, 1, do_classifier_free_guidance=False)
        return embeddings.to(self.dtype)

    def _add_adapter(self, config: Config) -> None:
        from diffusers.training_utils import cast_training_params
        from peft import LoraConfig

        self.unet.add_adapter(
            LoraConfig(
                r=config.lora_rank,
                lora_alpha=config.lora_alpha,
                target_modules=list(config.lora_target_modules),
                init_lora_weights="gaussian",
            )
        )
        cast_training_params(self.unet, dtype=torch.float32)


def find_device(name: str) -> torch.device:
    """The device that `--device` names; "auto" is a GPU if there is one.

    Raises:
        ValueError: for another name, or a GPU that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"--device {name} is not supported; choose auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    count = torch.cuda.device_count()
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= count):
        raise ValueError(
            f"--device {name} is not there: this machine shows {count} GPU(s) to PyTorch {torch.__version__}; use "
            "--device auto or cpu, or install a PyTorch build for your GPU"
        )
    return device


def _check_xformers(device: torch.device) -> None:
    if importlib.util.find_spec("xformers") is None:
        raise ValueError(
            "--attention xformers needs the package xformers, which is not installed; pip install "
            "'pcpo-fast[xformers]', or use --attention sdpa"
        )
    if device.type != "cuda":
        raise ValueError(f"--attention xformers runs on a GPU and the device is {device}; use --attention sdpa")
