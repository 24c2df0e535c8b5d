"""Build the embedded digits models from nothing: `python -m pcpo_fast.assets.build_digits`.

The results are an ordinary Stable Diffusion pipeline and an ordinary Stable Diffusion 3 pipeline, only small, with the
two classifiers that score them. Everything is trained here, on the 1797 handwritten digits that come with scikit-learn,
in this order:

1. the byte-level BPE tokenizer, from the prompts;
2. the autoencoder, 3x32x32 pixels to 4x8x8 latents;
3. the reward and the eval classifier, each on its own half of the digits, as drawn and as the autoencoder returns them;
4. the text encoder and the denoiser, together, to predict the noise in a latent from its prompt;
5. the flow model's transformer, on the same autoencoder and text encoder, to predict the velocity of a latent.

Training stops early on purpose: both models draw digits, but about one in five is malformed or not the one that was
asked for, which is what alignment is there to repair. One seed decides everything; on one machine with one number of
threads, the same seed gives the same files.
"""

import argparse
import copy
import json
import math
import shutil
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from pcpo_fast import flow_table, sampler_step
from pcpo_fast.rewards.digits import DIGIT_WORDS, IMAGE_SIZE, DigitClassifier, digit_of

ASSETS = Path(__file__).parent
# the guidance scale at which the models' quality is stated, and from which alignment starts
GUIDANCE_SCALE = 1.5
NUM_INFERENCE_STEPS = 20
FLOW_GUIDANCE_SCALE = 1.0
FLOW_NUM_INFERENCE_STEPS = 10
FLOW_NOISE_LEVEL = 0.7
SEED = 0

PROMPT_TEMPLATES = (
    "a handwritten {word}",
    "a handwritten {numeral}",
    "the digit {word}",
    "the digit {numeral}",
    "a photo of the number {word}",
    "the number {numeral} on a black background",
    "{word}, written by hand",
    "a drawing of a {word}",
)
MAX_PROMPT_TOKENS = 16
LATENT_SHAPE = (4, 8, 8)

AUTOENCODER_STEPS = 1000
CLASSIFIER_STEPS = 1500
DENOISER_STEPS = 1500
FLOW_STEPS = 1400


def prompts() -> list[str]:
    """The training prompts: every template for zero, then every template for one, and so on (80 in all)."""
    return [
        template.format(word=word, numeral=numeral)
        for numeral, word in enumerate(DIGIT_WORDS)
        for template in PROMPT_TEMPLATES
    ]


def load_data() -> tuple[Tensor, Tensor]:
    """The real digits as white ink on black.

    Returns:
        images, (1797, 3, 32, 32) float32 in [-1, 1], and the digits they show, (1797,) int64.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    ink = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    # a margin before the enlargement, so that strokes end inside the picture
    ink = F.interpolate(F.pad(ink, (1, 1, 1, 1)), (IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", align_corners=False)
    ink = ((ink - 0.15) / 0.7).clamp(0, 1)
    ink = ink * ink * (3 - 2 * ink)
    return (ink * 2 - 1).expand(-1, 3, -1, -1).contiguous(), torch.tensor(data.target)


def split_halves(digits: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of two disjoint halves, each with half of every digit: for the reward and for the eval classifier."""
    generator = torch.Generator().manual_seed(seed)
    halves: tuple[list[Tensor], list[Tensor]] = ([], [])
    for digit in range(10):
        indices = (digits == digit).nonzero().squeeze(1)
        indices = indices[torch.randperm(len(indices), generator=generator)]
        for half, part in zip(halves, (indices[::2], indices[1::2]), strict=True):
            half.append(part)
    return torch.cat(halves[0]).sort().values, torch.cat(halves[1]).sort().values


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn by up to 8 degrees, scale by up to 8%, and shift by up to 1.3 pixels, each picture on its own.

    Args:
        images: (N, 3, 32, 32) in [-1, 1], black outside.

    Returns:
        The same shape and range.
    """
    angle, scale, shift_x, shift_y = (torch.rand(4, len(images), generator=generator) * 2 - 1) * 0.08
    angle = angle * (math.pi / 180 * 100)
    cos, sin = angle.cos() * (1 + scale), angle.sin() * (1 + scale)
    theta = torch.stack([torch.stack([cos, -sin, shift_x], 1), torch.stack([sin, cos, shift_y], 1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE with merges learnt from the prompts.

    Every byte has a token of its own, within a word and at its end, so that any text can be encoded.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    learner.train_from_iterator(
        prompts(), trainers.BpeTrainer(vocab_size=2000, end_of_word_suffix="</w>", show_progress=False)
    )
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_PROMPT_TOKENS)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids, (len(texts), 16) int64, padded as the pipeline pads them."""
    batch = tokenizer(texts, padding="max_length", max_length=MAX_PROMPT_TOKENS, truncation=True, return_tensors="pt")
    return batch.input_ids


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained text encoder: two layers, 64 wide."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            projection_dim=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=MAX_PROMPT_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_autoencoder() -> AutoencoderKL:
    """An untrained autoencoder, 3x32x32 to 4x8x8."""
    return AutoencoderKL(
        sample_size=IMAGE_SIZE,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=LATENT_SHAPE[0],
    )


def build_denoiser() -> UNet2DConditionModel:
    """An untrained denoiser: convolutions at 8x8, self- and cross-attention at 4x4, and no more, for speed."""
    return UNet2DConditionModel(
        sample_size=LATENT_SHAPE[1],
        in_channels=LATENT_SHAPE[0],
        out_channels=LATENT_SHAPE[0],
        block_out_channels=(16, 48),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type=None,
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=64,
        # diffusers reads this as the number of heads
        attention_head_dim=3,
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    )


def build_flow_text_encoder(text_encoder: CLIPTextModel) -> CLIPTextModelWithProjection:
    """The text encoder as Stable Diffusion 3 takes it: with a projection of the last token, here the identity."""
    projected = CLIPTextModelWithProjection(text_encoder.config)
    # transformers 5 dropped the module between the model and its layers
    layers = getattr(text_encoder, "text_model", text_encoder)
    projected.text_model.load_state_dict(layers.state_dict())
    torch.nn.init.eye_(projected.text_projection.weight)
    return projected.eval().requires_grad_(False)


def build_flow_transformer() -> SD3Transformer2DModel:
    """An untrained velocity predictor: 16 patches of 2x2 latents attend with the prompt's tokens."""
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SHAPE[1],
        patch_size=2,
        in_channels=LATENT_SHAPE[0],
        out_channels=LATENT_SHAPE[0],
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        # two text encoders, side by side
        joint_attention_dim=128,
        pooled_projection_dim=128,
        caption_projection_dim=64,
        pos_embed_max_size=8,
    )
    # every block starts as the identity, as in DiT
    modulations = [transformer.norm_out.linear, transformer.proj_out]
    for block in transformer.transformer_blocks:
        modulations += [block.norm1.linear, block.norm1_context.linear]
    for linear in modulations:
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    return transformer


def build_flow_pipeline(autoencoder: AutoencoderKL, text_encoder: CLIPTextModel) -> StableDiffusion3Pipeline:
    """An untrained flow pipeline around the denoiser's autoencoder and text encoder, which it leaves as they are."""
    # Stable Diffusion 3 adds a shift, which must be a number
    shifted = build_autoencoder().eval().requires_grad_(False)
    shifted.load_state_dict(autoencoder.state_dict())
    shifted.register_to_config(scaling_factor=autoencoder.config.scaling_factor, shift_factor=0.0)
    tokenizer = build_tokenizer()
    projected = build_flow_text_encoder(text_encoder)
    return StableDiffusion3Pipeline(
        vae=shifted,
        text_encoder=projected,
        text_encoder_2=projected,
        text_encoder_3=None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=None,
        transformer=build_flow_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


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


@torch.no_grad()
def encode(autoencoder: AutoencoderKL, images: Tensor, scale: float | None = None) -> Tensor:
    """Mean latents of (N, 3, 32, 32) pictures, (N, 4, 8, 8), times `scale` (by default the scaling factor)."""
    scale = autoencoder.config.scaling_factor if scale is None else scale
    return torch.cat([autoencoder.encode(batch).latent_dist.mean for batch in images.split(128)]) * scale


@torch.no_grad()
def decode(autoencoder: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pictures, (N, 3, 32, 32) in [-1, 1], of scaled latents (N, 4, 8, 8)."""
    latents = latents / autoencoder.config.scaling_factor
    return torch.cat([autoencoder.decode(batch).sample for batch in latents.split(128)]).clamp(-1, 1)


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
    table = flow_table.from_scheduler(pipeline.scheduler, FLOW_NUM_INFERENCE_STEPS, noise_level=FLOW_NOISE_LEVEL)
    embeds = pipeline.encode_prompt(texts, texts, texts, max_sequence_length=MAX_PROMPT_TOKENS)
    condition, pooled = torch.cat(embeds[:2]), torch.cat(embeds[2:])
    latents = torch.randn(len(texts), *LATENT_SHAPE, generator=torch.Generator().manual_seed(seed))
    for step, timestep in enumerate(table.timesteps):
        output = pipeline.transformer(latents.repeat(2, 1, 1, 1), condition, pooled, timestep.expand(2 * len(texts)))
        prompted, unprompted = output.sample.chunk(2)
        guidance = {"uncond_output": unprompted, "guidance_scale": guidance_scale}
        latents = sampler_step(prompted, latents, table, step, seed=seed, **guidance).prev_sample
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


def build(
    output_dir: Path,
    seed: int,
    picture: Path | None = None,
    flow_picture: Path | None = None,
    only_flow: bool = False,
) -> dict[str, object]:
    """Train everything, put it into `output_dir`, and return the measured quality of both models.

    Nothing in `output_dir` is touched until all is trained and saved.

    Args:
        output_dir: gets `digits/`, `digits_classifiers/`, `digits_prompts.txt` and `digits_flow/`.
        seed: decides the halves, the initial weights and the order of training.
        picture: where to save a grid of the diffusion model's samples, a column per digit.
        flow_picture: the same of the flow model's.
        only_flow: train the flow model alone, on what `output_dir` has of the rest.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    quality: dict[str, object] = {}
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".digits-") as scratch:
        new = Path(scratch)
        if not only_flow:
            quality["digits"] = build_diffusion(new, seed, picture)
        quality["digits_flow"] = build_flow(output_dir if only_flow else new, new, seed, flow_picture)
        for path in list(new.iterdir()):
            shutil.rmtree(output_dir / path.name, ignore_errors=True)
            path.replace(output_dir / path.name)
    return quality


def build_diffusion(output_dir: Path, seed: int, picture: Path | None = None) -> dict[str, object]:
    """Train the diffusion model and the classifiers, save them and the prompts in `output_dir`, and return the quality.

    The figures are also in `digits/quality.json`.
    """
    images, digits = load_data()
    reward_half, eval_half = split_halves(digits, seed)
    tokenizer = build_tokenizer()
    autoencoder = train_autoencoder(images, seed)
    reward = train_classifier(images[reward_half], digits[reward_half], autoencoder, seed + 1)
    evaluator = train_classifier(images[eval_half], digits[eval_half], autoencoder, seed + 2)
    text_encoder, unet = train_denoiser(images, digits, autoencoder, tokenizer, seed + 3)
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )

    texts = prompts() * 10
    reconstructed = decode(autoencoder, encode(autoencoder, images))
    quality: dict[str, object] = {
        "seed": seed,
        "pipeline": {
            "images": len(texts),
            "guidance_scale": GUIDANCE_SCALE,
            **assess_pictures(generate(pipeline, texts, seed), texts, reward, evaluator),
        },
        "reward_classifier": assess_classifier(reward, images[eval_half], digits[eval_half]),
        "eval_classifier": assess_classifier(evaluator, images[reward_half], digits[reward_half]),
        "autoencoder": {
            "mean_squared_error": round(F.mse_loss(reconstructed, images).item(), 5),
            "scaling_factor": autoencoder.config.scaling_factor,
        },
    }
    pipeline.save_pretrained(output_dir / "digits")
    (output_dir / "digits" / "quality.json").write_text(json.dumps(quality, indent=2) + "\n")
    (output_dir / "digits_classifiers").mkdir()
    save_file(reward.state_dict(), output_dir / "digits_classifiers" / "reward.safetensors")
    save_file(evaluator.state_dict(), output_dir / "digits_classifiers" / "eval.safetensors")
    (output_dir / "digits_prompts.txt").write_text("\n".join(prompts()) + "\n")
    if picture is not None:
        save_picture(generate(pipeline, _texts_by_column(), seed), 10, picture)
    return quality


def build_flow(base_dir: Path, output_dir: Path, seed: int, picture: Path | None = None) -> dict[str, object]:
    """Train the flow model on the autoencoder, text encoder and classifiers in `base_dir`; save it in `output_dir`.

    Returns the measured quality, which is also in `digits_flow/quality.json`.
    """
    images, digits = load_data()
    autoencoder = AutoencoderKL.from_pretrained(base_dir / "digits" / "vae").eval().requires_grad_(False)
    text_encoder = CLIPTextModel.from_pretrained(base_dir / "digits" / "text_encoder").eval()
    pipeline = train_flow(images, digits, autoencoder, text_encoder, seed + 4)

    classifiers = []
    for which in ("reward", "eval"):
        classifier = DigitClassifier().eval()
        classifier.load_state_dict(load_file(base_dir / "digits_classifiers" / f"{which}.safetensors"))
        classifiers.append(classifier)
    texts = prompts() * 10
    quality: dict[str, object] = {
        "seed": seed,
        "images": len(texts),
        "guidance_scale": FLOW_GUIDANCE_SCALE,
        "num_inference_steps": FLOW_NUM_INFERENCE_STEPS,
        "pipeline": assess_pictures(generate(pipeline, texts, seed), texts, *classifiers),
        "flow_sde": {
            "noise_level": FLOW_NOISE_LEVEL,
            **assess_pictures(generate_stochastic(pipeline, texts, seed), texts, *classifiers),
        },
    }
    pipeline.save_pretrained(output_dir / "digits_flow")
    (output_dir / "digits_flow" / "quality.json").write_text(json.dumps(quality, indent=2) + "\n")
    if picture is not None:
        save_picture(generate_stochastic(pipeline, _texts_by_column(), seed), 10, picture)
    return quality


def _texts_by_column() -> list[str]:
    """The prompts for a grid with a column per digit, row by row."""
    return [text for row in range(len(PROMPT_TEMPLATES)) for text in prompts()[row :: len(PROMPT_TEMPLATES)]]


class _Progress:
    """Prints a line for every tenth of a training run."""

    def __init__(self, name: str, steps: int) -> None:
        self.name, self.steps, self.start = name, steps, time.perf_counter()

    def __call__(self, step: int, **values: Tensor) -> None:
        if (step + 1) % max(self.steps // 10, 1) == 0:
            shown = "  ".join(f"{key} {value.item():.4f}" for key, value in values.items())
            seconds = time.perf_counter() - self.start
            print(f"{self.name:12} {step + 1:5}/{self.steps}  {shown}  {seconds:.0f} s", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pcpo_fast.assets.build_digits", description=str(__doc__).partition("\n")[0]
    )
    parser.add_argument("--output-dir", type=Path, default=ASSETS, help="where the model goes (the package's assets)")
    parser.add_argument("--seed", type=int, default=SEED, help="decides everything that is random")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; part of what makes a build repeatable")
    parser.add_argument("--only-flow", action="store_true", help="train the flow model alone, on the rest as it is")
    parser.add_argument("--picture", type=Path, help="save a grid of the diffusion model's samples to this PNG")
    parser.add_argument("--flow-picture", type=Path, help="save a grid of the flow model's samples to this PNG")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    start = time.perf_counter()
    quality = build(
        arguments.output_dir, arguments.seed, arguments.picture, arguments.flow_picture, arguments.only_flow
    )
    print(json.dumps(quality, indent=2))
    print(f"{arguments.output_dir}: built in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
