"""Quality of the digits models: pictures by the pipelines' own samplers, read by the classifiers."""

from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from torch import Tensor

from pcpo_fast import Guidance, NoiseKey, StepTable, sampler_step
from pcpo_fast.digits.models import LATENT_SHAPE, MAX_PROMPT_TOKENS, decode
from pcpo_fast.digits.rewards import DigitClassifier, digit_of

# the guidance scale at which the models' quality is stated, and from which alignment starts
GUIDANCE_SCALE = 1.5
NUM_INFERENCE_STEPS = 20
FLOW_GUIDANCE_SCALE = 1.0
FLOW_NUM_INFERENCE_STEPS = 10
FLOW_NOISE_LEVEL = 0.7


def generate(
    pipeline: StableDiffusionPipeline | StableDiffusion3Pipeline,
    texts: list[str],
    seed: int,
    guidance_scale: float | None = None,
) -> Tensor:
    """Sample one picture per prompt by the pipeline's own call: (N, 3, 32, 32) in [0, 1].

    The denoiser takes 20 stochastic DDIM steps (eta = 1) with guidance, the flow model 10 Euler steps without.
    """
    pipeline.set_progress_bar_config(disable=True)
    if isinstance(pipeline, StableDiffusion3Pipeline):
        steps, default_scale = FLOW_NUM_INFERENCE_STEPS, FLOW_GUIDANCE_SCALE
        settings: dict[str, object] = {"max_sequence_length": MAX_PROMPT_TOKENS}
    else:
        steps, default_scale, settings = NUM_INFERENCE_STEPS, GUIDANCE_SCALE, {"eta": 1.0}
    pictures = pipeline(
        texts,
        num_inference_steps=steps,
        guidance_scale=default_scale if guidance_scale is None else guidance_scale,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
        **settings,
    )
    return pictures.images


@torch.no_grad()
def generate_stochastic(
    pipeline: StableDiffusion3Pipeline, texts: list[str], seed: int, guidance_scale: float = FLOW_GUIDANCE_SCALE
) -> Tensor:
    """Sample one picture per prompt with 10 steps of Flow-SDE, noise level 0.7, as in alignment: (N, 3, 32, 32) in
    [0, 1]."""
    table = StepTable.from_scheduler(pipeline.scheduler, FLOW_NUM_INFERENCE_STEPS, noise_level=FLOW_NOISE_LEVEL)
    key = NoiseKey(seed, torch.arange(len(texts)))
    embeds = pipeline.encode_prompt(texts, texts, texts, max_sequence_length=MAX_PROMPT_TOKENS)
    condition, pooled = torch.cat(embeds[:2]), torch.cat(embeds[2:])
    latents = torch.randn(len(texts), *LATENT_SHAPE, generator=torch.Generator().manual_seed(seed))
    for step, timestep in enumerate(table.timesteps):
        output = pipeline.transformer(latents.repeat(2, 1, 1, 1), condition, pooled, timestep.expand(2 * len(texts)))
        prompted, unprompted = output.sample.chunk(2)
        guidance = Guidance(unprompted, guidance_scale)
        latents = sampler_step(prompted, latents, table, step, key, guidance=guidance).prev_sample
    return decode(pipeline.vae, latents) / 2 + 0.5


def save_picture(images: Tensor, columns: int, path: Path, zoom: int = 2) -> None:
    """Save (N, 3, H, W) pictures in [0, 1] as one PNG, row by row."""
    from PIL import Image

    rows = [torch.cat(list(row), dim=2) for row in images.split(columns)]
    pixels = (torch.cat(rows, dim=1).permute(1, 2, 0) * 255).round().byte()
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(pixels.numpy())
    picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(path, optimize=True)


@torch.no_grad()
def assess_classifier(classifier: DigitClassifier, images: Tensor, digits: Tensor) -> dict[str, float]:
    """Accuracy, calibration and log-probabilities on pictures (N, 3, 32, 32) in [-1, 1] it was not trained on.

    `calibration_error` is the expected calibration error over ten bins of confidence. The log-probabilities, in nats,
    are means: of the digit shown, and of the other nine.
    """
    log_probs = classifier(images / 2 + 0.5).log_softmax(dim=1)
    confidence, read = log_probs.exp().max(dim=1)
    right = (read == digits).float()
    bins = (confidence * 10).long().clamp(max=9)
    gaps = torch.zeros(10).index_add_(0, bins, right - confidence)
    own = log_probs.gather(1, digits[:, None]).squeeze(1)
    figures = {
        "accuracy": right.mean(),
        "calibration_error": gaps.abs().sum() / len(digits),
        "log_prob_of_the_digit": own.mean(),
        "log_prob_of_the_others": (log_probs.sum(dim=1) - own).mean() / 9,
    }
    return {key: round(value.item(), 4) for key, value in figures.items()}


@torch.no_grad()
def assess_pictures(
    images: Tensor, texts: list[str], reward: DigitClassifier, evaluator: DigitClassifier
) -> dict[str, object]:
    """How often the classifiers read the prompted digit in pictures (N, 3, 32, 32) in [0, 1] of N prompts."""
    digits = torch.tensor([digit_of(text) for text in texts])
    right = (evaluator(images).argmax(dim=1) == digits).float()
    log_probs = reward(images).log_softmax(dim=1)
    return {
        "accuracy_eval": round(right.mean().item(), 4),
        "accuracy_eval_per_digit": [round(right[digits == digit].mean().item(), 3) for digit in range(10)],
        "accuracy_reward": round((log_probs.argmax(dim=1) == digits).float().mean().item(), 4),
        "alignment": round(log_probs.gather(1, digits[:, None]).mean().item(), 4),
    }
