import dataclasses
import importlib.util
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from pipelines import FAMILIES, flux, stable_diffusion, stable_diffusion_3, stable_diffusion_xl
from safetensors.torch import load_file, save_file

from pcpo_fast import samplers
from pcpo_fast.config import ModelSettings, SamplerSettings
from pcpo_fast.errors import SettingError
from pcpo_fast.policies import Conditioning, embeddings, find_family, find_model, load_policy
from pcpo_fast.presets import PRESETS

pytest_plugins = "pipelines"
pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = 3
each_family = pytest.mark.parametrize("family", FAMILIES)


def make_settings(model, **settings):
    return ModelSettings(**{"model": str(model), "resolution": 64, "max_sequence_length": None} | settings)


def make_policy(model, *, decode_batch=2, keep_reference=False, **settings):
    torch.manual_seed(0)
    return load_policy(make_settings(model, **settings), decode_batch=decode_batch, keep_reference=keep_reference)


def wrap(pipeline, **settings):
    """The policy of a pipeline that is in memory."""
    settings = ModelSettings(**{"resolution": 64, "device": "cpu"} | settings)
    return find_family(type(pipeline).__name__)(pipeline, settings, decode_batch=2, keep_reference=False)


def refused(name, message):
    """A SettingError of the setting `name`, whose reason matches."""
    return pytest.raises(SettingError, match=f"^{name}: .*{message}")


def train_a_little(policy):
    """Moves every trained weight, as a few updates would."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return policy


def inputs(policy):
    sample = torch.randn(ROWS, *policy.latent_shape, generator=torch.Generator().manual_seed(2))
    timesteps = samplers.build(SamplerSettings(num_inference_steps=4), policy.schedule()).timesteps
    return sample, timesteps[[0, 1, 3]], policy.encode(["cat", "dog", "horse"])


@torch.no_grad()
def denoise(denoiser, policy):
    """The output of that denoiser without guidance, by the policy's own code."""
    return policy.denoise(denoiser, *inputs(policy))


def denoiser_of(pipeline, policy):
    return getattr(pipeline, policy.denoiser_name)


@torch.no_grad()
@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd35"])
def test_guidance_combines_two_outputs(models, family):
    """u + g (c - u), with u the output for the pipeline's own negative prompt, one call of the denoiser at a time."""
    policy = make_policy(models[family], guidance_scale=3.5)
    sample, timestep, conditioning = inputs(policy)
    encode = {"prompt": "", "device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    more = {"prompt_2": "", "prompt_3": ""} if family == "sd35" else {}
    negatives = policy.pipeline.encode_prompt(**encode, **more)[1::2]
    empty = Conditioning(**dict(zip(conditioning.tensors(), negatives, strict=True))).expand(ROWS)
    uncond, cond = (policy.denoise(policy.denoiser, sample, timestep, c) for c in (empty, conditioning))
    guided = policy.predict(sample, timestep, conditioning)
    # a denoiser may sum in another order for another batch
    torch.testing.assert_close(guided, uncond + 3.5 * (cond - uncond), rtol=1e-4, atol=1e-5)
    assert (guided - cond).abs().max() > 1e-3
    bare = make_policy(models[family], guidance_scale=1.0)
    assert torch.equal(bare.predict(sample, timestep, conditioning), denoise(bare.denoiser, bare))


@torch.no_grad()
def test_flux_is_told_its_guidance(models):
    outputs = []
    for scale in (1.0, 3.5):
        policy = make_policy(models["flux"], guidance_scale=scale)
        outputs.append(policy.predict(*inputs(policy)))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


def test_guidance_for_a_flux_model_without_is_refused():
    pipeline = flux(guidance_embeds=False)
    with refused("guidance_scale", "5.0 has no meaning .* use 1"):
        wrap(pipeline)
    policy = wrap(pipeline, guidance_scale=1.0)
    assert policy.predict(*inputs(policy)).isfinite().all()


@torch.no_grad()
@each_family
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_precision(models, family, dtype, tuning):
    """Outputs and frozen weights have the policy's dtype; trained weights are float32 and start as they were saved."""
    policy = make_policy(models[family], dtype=dtype, tuning=tuning)
    wanted = getattr(torch, {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[dtype])
    trained = policy.trainable_parameters()
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    frozen = [p for module in policy._modules() for p in module.parameters() if not p.requires_grad]
    # an autoencoder that overflows in half precision stays in float32
    upcast = policy.pipeline.vae.config.force_upcast and dtype == "fp16"
    assert {p.dtype for p in frozen} == {wanted} | ({torch.float32} if upcast else set())
    assert policy.pipeline.vae.dtype == (torch.float32 if upcast else wanted)
    assert not any(module.training for module in policy.denoiser.modules() if isinstance(module, torch.nn.Dropout))
    output = policy.predict(*inputs(policy))
    assert output.dtype == wanted
    assert output.isfinite().all()
    assert policy.decode(torch.randn(2, *policy.latent_shape)).isfinite().all()
    saved = load_file(next((models[family] / policy.denoiser_name).glob("*.safetensors")))
    if tuning == "full":
        assert all(torch.equal(value, saved[name]) for name, value in policy.denoiser.state_dict().items())
        assert len(trained) == len(dict(policy.denoiser.named_parameters()))


# layers with an adapter: 4 in each of the 2 attentions of 16 blocks (6 down, 1 in the middle, 9 up); 8 in a joint
# attention, 7 in the last one; 12 in each double block and 3 in each single one
@pytest.mark.parametrize(("family", "adapters"), [("sd15", 4 * 2 * 16), ("sd35", 8 + 7), ("flux", 2 * 12 + 2 * 3)])
def test_the_layers_with_adapters(models, family, adapters):
    policy = make_policy(models[family])
    names = [name for name, p in policy.denoiser.named_parameters() if p.requires_grad]
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    assert len(names) == 2 * adapters


@each_family
@pytest.mark.parametrize("bound", [embeddings.BOUND, 0], ids=["memory", "disk"])
def test_prompts_are_encoded_once_and_the_encoders_can_go(models, family, bound, monkeypatch):
    policy = make_policy(models[family], guidance_scale=1.0)
    policy._embeddings.bound = bound
    encode_prompt, calls = policy.pipeline.encode_prompt, []

    def counted(prompt, **settings):
        calls.append(prompt)
        return encode_prompt(prompt=prompt, **settings)

    monkeypatch.setattr(policy.pipeline, "encode_prompt", counted)
    before = policy.encode(["cat", "dog", "cat"])
    policy.release_text_encoders(["cat", "horse"])
    assert calls == ["cat", "dog", "horse"]
    assert all(getattr(policy.pipeline, name) is None for name in ("text_encoder", *policy._text_encoder_names()))
    after = policy.encode(["cat", "dog", "cat"])
    assert before.tensors().keys() == after.tensors().keys()
    assert all(torch.equal(tensor, after.tensors()[name]) for name, tensor in before.tensors().items())
    assert calls == ["cat", "dog", "horse"]
    with refused("release_text_encoders", "'a bear' was not encoded before; .* keep the encoders"):
        policy.encode(["a bear"])


def test_sd3_with_and_without_its_third_encoder(tmp_path):
    stable_diffusion_3(third_encoder=True).save_pretrained(tmp_path)
    policies = [make_policy(tmp_path, guidance_scale=1.0, max_sequence_length=24, t5=t5) for t5 in (True, False)]
    whole, without = (policy.encode(["cat", "dog"]) for policy in policies)
    assert whole.embeddings.shape == without.embeddings.shape == (2, 16 + 24, 32)
    assert torch.equal(whole.embeddings[:, :16], without.embeddings[:, :16])
    assert torch.equal(whole.pooled, without.pooled)
    assert without.embeddings[:, 16:].abs().max() == 0 < whole.embeddings[:, 16:].abs().max()
    assert (policies[0].predict(*inputs(policies[0])) - policies[1].predict(*inputs(policies[1]))).abs().max() > 1e-4
    with refused(
        "t5", r"digits \(StableDiffusionPolicy\) has no T5 encoder that can be left out; leave this setting out"
    ):
        make_policy("digits", t5=False, resolution=None)


@torch.no_grad()
@each_family
@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_reference_is_the_model_before_training(models, family, tuning, dtype):
    policy = make_policy(models[family], tuning=tuning, dtype=dtype, keep_reference=True)
    before = policy.predict(*inputs(policy))
    assert torch.equal(policy.predict_reference(*inputs(policy)), before)
    count = len(policy.trainable_parameters())
    train_a_little(policy)
    assert torch.equal(policy.predict_reference(*inputs(policy)), before)
    assert not torch.equal(policy.predict(*inputs(policy)), before)
    assert len(policy.trainable_parameters()) == count


def test_full_tuning_has_a_reference_only_if_asked_for(model):
    policy = make_policy(model, tuning="full")
    with pytest.raises(
        ValueError, match="the weights before training were not kept; make the policy with keep_reference=True"
    ):
        policy.predict_reference(*inputs(policy))


@each_family
def test_encode_does_not_depend_on_the_batch(models, family):
    policy = make_policy(models[family])
    prompts = ["cat", "a dog on the moon", "cat"]
    encode = {"prompt": prompts, "device": "cpu", "num_images_per_prompt": 1}
    with torch.no_grad():
        if family == "flux":
            expected = policy.pipeline.encode_prompt(**encode, prompt_2=prompts)[:2]
        else:
            more = {"prompt_2": prompts, "prompt_3": prompts} if family == "sd35" else {}
            expected = policy.pipeline.encode_prompt(**encode, **more, do_classifier_free_guidance=False)[::2]
    encoded = policy.encode(prompts)
    assert len(encoded) == 3 and len(encoded.tensors()) == len(expected)
    for ours, theirs in zip(encoded.tensors().values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert torch.equal(ours[0], ours[2])
        assert (ours[0] - ours[1]).abs().max() > 1e-2


@each_family
def test_decode_does_not_depend_on_the_batch(models, family):
    one, all_ = (make_policy(models[family], decode_batch=size) for size in (1, 5))
    latents = torch.randn(5, *one.latent_shape, generator=torch.Generator().manual_seed(2))
    images = one.decode(latents)
    torch.testing.assert_close(images, all_.decode(latents), rtol=0, atol=1e-5)
    assert images.shape == (5, 3, 64, 64)
    assert 0 <= images.min() < images.max() <= 1


def test_resolution_sets_the_latents(model):
    assert make_policy(model, resolution=None).latent_shape == (4, 8, 8)
    policy = make_policy(model, resolution=96)
    assert policy.latent_shape == (4, 12, 12)
    assert policy.decode(torch.zeros(1, 4, 12, 12)).shape == (1, 3, 96, 96)


@each_family
@pytest.mark.parametrize("alpha", [4, 10])
def test_saved_lora_is_what_diffusers_reads(models, family, tmp_path, alpha):
    """A fresh pipeline with the saved weights has the policy's output, scale included; without, the base model's."""
    policy = make_policy(models[family], lora_rank=4, lora_alpha=alpha)
    base = denoise(policy.denoiser, policy)
    absent = {"text_encoder_3": None, "tokenizer_3": None} if family == "sd35" else {}
    fresh = DiffusionPipeline.from_pretrained(models[family], **absent)
    # an adapter starts at zero
    assert torch.equal(denoise(denoiser_of(fresh, policy), policy), base)
    train_a_little(policy).save(tmp_path)
    trained = denoise(policy.denoiser, policy)
    assert (trained - base).abs().max() > 1e-2
    fresh.load_lora_weights(tmp_path)
    torch.testing.assert_close(denoise(denoiser_of(fresh, policy), policy), trained, rtol=1e-5, atol=1e-5)


@each_family
def test_a_saved_denoiser_is_what_diffusers_reads(models, family, tmp_path):
    policy = train_a_little(make_policy(models[family], tuning="full"))
    policy.save(tmp_path)
    fresh = type(policy.denoiser).from_pretrained(tmp_path)
    assert torch.equal(denoise(fresh, policy), denoise(policy.denoiser, policy))


@each_family
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_weights_come_back_bit_for_bit(models, family, tmp_path, tuning, dtype):
    policy = train_a_little(make_policy(models[family], tuning=tuning, dtype=dtype))
    policy.save(tmp_path)
    other = make_policy(models[family], tuning=tuning, dtype=dtype)
    other.load(tmp_path)
    ours, theirs = policy.denoiser.state_dict(), other.denoiser.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_rank": 2}, "does not fit this model with rank 2"),
        ({"lora_target_modules": ("to_q",)}, "have unexpected layers: .*to_k.*, .* more; resume with the run's own"),
    ],
)
def test_another_adapter_is_refused(model, tmp_path, settings, message):
    make_policy(model).save(tmp_path)
    (name,) = settings
    with refused(name, message):
        make_policy(model, **settings).load(tmp_path)


def test_a_denoiser_of_another_build_is_refused(model, tmp_path):
    make_policy(model, tuning="full").save(tmp_path)
    with refused("model", "lack layers: .* more; resume with the run's own model"):
        make_policy("digits", tuning="full", resolution=None).load(tmp_path)


def test_a_denoiser_of_other_widths_is_refused(model, tmp_path):
    policy = make_policy(model, tuning="full")
    state = {name: tensor[..., :1].contiguous() for name, tensor in policy.denoiser.state_dict().items()}
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    with refused("model", "does not fit this model: (.|\n)*size mismatch"):
        policy.load(tmp_path)


@pytest.mark.parametrize(
    ("tuning", "setting", "file"),
    [
        ("lora", "lora_target_modules", "pytorch_lora_weights.safetensors"),
        ("full", "model", "diffusion_pytorch_model.safetensors"),
    ],
)
def test_weights_that_lack_layers_are_refused_by_name(model, tmp_path, tuning, setting, file):
    """Fresh layers beside the moments of trained ones would be another run."""
    make_policy(model, tuning=tuning).save(tmp_path)
    tensors = load_file(tmp_path / file)
    *kept, lacking = sorted(tensors)
    save_file({name: tensors[name] for name in kept}, tmp_path / file)
    policy = make_policy(model, tuning=tuning)
    before = {name: tensor.clone() for name, tensor in policy.denoiser.state_dict().items()}
    with refused(setting, f"the weights in {tmp_path} lack layers: {lacking.removeprefix('unet.')};"):
        policy.load(tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.denoiser.state_dict().items())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("device", "gpu", "gpu is not supported; choose auto, cpu, cuda or cuda:N"),
        ("device", "mps", "mps is not supported"),
        ("device", "cuda:99", "cuda:99 is not there: this machine shows .* use auto or cpu"),
        ("attention", "xformers", "needs the package xformers, .* or use sdpa"),
        ("resolution", 60, "60 is not a multiple of 8"),
    ],
)
def test_what_this_machine_or_model_cannot_do_is_refused_before_anything_is_loaded(
    model, monkeypatch, name, value, message
):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "xformers" else find_spec(name, *a)
    )
    with refused(name, message):
        find_model(make_settings(model, **{"device": "cpu", name: value}))


def test_layers_that_are_not_there_are_refused(model):
    with refused("lora_target_modules", "to_nothing names no layer of UNet2DConditionModel; .* such as to_q"):
        make_policy(model, lora_target_modules=("to_nothing",))


def test_xformers_without_a_gpu_is_refused(model, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with refused("attention", "xformers runs on a GPU and the device is cpu; use sdpa"):
        find_model(make_settings(model, attention="xformers", device="cpu"))


@pytest.mark.parametrize("name", ["nowhere", "./nowhere/at/all", "/nowhere"])
def test_a_missing_folder_is_refused(name):
    with pytest.raises(SettingError) as error:
        find_model(make_settings(name))
    assert error.value.name == "model"
    assert error.value.reason.startswith(f"{name!r} is not a diffusers pipeline: {name}/model_index.json not found; ")
    assert error.value.reason.endswith("a hub name (owner/name), or digits or digits-flow")


def test_a_hub_name_that_cannot_be_reached_is_refused(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with refused("model", "'owner/not-there-at-all' is not, or not wholly, in the cache .* HF_HUB_OFFLINE=1 forbids"):
        find_model(make_settings("owner/not-there-at-all"))


def test_an_incomplete_folder_is_refused(model, tmp_path):
    shutil.copytree(model, tmp_path / "cut")
    (tmp_path / "cut" / "vae" / "config.json").write_text("{")
    with refused("model", r"cut/vae/config.json could not be read: "):
        find_model(make_settings(tmp_path / "cut"))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("unet/diffusion_pytorch_model.safetensors", None),
        ("scheduler/scheduler_config.json", "{"),
        ("model_index.json", "[]"),
    ],
)
def test_a_damaged_model_is_named(model, tmp_path, file, content):
    """Whether the damage shows when it is found, when its schedule is read or when it is loaded."""
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with refused("model", str(folder)):
        source = find_model(ModelSettings(model=str(folder)))
        source.schedule()
        source.load(decode_batch=1, keep_reference=False)


def test_a_model_without_a_size_of_its_own_needs_a_resolution(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"sample_size": None}))
    with refused("resolution", "is not set, and the model's sample_size is None"):
        find_model(ModelSettings(model=str(folder)))
    find_model(ModelSettings(model=str(folder), resolution=32))


@each_family
def test_a_model_is_found_without_its_weights(models, bare, family):
    """And has the schedule of the policy that is loaded from it."""
    source = find_model(make_settings(bare(family)))
    settings, policy = SamplerSettings(num_inference_steps=7), make_policy(models[family])
    assert source.kind == type(policy.pipeline).__name__ and source.policy_class is type(policy)
    found, loaded = (samplers.build(settings, model.schedule()) for model in (source, policy))
    assert torch.equal(found.rows, loaded.rows) and torch.equal(found.timesteps, loaded.timesteps)
    assert source.schedule()[1:] == policy.schedule()[1:]


@each_family
def test_loading_changes_nothing_global(models, family):
    def globals_():
        backends = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        return *backends, torch._dynamo.config.recompile_limit, torch.is_grad_enabled(), torch.get_default_dtype()

    before = globals_()
    make_policy(models[family], compile=True, tf32=not before[0])
    assert globals_() == before


@pytest.mark.parametrize("build", [stable_diffusion, stable_diffusion_xl, stable_diffusion_3, flux])
def test_a_policy_needs_no_folder(build):
    """A pipeline that is in memory already can be aligned too."""
    policy = wrap(build(), guidance_scale=3.0)
    assert policy.predict(*inputs(policy)).requires_grad


def test_another_pipeline_is_refused(model, tmp_path):
    shutil.copytree(model, tmp_path / "other")
    index = tmp_path / "other" / "model_index.json"
    index.write_text(index.read_text().replace('"StableDiffusionPipeline"', '"PixArtAlphaPipeline"'))
    with refused("model", "is a PixArtAlphaPipeline, for which there is no policy; give a StableDiffusion"):
        find_model(make_settings(tmp_path / "other"))


@pytest.mark.parametrize("family", ["sdxl", "sd35", "flux"])
def test_resolutions_that_do_not_divide_are_refused(models, family):
    multiple = {"sdxl": 8, "sd35": 16, "flux": 16}[family]
    with refused("resolution", f"60 is not a multiple of {multiple}"):
        find_model(make_settings(models[family], resolution=60))


def test_sdxl_is_told_its_size(models):
    """Original size, corner and target size, as the pipeline makes them."""
    policy, seen = make_policy(models["sdxl"], resolution=96), []

    def denoiser(*arguments, added_cond_kwargs):
        seen.append(added_cond_kwargs["time_ids"])
        return SimpleNamespace(sample=arguments[0])

    policy.denoise(denoiser, *inputs(policy))
    expected = policy.pipeline._get_add_time_ids((96, 96), (0, 0), (96, 96), torch.float32, 16)
    assert torch.equal(seen[0], expected.expand(ROWS, -1))


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize(("name", "value"), [("sampler", "dance"), ("noise_level", 0.3), ("shift", 3.0)])
def test_settings_of_flow_models_are_refused_elsewhere(models, family, name, value):
    source = find_model(make_settings(models[family]))
    with refused(name, ""):
        samplers.build(SamplerSettings(**{name: value}), source.schedule())


@pytest.mark.parametrize("family", ["sd35", "flux"])
@pytest.mark.parametrize(("name", "value"), [("sampler", "ddim"), ("eta", 1.0)])
def test_settings_of_diffusion_models_are_refused_elsewhere(models, family, name, value):
    source = find_model(make_settings(models[family]))
    with refused(name, ""):
        samplers.build(SamplerSettings(**{name: value}), source.schedule())


@pytest.mark.parametrize("preset", ["sd15", "sdxl", "sd35", "flux"])
def test_presets_are_settings_that_their_models_take(models, preset):
    config = PRESETS[preset]
    policy = make_policy(models[preset], guidance_scale=config.model.guidance_scale)
    settings = dataclasses.replace(config.sampler, credit="proportionate")
    table = samplers.build(settings, policy.schedule())
    assert len(table) == settings.num_inference_steps
    zeta = {"sd35": 4.2967, "flux": 13.343}
    if preset in zeta:
        assert table.target_weight == pytest.approx(zeta[preset], rel=1e-4)
        assert table.trainable.tolist() == [True] * (len(table) - 1) + [False]


EXECUTION = {
    "gradient-checkpointing": {"gradient_checkpointing": True},
    "sdpa-math": {"attention": "sdpa-math"},
    "sdpa-flash": {"attention": "sdpa-flash"},
    "checkpointing-math": {"gradient_checkpointing": True, "attention": "sdpa-math"},
    "channels-last": {"channels_last": True},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", EXECUTION)
def test_how_the_denoiser_is_run_changes_nothing_but_rounding(models, name, family):
    """Neither outputs nor gradients; with checkpointing, not a bit of either."""
    settings = EXECUTION[name]
    if "channels_last" in settings and family in ("sd35", "flux"):
        with refused("channels_last", "has no convolutions in its denoiser; leave this setting out"):
            find_model(make_settings(models[family], **settings))
        return
    found = []
    for changed in ({}, settings):
        policy = make_policy(models[family], resolution=64, **changed)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in policy.trainable_parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
        sample = torch.randn((4, *policy.latent_shape), generator=generator)
        output = policy.predict(sample, torch.full((4,), 500), policy.encode(["cat", "dog", "horse", "cat"]))
        gradients = torch.autograd.grad(output.square().mean(), policy.trainable_parameters())
        found.append((output.detach(), torch.cat([gradient.flatten() for gradient in gradients])))
    for plain, changed in zip(*found, strict=True):
        if name == "gradient-checkpointing":
            assert torch.equal(plain, changed)
        else:
            # sums in another order, through some ten layers
            assert (plain - changed).norm() <= 1e-4 * plain.norm()


def test_attention_is_the_kernel_that_was_named(model, monkeypatch):
    """In the forward pass, and where the backward pass computes activations again."""
    named, inner = [], torch.nn.functional.scaled_dot_product_attention
    policy = make_policy(model, attention="sdpa-math", gradient_checkpointing=True)
    conditioning = policy.encode(["cat"])

    def watched(*arguments, **settings):
        flash, math = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()
        named.append((flash, math))
        return inner(*arguments, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    sample = torch.randn((1, *policy.latent_shape))
    output = policy.predict(sample, torch.full((1,), 500), conditioning)
    forward = len(named)
    output.mean().backward()
    assert len(named) == 2 * forward > 0
    assert set(named) == {(False, True)}


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_channels_last_is_how_convolutions_lie_and_not_how_they_are_saved(model, tmp_path, tuning):
    policy = make_policy(model, channels_last=True, tuning=tuning)
    weights = {
        name: weight.is_contiguous(memory_format=torch.channels_last)
        for name, weight in policy.denoiser.named_parameters()
        if weight.dim() == 4 and weight.shape[1] > 1 and weight.shape[2] > 1
    }
    assert weights and all(weights.values())
    train_a_little(policy)
    policy.save(tmp_path)
    plain = make_policy(model, tuning=tuning)
    plain.load(tmp_path)
    for ours, theirs in zip(policy.trainable_parameters(), plain.trainable_parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_flux_is_told_the_timesteps_of_its_pipeline(models, dtype):
    policy = make_policy(models["flux"], dtype=dtype, guidance_scale=3.5)
    told = []
    policy.denoiser.time_text_embed.time_proj.register_forward_pre_hook(lambda _, inputs: told.append(inputs[0][:1]))
    policy.pipeline("cat", num_inference_steps=16, height=64, width=64, output_type="latent")
    pipelines, told = torch.cat(told).view(16, 2)[:, 0], []
    timesteps = samplers.build(SamplerSettings(num_inference_steps=16), policy.schedule()).timesteps
    policy.denoiser.time_text_embed.time_proj._forward_pre_hooks.clear()
    policy.denoiser.time_text_embed.time_proj.register_forward_pre_hook(lambda _, inputs: told.append(inputs[0][:1]))
    for timestep in timesteps:
        policy.predict(torch.zeros((1, *policy.latent_shape)), timestep[None], policy.encode(["cat"]))
    ours = torch.cat(told).view(16, 2)[:, 0]
    assert torch.equal(ours, pipelines)


def test_a_shift_of_ones_own_keeps_the_models_timesteps(models):
    policy = make_policy(models["sd35"])
    policy.pipeline.scheduler.register_to_config(num_train_timesteps=500)
    table = samplers.build(SamplerSettings(num_inference_steps=4, shift=3.0), policy.schedule())
    assert table.timesteps[0] == 500


def test_latents_with_a_mean_and_a_deviation(models):
    """As autoencoders of some SDXL models have them."""
    policy = make_policy(models["sdxl"])
    policy.pipeline.vae.register_to_config(latents_mean=[-1.0, 0.5, 0.0, 2.0], latents_std=[2.0, 1.0, 0.5, 3.0])
    latents = torch.randn((1, *policy.latent_shape), generator=torch.Generator().manual_seed(0))
    policy.pipeline.scheduler.set_timesteps(1)
    call = {"prompt": "cat", "num_inference_steps": 1, "height": 64, "width": 64, "latents": latents}
    end = policy.pipeline(**call, output_type="latent").images
    images = policy.pipeline(**call, output_type="pt").images
    torch.testing.assert_close(policy.decode(end), images, rtol=0, atol=1e-5)


def test_full_tuning_trains_float32_weights():
    pipeline = stable_diffusion().to(torch.bfloat16)
    policy = wrap(pipeline, tuning="full", dtype="bf16")
    assert {parameter.dtype for parameter in policy.trainable_parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("family", "name", "value", "message"),
    [
        ("sd15", "max_sequence_length", 16, "has no text encoder whose number of tokens .* leave this setting out"),
        ("sdxl", "max_sequence_length", 16, "has no text encoder whose number of tokens .* leave this setting out"),
        ("flux", "t5", False, r"\(FluxPolicy\) has no T5 encoder that can be left out; leave this setting out"),
        ("sd35", "resolution", 512, "512 is more than the 256 that this model has positions for"),
    ],
)
def test_what_a_family_does_not_have_is_refused(models, family, name, value, message):
    with refused(name, message):
        find_model(make_settings(models[family], **{name: value}))


def test_attention_that_a_model_cannot_have_is_refused(models, monkeypatch):
    with refused("attention", r"flash is not available for .* use PyTorch's own: sdpa, sdpa-flash"):
        find_model(make_settings(models["sd35"], attention="flash"))
    monkeypatch.setattr("pcpo_fast.policies.checks.check_package", lambda *_: None)
    find_model(make_settings(models["sd35"], attention="xformers", tuning="full"))
    with refused("attention", "wants queries, keys and values of one dtype, .* use sdpa, or tuning lora"):
        find_model(make_settings(models["sd35"], attention="xformers", tuning="full", dtype="bf16"))


def test_conditioning_keeps_its_names():
    mask, embeddings = torch.tensor([[True, False], [True, True], [False, True]]), torch.randn(3, 2, 4)
    conditioning = Conditioning(mask=mask, embeddings=embeddings)
    assert len(conditioning) == 3
    assert torch.equal(conditioning.mask, mask) and torch.equal(conditioning.embeddings, embeddings)
    for made, rows in (
        (conditioning[[2, 0]], [2, 0]),
        (conditioning[torch.tensor([1, 1])], [1, 1]),
        (conditioning.to(torch.device("cpu")), [0, 1, 2]),
        (conditioning[1:2].expand(3), [1, 1, 1]),
        # whatever the order in which the names were given
        (Conditioning.cat([conditioning, Conditioning(embeddings=embeddings, mask=mask)]), [0, 1, 2, 0, 1, 2]),
    ):
        assert list(made.tensors()) == ["mask", "embeddings"]
        assert torch.equal(made.mask, mask[rows]) and torch.equal(made.embeddings, embeddings[rows])


def test_conditionings_that_do_not_fit_are_refused():
    one, other = (
        Conditioning(embeddings=torch.zeros(2, 3)),
        Conditioning(embeddings=torch.zeros(2, 3), pooled=torch.zeros(2, 1)),
    )
    with pytest.raises(ValueError, match="cannot be joined: embeddings and embeddings, pooled"):
        Conditioning.cat([one, other])
    with pytest.raises(ValueError, match=r"one row per prompt; given a \(2,\), b \(3,\)"):
        Conditioning(a=torch.zeros(2), b=torch.zeros(3))
    with pytest.raises(ValueError, match="given no tensor"):
        Conditioning()
    with pytest.raises(AttributeError, match="has no tensor 'pooled'"):
        _ = one.pooled
