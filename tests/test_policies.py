import importlib.util
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from pipelines import stable_diffusion

from pcpo_fast.config import Config
from pcpo_fast.policies import StableDiffusionPolicy

pytest_plugins = "pipelines"
pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = 3


def make_policy(model, **settings):
    torch.manual_seed(0)
    return StableDiffusionPolicy.from_pretrained(Config(model=str(model), **settings))


def train_a_little(policy):
    """Moves every trained weight, as a few updates would."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return policy


def inputs(policy):
    sample = torch.randn(ROWS, *policy.latent_shape, generator=torch.Generator().manual_seed(2))
    return sample, torch.tensor([981, 501, 1]), policy.encode(["cat", "dog", "horse"])


@torch.no_grad()
def denoise(unet, policy):
    sample, timestep, conditioning = inputs(policy)
    return unet(sample, timestep, conditioning).sample


@torch.no_grad()
def test_guidance_combines_two_outputs(model):
    """u + g (c - u), with u the output for the empty prompt, one call of the denoiser at a time."""
    policy = make_policy(model, guidance_scale=3.5)
    sample, timestep, conditioning = inputs(policy)
    empty = policy.encode([""]).expand(ROWS, -1, -1)
    uncond, cond = (policy.unet(sample, timestep, c).sample for c in (empty, conditioning))
    guided = policy.predict(sample, timestep, conditioning)
    # a denoiser may sum in another order for another batch
    torch.testing.assert_close(guided, uncond + 3.5 * (cond - uncond), rtol=1e-4, atol=1e-5)
    assert (guided - cond).abs().max() > 1e-3
    bare = make_policy(model, guidance_scale=1.0)
    assert torch.equal(bare.predict(sample, timestep, conditioning), denoise(bare.unet, bare))


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_precision(model, dtype, tuning):
    """Outputs and frozen weights have the policy's dtype; trained weights are float32 and start as they were saved."""
    policy = make_policy(model, dtype=dtype, tuning=tuning)
    wanted = getattr(torch, {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[dtype])
    trained = policy.trainable_parameters()
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    frozen = [p for m in (policy.unet, policy.pipeline.vae, policy.pipeline.text_encoder) for p in m.parameters()]
    assert {parameter.dtype for parameter in frozen if not parameter.requires_grad} == {wanted}
    assert not any(module.training for module in policy.unet.modules() if isinstance(module, torch.nn.Dropout))
    output = policy.predict(*inputs(policy))
    assert output.dtype == wanted
    assert output.isfinite().all()
    saved = UNet2DConditionModel.from_pretrained(model, subfolder="unet").state_dict()
    if tuning == "full":
        assert all(torch.equal(value, saved[name]) for name, value in policy.unet.state_dict().items())
        assert len(trained) == len(saved)
    else:
        # rank 4 on the 4 projections of 2 attentions in 16 blocks, 6 down, 1 in the middle, 9 up
        assert len(trained) == 2 * 4 * 2 * 16


def test_encode_does_not_depend_on_the_batch(model):
    policy = make_policy(model)
    prompts = ["cat", "a dog on the moon", "cat"]
    expected, _ = policy.pipeline.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=False)
    encoded = policy.encode(prompts)
    torch.testing.assert_close(encoded, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(encoded[0], encoded[2])
    assert (encoded[0] - encoded[1]).abs().max() > 0.1


def test_decode_is_the_pipelines_and_does_not_depend_on_the_batch(model):
    policy = make_policy(model, micro_batch_size=2)
    latents = torch.randn(5, *policy.latent_shape, generator=torch.Generator().manual_seed(2))
    vae = policy.pipeline.vae
    with torch.no_grad():
        decoded = vae.decode(latents / vae.config.scaling_factor).sample
    expected = policy.pipeline.image_processor.postprocess(decoded, output_type="pt")
    images = policy.decode(latents)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    assert images.shape == (5, 3, 64, 64)
    assert images.std() > 0.01


def test_resolution_sets_the_latents(model):
    assert make_policy(model).latent_shape == (4, 8, 8)
    policy = make_policy(model, resolution=96)
    assert policy.latent_shape == (4, 12, 12)
    assert policy.decode(torch.zeros(1, 4, 12, 12)).shape == (1, 3, 96, 96)


@pytest.mark.parametrize("alpha", [4, 10])
def test_saved_lora_is_what_diffusers_reads(model, tmp_path, alpha):
    """A fresh pipeline with the saved weights has the policy's output, scale included; without, the base model's."""
    policy = make_policy(model, lora_rank=4, lora_alpha=alpha)
    base = denoise(policy.unet, policy)
    fresh = StableDiffusionPipeline.from_pretrained(model)
    # an adapter starts at zero
    assert torch.equal(denoise(fresh.unet, policy), base)
    train_a_little(policy).save(tmp_path)
    trained = denoise(policy.unet, policy)
    assert (trained - base).abs().max() > 1e-2
    fresh.load_lora_weights(tmp_path)
    torch.testing.assert_close(denoise(fresh.unet, policy), trained, rtol=1e-6, atol=1e-6)


def test_saved_unet_is_what_diffusers_reads(model, tmp_path):
    policy = train_a_little(make_policy(model, tuning="full"))
    policy.save(tmp_path)
    assert torch.equal(denoise(UNet2DConditionModel.from_pretrained(tmp_path), policy), denoise(policy.unet, policy))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_weights_come_back_bit_for_bit(model, tmp_path, tuning, dtype):
    policy = train_a_little(make_policy(model, tuning=tuning, dtype=dtype))
    policy.save(tmp_path)
    other = make_policy(model, tuning=tuning, dtype=dtype)
    other.load(tmp_path)
    ours, theirs = policy.unet.state_dict(), other.unet.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_rank": 2}, "does not fit this model and --lora-rank"),
        ({"lora_target_modules": ("to_q",)}, "has layers that this model's adapter has not"),
    ],
)
def test_another_adapter_is_refused(model, tmp_path, settings, message):
    make_policy(model).save(tmp_path)
    with pytest.raises(ValueError, match=message):
        make_policy(model, **settings).load(tmp_path)


def test_a_unet_of_another_build_is_refused(model, tmp_path):
    make_policy(model, tuning="full").save(tmp_path)
    with pytest.raises(ValueError, match="is not built as this model's; resume with the run's own --model"):
        make_policy("digits", tuning="full").load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "gpu"}, "--device gpu is not supported; choose auto, cpu, cuda or cuda:N"),
        ({"device": "mps"}, "--device mps is not supported"),
        ({"device": "cuda:99"}, "--device cuda:99 is not there: this machine shows .* use --device auto or cpu"),
        ({"attention": "xformers", "device": "cpu"}, "needs the package xformers, .* or use --attention sdpa"),
        ({"resolution": 60}, "--resolution 60 is not a multiple of 8"),
        ({"lora_target_modules": ("to_nothing",)}, "Target modules {'to_nothing'} not found"),
    ],
)
def test_what_this_machine_or_model_cannot_do_is_refused(model, monkeypatch, settings, message):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "xformers" else find_spec(name, *a)
    )
    with pytest.raises(ValueError, match=message):
        make_policy(model, **settings)


def test_xformers_without_a_gpu_is_refused(model, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(
        ValueError, match="--attention xformers runs on a GPU and the device is cpu; use --attention sdpa"
    ):
        make_policy(model, attention="xformers", device="cpu")


@pytest.mark.parametrize("name", ["nowhere", "./nowhere/at/all", "/nowhere"])
def test_a_missing_folder_is_refused(name):
    with pytest.raises(FileNotFoundError) as error:
        make_policy(name)
    assert f"--model {name!r} is no diffusers pipeline: there is no {name}/model_index.json" in str(error.value)
    assert "a hub name (owner/name), or digits" in str(error.value)


def test_a_policy_needs_no_folder(tmp_path):
    """A pipeline that is in memory already can be aligned too."""
    policy = StableDiffusionPolicy(stable_diffusion(), Config(), torch.device("cpu"))
    assert policy.predict(*inputs(policy)).requires_grad


def test_another_pipeline_is_refused(model, tmp_path):
    shutil.copytree(model, tmp_path / "other")
    index = tmp_path / "other" / "model_index.json"
    index.write_text(index.read_text().replace('"StableDiffusionPipeline"', '"StableDiffusionXLPipeline"'))
    with pytest.raises(ValueError, match="is a StableDiffusionXLPipeline"):
        make_policy(tmp_path / "other")
