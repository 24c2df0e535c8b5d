"""The denoiser of a diffusers pipeline as a policy: everything that the families of models share.

A family is a subclass in a file of its own. It embeds a prompt, calls the denoiser, and names the settings that it
takes; `docs/policies.md` lists what it may override.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from pcpo_fast.errors import SettingError
from pcpo_fast.policies import DTYPES, Conditioning, adapters, find_device
from pcpo_fast.policies.attention import PACKAGES, SDPA_KERNELS
from pcpo_fast.policies.checks import check_call, check_settings
from pcpo_fast.policies.embeddings import Embeddings
from pcpo_fast.samplers import Schedule
from pcpo_fast.samplers.schedulers import convert

if TYPE_CHECKING:
    from pcpo_fast.config import ModelSettings


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
        keep_reference: whether `predict_reference` will be called. Full tuning, and an adapter that was given, then
            keep a copy of the trained weights.

    Raises:
        SettingError: for settings that the model or this machine lacks.
    """

    # the denoiser's name in the pipeline
    denoiser_name: ClassVar[str] = "transformer"
    # the classes of the denoiser and the autoencoder; None takes any
    denoiser_class: ClassVar[str | None] = None
    vae_class: ClassVar[str | None] = "AutoencoderKL"
    # entries of the denoiser's configuration that change how it is called, with the values that are served
    served: ClassVar[dict[str, tuple[object, ...]]] = {}
    # latent cells whose channels the denoiser takes as one
    cells_per_token: ClassVar[int] = 1
    # ends of the names of the layers that get an adapter by default
    lora_target_modules: ClassVar[tuple[str, ...]]
    # the classes of the denoiser's blocks that `compile` compiles
    transformer_blocks: ClassVar[tuple[str, ...]]
    # those of checks.OPTIONAL_SETTINGS that the family takes
    optional_settings: ClassVar[tuple[str, ...]] = ()
    # those of attention.PACKAGES that diffusers offers for the family
    attention_packages: ClassVar[tuple[str, ...]] = ("xformers",)
    # the noise levels of T steps before the shift, where the pipeline does not leave them to its scheduler
    sigmas: ClassVar[Callable[[int], Sequence[float]] | None] = None

    def __init__(self, pipeline: Any, settings: ModelSettings, *, decode_batch: int, keep_reference: bool) -> None:
        self.pipeline, self.settings = pipeline, settings
        self.denoiser = getattr(pipeline, self.denoiser_name)
        config, scale = self.denoiser.config, pipeline.vae_scale_factor
        parts = {name: part for name, part in pipeline.components.items() if part is not None}
        configs = {name: parts[name].config.to_dict() for name in self._text_encoder_names()}
        configs |= {self.denoiser_name: config, "vae": pipeline.vae.config}
        check_call(type(self), settings.model, {name: type(part).__name__ for name, part in parts.items()}, configs)
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
        if settings.tuning == "full":
            self.denoiser.float().requires_grad_(True)
        elif settings.lora_path is not None:
            adapters.add_saved_adapter(self.denoiser, self.read_adapter(settings))
        else:
            adapters.add_adapter(self.denoiser, settings, self.lora_target_modules)
        if settings.channels_last:
            pipeline.vae.to(memory_format=torch.channels_last)
        self._attention = SDPA_KERNELS.get(settings.attention)
        self._set_execution()
        # the weights that the KL term pulls towards; a new adapter's change nothing and can be left out
        self._keeps = settings.tuning == "full" or (settings.lora_path is not None and settings.kl_reference == "start")
        weights = self.trainable_parameters() if keep_reference and self._keeps else []
        self._start = [weight.detach().clone() for weight in weights]

        self.height, self.width = self.size(settings, config, scale)
        self.latent_shape = self.latent_shape_at(self.height // scale, self.width // scale)
        self._embeddings = Embeddings(self.embed)
        # the conditioning that guidance steers away from, or None without classifier-free guidance
        self.uncond = self.embed_negative().to(self.device) if self.uses_cfg() else None

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The conditioning of N prompts, on the device. The text encoders see every prompt once.

        Raises:
            SettingError: for a prompt that was not encoded before the text encoders were released.
        """
        return self._embeddings(prompts).to(self.device)

    def release_text_encoders(self, prompts: Sequence[str]) -> None:
        """Encodes `prompts`, the only ones that `encode` can be given afterwards, and frees the text encoders.

        Raises:
            SettingError: if their embeddings fit neither into main memory nor on the disk.
        """
        self._embeddings.prepare(prompts)
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
        """The output of the model as it was before training, or of the base model (`kl_reference`).

        Raises:
            ValueError: without `keep_reference` where that needs a copy of the weights.
        """
        if self._keeps:
            if not self._start:
                raise ValueError("the weights before training were not kept; make the policy with keep_reference=True")
            with self._at_start():
                return self._guided(self.denoiser, sample, timestep, conditioning)
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

        layers = tuple(
            (module.disable_adapters, tuple(module.active_adapters), tuple(getattr(module, "scaling", {}).values()))
            for module in self.denoiser.modules()
            if isinstance(module, BaseTunerLayer)
        )
        weights = tuple(parameter.data_ptr() for parameter in self.denoiser.parameters())
        return self.dtype, self.latent_shape, self.guidance_scale, layers, weights

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """The float32 parameters that the optimizer updates, in a fixed order."""
        return [parameter for parameter in self.denoiser.parameters() if parameter.requires_grad]

    def save(self, folder: Path) -> None:
        """Writes the trained weights as diffusers reads them: LoRA for `pipeline.load_lora_weights(folder)`, or the
        whole denoiser for its class's `from_pretrained(folder)`."""
        if self.settings.tuning == "full":
            self.denoiser.save_pretrained(folder)
        else:
            adapters.save_adapter(self.pipeline, self.denoiser_name, folder)

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
                adapters.check_layers(folder, "model", self.denoiser.state_dict(), state)
                self.denoiser.load_state_dict(state)
            else:
                adapters.restore_adapter(self.denoiser, self.denoiser_name, folder, state)
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
        check_settings(cls, settings, config, scale)

    @classmethod
    def check_parts(cls, model: str, configs: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuses parts that do not fit one another; called before weights are loaded.

        Args:
            model: the model's name in messages.
            configs: the configurations of the denoiser, the autoencoder and the text encoders, by their names.

        Raises:
            SettingError: for such parts.
        """

    @classmethod
    def load_arguments(cls, settings: ModelSettings) -> dict[str, Any]:
        """Arguments of the pipeline's `from_pretrained` beside the dtype: parts to leave out, say."""
        return {}

    @classmethod
    def default_size(cls, config: Mapping[str, Any], scale: int) -> tuple[int, int]:
        """Height and width of the model's own images in pixels; arguments as in `check`."""
        size = config.get("sample_size")
        sides = [size, size] if isinstance(size, int) else size
        if not isinstance(sides, list | tuple) or [type(side) for side in sides] != [int, int]:
            raise SettingError("resolution", f"is not set, and the model's sample_size is {size!r}; give one in pixels")
        return sides[0] * scale, sides[1] * scale

    @classmethod
    def patch_size(cls, config: Mapping[str, Any]) -> int:
        """Latent cells per token of the denoiser, along a side."""
        return 1

    def uses_cfg(self) -> bool:
        """Whether `predict` combines the outputs with and without the prompt."""
        return self.guidance_scale != 1

    def latent_shape_at(self, rows: int, columns: int) -> tuple[int, ...]:
        """The shape of a latent as the sampler sees it, for so many latent cells."""
        return (self.denoiser.config.in_channels, rows, columns)

    def embed(self, prompt: str) -> Conditioning:
        """The conditioning of one prompt, one row, in the policy's dtype; `encode_prompt` helps."""
        raise NotImplementedError

    def embed_negative(self) -> Conditioning:
        """The conditioning that guidance steers away from, as the pipeline has it."""
        return self.embed(self.settings.negative_prompt or "")

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
    def size(cls, settings: ModelSettings, config: Mapping[str, Any], scale: int) -> tuple[int, int]:
        """Height and width of the images in pixels; arguments as in `check`."""
        height, width = settings.height or settings.resolution, settings.width or settings.resolution
        if height is None or width is None:
            own = cls.default_size(config, scale)
            height, width = height or own[0], width or own[1]
        return height, width

    @classmethod
    def schedule_of(cls, scheduler: Any, settings: ModelSettings, config: Mapping[str, Any], scale: int) -> Schedule:
        """The schedule of a model with this scheduler; other arguments as in `check`."""
        if settings.scheduler != "model":
            try:
                scheduler = convert(scheduler, settings.scheduler)
            except ValueError as error:
                raise SettingError("scheduler", str(error)) from error
        cells = scale * cls.patch_size(config)
        height, width = cls.size(settings, config, scale)
        return Schedule(scheduler, sigmas=cls.sigmas, image_seq_len=(height // cells) * (width // cells))

    @classmethod
    def read_adapter(cls, settings: ModelSettings) -> adapters.Adapter:
        """The adapter that `lora_path` names, without its values."""
        return adapters.read_adapter(Path(settings.lora_path or "").expanduser(), cls.denoiser_name)

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

    @contextlib.contextmanager
    def _at_start(self) -> Iterator[None]:
        """Puts the weights before training in the place of the trained ones, without a copy."""
        weights = self.trainable_parameters()
        now = [weight.data for weight in weights]
        try:
            for weight, value in zip(weights, self._start, strict=True):
                weight.data = value
            yield
        finally:
            for weight, value in zip(weights, now, strict=True):
                weight.data = value

    def _set_execution(self) -> None:
        """How the denoiser is run; its outputs stay the same but for rounding."""
        settings, denoiser = self.settings, self.denoiser
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


def _make_contiguous(module: torch.nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name, value in state.items():
        if isinstance(value, Tensor):
            state[name] = value.contiguous()
