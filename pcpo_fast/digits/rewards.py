"""Rewards of the embedded digits model: does a picture show the digit that its prompt names?

Two small classifiers, trained on disjoint halves of scikit-learn's handwritten digits, read the pictures. The reward
classifier gives the reward; the eval classifier never does, so that its accuracy also tells whether a policy learnt the
digit or merely how to please the reward.
"""

import functools
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from pcpo_fast.rewards import RewardError

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
IMAGE_SIZE = 32

CLASSIFIERS = Path(__file__).parent / "classifiers"
_DIGIT = re.compile(rf"\b(?:{'|'.join(DIGIT_WORDS)}|[0-9])\b", re.IGNORECASE)


class DigitClassifier(nn.Module):
    """A small convolutional network that reads one digit from a picture (about 34 thousand parameters)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 16), (16, 32), (32, 64)):
            layers += [
                nn.Conv2d(inputs, outputs, 3, padding=1),
                nn.GroupNorm(4, outputs),
                nn.SiLU(),
                nn.AvgPool2d(2),
            ]
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * (IMAGE_SIZE // 8) ** 2, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Read the pictures.

        Args:
            images: (N, 3, H, W), in [0, 1]; resized to 32x32 where they are not.

        Returns:
            Logits, (N, 10), one column per digit, in the dtype of the weights.
        """
        images = images.to(next(self.parameters()).dtype)
        if images.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
            images = F.interpolate(images, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True)
        return self.head(self.features(images * 2 - 1))


@functools.cache
def load_classifier(which: str, device: str | torch.device = "cpu") -> DigitClassifier:
    """Load one of the two trained classifiers, frozen and in eval mode; the same object for the same arguments.

    Args:
        which: `"reward"` or `"eval"`.
        device: where the classifier goes.

    Raises:
        ValueError: `which` names no classifier.
    """
    if which not in ("reward", "eval"):
        raise ValueError(f"no classifier {which!r}: choose 'reward' or 'eval'")
    # its weights are not drawn, and the random state of the run stays as it is
    with torch.random.fork_rng(devices=()):
        classifier = DigitClassifier()
    classifier.load_state_dict(load_file(CLASSIFIERS / f"{which}.safetensors"))
    return classifier.to(device).eval().requires_grad_(False)


def digit_of(prompt: str) -> int:
    """The one digit that a prompt names, as a word (`seven`, in any case) or as a numeral that stands alone (`7`).

    Raises:
        RewardError: the prompt names no digit, or more than one.
    """
    found = {match.lower() for match in _DIGIT.findall(prompt)}
    digits = {int(match) if match.isdecimal() else DIGIT_WORDS.index(match) for match in found}
    if len(digits) != 1:
        named = f"names {len(digits)} digits" if digits else "names no digit"
        raise RewardError(
            f"the prompt {prompt!r} {named}: write exactly one, as a word ({', '.join(DIGIT_WORDS)}) or a numeral (0-9)"
        )
    return digits.pop()


def alignment(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Log-probability, in nats, of the prompted digit under the reward classifier.

    Args:
        images: (N, 3, H, W), floating point, in [0, 1].
        prompts: N prompts, each naming one digit.

    Returns:
        (N,) float32 on the images' device, at most 0.

    Raises:
        RewardError: the shapes do not match, or a prompt does not name exactly one digit.
    """
    digits = _digits(images, prompts)
    log_probs = load_classifier("reward", images.device)(images).log_softmax(dim=-1)
    return log_probs.gather(1, digits[:, None]).squeeze(1)


def accuracy(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Whether the eval classifier reads the prompted digit: 1 or 0 per picture. For evaluation only, never a reward.

    Args, shape, dtype and errors as in `alignment`.
    """
    digits = _digits(images, prompts)
    return (load_classifier("eval", images.device)(images).argmax(dim=-1) == digits).float()


def _digits(images: Tensor, prompts: Sequence[str]) -> Tensor:
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise RewardError(f"images must be (N, 3, H, W) floats in [0, 1], got {tuple(images.shape)} {images.dtype}")
    if len(prompts) != len(images):
        raise RewardError(f"one prompt per image: got {len(prompts)} prompts for {len(images)} images")
    return torch.tensor([digit_of(prompt) for prompt in prompts], device=images.device)
