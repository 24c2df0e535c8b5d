"""LoRA adapters of a denoiser: new ones, saved ones to start from, and their files."""

from __future__ import annotations

import collections
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pcpo_fast.errors import SettingError

if TYPE_CHECKING:
    from pcpo_fast.config import ModelSettings

# the files of a folder: diffusers', with the configuration in its header, and PEFT's, with one beside it
DIFFUSERS_FILE, PEFT_FILE, PEFT_CONFIG = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "adapter_config.json",
)
# entries of a LoRA configuration that an adapter is made with
SERVED = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
# entries that change nothing here: layers are read from the file, and there is no dropout
IGNORED = (
    *("auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out", "inference_mode", "lora_dropout"),
    *("layers_pattern", "layers_to_transform", "peft_version", "revision", "target_modules", "task_type"),
)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A saved adapter whose values are not read yet.

    Attributes:
        file: the safetensors file.
        names: of each tensor, its name in the denoiser (ends with lora_A.weight or lora_B.weight) and in the file.
        shapes: by the name in the denoiser.
        config: arguments of PEFT's LoraConfig.
    """

    file: Path
    names: dict[str, str]
    shapes: dict[str, list[int]]
    config: dict[str, Any]

    def values(self) -> dict[str, Tensor]:
        """The tensors by their names in the denoiser, in float32."""
        from safetensors.torch import load_file

        tensors = load_file(self.file)
        return {name: tensors[saved].float() for name, saved in self.names.items()}


def read_adapter(path: Path, denoiser_name: str) -> Adapter:
    """Reads names, shapes and the configuration of an adapter that diffusers or PEFT saved.

    Args:
        path: its folder or its safetensors file.
        denoiser_name: the denoiser's name in the pipeline.

    Raises:
        SettingError: for what is no such adapter, and for one that has more than LoRA layers of the denoiser.
    """
    from safetensors import SafetensorError, safe_open

    file = path
    if path.is_dir():
        found = [path / name for name in (DIFFUSERS_FILE, PEFT_FILE) if (path / name).is_file()]
        file = found[0] if found else path / DIFFUSERS_FILE
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            saved = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
        beside = file.parent / PEFT_CONFIG
        if "lora_adapter_metadata" in metadata:
            config = _of_denoiser(json.loads(metadata["lora_adapter_metadata"]), denoiser_name)
        elif file.name == PEFT_FILE and beside.is_file():
            config = json.loads(beside.read_text(encoding="utf-8"))
        else:
            config = {}
    except (OSError, ValueError, SafetensorError) as error:
        raise SettingError(
            "lora_path",
            f"{path} cannot be read as an adapter: {error}; give a folder that pipeline.save_lora_weights or PEFT's "
            "save_pretrained wrote, or its .safetensors file",
        ) from error
    # the denoiser's own save_lora_adapter writes no prefix
    pattern = re.compile(
        rf"(?:{denoiser_name}\.|base_model\.model\.)?((?!text_encoder|unet\.|transformer\.).+\.lora_[AB]\.weight)"
    )
    names = {match[1]: name for name in saved if (match := pattern.fullmatch(name))}
    other = sorted(saved.keys() - names.values())
    if other or not names:
        raise SettingError(
            "lora_path",
            f"{file} holds {shorten(other) or 'nothing'}, and an adapter to start from holds LoRA layers of the "
            f"{denoiser_name} alone ({denoiser_name}.<layer>.lora_A.weight), as diffusers and PEFT save them; convert "
            "another trainer's with pipeline.load_lora_weights and pipeline.save_lora_weights",
        )
    shapes = {name: saved[written] for name, written in names.items()}
    return Adapter(file, names, shapes, _check_config(file, config, shapes))


def _of_denoiser(metadata: Mapping[str, Any], denoiser_name: str) -> dict[str, Any]:
    prefix = f"{denoiser_name}."
    own = {name.removeprefix(prefix): value for name, value in metadata.items() if name.startswith(prefix)}
    return own or dict(metadata)


def _check_config(file: Path, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Arguments of LoraConfig for an adapter of these layers; refuses what plain LoRA does not have."""
    from peft import LoraConfig

    default = LoraConfig().to_dict()
    plain = {"peft_type": ("LORA", None), "init_lora_weights": (True, False, "gaussian", None)}
    for name, value in config.items():
        accepted = plain.get(name, (default.get(name), None))
        if name not in SERVED + IGNORED and value not in accepted and value:
            raise SettingError(
                "lora_path",
                f"{file} was saved with {name}={value!r}, and plain LoRA layers alone are trained here; merge it into "
                "the model, or give another adapter",
            )
    ranks = {name.removesuffix(".lora_A.weight"): shape[0] for name, shape in shapes.items() if ".lora_A." in name}
    layers = sorted(ranks)
    if "r" in config:
        made = {name: config[name] for name in SERVED if config.get(name) is not None}
    else:
        # as diffusers reads a file that tells only shapes: the scale is 1
        usual = collections.Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
        pattern = {f"^{re.escape(layer)}": rank for layer, rank in ranks.items() if rank != usual}
        made = {"r": usual, "lora_alpha": usual, "rank_pattern": pattern, "alpha_pattern": dict(pattern)}
    return made | {"target_modules": layers}


def add_adapter(denoiser: Any, settings: ModelSettings, default_targets: Sequence[str]) -> None:
    """Gives the denoiser a new adapter, which changes nothing before it is trained.

    Raises:
        SettingError: for target modules that the denoiser lacks.
    """
    from peft import LoraConfig

    targets = settings.lora_target_modules or default_targets
    layers = [name for name, _ in denoiser.named_modules()]
    for target in settings.lora_target_modules or ():
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            raise SettingError(
                "lora_target_modules",
                f"{target} names no layer of {type(denoiser).__name__}; give the ends of layers' names, such as "
                f"{default_targets[0]}",
            )
    arguments = {"r": settings.lora_rank, "lora_alpha": settings.lora_alpha, "target_modules": list(targets)}
    _add(denoiser, LoraConfig(**arguments, init_lora_weights="gaussian"))


def add_saved_adapter(denoiser: Any, adapter: Adapter) -> None:
    """Gives the denoiser the saved adapter; on the meta device, its layers without their values.

    Raises:
        SettingError: if it does not fit the denoiser, or a layer is missing or unexpected.
    """
    from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict

    known = {name for name, _ in denoiser.named_modules()}
    missing = sorted(set(adapter.config["target_modules"]) - known)
    if missing:
        raise SettingError(
            "lora_path",
            f"{adapter.file} has layers that {type(denoiser).__name__} lacks: {shorten(missing)}; give an adapter of "
            "this model",
        )
    try:
        _add(denoiser, LoraConfig(**adapter.config))
    except (TypeError, ValueError, KeyError) as error:
        raise SettingError("lora_path", f"{adapter.file} cannot be added to this model: {error}") from error
    own = get_peft_model_state_dict(denoiser)
    check_layers(adapter.file, "lora_path", own, adapter.names, "give an adapter of this model that is whole")
    for name, tensor in own.items():
        if list(tensor.shape) != list(adapter.shapes[name]):
            raise SettingError(
                "lora_path",
                f"{adapter.file} does not fit this model: {name} has shape {list(adapter.shapes[name])} and the model "
                f"wants {list(tensor.shape)}; give an adapter of this model",
            )
    if not next(denoiser.parameters()).is_meta:
        set_peft_model_state_dict(denoiser, adapter.values())


def _add(denoiser: Any, config: Any) -> None:
    from diffusers.training_utils import cast_training_params

    denoiser.add_adapter(config)
    cast_training_params(denoiser, dtype=torch.float32)


def save_adapter(pipeline: Any, denoiser_name: str, folder: Path) -> None:
    """Writes the denoiser's adapter for `pipeline.load_lora_weights(folder)`."""
    from peft import get_peft_model_state_dict

    denoiser = getattr(pipeline, denoiser_name)
    # a set, whose order is another one in every process
    metadata = denoiser.peft_config["default"].to_dict()
    metadata["target_modules"] = sorted(metadata["target_modules"])
    layers = {
        f"{denoiser_name}_lora_layers": get_peft_model_state_dict(denoiser),
        f"{denoiser_name}_lora_adapter_metadata": metadata,
    }
    pipeline.save_lora_weights(folder, **layers)


def restore_adapter(denoiser: Any, denoiser_name: str, folder: Path, state: Mapping[str, Tensor]) -> None:
    """Gives the denoiser's adapter the tensors that `save_adapter` wrote to `folder`."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    state = {name.removeprefix(f"{denoiser_name}."): tensor for name, tensor in state.items()}
    check_layers(folder, "lora_target_modules", get_peft_model_state_dict(denoiser), state)
    set_peft_model_state_dict(denoiser, state)


def check_layers(
    path: Path,
    setting: str,
    own: Mapping[str, Any],
    found: Mapping[str, Any],
    advice: str = "resume with the run's own model and target modules, or bring the files back from a copy",
) -> None:
    """Refuses weights found in `path` that lack layers of the model's own, or have others."""
    for verb, names in (("lack", own.keys() - found.keys()), ("have unexpected", found.keys() - own.keys())):
        if names:
            raise SettingError(setting, f"the weights in {path} {verb} layers: {shorten(sorted(names))}; {advice}")


def shorten(names: Sequence[str]) -> str:
    """The first names of a list, and how many follow."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
