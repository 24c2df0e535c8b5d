"""The embedded flow model: what is shipped, what it shares with the diffusion model, how it draws, how it is made."""

import functools
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("sklearn")

from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline, StableDiffusionPipeline
from safetensors.torch import load_file

from pcpo_fast.digits import data, models, quality, rewards, training

ROOM = Path(data.__file__).parent
FLOW = ROOM / "flow"


@functools.cache
def pipeline() -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline.from_pretrained(FLOW, text_encoder_3=None, tokenizer_3=None)


@functools.cache
def diffusion() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(ROOM / "diffusion")


def shipped_prompts() -> list[str]:
    return (ROOM / "prompts.txt").read_text().splitlines()


def test_folder_is_a_stable_diffusion_3_pipeline():
    loaded = pipeline()
    assert type(loaded.scheduler) is FlowMatchEulerDiscreteScheduler
    assert (loaded.scheduler.config.shift, loaded.scheduler.config.use_dynamic_shifting) == (3.0, False)
    assert loaded.text_encoder_3 is None and loaded.tokenizer_3 is None
    assert loaded.transformer.config.sample_size * loaded.vae_scale_factor == rewards.IMAGE_SIZE
    assert loaded.tokenizer_max_length == models.MAX_PROMPT_TOKENS
    # weights are those of the moving average, not of an untrained model, whose output is zero
    assert loaded.transformer.proj_out.weight.abs().max() > 0


def test_shipped_files_are_small_and_name_no_folder():
    files = [path for path in FLOW.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8e6
    assert not any("_name_or_path" in path.read_text() for path in files if path.suffix == ".json")


def test_autoencoder_is_that_of_the_diffusion_model():
    name = "vae/diffusion_pytorch_model.safetensors"
    assert (FLOW / name).read_bytes() == (ROOM / "diffusion" / name).read_bytes()
    config = pipeline().vae.config
    assert config.scaling_factor == diffusion().vae.config.scaling_factor
    assert config.shift_factor == 0


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2"])
def test_text_encoders_are_that_of_the_diffusion_model(name):
    theirs = load_file(ROOM / "diffusion" / "text_encoder" / "model.safetensors")
    ours = load_file(FLOW / name / "model.safetensors")
    projection = ours.pop("text_projection.weight")
    assert torch.equal(projection, torch.eye(64))
    # versions of transformers differ in the prefix
    theirs = {key.removeprefix("text_model."): value for key, value in theirs.items()}
    ours = {key.removeprefix("text_model."): value for key, value in ours.items()}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_prompt_embeddings_carry_the_digit_in_any_wording():
    texts = shipped_prompts()
    embeds, _, pooled, _ = pipeline().encode_prompt(
        texts, texts, texts, do_classifier_free_guidance=False, max_sequence_length=models.MAX_PROMPT_TOKENS
    )
    assert embeds.shape == (80, 2 * models.MAX_PROMPT_TOKENS, 128)
    assert pooled.shape == (80, 128)
    # classified by the nearest mean of the other wordings
    pooled = pooled.view(10, len(data.PROMPT_TEMPLATES), 128)
    for wording in range(len(data.PROMPT_TEMPLATES)):
        others = [other for other in range(len(data.PROMPT_TEMPLATES)) if other != wording]
        nearest = torch.cdist(pooled[:, wording], pooled[:, others].mean(dim=1)).argmin(dim=1)
        assert torch.equal(nearest, torch.arange(10))


@pytest.mark.parametrize("sample", [quality.generate, quality.generate_stochastic])
def test_pictures_show_the_prompted_digit_often_but_not_always(sample):
    texts = shipped_prompts() * 3
    images = sample(pipeline(), texts, seed=1234)
    assert images.shape == (240, 3, 32, 32)
    # below, the model cannot draw; above, alignment has nothing left to do
    assert 0.65 <= rewards.accuracy(images, texts).mean() <= 0.92
    # half of the 80 prompts further on, every prompt names a digit five away
    elsewhere = texts[40:] + texts[:40]
    assert rewards.alignment(images, texts).mean() > rewards.alignment(images, elsewhere).mean() + 2


def test_guidance_matters_and_the_empty_prompt_is_no_digit():
    texts = shipped_prompts()
    unguided = quality.generate(pipeline(), texts, seed=5, guidance_scale=1.0)
    guided = quality.generate(pipeline(), texts, seed=5, guidance_scale=4.0)
    assert rewards.alignment(guided, texts).mean() > rewards.alignment(unguided, texts).mean()
    unconditional = quality.generate(pipeline(), [""] * 80, seed=5, guidance_scale=1.0)
    read = rewards.load_classifier("eval")(unconditional).argmax(dim=1)
    assert len(read.unique()) >= 6


def test_stochastic_sampler_without_noise_is_the_pipelines_own(monkeypatch):
    texts = shipped_prompts()[::8]
    own = quality.generate(pipeline(), texts, seed=3)
    assert not torch.allclose(quality.generate_stochastic(pipeline(), texts, seed=3), own, atol=0.1)
    monkeypatch.setattr(quality, "FLOW_NOISE_LEVEL", 0.0)
    torch.testing.assert_close(quality.generate_stochastic(pipeline(), texts, seed=3), own, atol=1e-3, rtol=0)


def test_shipped_quality_is_that_of_the_shipped_files():
    shipped = json.loads((FLOW / "quality.json").read_text())
    assert shipped["guidance_scale"] == quality.FLOW_GUIDANCE_SCALE
    texts = shipped_prompts() * 3
    images = quality.generate_stochastic(pipeline(), texts, seed=77)
    # four standard errors of the difference between 240 and 800 pictures
    assert rewards.accuracy(images, texts).mean() == pytest.approx(shipped["flow_sde"]["accuracy_eval"], abs=0.12)


def test_training_repeats_bit_for_bit_and_leaves_the_rest_alone():
    images, shown = data.load_data()
    before = {key: value.clone() for key, value in diffusion().text_encoder.state_dict().items()}

    def small_build() -> list[torch.Tensor]:
        built = training.train_flow(images[:16], shown[:16], diffusion().vae, diffusion().text_encoder, seed=9, steps=3)
        return list(built.transformer.state_dict().values())

    first = small_build()
    torch.rand(3)
    assert all(torch.equal(one, other) for one, other in zip(first, small_build(), strict=True))
    untrained = models.build_flow_transformer().state_dict().values()
    assert not all(torch.equal(one, other) for one, other in zip(first, untrained, strict=True))
    after = diffusion().text_encoder.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
