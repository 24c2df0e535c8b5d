"""Training of the digits models' parts, each from a seed of its own."""

import copy
import math
import time

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusion3Pipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from pcpo_fast.digits.data import PROMPT_TEMPLATES, augment, prompts
from pcpo_fast.digits.models import (
    LATENT_SHAPE,
    MAX_PROMPT_TOKENS,
    build_autoencoder,
    build_denoiser,
    build_flow_pipeline,
    build_scheduler,
    build_text_encoder,
    decode,
    encode,
    tokenize,
)
from pcpo_fast.digits.rewards import DigitClassifier

AUTOENCODER_STEPS = 1000
CLASSIFIER_STEPS = 1500
DENOISER_STEPS = 1500
FLOW_STEPS = 1400


def train_autoencoder(images: Tensor, seed: int, steps: int = AUTOENCODER_STEPS) -> AutoencoderKL:
    """Train the autoencoder on (N, 3, 32, 32) pictures in [-1, 1] and set its scaling factor."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    autoencoder = build_autoencoder()
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    progress = _Progress("autoencoder", steps)
    for step in range(steps):
        batch = augment(images[torch.randint(len(images), (32,), generator=generator)], generator)
        posterior = autoencoder.encode(batch).latent_dist
        decoded = autoencoder.decode(posterior.sample(generator)).sample
        error = F.mse_loss(decoded, batch)
        kl = posterior.kl().mean() / math.prod(LATENT_SHAPE)
        # enough of a prior to keep latents smooth: a small move in latent space stays a small move in the picture
        loss = error + 2e-3 * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress(step, error=error, kl=kl)
    autoencoder.eval().requires_grad_(False)
    latents = encode(autoencoder, images, scale=1.0)
    autoencoder.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return autoencoder


def train_classifier(
    images: Tensor, digits: Tensor, autoencoder: AutoencoderKL, seed: int, steps: int = CLASSIFIER_STEPS
) -> DigitClassifier:
    """Train a classifier on pictures (N, 3, 32, 32) in [-1, 1] of digits (N,), as drawn and as reconstructed."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.cat([augment(images, generator) for _ in range(16)])
    labels = digits.repeat(16)
    latents = encode(autoencoder, drawn)
    latents += 0.2 * torch.randn(latents.shape, generator=generator)
    pool = torch.cat([drawn, decode(autoencoder, latents)]) / 2 + 0.5
    labels = labels.repeat(2)

    classifier = DigitClassifier().train()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    progress = _Progress("classifier", steps)
    for step in range(steps):
        chosen = torch.randint(len(pool), (64,), generator=generator)
        # smoothed labels keep the log-probability of a wrong digit finite in practice and telling
        loss = F.cross_entropy(classifier(pool[chosen]), labels[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(step, loss=loss)
    return classifier.eval().requires_grad_(False)


def train_denoiser(
    images: Tensor,
    digits: Tensor,
    autoencoder: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    seed: int,
    steps: int = DENOISER_STEPS,
) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """Train the text encoder and the denoiser on pictures (N, 3, 32, 32) in [-1, 1] of digits (N,)."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    scheduler = build_scheduler()
    latents = torch.cat([encode(autoencoder, augment(images, generator)) for _ in range(16)])
    digits = digits.repeat(16)
    ids = tokenize(tokenizer, prompts()).view(10, len(PROMPT_TEMPLATES), MAX_PROMPT_TOKENS)
    empty = tokenize(tokenizer, [""])[0]

    trained = torch.nn.ModuleList([build_text_encoder(tokenizer).train(), build_denoiser().train()])
    average = copy.deepcopy(trained).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.05)
    progress = _Progress("denoiser", steps)
    batch = 64
    for step in range(steps):
        chosen = torch.randint(len(latents), (batch,), generator=generator)
        wording = torch.randint(len(PROMPT_TEMPLATES), (batch,), generator=generator)
        dropped = torch.rand(batch, generator=generator) < 0.12
        tokens = torch.where(dropped[:, None], empty, ids[digits[chosen], wording])
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (batch,), generator=generator)
        noise = torch.randn(batch, *LATENT_SHAPE, generator=generator)

        text_encoder, unet = trained
        condition = text_encoder(tokens).last_hidden_state
        noisy = scheduler.add_noise(latents[chosen], noise, timesteps)
        loss = F.mse_loss(unet(noisy, timesteps, condition).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            decay = min(0.995, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), list(trained.parameters()), 1 - decay)
        progress(step, loss=loss)
    return average[0], average[1]


def train_flow(
    images: Tensor,
    digits: Tensor,
    autoencoder: AutoencoderKL,
    text_encoder: CLIPTextModel,
    seed: int,
    steps: int = FLOW_STEPS,
) -> StableDiffusion3Pipeline:
    """Train the flow model on pictures (N, 3, 32, 32) in [-1, 1] of digits (N,); only its transformer learns."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    pipeline = build_flow_pipeline(autoencoder, text_encoder)
    latents = torch.cat([encode(autoencoder, augment(images, generator)) for _ in range(16)])
    digits = digits.repeat(16)
    texts = [*prompts(), ""]
    condition, _, pooled, _ = pipeline.encode_prompt(
        texts, texts, texts, do_classifier_free_guidance=False, max_sequence_length=MAX_PROMPT_TOKENS
    )

    trained = pipeline.transformer.train()
    average = copy.deepcopy(trained).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.05)
    progress = _Progress("flow", steps)
    batch = 64
    for step in range(steps):
        chosen = torch.randint(len(latents), (batch,), generator=generator)
        wording = torch.randint(len(PROMPT_TEMPLATES), (batch,), generator=generator)
        dropped = torch.rand(batch, generator=generator) < 0.12
        text = torch.where(dropped, len(texts) - 1, digits[chosen] * len(PROMPT_TEMPLATES) + wording)
        # the middle of the way is the hardest part of it: logit-normal, as Stable Diffusion 3 was trained
        sigmas = torch.randn(batch, generator=generator).sigmoid()
        noise = torch.randn(batch, *LATENT_SHAPE, generator=generator)

        noisy = torch.lerp(latents[chosen], noise, sigmas[:, None, None, None])
        velocity = trained(noisy, condition[text], pooled[text], sigmas * 1000).sample
        loss = F.mse_loss(velocity, noise - latents[chosen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            decay = min(0.995, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), list(trained.parameters()), 1 - decay)
        progress(step, loss=loss)
    pipeline.transformer = average
    return pipeline


class _Progress:
    """Prints a line for every tenth of a training run."""

    def __init__(self, name: str, steps: int) -> None:
        self.name, self.steps, self.start = name, steps, time.perf_counter()

    def __call__(self, step: int, **values: Tensor) -> None:
        if (step + 1) % max(self.steps // 10, 1) == 0:
            shown = "  ".join(f"{key} {value.item():.4f}" for key, value in values.items())
            seconds = time.perf_counter() - self.start
            print(f"{self.name:12} {step + 1:5}/{self.steps}  {shown}  {seconds:.0f} s", flush=True)
