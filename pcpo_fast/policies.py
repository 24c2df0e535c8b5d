"""A denoiser as a policy: prompts -> conditioning, latents -> model output, latents -> images.

The trainer knows a policy by these members alone: `encode`, `predict`, `reference`, `decode`, `make_table`,
`make_eval_table`, `latent_shape`, `dtype`, `device`, `graph_key`, `trainable_parameters`, `save`, `load` and
`release_text_encoders`.
`DiffusersPolicy` has them for any diffusers pipeline; what one family of models has for itself is a subclass of a few
lines.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import re
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from pcpo_fast.config import NOISE_LEVELS, Config
from pcpo_fast.tables import StepTable, ddim_table, flow_table, shifted_sigmas

# PyTorch's own kernels, one of which it picks where none is named
SDPA_KERNELS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
# by the setting: the module, and what to install
ATTENTION_PACKAGES = {"xformers": ("xformers", "'pcpo-fast[xformers]'"), "flash": ("flash_attn", "flash-attn")}
# kinds of block times shapes of latents times with and without gradients, and room
COMPILED_VARIANTS = 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# the models that come with the package
DIGITS = Path(__file__).parent / "digits"
EMBEDDED = {"digits": DIGITS / "diffusion", "digits-flow": DIGITS / "flow"}


@dataclasses.dataclass
class Conditioning:
    """What a denoiser is told of N prompts.

    Attributes:
        embeddings: (N, tokens, width), for cross- or joint attention.
        pooled: (N, width), for the models that take it.
    """

    embeddings: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.embeddings)

    def __getitem__(self, rows: Any) -> Conditioning:
        return Conditioning(self.embeddings[rows], None if self.pooled is None else self.pooled[rows])

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.embeddings, self.pooled) if tensor is not None]

    def to(self, device: torch.device) -> Conditioning:
        return Conditioning(*(tensor.to(device) for tensor in self.tensors()))

    def expand(self, rows: int) -> Conditioning:
        """A single prompt's, for that many rows."""
        return Conditioning(*(tensor.expand(rows, *tensor.shape[1:]) for tensor in self.tensors()))

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        return Conditioning(*(torch.cat(tensors) for tensors in zip(*(part.tensors() for part in parts), strict=True)))


class DiffusersPolicy:
    """The denoiser of a diffusers pipeline, with classifier-free guidance, as a policy.

    Trained weights are kept in float32 and frozen ones as the pipeline has them, which `load_policy` loads in the
    policy's dtype; with bf16 and fp16 the denoiser runs under autocast. The guided output is combined in float32 and
    rounded once to the policy's dtype, by the same code at rollout and in training, so that the ratio before the first
    update is exactly 1.
    """

    # the denoiser's name in the pipeline
    denoiser_name: ClassVar[str] = "transformer"
    lora_target_modules: ClassVar[tuple[str, ...]]
    samplers: ClassVar[tuple[str, ...]] = ("flow", "dance", "cps")
    # a pixel side must be a multiple of the autoencoder's scale factor times this
    patch_size: ClassVar[int] = 1
    # the classes of the denoiser's blocks that --compile compiles
    transformer_blocks: ClassVar[tuple[str, ...]]

    def __init__(self, pipeline: Any, config: Config, device: torch.device) -> None:
        self.pipeline = pipeline
        self.denoiser = getattr(pipeline, self.denoiser_name)
        self.device = device
        self.dtype = DTYPES[config.dtype]
        self.guidance_scale = config.guidance_scale
        self.tuning = config.tuning
        self.decode_batch = config.micro_batch_size
        self.max_sequence_length = config.max_sequence_length

        pipeline.set_progress_bar_config(disable=True)
        for module in self._modules():
            # eval: dropout would make the output of training differ from that of the rollout
            module.requires_grad_(False).eval().to(device)
        if self.dtype == torch.float16 and pipeline.vae.config.force_upcast:
            pipeline.vae.to(torch.float32)
        # before any adapter: the weights that the KL term pulls towards
        wants_copy = config.tuning == "full" and config.kl_weight > 0
        self._frozen = copy.deepcopy(self.denoiser) if wants_copy else None
        if config.tuning == "lora":
            self._add_adapter(config)
        else:
            self.denoiser.float().requires_grad_(True)
        if config.channels_last:
            pipeline.vae.to(memory_format=torch.channels_last)
        self._attention = SDPA_KERNELS.get(config.attention)
        for denoiser in filter(None, (self.denoiser, self._frozen)):
            self._set_execution(denoiser, config)

        scale = pipeline.vae_scale_factor
        side = config.resolution or self._default_side()
        if side % (scale * self.patch_size):
            raise ValueError(
                f"--resolution {side} is not a multiple of {scale * self.patch_size}, the autoencoder's scale factor"
                + (" times the patch size" if self.patch_size > 1 else "")
            )
        self.side = side
        self.latent_shape = self._latent_shape(side // scale)
        # each prompt is encoded once; in main memory, as there may be many
        self._encoded: dict[str, Conditioning] = {}
        self._uncond = self._embed_empty().to(device) if self._guides() else None

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The conditioning of N prompts, on the device. The text encoders see every prompt once.

        Raises:
            ValueError: for a prompt that was not encoded before the text encoders were released.
        """
        for prompt in prompts:
            if prompt not in self._encoded:
                self._encoded[prompt] = self._embed(prompt).to(torch.device("cpu"))
        return Conditioning.cat([self._encoded[prompt] for prompt in prompts]).to(self.device)

    def release_text_encoders(self, prompts: Sequence[str]) -> None:
        """Encodes `prompts`, the only ones that `encode` can be given from then on, and frees the text encoders."""
        self.encode(prompts)
        for name in self._text_encoder_names():
            setattr(self.pipeline, name, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def predict(self, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """The guided model output m, differentiable in the trained weights.

        Args:
            sample: float32 (rows, *latent_shape), the latents x.
            timestep: (rows,), as the step table has it.
            conditioning: of `rows` prompts, from `encode`.

        Returns:
            (rows, *latent_shape) in the policy's dtype: u + guidance_scale (c - u), rounded once
            (Ho and Salimans, arXiv 2207.12598).
        """
        return self._guided(self.denoiser, sample, timestep, conditioning)

    @torch.no_grad()
    def reference(self, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """The same of the model as it was before any training: without its adapter, or a frozen copy's.

        With full tuning there is a copy only if the policy was made with a `kl_weight` above 0.
        """
        if self._frozen is not None:
            return self._guided(self._frozen, sample, timestep, conditioning)
        self.denoiser.disable_adapters()
        try:
            return self._guided(self.denoiser, sample, timestep, conditioning)
        finally:
            self.denoiser.enable_adapters()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images, float32 (N, 3, H, W) in [0, 1], of latents (N, *latent_shape); some at a time."""
        vae = self.pipeline.vae
        scale, shift = 1 / vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0
        mean, std = (vae.config.get(f"latents_{name}") for name in ("mean", "std"))
        if mean is not None and std is not None:
            shift, std = (torch.tensor(values, device=self.device).view(1, -1, 1, 1) for values in (mean, std))
            scale = scale * std
        images = [
            vae.decode((self._unpack(batch) * scale + shift).to(vae.dtype)).sample.float()
            for batch in latents.split(self.decode_batch)
        ]
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1)

    def make_table(self, config: Config, *, window: tuple[int, int] | None = None) -> StepTable:
        """The sampler that `config` asks for, on the model's own schedule, with only the steps of `window` stochastic.

        Raises:
            ValueError: for a sampler of another family of models, and for whatever the builders of tables refuse.
        """
        sampler = config.sampler or self.samplers[0]
        if sampler not in self.samplers:
            raise ValueError(
                f"--sampler {sampler} is not one for {type(self.pipeline).__name__}; choose {', '.join(self.samplers)}"
            )
        if config.eta is not None:
            raise ValueError("--eta is DDIM's; the samplers of flow models take --noise-level")
        noise_level = NOISE_LEVELS[sampler] if config.noise_level is None else config.noise_level
        settings: dict[str, Any] = {
            "sde": sampler,
            "noise_level": noise_level,
            "credit": config.credit,
            "target_weight": config.target_weight,
            "normalized": config.normalized_log_prob,
            "window": window,
        }
        if config.shift is not None:
            training_steps = self.pipeline.scheduler.config.num_train_timesteps
            sigmas = shifted_sigmas(config.num_inference_steps, config.shift)
            return flow_table(sigmas, num_train_timesteps=training_steps, **settings)
        return flow_table.from_scheduler(
            self.pipeline.scheduler,
            config.num_inference_steps,
            sigmas=self._sigmas(config.num_inference_steps),
            image_seq_len=self._image_seq_len(),
            **settings,
        )

    def make_eval_table(self, config: Config) -> StepTable:
        """The sampler that users of the model have, on the same schedule: for flow models the ODE."""
        plain = {"noise_level": 0.0, "credit": "native", "target_weight": None}
        return self.make_table(dataclasses.replace(config, **plain))

    def graph_key(self) -> Hashable:
        """Changes whenever a captured call of `predict` is no longer what a call would be: weights that lie elsewhere,
        another adapter, dtype, resolution or guidance. Weights that change in place do not count."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        adapters = tuple(
            (module.disable_adapters, tuple(module.active_adapters), tuple(getattr(module, "scaling", {}).values()))
            for module in self.denoiser.modules()
            if isinstance(module, BaseTunerLayer)
        )
        weights = tuple(parameter.data_ptr() for parameter in self.denoiser.parameters())
        return self.dtype, self.latent_shape, self.guidance_scale, adapters, weights

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """The float32 parameters that the optimiser updates, in a fixed order."""
        return [parameter for parameter in self.denoiser.parameters() if parameter.requires_grad]

    def save(self, folder: Path) -> None:
        """Writes the trained weights as diffusers reads them: LoRA for `pipeline.load_lora_weights(folder)`, or the
        whole denoiser for its class's `from_pretrained(folder)`."""
        if self.tuning == "full":
            self.denoiser.save_pretrained(folder)
            return
        from peft import get_peft_model_state_dict

        # a set, whose order is another one in every process
        metadata = self.denoiser.peft_config["default"].to_dict()
        metadata["target_modules"] = sorted(metadata["target_modules"])
        layers = {
            f"{self.denoiser_name}_lora_layers": get_peft_model_state_dict(self.denoiser),
            f"{self.denoiser_name}_lora_adapter_metadata": metadata,
        }
        self.pipeline.save_lora_weights(folder, **layers)

    def load(self, folder: Path) -> None:
        """Reads back, bit for bit, what `save` wrote for the same model and tuning.

        Raises:
            ValueError: if the weights in `folder` are another adapter's or another model's.
        """
        if self.tuning == "full":
            state = type(self.denoiser).from_pretrained(folder).state_dict()
            try:
                self.denoiser.load_state_dict(state)
            except RuntimeError as error:
                raise ValueError(
                    f"the denoiser in {folder} is not built as this model's; resume with the run's own --model"
                ) from error
            return
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        prefix = f"{self.denoiser_name}."
        state = {
            name.removeprefix(prefix): tensor
            for name, tensor in load_file(folder / "pytorch_lora_weights.safetensors").items()
        }
        try:
            result = set_peft_model_state_dict(self.denoiser, state)
        except RuntimeError as error:
            raise ValueError(f"the adapter in {folder} does not fit this model and --lora-rank: {error}") from error
        if result is not None and result.unexpected_keys:
            raise ValueError(
                f"the adapter in {folder} has layers that this model's adapter has not ({result.unexpected_keys[0]}, "
                "...); resume with the run's own --model and --lora-target-modules"
            )

    # what a family of models has for itself

    def _embed(self, prompt: str) -> Conditioning:
        """The conditioning of one prompt, in the policy's dtype."""
        raise NotImplementedError

    def _embed_empty(self) -> Conditioning:
        """The conditioning that guidance steers away from, as the pipeline has it."""
        return self._embed("")

    def _denoise(self, denoiser: Any, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """The model's output for latents in the policy's dtype, without guidance."""
        raise NotImplementedError

    def _guides(self) -> bool:
        """Whether `predict` combines two outputs."""
        return self.guidance_scale != 1

    def _latent_shape(self, side: int) -> tuple[int, ...]:
        """The shape of a latent as the sampler sees it, `side` of the autoencoder's pixels wide and high."""
        return (self.denoiser.config.in_channels, side, side)

    def _unpack(self, latents: Tensor) -> Tensor:
        """(N, *latent_shape) -> (N, C, h, w)."""
        return latents

    def _default_side(self) -> int:
        return self.denoiser.config.sample_size * self.pipeline.vae_scale_factor

    def _sigmas(self, num_inference_steps: int) -> list[float] | None:
        """The pipeline's own noise levels before shifting; None where it leaves them to its scheduler."""
        return None

    def _image_seq_len(self) -> int:
        """The number of patches, which dynamic shifting goes by."""
        return (self.side // self.pipeline.vae_scale_factor // self.patch_size) ** 2

    def _use_attention_package(self, denoiser: Any, name: str) -> None:
        """Sets a denoiser's attention to that of the package `name`, "xformers" or "flash".

        Raises:
            ValueError: for one that diffusers does not offer for this denoiser.
        """
        if name == "flash":
            raise ValueError(
                f"--attention flash is for FLUX alone, and the model is a {type(self.pipeline).__name__}; use "
                "--attention sdpa-flash, PyTorch's own flash attention"
            )
        denoiser.enable_xformers_memory_efficient_attention()

    # shared

    def _set_execution(self, denoiser: Any, config: Config) -> None:
        """How the denoiser is run; what it computes stays the same but for rounding."""
        if config.attention in ATTENTION_PACKAGES:
            self._use_attention_package(denoiser, config.attention)
        if config.channels_last:
            if self.denoiser_name != "unet":
                raise ValueError(
                    f"--channels-last is for the convolutions of UNets, and {type(self.pipeline).__name__} has a "
                    "transformer; leave it out"
                )
            denoiser.to(memory_format=torch.channels_last)
            # files hold weights in their usual order
            denoiser.register_state_dict_post_hook(_make_contiguous)
        if config.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing(self._checkpoint)
        if config.compile:
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_VARIANTS)
            for module in denoiser.modules():
                if type(module).__name__ in self.transformer_blocks:
                    module.compile(dynamic=False)

    def _checkpoint(self, module: torch.nn.Module, *inputs: Any) -> Any:
        # the backward pass computes the activations again outside of `_run`
        def contexts():
            return contextlib.nullcontext(), self._chosen_attention()

        # nothing in it draws
        return checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    def _chosen_attention(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._attention is None else sdpa_kernel(self._attention)

    def _guided(self, denoiser: Any, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        if self._uncond is None:
            return self._run(denoiser, sample, timestep, conditioning).to(self.dtype)
        conditioning = Conditioning.cat([self._uncond.expand(len(sample)), conditioning])
        output = self._run(denoiser, torch.cat([sample, sample]), torch.cat([timestep, timestep]), conditioning)
        uncond, cond = output.float().chunk(2)
        return (uncond + self.guidance_scale * (cond - uncond)).to(self.dtype)

    def _run(self, denoiser: Any, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        mixed = self.dtype != torch.float32
        autocast = torch.autocast(self.device.type, self.dtype) if mixed else contextlib.nullcontext()
        with autocast, self._chosen_attention():
            return self._denoise(denoiser, sample.to(self.dtype), timestep, conditioning)

    def _text_encoder_names(self) -> list[str]:
        """Of those that the pipeline has."""
        names = ("text_encoder", "text_encoder_2", "text_encoder_3")
        return [name for name in names if getattr(self.pipeline, name, None) is not None]

    def _modules(self) -> Iterator[torch.nn.Module]:
        for name in (self.denoiser_name, "vae", *self._text_encoder_names()):
            yield getattr(self.pipeline, name)

    def _encode_prompt(self, prompt: str, **settings: Any) -> list[Any]:
        """What the pipeline's own `encode_prompt` makes of one prompt, in the policy's dtype."""
        if not self._text_encoder_names():
            raise ValueError(
                f"the text encoders were released and the prompt {prompt!r} was not encoded before; name it to "
                "release_text_encoders, or keep them with --no-release-text-encoders"
            )
        if self.max_sequence_length is not None:
            settings["max_sequence_length"] = self.max_sequence_length
        with torch.no_grad():
            encoded = self.pipeline.encode_prompt(prompt=prompt, device=self.device, **settings)
        return [None if tensor is None else tensor.to(self.dtype) for tensor in encoded]

    def _add_adapter(self, config: Config) -> None:
        from diffusers.training_utils import cast_training_params
        from peft import LoraConfig

        targets = config.lora_target_modules or self.lora_target_modules
        layers = [name for name, _ in self.denoiser.named_modules()]
        for target in config.lora_target_modules or ():
            if not any(name == target or name.endswith(f".{target}") for name in layers):
                raise ValueError(
                    f"--lora-target-modules {target} names no layer of {type(self.denoiser).__name__}; give the ends "
                    f"of layers' names, such as {self.lora_target_modules[0]}"
                )
        self.denoiser.add_adapter(
            LoraConfig(
                r=config.lora_rank,
                lora_alpha=config.lora_alpha,
                target_modules=list(targets),
                init_lora_weights="gaussian",
            )
        )
        cast_training_params(self.denoiser, dtype=torch.float32)


class StableDiffusionPolicy(DiffusersPolicy):
    """StableDiffusionPipeline: a UNet that predicts epsilon or v, and DDIM."""

    denoiser_name = "unet"
    lora_target_modules = ("to_q", "to_k", "to_v", "to_out.0")
    transformer_blocks = ("BasicTransformerBlock",)
    samplers = ("ddim",)

    def make_table(self, config: Config, *, window: tuple[int, int] | None = None) -> StepTable:
        if config.sampler not in (None, *self.samplers):
            raise ValueError(
                f"--sampler {config.sampler} is one of flow models and {type(self.pipeline).__name__} is a diffusion "
                "model; leave it out, or use ddim"
            )
        flow_settings = {"noise_level": None, "shift": None, "normalized_log_prob": True}
        for name, default in flow_settings.items():
            if getattr(config, name) != default:
                flag = "no-normalized-log-prob" if name == "normalized_log_prob" else name.replace("_", "-")
                raise ValueError(
                    f"--{flag} is a setting of flow models and {type(self.pipeline).__name__} is a "
                    "diffusion model; leave it out" + ("; DDIM takes --eta" if name == "noise_level" else "")
                )
        return ddim_table.from_scheduler(
            self.pipeline.scheduler,
            config.num_inference_steps,
            eta=1.0 if config.eta is None else config.eta,
            credit=config.credit,
            target_weight=config.target_weight,
            window=window,
        )

    def make_eval_table(self, config: Config) -> StepTable:
        """The sampler that users of the model have, whatever its credit in training."""
        return self.make_table(dataclasses.replace(config, credit="native", target_weight=None))

    def _embed(self, prompt: str) -> Conditioning:
        embeddings, _ = self._encode_prompt(prompt, num_images_per_prompt=1, do_classifier_free_guidance=False)
        return Conditioning(embeddings)

    def _denoise(self, denoiser, sample, timestep, conditioning):
        return denoiser(sample, timestep, conditioning.embeddings).sample


class StableDiffusionXLPolicy(StableDiffusionPolicy):
    """StableDiffusionXLPipeline: two text encoders, pooled embeddings, and the picture's size as time ids."""

    def __init__(self, pipeline: Any, config: Config, device: torch.device) -> None:
        super().__init__(pipeline, config, device)
        # original size, top left corner of the crop, target size
        time_ids = [[self.side, self.side, 0, 0, self.side, self.side]]
        self._time_ids = torch.tensor(time_ids, dtype=self.dtype, device=device)

    def _embed(self, prompt):
        embeddings, _, pooled, _ = self._encode_prompt(prompt, do_classifier_free_guidance=False)
        return Conditioning(embeddings, pooled)

    def _embed_empty(self):
        # zeros or the empty prompt's, as the pipeline's own setting says
        _, embeddings, _, pooled = self._encode_prompt("", do_classifier_free_guidance=True)
        return Conditioning(embeddings, pooled)

    def _denoise(self, denoiser, sample, timestep, conditioning):
        added = {"text_embeds": conditioning.pooled, "time_ids": self._time_ids.expand(len(sample), -1)}
        return denoiser(sample, timestep, conditioning.embeddings, added_cond_kwargs=added).sample


class StableDiffusion3Policy(DiffusersPolicy):
    """StableDiffusion3Pipeline: SD3 and SD3.5, with or without the third text encoder."""

    # as Flow-GRPO has them (Liu et al., arXiv 2505.05470)
    lora_target_modules = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )
    transformer_blocks = ("JointTransformerBlock",)

    def __init__(self, pipeline: Any, config: Config, device: torch.device) -> None:
        super().__init__(pipeline, config, device)
        largest = self.denoiser.config.pos_embed_max_size * self.patch_size * pipeline.vae_scale_factor
        if self.side > largest:
            raise ValueError(
                f"--resolution {self.side} is more than the {largest} that this model has positions for; lower it"
            )

    @property
    def patch_size(self) -> int:
        return self.denoiser.config.patch_size

    def _use_attention_package(self, denoiser, name):
        if name == "xformers" and self.tuning == "full" and self.dtype != torch.float32:
            raise ValueError(
                "--attention xformers wants queries, keys and values of one dtype, and with --tuning full in half "
                "precision this model's norms leave two; use --attention sdpa, or --tuning lora"
            )
        super()._use_attention_package(denoiser, name)

    def _embed(self, prompt):
        embeddings, _, pooled, _ = self._encode_prompt(
            prompt, prompt_2=prompt, prompt_3=prompt, do_classifier_free_guidance=False
        )
        return Conditioning(embeddings, pooled)

    def _denoise(self, denoiser, sample, timestep, conditioning):
        return denoiser(
            sample,
            timestep=timestep,
            encoder_hidden_states=conditioning.embeddings,
            pooled_projections=conditioning.pooled,
        ).sample


class FluxPolicy(DiffusersPolicy):
    """FluxPipeline: FLUX.1, whose latents are packed 2x2 and whose guidance is an input of the model."""

    lora_target_modules = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )
    patch_size = 2
    transformer_blocks = ("FluxTransformerBlock", "FluxSingleTransformerBlock")

    def __init__(self, pipeline: Any, config: Config, device: torch.device) -> None:
        if not pipeline.transformer.config.guidance_embeds and config.guidance_scale != 1:
            raise ValueError(
                f"--guidance-scale {config.guidance_scale} has no meaning for this FLUX model, which takes no guidance "
                "(guidance_embeds is off); use --guidance-scale 1"
            )
        super().__init__(pipeline, config, device)

    def _guides(self):
        return False

    def _embed(self, prompt):
        embeddings, pooled, _ = self._encode_prompt(prompt)
        return Conditioning(embeddings, pooled)

    def _denoise(self, denoiser, sample, timestep, conditioning):
        cells = self.side // self.pipeline.vae_scale_factor // 2
        row, column = torch.meshgrid(*[torch.arange(cells, device=sample.device)] * 2, indexing="ij")
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

    def _latent_shape(self, side):
        return ((side // 2) ** 2, self.denoiser.config.in_channels)

    def _unpack(self, latents):
        return self.pipeline._unpack_latents(latents, self.side, self.side, self.pipeline.vae_scale_factor)

    def _default_side(self):
        return self.pipeline.default_sample_size * self.pipeline.vae_scale_factor

    def _use_attention_package(self, denoiser, name):
        denoiser.set_attention_backend(name)

    def _sigmas(self, num_inference_steps):
        return np.linspace(1.0, 1 / num_inference_steps, num_inference_steps).tolist()


POLICIES: dict[str, type[DiffusersPolicy]] = {
    "StableDiffusionPipeline": StableDiffusionPolicy,
    "StableDiffusionXLPipeline": StableDiffusionXLPolicy,
    "StableDiffusion3Pipeline": StableDiffusion3Policy,
    "FluxPipeline": FluxPolicy,
}


def _make_contiguous(module: torch.nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name, value in state.items():
        if isinstance(value, Tensor):
            state[name] = value.contiguous()


def load_policy(config: Config) -> DiffusersPolicy:
    """The policy of the pipeline that `config.model` names: a local folder, a hub name, or an embedded one.

    Raises:
        ValueError: for a device or an attention backend that this machine cannot run, and for pipelines of which there
            is no policy.
        FileNotFoundError: for a folder that is not there.
    """
    device = find_device(config.device)
    if config.attention in ATTENTION_PACKAGES:
        _check_attention_package(config.attention, device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32
    import diffusers

    model = str(EMBEDDED.get(config.model, config.model))
    # a hub name has the form owner/name and is no path on this machine
    is_path = model.startswith((".", "/", "~")) or model.count("/") != 1 or Path(model).parent.exists()
    if is_path and not (Path(model).expanduser() / "model_index.json").is_file():
        raise FileNotFoundError(
            f"--model {config.model!r} is no diffusers pipeline: there is no {model}/model_index.json. Give a "
            f"folder that DiffusionPipeline.save_pretrained wrote, a hub name (owner/name), or {' or '.join(EMBEDDED)}"
        )
    source = Path(model).expanduser() if is_path else model
    index: Any = diffusers.DiffusionPipeline.load_config(source)
    kind = index["_class_name"]
    if kind not in POLICIES:
        raise ValueError(f"--model {config.model!r} is a {kind}, which no policy can run; give a {', '.join(POLICIES)}")
    policy, dtype = POLICIES[kind], DTYPES[config.dtype]
    # parts that the folder was saved without
    settings: dict[str, Any] = {name: None for name, part in index.items() if part == [None, None]}
    if kind == "StableDiffusionPipeline":
        settings |= {"safety_checker": None, "requires_safety_checker": False}
    if not config.t5:
        if kind != "StableDiffusion3Pipeline":
            raise ValueError(f"--no-t5 leaves out the third text encoder of SD3, and {config.model!r} is a {kind}")
        settings |= {"text_encoder_3": None, "tokenizer_3": None}
    if config.max_sequence_length is not None and kind not in ("StableDiffusion3Pipeline", "FluxPipeline"):
        raise ValueError(
            f"--max-sequence-length {config.max_sequence_length} is for the T5 encoder of SD3 and FLUX, and "
            f"{config.model!r} is a {kind}; leave it out"
        )
    pipeline = getattr(diffusers, kind).from_pretrained(
        source,
        torch_dtype={"default": dtype, policy.denoiser_name: dtype if config.tuning == "lora" else torch.float32},
        **settings,
    )
    return policy(pipeline, config, device)


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


def _check_attention_package(attention: str, device: torch.device) -> None:
    module, package = ATTENTION_PACKAGES[attention]
    if importlib.util.find_spec(module) is None:
        raise ValueError(
            f"--attention {attention} needs the package {module}, which is not installed; pip install {package}, or "
            "use --attention sdpa"
        )
    if device.type != "cuda":
        raise ValueError(f"--attention {attention} runs on a GPU and the device is {device}; use --attention sdpa")
