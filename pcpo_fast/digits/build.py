"""Build the embedded digits models from nothing: `python -m pcpo_fast.digits.build`.

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
import json
import shutil
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from pcpo_fast.digits.data import PROMPT_TEMPLATES, load_data, prompts, split_halves
from pcpo_fast.digits.models import build_scheduler, build_tokenizer, decode, encode
from pcpo_fast.digits.quality import (
    FLOW_GUIDANCE_SCALE,
    FLOW_NOISE_LEVEL,
    FLOW_NUM_INFERENCE_STEPS,
    GUIDANCE_SCALE,
    assess_classifier,
    assess_pictures,
    generate,
    generate_stochastic,
    save_picture,
)
from pcpo_fast.digits.rewards import DigitClassifier
from pcpo_fast.digits.training import train_autoencoder, train_classifier, train_denoiser, train_flow

ROOM = Path(__file__).parent
SEED = 0


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
        output_dir: gets `diffusion/`, `classifiers/`, `prompts.txt` and `flow/`.
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
            quality["diffusion"] = build_diffusion(new, seed, picture)
        quality["flow"] = build_flow(output_dir if only_flow else new, new, seed, flow_picture)
        for path in list(new.iterdir()):
            shutil.rmtree(output_dir / path.name, ignore_errors=True)
            path.replace(output_dir / path.name)
    return quality


def build_diffusion(output_dir: Path, seed: int, picture: Path | None = None) -> dict[str, object]:
    """Train the diffusion model and the classifiers, save them and the prompts in `output_dir`, and return the quality.

    The figures are also in `diffusion/quality.json`.
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
    pipeline.save_pretrained(output_dir / "diffusion")
    (output_dir / "diffusion" / "quality.json").write_text(json.dumps(quality, indent=2) + "\n")
    (output_dir / "classifiers").mkdir()
    save_file(reward.state_dict(), output_dir / "classifiers" / "reward.safetensors")
    save_file(evaluator.state_dict(), output_dir / "classifiers" / "eval.safetensors")
    (output_dir / "prompts.txt").write_text("\n".join(prompts()) + "\n")
    if picture is not None:
        save_picture(generate(pipeline, _texts_by_column(), seed), 10, picture)
    return quality


def build_flow(base_dir: Path, output_dir: Path, seed: int, picture: Path | None = None) -> dict[str, object]:
    """Train the flow model on the autoencoder, text encoder and classifiers in `base_dir`; save it in `output_dir`.

    Returns the measured quality, which is also in `flow/quality.json`.
    """
    images, digits = load_data()
    autoencoder = AutoencoderKL.from_pretrained(base_dir / "diffusion" / "vae").eval().requires_grad_(False)
    text_encoder = CLIPTextModel.from_pretrained(base_dir / "diffusion" / "text_encoder").eval()
    pipeline = train_flow(images, digits, autoencoder, text_encoder, seed + 4)

    classifiers = []
    for which in ("reward", "eval"):
        classifier = DigitClassifier().eval()
        classifier.load_state_dict(load_file(base_dir / "classifiers" / f"{which}.safetensors"))
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
    pipeline.save_pretrained(output_dir / "flow")
    (output_dir / "flow" / "quality.json").write_text(json.dumps(quality, indent=2) + "\n")
    if picture is not None:
        save_picture(generate_stochastic(pipeline, _texts_by_column(), seed), 10, picture)
    return quality


def _texts_by_column() -> list[str]:
    """The prompts for a grid with a column per digit, row by row."""
    return [text for row in range(len(PROMPT_TEMPLATES)) for text in prompts()[row :: len(PROMPT_TEMPLATES)]]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pcpo_fast.digits.build", description=str(__doc__).partition("\n")[0]
    )
    parser.add_argument("--output-dir", type=Path, default=ROOM, help="where the model goes (the package's own folder)")
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
