"""The embedded digits model: what is shipped, how well it draws, how well its classifiers read, how it is made."""

import functools
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("sklearn")

from diffusers import DDIMScheduler, StableDiffusionPipeline

from pcpo_fast.digits import build, data, models, quality, rewards, training

ROOM = Path(data.__file__).parent


@functools.cache
def pipeline() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(ROOM / "diffusion")


@functools.cache
def real_digits() -> tuple[torch.Tensor, torch.Tensor]:
    return data.load_data()


def shipped_prompts() -> list[str]:
    return (ROOM / "prompts.txt").read_text().splitlines()


def test_folder_is_a_stable_diffusion_pipeline():
    loaded = pipeline()
    assert isinstance(loaded.scheduler, DDIMScheduler)
    assert loaded.safety_checker is None and loaded.feature_extractor is None
    assert not loaded.config.requires_safety_checker
    config = loaded.scheduler.config
    assert (config.prediction_type, config.clip_sample, config.set_alpha_to_one) == ("epsilon", False, False)
    assert (config.timestep_spacing, config.steps_offset, config.beta_schedule) == ("leading", 1, "scaled_linear")
    assert loaded.unet.config.sample_size * loaded.vae_scale_factor == rewards.IMAGE_SIZE


def test_shipped_files_are_small():
    files = [*(ROOM / "diffusion").rglob("*"), *(ROOM / "classifiers").rglob("*")]
    assert sum(path.stat().st_size for path in files if path.is_file()) <= 8e6


def test_latents_have_unit_variance():
    latents = models.encode(pipeline().vae, real_digits()[0][:600])
    assert latents.shape == (600, *models.LATENT_SHAPE)
    assert latents.std().item() == pytest.approx(1, abs=0.03)


def test_autoencoder_returns_the_digit_it_was_given():
    images, shown = real_digits()
    returned = models.decode(pipeline().vae, models.encode(pipeline().vae, images[:400]))
    assert torch.nn.functional.mse_loss(returned, images[:400]) < 0.01
    read = rewards.load_classifier("eval")(returned / 2 + 0.5).argmax(dim=1)
    assert (read == shown[:400]).float().mean() > 0.96


def test_pictures_show_the_prompted_digit_often_but_not_always():
    texts = shipped_prompts() * 3
    images = quality.generate(pipeline(), texts, seed=1234)
    assert images.shape == (240, 3, 32, 32)
    # below, the model cannot draw; above, alignment has nothing left to do
    assert 0.65 <= rewards.accuracy(images, texts).mean() <= 0.95
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


@pytest.mark.parametrize(("which", "held_out"), [("reward", 1), ("eval", 0)])
def test_classifiers_read_the_half_they_were_not_trained_on(which, held_out):
    images, shown = real_digits()
    half = data.split_halves(shown, build.SEED)[held_out]
    figures = quality.assess_classifier(rewards.load_classifier(which), images[half], shown[half])
    assert figures["accuracy"] >= 0.96
    assert figures["calibration_error"] <= 0.1
    # not saturated: the log-probability of a wrong digit still tells near from far
    assert -9 < figures["log_prob_of_the_others"] < -3


def test_halves_are_disjoint_whole_and_balanced():
    shown = real_digits()[1]
    first, second = data.split_halves(shown, seed=3)
    assert torch.equal(torch.cat([first, second]).sort().values, torch.arange(len(shown)))
    assert (shown[first].bincount() - shown[second].bincount()).abs().max() <= 1
    assert not torch.equal(first, data.split_halves(shown, seed=4)[0])


def test_shipped_prompts_are_the_training_prompts():
    texts = shipped_prompts()
    assert texts == data.prompts()
    assert len(set(texts)) == len(texts)
    per_digit = len(data.PROMPT_TEMPLATES)
    assert [rewards.digit_of(text) for text in texts] == [digit for digit in range(10) for _ in range(per_digit)]


@pytest.mark.parametrize(
    ("prompt", "digit"),
    [("SEVEN, by hand", 7), ("the number 0.", 0), ("a 3", 3), ("8 eight Eight", 8), ("a well-known nine", 9)],
)
def test_digit_of(prompt, digit):
    assert rewards.digit_of(prompt) == digit


@pytest.mark.parametrize("prompt", ["", "a horse", "the number 42", "someone tensed", "one or two"])
def test_digit_of_says_what_it_accepts(prompt):
    with pytest.raises(ValueError, match=r"seven.*0-9") as raised:
        rewards.digit_of(prompt)
    assert repr(prompt) in str(raised.value)


def test_alignment_prefers_the_right_digit():
    images, shown = real_digits()
    images, shown = images[:100] / 2 + 0.5, shown[:100].tolist()
    right = rewards.alignment(images, [f"the digit {digit}" for digit in shown])
    wrong = rewards.alignment(images, [f"the digit {(digit + 1) % 10}" for digit in shown])
    assert right.shape == (100,) and right.dtype == torch.float32
    assert torch.isfinite(right).all() and torch.isfinite(wrong).all() and (right <= 0).all()
    assert (right > wrong).float().mean() > 0.96
    every = torch.stack([rewards.alignment(images, [str(digit)] * 100) for digit in range(10)])
    torch.testing.assert_close(every.exp().sum(dim=0), torch.ones(100))


def test_rewards_take_other_sizes_and_precisions():
    images, shown = real_digits()
    texts = [f"a {digit}" for digit in shown[:50].tolist()]
    images = images[:50] / 2 + 0.5
    large = torch.nn.functional.interpolate(images, (96, 96), mode="bicubic").clamp(0, 1)
    assert rewards.accuracy(large, texts).mean() > 0.9
    assert rewards.accuracy(images.bfloat16(), texts).mean() > 0.9
    assert rewards.accuracy(images, texts).unique().tolist() in ([0, 1], [1])


def test_reward_and_eval_are_two_networks_loaded_once():
    reward, evaluator = rewards.load_classifier("reward"), rewards.load_classifier("eval")
    assert reward is rewards.load_classifier("reward")
    assert not reward.training and not any(parameter.requires_grad for parameter in reward.parameters())
    assert not torch.equal(reward.head[-1].weight, evaluator.head[-1].weight)
    with pytest.raises(ValueError, match=r"'test'.*'reward' or 'eval'"):
        rewards.load_classifier("test")


def test_loading_a_classifier_draws_nothing():
    """A resumed run loads them later than one that was not cut off."""
    before = torch.get_rng_state()
    rewards.load_classifier.__wrapped__("reward")
    assert torch.equal(torch.get_rng_state(), before)


def test_rewards_refuse_mismatched_input():
    images = torch.rand(2, 3, 32, 32)
    with pytest.raises(ValueError, match="1 prompts for 2 images"):
        rewards.alignment(images, ["a 1"])
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\)"):
        rewards.accuracy(images[:, :1], ["a 1", "a 2"])
    with pytest.raises(ValueError, match="uint8"):
        rewards.alignment((images * 255).byte(), ["a 1", "a 2"])


def test_tokenizer_encodes_any_text_and_is_the_shipped_one():
    built, shipped = models.build_tokenizer(), pipeline().tokenizer
    assert built.get_vocab() == shipped.get_vocab()
    texts = [*shipped_prompts(), "", "Zürich, 日本 ☃!", "unseen words: qwxzy", "seven " * 40]
    assert torch.equal(models.tokenize(built, texts), models.tokenize(shipped, texts))
    ids = models.tokenize(shipped, texts)
    assert ids.shape == (len(texts), models.MAX_PROMPT_TOKENS)
    # no prompt is cut short, and no character is lost to the unknown token
    assert (ids[: len(shipped_prompts()), -1] == shipped.eos_token_id).all()
    for text in ("a handwritten seven", "zürich 日本 ☃"):
        assert shipped.decode(shipped(text).input_ids, skip_special_tokens=True) == text


def test_training_repeats_bit_for_bit():
    images, shown = real_digits()
    tokenizer = models.build_tokenizer()

    def small_build() -> list[torch.Tensor]:
        autoencoder = training.train_autoencoder(images[:64], seed=7, steps=2)
        classifier = training.train_classifier(images[:16], shown[:16], autoencoder, seed=8, steps=2)
        parts = training.train_denoiser(images[:16], shown[:16], autoencoder, tokenizer, seed=9, steps=2)
        return [value for part in (autoencoder, classifier, *parts) for value in part.state_dict().values()]

    first = small_build()
    torch.rand(3)
    assert all(torch.equal(one, other) for one, other in zip(first, small_build(), strict=True))
