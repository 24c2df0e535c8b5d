"""Build the embedded digits model from nothing: `python -m pcpo_fast.assets.build_digits`.

The result is an ordinary Stable Diffusion pipeline, only small, with the two classifiers that score it. Everything is
trained here, on the 1797 handwritten digits that come with scikit-learn, in this order:

1. the byte-level BPE tokenizer, from the prompts;
2. the autoencoder, 3x32x32 pixels to 4x8x8 latents;
3. the reward and the eval classifier, each on its own half of the digits, as drawn and as the autoencoder returns them;
4. the text encoder and the denoiser, together, to predict the noise in a latent from its prompt.

The denoiser's training stops early on purpose: it draws digits, but about one in five is malformed or not the one that
was asked for, which is what alignment is there to repair. One seed decides everything; on one machine with one number
of threads, the same seed gives the same files.
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
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from pcpo_fast.rewards.digits import DIGIT_WORDS, IMAGE_SIZE, DigitClassifier, digit_of

ASSETS = Path(__file__).parent
# the guidance scale at which the model's quality is stated, and from which alignment starts
GUIDANCE_SCALE = 1.5
NUM_INFERENCE_STEPS = 20
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


def generate(
    pipeline: StableDiffusionPipeline, texts: list[str], seed: int, guidance_scale: float = GUIDANCE_SCALE
) -> Tensor:
    """Sample one picture per prompt with 20 stochastic DDIM steps (eta = 1): (N, 3, 32, 32) in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        texts,
        num_inference_steps=NUM_INFERENCE_STEPS,
        guidance_scale=guidance_scale,
        eta=1.0,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    )
    return pictures.images


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


def assess_pipeline(
    pipeline: StableDiffusionPipeline,
    reward: DigitClassifier,
    evaluator: DigitClassifier,
    seed: int,
    repeats: int = 10,
) -> dict[str, object]:
    """How often, over `repeats` pictures per training prompt, the classifiers read the prompted digit."""
    texts = prompts() * repeats
    digits = torch.tensor([digit_of(text) for text in texts])
    images = generate(pipeline, texts, seed)
    with torch.no_grad():
        right = (evaluator(images).argmax(dim=1) == digits).float()
        log_probs = reward(images).log_softmax(dim=1)
    return {
        "images": len(texts),
        "guidance_scale": GUIDANCE_SCALE,
        "accuracy_eval": round(right.mean().item(), 4),
        "accuracy_eval_per_digit": [round(right[digits == digit].mean().item(), 3) for digit in range(10)],
        "accuracy_reward": round((log_probs.argmax(dim=1) == digits).float().mean().item(), 4),
        "alignment": round(log_probs.gather(1, digits[:, None]).mean().item(), 4),
    }


def build(output_dir: Path, seed: int, picture: Path | None = None) -> dict[str, object]:
    """Train everything, put it into `output_dir`, and return the measured quality.

    Nothing in `output_dir` is touched until all is trained and saved. The figures are also in `digits/quality.json`.

    Args:
        output_dir: gets `digits/`, `digits_classifiers/` and `digits_prompts.txt`.
        seed: decides the halves, the initial weights and the order of training.
        picture: where to save a grid of samples, a column per digit.
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

    reconstructed = decode(autoencoder, encode(autoencoder, images))
    quality: dict[str, object] = {
        "seed": seed,
        "pipeline": assess_pipeline(pipeline, reward, evaluator, seed),
        "reward_classifier": assess_classifier(reward, images[eval_half], digits[eval_half]),
        "eval_classifier": assess_classifier(evaluator, images[reward_half], digits[reward_half]),
        "autoencoder": {
            "mean_squared_error": round(F.mse_loss(reconstructed, images).item(), 5),
            "scaling_factor": autoencoder.config.scaling_factor,
        },
    }

    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".digits-") as scratch:
        new = Path(scratch)
        pipeline.save_pretrained(new / "digits")
        (new / "digits" / "quality.json").write_text(json.dumps(quality, indent=2) + "\n")
        (new / "digits_classifiers").mkdir()
        save_file(reward.state_dict(), new / "digits_classifiers" / "reward.safetensors")
        save_file(evaluator.state_dict(), new / "digits_classifiers" / "eval.safetensors")
        (new / "digits_prompts.txt").write_text("\n".join(prompts()) + "\n")
        for name in ("digits", "digits_classifiers"):
            shutil.rmtree(output_dir / name, ignore_errors=True)
        for path in list(new.iterdir()):
            path.replace(output_dir / path.name)

    if picture is not None:
        rows = [prompts()[row :: len(PROMPT_TEMPLATES)] for row in range(len(PROMPT_TEMPLATES))]
        save_picture(generate(pipeline, [text for row in rows for text in row], seed), 10, picture)
    return quality


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
    parser.add_argument("--picture", type=Path, help="save a grid of samples to this PNG")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    start = time.perf_counter()
    quality = build(arguments.output_dir, arguments.seed, arguments.picture)
    print(json.dumps(quality, indent=2))
    print(f"{arguments.output_dir}: built in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
