"""Policies: a denoiser with everything around it, from prompts to images.

`Policy` lists what the rollout, the trainer and the checkpoints use; any class with these members will do.
`load_policy` makes one from a diffusers pipeline: `pcpo_fast.policies.diffusers` has what all pipelines share, and each
family of models is a file beside it. `find_model` checks everything about a pipeline that needs no weights.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from pcpo_fast.errors import SettingError
from pcpo_fast.policies.sources import EMBEDDED, UNUSED, Files, check_programs, check_variant, open_model
from pcpo_fast.samplers import Schedule

if TYPE_CHECKING:
    from pcpo_fast.config import ModelSettings
    from pcpo_fast.policies.diffusers import DiffusersPolicy

__all__ = [
    "DTYPES",
    "EMBEDDED",
    "FAMILIES",
    "Conditioning",
    "ModelSource",
    "Policy",
    "find_device",
    "find_family",
    "find_model",
    "load_policy",
]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# the policy of each diffusers pipeline class, as module:class
FAMILIES = {
    "StableDiffusionPipeline": "pcpo_fast.policies.stable_diffusion:StableDiffusionPolicy",
    "StableDiffusionXLPipeline": "pcpo_fast.policies.stable_diffusion:StableDiffusionXLPolicy",
    "StableDiffusion3Pipeline": "pcpo_fast.policies.stable_diffusion_3:StableDiffusion3Policy",
    "FluxPipeline": "pcpo_fast.policies.flux:FluxPolicy",
}


class Conditioning:
    """Everything that a denoiser is given about N prompts: named tensors with N rows each.

    `Conditioning(embeddings=..., pooled=...)` has the attributes `embeddings` and `pooled`. Only the policy that makes
    a conditioning knows its names; `len`, rows, `to`, `expand` and `cat` work for all of them.

    Args:
        tensors: by name, each of shape (N, ...).

    Raises:
        ValueError: for no tensor at all, and for tensors that differ in their number of rows.
    """

    def __init__(self, **tensors: Tensor) -> None:
        if len({len(tensor) for tensor in tensors.values()}) != 1:
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()) or "no tensor"
            raise ValueError(f"a conditioning needs tensors with one row per prompt; given {shapes}")
        self._tensors = tensors

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.__dict__["_tensors"][name]
        except KeyError:
            raise AttributeError(f"the conditioning has no tensor {name!r}") from None

    def __len__(self) -> int:
        return len(next(iter(self._tensors.values())))

    def __getitem__(self, rows: Any) -> Conditioning:
        """Some of the rows, in the order of the index: a slice, or an int64 or bool tensor."""
        return self._map(lambda tensor: tensor[rows])

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return dict(self._tensors)

    def to(self, device: torch.device) -> Conditioning:
        """The same on `device`."""
        return self._map(lambda tensor: tensor.to(device))

    def expand(self, rows: int) -> Conditioning:
        """The conditioning of a single prompt as `rows` equal rows, without a copy."""
        return self._map(lambda tensor: tensor.expand(rows, *tensor.shape[1:]))

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """The rows of several conditionings, one after another.

        Raises:
            ValueError: for parts whose tensors have different names.
        """
        names = parts[0].tensors().keys()
        for part in parts:
            if part.tensors().keys() != names:
                raise ValueError(
                    f"conditionings with different tensors cannot be joined: {', '.join(names)} and "
                    f"{', '.join(part.tensors())}; a policy must name the same tensors for every prompt"
                )
        return Conditioning(**{name: torch.cat([part.tensors()[name] for part in parts]) for name in names})

    def _map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        return Conditioning(**{name: change(tensor) for name, tensor in self._tensors.items()})


class Policy(Protocol):
    """A text-to-image denoiser that can be sampled from and trained.

    Three rules keep the first ratio of an update at exactly 1: `predict` is the only place that computes a model
    output, in sampling and in training; nothing in it is random, so there is no dropout; and sampling and training call
    it with the same number of rows.

    Attributes:
        latent_shape: the shape of one latent as the sampler sees it, such as (4, 64, 64).
        dtype: the dtype of the model outputs.
        device: where the weights, the conditioning and the latents are.
    """

    latent_shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The conditioning of N prompts, N rows on `device`. A row depends on its own prompt only."""
        ...

    def predict(self, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """The model output m, guidance included, differentiable in the trained weights.

        Args:
            sample: float32 (rows, *latent_shape), the latents x.
            timestep: (rows,), int64 for diffusion and float32 for flow models, as the step table has them.
            conditioning: `rows` rows.

        Returns:
            (rows, *latent_shape) in `dtype`.
        """
        ...

    def predict_reference(self, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """The output of the model as it was before training, without a gradient; arguments and result as `predict`.

        Only called for the KL term.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images, float32 (N, 3, H, W) in [0, 1], from float32 latents (N, *latent_shape)."""
        ...

    def schedule(self) -> Schedule:
        """The model's own noise schedule, from which `pcpo_fast.samplers.build` makes the step table."""
        ...

    def capture_key(self) -> Hashable:
        """A value that changes when a captured CUDA graph of `predict` is no longer valid.

        Weights that change in place do not count. A constant will do for a policy in which nothing else changes.
        """
        ...

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """The float32 parameters that the optimizer updates, always in the same order."""
        ...

    def save(self, folder: Path) -> None:
        """Writes the trained weights to `folder`, which it creates."""
        ...

    def load(self, folder: Path) -> None:
        """Reads back, bit for bit, what `save` wrote for the same model and settings."""
        ...

    def release_text_encoders(self, prompts: Sequence[str]) -> None:
        """Encodes `prompts`, the only ones that `encode` will be given afterwards, and frees the text encoders."""
        ...


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A diffusers pipeline that was found and whose settings were checked, before any weights are read.

    Attributes:
        settings: the model's settings.
        kind: its pipeline class, such as "FluxPipeline".
        policy_class: the policy of that class.
    """

    settings: ModelSettings
    kind: str
    policy_class: type[DiffusersPolicy]
    _files: Files
    _index: Mapping[str, Any]
    _denoiser_config: Mapping[str, Any]
    _vae_scale_factor: int

    @property
    def device(self) -> torch.device:
        """Where the policy will be."""
        return find_device(self.settings.device)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        return self.policy_class.size(self.settings, self._denoiser_config, self._vae_scale_factor)

    def schedule(self) -> Schedule:
        """The schedule that the policy will have; reads the scheduler's configuration."""
        import diffusers

        name = self._index["scheduler"][1]
        scheduler_class = getattr(diffusers, name, None)
        if scheduler_class is None or not issubclass(scheduler_class, diffusers.SchedulerMixin):
            raise SettingError("model", f"{self.settings.model!r} has the scheduler {name}, which diffusers has not")
        with self._files.loading():
            scheduler = scheduler_class.from_pretrained(self._files.folder, subfolder="scheduler")
        return self.policy_class.schedule_of(scheduler, self.settings, self._denoiser_config, self._vae_scale_factor)

    def load(self, *, decode_batch: int, keep_reference: bool) -> DiffusersPolicy:
        """Loads the pipeline and makes its policy; arguments as in `load_policy`."""
        import diffusers

        settings, policy_class = self.settings, self.policy_class
        dtype = DTYPES[settings.dtype]
        # parts that the folder was saved without, and parts that nobody calls
        absent = {name: None for name, part in self._index.items() if part == [None, None] or name in UNUSED}
        with self._files.loading():
            pipeline = getattr(diffusers, self.kind).from_pretrained(
                self._files.location,
                revision=self._files.revision,
                variant=settings.variant,
                torch_dtype={
                    "default": dtype,
                    policy_class.denoiser_name: dtype if settings.tuning == "lora" else torch.float32,
                },
                **absent | policy_class.load_arguments(settings),
            )
        return policy_class(pipeline, settings, decode_batch=decode_batch, keep_reference=keep_reference)


def find_model(settings: ModelSettings) -> ModelSource:
    """Finds the pipeline that `settings.model` names and checks all settings of the model, without loading weights.

    Reads `model_index.json` and the configurations of the pipeline's parts.

    Raises:
        SettingError: for a model that cannot be found, has no policy or names a program of its own, a device or
            attention backend that this machine cannot run, and settings that the model lacks.
    """
    find_device(settings.device)
    model = settings.model
    files = open_model(model)
    index = files.read("model_index.json")
    kind = index.get("_class_name")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise SettingError(
            "model", f"{model!r} is a {kind}, for which there is no policy; give a {', '.join(FAMILIES)}"
        )
    check_programs(model, files, index)
    policy_class = find_family(kind)
    for name in (policy_class.denoiser_name, "vae", "scheduler"):
        if not isinstance(index.get(name), list) or index[name] == [None, None]:
            raise SettingError("model", f"{model!r} has no {name} in its model_index.json, and a {kind} needs one")
    # imports this module
    from pcpo_fast.policies.checks import check_call

    classes = {name: part[1] for name, part in index.items() if isinstance(part, list) and part != [None, None]}
    configured = [name for name in classes if name in (policy_class.denoiser_name, "vae") or "text_encoder" in name]
    configs = {name: files.read(f"{name}/config.json") for name in configured}
    check_call(policy_class, model, classes, configs)
    denoiser_config = configs[policy_class.denoiser_name]
    scale = 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
    policy_class.check(settings, denoiser_config, scale)
    if settings.lora_path is not None:
        _check_adapter(settings, policy_class, index, denoiser_config)
    if not isinstance(files.location, str):
        check_variant(files.folder / policy_class.denoiser_name, settings.variant)
    return ModelSource(settings, kind, policy_class, files, index, denoiser_config, scale)


def _check_adapter(
    settings: ModelSettings, policy_class: type[DiffusersPolicy], index: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    """Refuses an adapter to start from that does not fit the denoiser, which is built without weights to see that."""
    import diffusers

    from pcpo_fast.policies.adapters import add_saved_adapter

    adapter = policy_class.read_adapter(settings)
    with torch.device("meta"):
        denoiser = getattr(diffusers, index[policy_class.denoiser_name][1]).from_config(dict(config))
        add_saved_adapter(denoiser, adapter)


def load_policy(settings: ModelSettings, *, decode_batch: int, keep_reference: bool) -> DiffusersPolicy:
    """The policy of the pipeline that `settings.model` names: a local folder, a hub name, or an embedded model.

    Args:
        settings: the model's settings.
        decode_batch: images that the autoencoder decodes at a time.
        keep_reference: whether `predict_reference` will be called, which costs a copy of the denoiser if all of it is
            trained.

    Raises:
        SettingError: as `find_model`.
    """
    return find_model(settings).load(decode_batch=decode_batch, keep_reference=keep_reference)


def find_family(kind: str) -> type[DiffusersPolicy]:
    """The policy class of a diffusers pipeline class, which `FAMILIES` must have."""
    module, _, name = FAMILIES[kind].partition(":")
    return getattr(importlib.import_module(module), name)


def find_device(name: str) -> torch.device:
    """The device with that name; "auto" is a GPU if there is one.

    Raises:
        SettingError: for another name, or a GPU that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise SettingError("device", f"{name} is not supported; choose auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    count = torch.cuda.device_count()
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= count):
        raise SettingError(
            "device",
            f"{name} is not there: this machine shows {count} GPU(s) to PyTorch {torch.__version__}; use auto or cpu, "
            "or install a PyTorch build for your GPU",
        )
    return device
