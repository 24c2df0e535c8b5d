"""Refusals of what a model lacks, and of what it asks for and nobody gives, before its weights are read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pcpo_fast.errors import SettingError
from pcpo_fast.policies import find_device
from pcpo_fast.policies.attention import PACKAGES, check_package
from pcpo_fast.policies.sources import UNUSED

if TYPE_CHECKING:
    from pcpo_fast.config import ModelSettings
    from pcpo_fast.policies.diffusers import DiffusersPolicy

# settings that only some families take: the default, and what the others lack
OPTIONAL_SETTINGS: dict[str, tuple[object, str]] = {
    "max_sequence_length": (None, "no text encoder whose number of tokens can be set"),
    "t5": (True, "no T5 encoder that can be left out"),
    "channels_last": (False, "no convolutions in its denoiser"),
}

# entries of a denoiser's configuration that change how it is called: what other values than the served ones ask for
ASKED = {
    "class_embed_type": "class labels",
    "num_class_embeds": "class labels",
    "addition_embed_type": "other inputs beside the prompt's embeddings",
    "encoder_hid_dim_type": "embeddings of an image",
    "time_cond_proj_dim": "the guidance scale as an input, as distilled models do",
    "attention_type": "boxes and their phrases",
    "dual_cross_attention": "two sequences of embeddings",
    "patch_size": "tokens of another size",
    "quantization_config": "quantised weights",
}


def check_settings(
    policy_class: type[DiffusersPolicy], settings: ModelSettings, config: Mapping[str, Any], scale: int
) -> None:
    """Refuses settings that the family or this machine lacks; arguments as in `DiffusersPolicy.check`."""
    model = f"{settings.model} ({policy_class.__name__})"
    for name, (default, lack) in OPTIONAL_SETTINGS.items():
        if name not in policy_class.optional_settings and getattr(settings, name) != default:
            raise SettingError(name, f"{model} has {lack}; leave this setting out")
    device = find_device(settings.device)
    if settings.attention in PACKAGES:
        check_package(settings.attention, device, policy_class.attention_packages, model)
    multiple = scale * policy_class.patch_size(config)
    for name, side in zip(("height", "width"), policy_class.size(settings, config, scale), strict=True):
        if side % multiple:
            given = name if getattr(settings, name) is not None else "resolution"
            raise SettingError(
                given,
                f"{side} is not a multiple of {multiple}, the autoencoder's scale factor"
                + (" times the patch size" if multiple > scale else "")
                + f"; {side // multiple * multiple or multiple} and {(side // multiple + 1) * multiple} are",
            )


def check_call(
    policy_class: type[DiffusersPolicy], model: str, classes: Mapping[str, str], configs: Mapping[str, Any]
) -> None:
    """Refuses a pipeline with parts that nobody calls, or that must be called otherwise than the policy does.

    Args:
        policy_class: the policy of the pipeline.
        model: its name in messages.
        classes: the class of each part, by its name in the pipeline.
        configs: the configurations of the denoiser, the autoencoder and the text encoders.

    Raises:
        SettingError: for such a part; it names the entry of the configuration.
    """
    denoiser, policy = policy_class.denoiser_name, policy_class.__name__
    other = "give a text-to-image model without it"
    for name, kind in classes.items():
        called = name in (denoiser, "vae", "scheduler", *UNUSED) or re.fullmatch(
            r"(text_encoder|tokenizer)(_\d)?", name
        )
        if not called:
            raise SettingError(
                "model", f"{model!r} has the part {name}, a {kind}, which {policy} does not call; {other}"
            )
    for name, wanted in ((denoiser, policy_class.denoiser_class), ("vae", policy_class.vae_class)):
        if wanted is not None and classes.get(name) != wanted:
            raise SettingError("model", f"{model!r} has a {classes.get(name)} as its {name}; {policy} takes a {wanted}")
    config, vae = configs[denoiser], configs["vae"]
    for entry, served in ({"quantization_config": (None,)} | policy_class.served).items():
        value = config.get(entry, served[0])
        if value not in served:
            raise SettingError(
                "model",
                f"{model!r} has {entry}={value!r} in {denoiser}/config.json, and so asks for {ASKED[entry]}; {policy} "
                f"takes {' or '.join(map(repr, served))}: {other}",
            )
    latents = vae.get("latent_channels", 0) * policy_class.cells_per_token
    inputs = config.get("in_channels")
    outputs = config.get("out_channels") or inputs
    if inputs != latents:
        raise SettingError(
            "model",
            f"{model!r} has in_channels={inputs!r} in {denoiser}/config.json, and latents have {latents}: it asks for "
            f"an image or a mask to edit beside them, which nobody gives; {other}",
        )
    if outputs != inputs:
        raise SettingError(
            "model",
            f"{model!r} has out_channels={outputs!r} in {denoiser}/config.json for {inputs} of latents: it predicts a "
            f"variance too (learned variance), or no latents; {other}",
        )
    if vae.get("out_channels", 3) != 3 or not vae.get("block_out_channels"):
        raise SettingError(
            "model", f"{model!r} has an autoencoder that gives no RGB images (vae/config.json: out_channels); {other}"
        )
    policy_class.check_parts(model, configs)
