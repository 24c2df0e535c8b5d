"""What a model's configuration asks for is served or refused by name, before its weights are read."""

import inspect

import diffusers
import pytest
import torch
from pipelines import FAMILIES, edit, stable_diffusion

from pcpo_fast.config import ModelSettings
from pcpo_fast.errors import SettingError
from pcpo_fast.policies import FAMILIES as POLICIES
from pcpo_fast.policies import find_family, find_model
from pcpo_fast.policies.checks import ASKED

pytest_plugins = "pipelines"
pytestmark = pytest.mark.usefixtures("one_thread")

# entries by which a model computes something else, and is called as any other
INSIDE = {
    "UNet2DConditionModel": {
        *("act_fn", "addition_embed_type_num_heads", "attention_head_dim", "block_out_channels", "center_input_sample"),
        *(
            "class_embeddings_concat",
            "conv_in_kernel",
            "conv_out_kernel",
            "cross_attention_dim",
            "cross_attention_norm",
        ),
        *("down_block_types", "downsample_padding", "dropout", "encoder_hid_dim", "flip_sin_to_cos", "freq_shift"),
        *("layers_per_block", "mid_block_only_cross_attention", "mid_block_scale_factor", "mid_block_type", "norm_eps"),
        *("norm_num_groups", "num_attention_heads", "only_cross_attention", "resnet_out_scale_factor"),
        *("resnet_skip_time_act", "resnet_time_scale_shift", "reverse_transformer_layers_per_block"),
        *("time_embedding_act_fn", "time_embedding_dim", "time_embedding_type", "timestep_post_act"),
        *("transformer_layers_per_block", "up_block_types", "upcast_attention", "use_linear_projection"),
    },
    "SD3Transformer2DModel": {
        *("attention_head_dim", "caption_projection_dim", "dual_attention_layers", "joint_attention_dim", "num_layers"),
        *("num_attention_heads", "pooled_projection_dim", "qk_norm"),
    },
    "FluxTransformer2DModel": {
        *("attention_head_dim", "axes_dims_rope", "joint_attention_dim", "num_attention_heads", "num_layers"),
        *("num_single_layers", "pooled_projection_dim"),
    },
}
# entries that are read: sizes, channels, time ids and the guidance input
READ = {
    "UNet2DConditionModel": {
        *("sample_size", "in_channels", "out_channels", "addition_time_embed_dim"),
        "projection_class_embeddings_input_dim",
    },
    "SD3Transformer2DModel": {"sample_size", "in_channels", "out_channels", "patch_size", "pos_embed_max_size"},
    "FluxTransformer2DModel": {"in_channels", "out_channels", "guidance_embeds"},
}
# inputs of a forward pass that no policy gives
OPTIONAL_INPUTS = {
    *("attention_mask", "cross_attention_kwargs", "encoder_attention_mask", "joint_attention_kwargs", "return_dict"),
    *("skip_layers", "class_labels", "timestep_cond"),
}
GIVEN = {
    "UNet2DConditionModel": {"sample", "timestep", "encoder_hidden_states", "added_cond_kwargs"},
    "SD3Transformer2DModel": {"hidden_states", "timestep", "encoder_hidden_states", "pooled_projections"},
    "FluxTransformer2DModel": {
        *("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections", "guidance", "txt_ids", "img_ids"),
    },
}


@pytest.mark.parametrize("kind", POLICIES)
def test_every_entry_of_a_denoisers_configuration_is_known(kind):
    """A version of diffusers that adds one shows here."""
    policy = find_family(kind)
    name = policy.denoiser_class
    entries = inspect.signature(getattr(diffusers, name).__init__).parameters.keys() - {"self"}
    assert entries == INSIDE[name] | READ[name] | policy.served.keys()
    assert not INSIDE[name] & (READ[name] | policy.served.keys())
    assert policy.served.keys() <= ASKED.keys()
    inputs = inspect.signature(getattr(diffusers, name).forward).parameters.keys() - {"self"}
    assert {n for n in inputs if "residual" not in n and "controlnet" not in n} <= GIVEN[name] | OPTIONAL_INPUTS


def find(folder):
    return find_model(ModelSettings(model=str(folder), resolution=64, guidance_scale=1.0))


UNETS, FLOWS = ("sd15", "sdxl"), ("sd35", "flux")
REFUSED = [
    *((family, {"class_embed_type": "timestep"}, "class_embed_type='timestep' .* class labels") for family in UNETS),
    *((family, {"num_class_embeds": 10}, "num_class_embeds=10 .* asks for class labels") for family in UNETS),
    ("sd15", {"addition_embed_type": "text_time"}, "addition_embed_type='text_time' .* other inputs"),
    ("sdxl", {"addition_embed_type": None}, "addition_embed_type=None .* takes 'text_time'"),
    *((family, {"addition_embed_type": "image"}, "addition_embed_type='image' .* other inputs") for family in UNETS),
    *(
        (family, {"encoder_hid_dim_type": name}, f"encoder_hid_dim_type='{name}' .* embeddings of an image")
        for family in UNETS
        for name in ("image_proj", "text_image_proj", "ip_image_proj")
    ),
    *(
        (family, {"time_cond_proj_dim": 256}, "time_cond_proj_dim=256 .* guidance scale as an input")
        for family in UNETS
    ),
    *((family, {"attention_type": "gated"}, "attention_type='gated' .* boxes") for family in UNETS),
    *((family, {"dual_cross_attention": True}, "dual_cross_attention=True .* two sequences") for family in UNETS),
    ("sdxl", {"projection_class_embeddings_input_dim": 16 + 5 * 4}, "the refiner does; give a base"),
    ("flux", {"patch_size": 2}, "patch_size=2 .* tokens of another size"),
    *(
        (family, {"quantization_config": {"bits": 4}}, "quantization_config=.* quantised weights")
        for family in FAMILIES
    ),
    # inpainting, instruct-pix2pix, upscaling, depth
    *(
        (family, {"in_channels": n}, f"in_channels={n} .* to edit beside them")
        for family in UNETS
        for n in (5, 7, 8, 9)
    ),
    *((family, {"in_channels": n}, f"in_channels={n} .* to edit beside them") for family in FLOWS for n in (32, 384)),
    *((family, {"in_channels": None}, "in_channels=None .* to edit beside them") for family in FAMILIES),
    *((family, {"out_channels": 8}, "out_channels=8 .* variance too") for family in FAMILIES),
]


@pytest.mark.parametrize(("family", "entries", "message"), REFUSED)
def test_what_a_denoiser_asks_for_and_nobody_gives_is_refused(bare, family, entries, message):
    folder = bare(family)
    edit(folder / ("unet" if family in UNETS else "transformer") / "config.json", **entries)
    with pytest.raises(SettingError, match=f"^model: .*{message}"):
        find(folder)


@pytest.mark.parametrize(
    ("family", "entries"),
    [
        ("sd15", {"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 16}),
        ("sd15", {"upcast_attention": True, "center_input_sample": True}),
        ("sd15", {"out_channels": None}),
        ("flux", {"out_channels": None}),
        ("flux", {"guidance_embeds": False}),
        ("sd35", {"pos_embed_max_size": None}),
    ],
)
def test_what_changes_only_the_inside_is_served(bare, family, entries):
    folder = bare(family)
    edit(folder / ("unet" if family in UNETS else "transformer") / "config.json", **entries)
    find(folder)


@pytest.mark.parametrize(
    ("file", "entries", "message"),
    [
        ("model_index.json", {"controlnet": ["diffusers", "ControlNetModel"]}, "has the part controlnet, a ControlNet"),
        ("model_index.json", {"unet_2": ["diffusers", "UNet2DConditionModel"]}, "has the part unet_2, a UNet2DCond"),
        (
            "model_index.json",
            {"unet": ["diffusers", "UNet2DModel"]},
            "has a UNet2DModel as its unet; .* takes a UNet2DC",
        ),
        (
            "model_index.json",
            {"vae": ["diffusers", "AutoencoderTiny"]},
            "has a AutoencoderTiny as its vae; .* takes a A",
        ),
        ("vae/config.json", {"latent_channels": 16}, "in_channels=4 .* and latents have 16"),
        ("vae/config.json", {"out_channels": 1}, "has an autoencoder that gives no RGB images"),
        ("vae/config.json", {"block_out_channels": None}, "has an autoencoder that gives no RGB images"),
    ],
)
def test_other_parts_are_refused(bare, file, entries, message):
    folder = bare("sd15")
    edit(folder / file, **entries)
    with pytest.raises(SettingError, match=f"^model: .*{message}"):
        find(folder)


def test_a_pipeline_in_memory_is_checked_too():
    pipeline = stable_diffusion()
    policy, settings = find_family("StableDiffusionPipeline"), ModelSettings(resolution=64, guidance_scale=1.0)
    policy(pipeline, settings, decode_batch=1, keep_reference=False)
    pipeline.unet.register_to_config(in_channels=9)
    with pytest.raises(SettingError, match=r"^model: .*in_channels=9 "):
        policy(pipeline, settings, decode_batch=1, keep_reference=False)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_denoiser_is_given_is_what_is_written_here(models, family):
    """The lists above are those of the calls."""
    policy = find(models[family]).load(decode_batch=1, keep_reference=False)
    seen = set()
    names = [n for n in inspect.signature(type(policy.denoiser).forward).parameters if n != "self"]

    def watch(module, arguments, named):
        seen.update(names[: len(arguments)], named)

    policy.denoiser.register_forward_pre_hook(watch, with_kwargs=True)
    sample = torch.zeros(1, *policy.latent_shape)
    policy.predict(sample, torch.full((1,), 500), policy.encode(["cat"]))
    optional = {"added_cond_kwargs"} if family == "sd15" else set()
    assert seen == GIVEN[policy.denoiser_class] - optional
