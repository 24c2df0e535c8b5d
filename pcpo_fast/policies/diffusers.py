"""The denoiser of a diffusers pipeline as a policy: everything that the families of models share.

A family is a subclass in a file of its own. It embeds a prompt, calls the denoiser, and names the settings that it
takes; `docs/policies.md` lists what it may override.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from pcpo_fast.errors import SettingError
from pcpo_fast.policies import DTYPES, Conditioning, find_device
from pcpo_fast.policies.attention import PACKAGES, SDPA_KERNELS, check_package
from pcpo_fast.samplers import Schedule

if TYPE_CHECKING:
    from pcpo_fast.config import ModelSettings

# settings that only some families take: the default, and what the others lack
OPTIONAL_SETTINGS: dict[str, tuple[object, str]] = {
    "max_sequence_length": (None, "no text encoder whose number of tokens can be set"),
    "t5": (True, "no T5 encoder that can be left out"),
    "channels_last": (False, "no convolutions in its denoiser"),
}


class DiffusersPolicy:
    """The denoiser of a diffusers pipeline with classifier-free guidance; see `pcpo_fast.policies.Policy`.

    Trained weights are kept in float32. Frozen ones stay as the pipeline has them, and `load_policy` loads them in the
    policy's dtype; with bf16 and fp16 the denoiser runs under autocast. The guided output is combined in float32 and
    rounded once to the policy's dtype, by the same code at rollout and in training, so that the ratio before the first
    update is exactly 1.

    Args:
        pipeline: a diffusers pipeline of the family, which the policy moves, freezes and trains.
        settings: the model's settings.
        decode_batch: images that the autoencoder decodes at a time.
        keep_reference: whether `predict_reference` will be called. Full tuning then keeps a copy of the denoiser.

    Raises:
        SettingError: for settings that the model or this machine lacks.
    """

    # the denoiser's name in the pipeline
    denoiser_name: ClassVar[str] = "transformer"
    # ends of the names of the layers that get an adapter by default
    lora_target_modules: ClassVar[tuple[str, ...]]
    # the classes of the denoiser's blocks that `compile` compiles
    transformer_blocks: ClassVar[tuple[str, ...]]
    # those of OPTIONAL_SETTINGS that the family takes
    optional_settings: ClassVar[tuple[str, ...]] = ()
    # those of attention.PACKAGES that diffusers offers for the family
    attention_packages: ClassVar[tuple[str, ...]] = ("xformers",)
    # the noise levels of T steps before the shift, where the pipeline does not leave them to its scheduler
    sigmas: ClassVar[Callable[[int], Sequence[float]] | None] = None

    def __init__(self, pipeline: Any, settings: ModelSettings, *, decode_batch: int, keep_reference: bool) -> None:
        self.pipeline, self.settings = pipeline, settings
        self.denoiser = getattr(pipeline, self.denoiser_name)
        config, scale = self.denoiser.config, pipeline.vae_scale_factor
        self.check(settings, config, scale)
        self.device = find_device(settings.device)
        self.dtype = DTYPES[settings.dtype]
        self.guidance_scale = settings.guidance_scale
        self.decode_batch = decode_batch

        pipeline.set_progress_bar_config(disable=True)
        for module in self._modules():
            # eval: dropout would make the output of training differ from that of the rollout
            module.requires_grad_(False).eval().to(self.device)
        if self.dtype == torch.float16 and pipeline.vae.config.force_upcast:
            pipeline.vae.to(torch.float32)
        # before any adapter: the weights that the KL term pulls towards
        self._frozen = copy.deepcopy(self.denoiser) if keep_reference and settings.tuning == "full" else None
        if settings.tuning == "lora":
            self._add_adapter()
        else:
            self.denoiser.float().requires_grad_(True)
        if settings.channels_last:
            pipeline.vae.to(memory_format=torch.channels_last)
        self._attention = SDPA_KERNELS.get(settings.attention)
        for denoiser in filter(None, (self.denoiser, self._frozen)):
            self._set_execution(denoiser)

        self.side = settings.resolution or self.default_side(config, scale)
        self.latent_shape = self.latent_shape_at(self.side // scale)
        # each prompt is encoded once; in main memory, as there may be many
        self._encoded: dict[str, Conditioning] = {}
        # the conditioning that guidance steers away from, or None without classifier-free guidance
        self.uncond = self.embed_empty().to(self.device) if self.uses_cfg() else None

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The conditioning of N prompts, on the device. The text encoders see every prompt once.

        Raises:
            SettingError: for a prompt that was not encoded before the text encoders were released.
        """
        for prompt in prompts:
            if prompt not in self._encoded:
                self._encoded[prompt] = self.embed(prompt).to(torch.device("cpu"))
        return Conditioning.cat([self._encoded[prompt] for prompt in prompts]).to(self.device)

    def release_text_encoders(self, prompts: Sequence[str]) -> None:
        """Encodes `prompts`, the only ones that `encode` can be given afterwards, and frees the text encoders."""
        self.encode(prompts)
        for name in self._text_encoder_names():
            setattr(self.pipeline, name, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def predict(self, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """The guided model output u + guidance_scale (c - u), rounded once (Ho and Salimans, arXiv 2207.12598).

        Arguments and result as in `Policy.predict`.
        """
        return self._guided(self.denoiser, sample, timestep, conditioning)

    @torch.no_grad()
    def predict_reference(self, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """The output of the model as it was before training: without its adapter, or a frozen copy's.

        Raises:
            ValueError: with full tuning and without `keep_reference`.
        """
        if self._frozen is not None:
            return self._guided(self._frozen, sample, timestep, conditioning)
        if self.settings.tuning == "full":
            raise ValueError("with full tuning there is no reference model; make the policy with keep_reference=True")
        self.denoiser.disable_adapters()
        try:
            return self._guided(self.denoiser, sample, timestep, conditioning)
        finally:
            self.denoiser.enable_adapters()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images, float32 (N, 3, H, W) in [0, 1], from latents (N, *latent_shape), `decode_batch` at a time."""
        vae = self.pipeline.vae
        scale, shift = 1 / vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0
        mean, std = (vae.config.get(f"latents_{name}") for name in ("mean", "std"))
        if mean is not None and std is not None:
            shift, std = (torch.tensor(values, device=self.device).view(1, -1, 1, 1) for values in (mean, std))
            scale = scale * std
        with record_function("decode"):
            images = [
                vae.decode((self.unpack(batch) * scale + shift).to(vae.dtype)).sample.float()
                for batch in latents.split(self.decode_batch)
            ]
            return (torch.cat(images) / 2 + 0.5).clamp(0, 1)

    def schedule(self) -> Schedule:
        """The noise schedule of the pipeline at the policy's resolution."""
        pipeline = self.pipeline
        return self.schedule_of(pipeline.scheduler, self.settings, self.denoiser.config, pipeline.vae_scale_factor)

    def capture_key(self) -> Hashable:
        """Changes with everything that a captured call of `predict` would not see: weights that lie elsewhere, another
        adapter, dtype, resolution or guidance scale. Weights that change in place do not count."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        adapters = tuple(
            (module.disable_adapters, tuple(module.active_adapters), tuple(getattr(module, "scaling", {}).values()))
            for module in self.denoiser.modules()
            if isinstance(module, BaseTunerLayer)
        )
        weights = tuple(parameter.data_ptr() for parameter in self.denoiser.parameters())
        return self.dtype, self.latent_shape, self.guidance_scale, adapters, weights

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """The float32 parameters that the optimizer updates, in a fixed order."""
        return [parameter for parameter in self.denoiser.parameters() if parameter.requires_grad]

    def save(self, folder: Path) -> None:
        """Writes the trained weights as diffusers reads them: LoRA for `pipeline.load_lora_weights(folder)`, or the
        whole denoiser for its class's `from_pretrained(folder)`."""
        if self.settings.tuning == "full":
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
            SettingError: if the weights in `folder` are those of another adapter or another model, lack layers of this
                one's, or have others.
        """
        from safetensors.torch import load_file

        state = {
            name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()
        }
        try:
            if self.settings.tuning == "full":
                _check_layers(folder, "model", self.denoiser.state_dict(), state)
                self.denoiser.load_state_dict(state)
                return
            from peft import get_peft_model_state_dict, set_peft_model_state_dict

            state = {name.removeprefix(f"{self.denoiser_name}."): tensor for name, tensor in state.items()}
            _check_layers(folder, "lora_target_modules", get_peft_model_state_dict(self.denoiser), state)
            set_peft_model_state_dict(self.denoiser, state)
        except RuntimeError as error:
            name, rank = ("model", "") if self.settings.tuning == "full" else ("lora_rank", self.settings.lora_rank)
            raise SettingError(
                name, f"what is in {folder} does not fit this model{rank and f' with rank {rank}'}: {error}"
            ) from error

    # hooks of a family of models

    @classmethod
    def check(cls, settings: ModelSettings, config: Mapping[str, Any], scale: int) -> None:
        """Refuses settings that the family, the model or this machine lacks; called before weights are loaded.

        Args:
            settings: the model's settings.
            config: the configuration of the denoiser.
            scale: pixels of the autoencoder per latent cell, along a side.

        Raises:
            SettingError: for such a setting.
        """
        for name, (default, lack) in OPTIONAL_SETTINGS.items():
            if name not in cls.optional_settings and getattr(settings, name) != default:
                raise SettingError(name, f"{settings.model} ({cls.__name__}) has {lack}; leave this setting out")
        device = find_device(settings.device)
        if settings.attention in PACKAGES:
            check_package(settings.attention, device, cls.attention_packages, f"{settings.model} ({cls.__name__})")
        side, multiple = settings.resolution or cls.default_side(config, scale), scale * cls.patch_size(config)
        if side % multiple:
            raise SettingError(
                "resolution",
                f"{side} is not a multiple of {multiple}, the autoencoder's scale factor"
                + (" times the patch size" if multiple > scale else ""),
            )

    @classmethod
    def load_arguments(cls, settings: ModelSettings) -> dict[str, Any]:
        """Arguments of the pipeline's `from_pretrained` beside the dtype: parts to leave out, say."""
        return {}

    @classmethod
    def default_side(cls, config: Mapping[str, Any], scale: int) -> int:
        """Height and width of the model's own images in pixels; arguments as in `check`."""
        size = config.get("sample_size")
        if not isinstance(size, int):
            raise SettingError("resolution", f"is not set, and the model's sample_size is {size!r}; give one in pixels")
        return size * scale

    @classmethod
    def patch_size(cls, config: Mapping[str, Any]) -> int:
        """Latent cells per token of the denoiser, along a side."""
        return 1

    def uses_cfg(self) -> bool:
        """Whether `predict` combines the outputs with and without the prompt."""
        return self.guidance_scale != 1

    def latent_shape_at(self, side: int) -> tuple[int, ...]:
        """The shape of a latent as the sampler sees it, for `side` x `side` latent cells."""
        return (self.denoiser.config.in_channels, side, side)

    def embed(self, prompt: str) -> Conditioning:
        """The conditioning of one prompt, one row, in the policy's dtype; `encode_prompt` helps."""
        raise NotImplementedError

    def embed_empty(self) -> Conditioning:
        """The conditioning that guidance steers away from, as the pipeline has it."""
        return self.embed("")

    def denoise(self, denoiser: Any, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Calls `denoiser`, with latents in the policy's dtype, and returns its output without guidance."""
        raise NotImplementedError

    def unpack(self, latents: Tensor) -> Tensor:
        """Latents of the sampler as the autoencoder takes them: (N, *latent_shape) -> (N, C, h, w)."""
        return latents

    def use_attention_package(self, denoiser: Any, name: str) -> None:
        """Sets the attention of `denoiser` to that of the package `name`, one of `attention_packages`."""
        denoiser.enable_xformers_memory_efficient_attention()

    # shared by all families

    @classmethod
    def schedule_of(cls, scheduler: Any, settings: ModelSettings, config: Mapping[str, Any], scale: int) -> Schedule:
        """The schedule of a model with this scheduler; other arguments as in `check`."""
        side = settings.resolution or cls.default_side(config, scale)
        patches = (side // scale // cls.patch_size(config)) ** 2
        return Schedule(scheduler, sigmas=cls.sigmas, image_seq_len=patches)

    def encode_prompt(self, prompt: str, **arguments: Any) -> list[Any]:
        """The results of the pipeline's own `encode_prompt` for one prompt, in the policy's dtype.

        Arguments that are None are left to the pipeline.
        """
        if not self._text_encoder_names():
            raise SettingError(
                "release_text_encoders",
                f"the text encoders were released and the prompt {prompt!r} was not encoded before; name it to "
                "release_text_encoders, or keep the encoders",
            )
        given = {name: value for name, value in arguments.items() if value is not None}
        with torch.no_grad():
            encoded = self.pipeline.encode_prompt(prompt=prompt, device=self.device, **given)
        return [None if tensor is None else tensor.to(self.dtype) for tensor in encoded]

    def run(self, denoiser: Any, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """The output of `denoiser` without guidance, in the policy's precision and with its attention."""
        mixed = self.dtype != torch.float32
        autocast = torch.autocast(self.device.type, self.dtype) if mixed else contextlib.nullcontext()
        with autocast, self._chosen_attention():
            return self.denoise(denoiser, sample.to(self.dtype), timestep, conditioning)

    def _guided(self, denoiser: Any, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        if self.uncond is None:
            return self.run(denoiser, sample, timestep, conditioning).to(self.dtype)
        conditioning = Conditioning.cat([self.uncond.expand(len(sample)), conditioning])
        output = self.run(denoiser, torch.cat([sample, sample]), torch.cat([timestep, timestep]), conditioning)
        uncond, cond = output.float().chunk(2)
        return (uncond + self.guidance_scale * (cond - uncond)).to(self.dtype)

    def _set_execution(self, denoiser: Any) -> None:
        """How the denoiser is run; its outputs stay the same but for rounding."""
        settings = self.settings
        if settings.attention in PACKAGES:
            self.use_attention_package(denoiser, settings.attention)
        if settings.channels_last:
            denoiser.to(memory_format=torch.channels_last)
            # files hold weights in their usual order
            denoiser.register_state_dict_post_hook(_make_contiguous)
        if settings.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing(self._checkpoint)
        if settings.compile:
            for module in denoiser.modules():
                if type(module).__name__ in self.transformer_blocks:
                    module.compile(dynamic=False)

    def _checkpoint(self, module: torch.nn.Module, *inputs: Any) -> Any:
        # the backward pass computes the activations again outside of `run`
        def contexts():
            return contextlib.nullcontext(), self._chosen_attention()

        # nothing in it is random
        return checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    def _chosen_attention(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._attention is None else sdpa_kernel(self._attention)

    def _text_encoder_names(self) -> list[str]:
        """The text encoders that the pipeline has."""
        names = ("text_encoder", "text_encoder_2", "text_encoder_3")
        return [name for name in names if getattr(self.pipeline, name, None) is not None]

    def _modules(self) -> Iterator[torch.nn.Module]:
        for name in (self.denoiser_name, "vae", *self._text_encoder_names()):
            yield getattr(self.pipeline, name)

    def _add_adapter(self) -> None:
        from diffusers.training_utils import cast_training_params
        from peft import LoraConfig

        settings = self.settings
        targets = settings.lora_target_modules or self.lora_target_modules
        layers = [name for name, _ in self.denoiser.named_modules()]
        for target in settings.lora_target_modules or ():
            if not any(name == target or name.endswith(f".{target}") for name in layers):
                raise SettingError(
                    "lora_target_modules",
                    f"{target} names no layer of {type(self.denoiser).__name__}; give the ends of layers' names, such "
                    f"as {self.lora_target_modules[0]}",
                )
        self.denoiser.add_adapter(
            LoraConfig(
                r=settings.lora_rank,
                lora_alpha=settings.lora_alpha,
                target_modules=list(targets),
                init_lora_weights="gaussian",
            )
        )
        cast_training_params(self.denoiser, dtype=torch.float32)


def _make_contiguous(module: torch.nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name, value in state.items():
        if isinstance(value, Tensor):
            state[name] = value.contiguous()


def _check_layers(folder: Path, setting: str, own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Refuses weights found in `folder` that lack layers of the model's own, or have others."""
    for verb, names in (("lack", own.keys() - found.keys()), ("have unexpected", found.keys() - own.keys())):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise SettingError(
                setting,
                f"the weights in {folder} {verb} layers: {shown}; resume with the run's own model and target modules, "
                "or bring the files back from a copy",
            )
