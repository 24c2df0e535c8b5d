"""A policy's images are those of its diffusers pipeline's own call: every family, at any size, with a negative prompt,
with an adapter."""

import functools
import itertools

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from pipelines import FAMILIES, make_trainer

from pcpo_fast.ops import NoiseKey, sample_noise
from pcpo_fast.rollout import RolloutEngine

pytest_plugins = "pipelines"
pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS, STEPS, SEED = ["cat", "dog", "horse"], 4, 3
DIFFUSION = ("sd15", "sdxl")

CASES = {
    "plain": {"guidance_scale": 1.0},
    "guided": {},
    "wide": {"height": 64, "width": 96},
    "tall": {"height": 96, "guidance_scale": 1.0},
    "empty negative prompt": {"negative_prompt": ""},
    "negative prompt": {"negative_prompt": "a bad drawing", "width": 80},
    "adapter of diffusers": {"adapter": "diffusers"},
    "adapter of PEFT": {"adapter": "peft", "height": 48},
    "adapter of the denoiser alone": {"adapter": "bare"},
}
# FLUX's guidance is an input: there is no negative prompt
TRIED = [(family, case) for family in FAMILIES for case in CASES if family != "flux" or "negative" not in case]


@functools.cache
def adapters(folder, family):
    """Saves one random adapter in three ways; ranks and scales differ by layer."""
    denoiser_name = "unet" if family in DIFFUSION else "transformer"
    pipeline, target = fresh(folder, family), folder.parent / f"adapter-{family}"
    denoiser = getattr(pipeline, denoiser_name)
    patterns = {"rank_pattern": {"to_out.0": 2}, "alpha_pattern": {"to_q": 4}}
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "to_out.0"], **patterns)
    denoiser.add_adapter(config)
    generator = torch.Generator().manual_seed(1)
    values = get_peft_model_state_dict(denoiser)
    with torch.no_grad():
        for weight in values.values():
            weight.copy_(torch.randn(weight.shape, generator=generator) / 2)
    metadata = denoiser.peft_config["default"].to_dict()
    metadata["target_modules"] = sorted(metadata["target_modules"])
    saved = {f"{denoiser_name}_lora_layers": values, f"{denoiser_name}_lora_adapter_metadata": metadata}
    pipeline.save_lora_weights(target / "diffusers", **saved)
    denoiser.save_lora_adapter(target / "bare")
    model = get_peft_model(getattr(fresh(folder, family), denoiser_name), config)
    set_peft_model_state_dict(model, {f"base_model.model.{name}": value for name, value in values.items()})
    model.save_pretrained(target / "peft")
    return target


def fresh(folder, family):
    absent = {"text_encoder_3": None, "tokenizer_3": None} if family == "sd35" else {}
    pipeline = DiffusionPipeline.from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(("family", "case"), TRIED)
def test_images_are_those_of_the_pipelines_call(models, tmp_path, family, case):
    """The pipeline's own call, with its scheduler, its guidance and our noise, ends at the same latents and images."""
    settings = {"guidance_scale": 5.0, "resolution": 64} | CASES[case]
    adapter = settings.pop("adapter", None)
    pipeline = fresh(models[family], family)
    if adapter is not None:
        settings["lora_path"] = str(adapters(models[family], family) / adapter)
        pipeline.load_lora_weights(adapters(models[family], family) / "diffusers")
    trainer = make_trainer(models[family], tmp_path, **settings, num_inference_steps=STEPS, credit="native")
    policy, table = trainer.policy, trainer.eval_table
    height, width = settings.get("height", 64), settings.get("width", 64)
    engine = RolloutEngine(policy, len(PROMPTS))
    order = torch.arange(len(PROMPTS))
    run = functools.partial(engine, table, policy.encode(PROMPTS), seed=SEED, first_index=0)
    trajectory = run(order)
    call = {
        "prompt": PROMPTS,
        "num_inference_steps": STEPS,
        "guidance_scale": settings["guidance_scale"],
        "height": height,
        "width": width,
        "latents": trajectory.states[:, 0].clone(),
    }
    if "negative_prompt" in settings:
        call["negative_prompt"] = [settings["negative_prompt"]] * len(PROMPTS)
    if family in DIFFUSION:
        call["eta"] = 1.0
        key, step = NoiseKey(SEED, order), type(pipeline.scheduler).step
        shape = (len(PROMPTS), *policy.latent_shape)
        noise = itertools.cycle([sample_noise(shape, table, index, key) for index in range(STEPS)])

        def step_with_our_noise(*arguments, eta, generator, **others):
            return step(pipeline.scheduler, *arguments, eta=eta, variance_noise=next(noise), **others)

        pipeline.scheduler.step = step_with_our_noise
    else:
        # the samplers of flow models are evaluated as the ODE that their pipelines follow
        assert not table.trainable.any()
    latents = pipeline(**call, output_type="latent").images
    # float32 latents of order 1 (10 with guidance on random weights) after a few steps
    torch.testing.assert_close(trajectory.latents, latents, rtol=1e-4, atol=1e-4)
    images = pipeline(**call, output_type="pt").images
    decoded = policy.decode(trajectory.latents)
    assert decoded.shape == (len(PROMPTS), 3, height, width)
    torch.testing.assert_close(decoded, images, rtol=0, atol=1e-4)
    # the prompts matter, so the comparison saw them
    assert (trajectory.latents - run(order.flip(0)).latents).abs().max() > 1e-4
    # and so do the adapter and the negative prompt
    if adapter is not None or settings.get("negative_prompt"):
        dropped = {name: value for name, value in settings.items() if name not in ("lora_path", "negative_prompt")}
        plain = make_trainer(models[family], tmp_path / "plain", **dropped, num_inference_steps=STEPS, credit="native")
        other = RolloutEngine(plain.policy, len(PROMPTS))(
            table, plain.policy.encode(PROMPTS), order, seed=SEED, first_index=0
        )
        assert (trajectory.latents - other.latents).abs().max() > 1e-3
