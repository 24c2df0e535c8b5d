"""Quality of a set of images: Fréchet distance, Inception Score and diversity, on the features of a classifier.

The definitions are the field's, with the eval classifier of the digits models in the place of Inception-v3 and the
handwritten digits in the place of a photo collection:

    Fréchet distance   Heusel et al., arXiv 1706.08500, equation 6, by torchmetrics
    Inception Score    Salimans et al., arXiv 1606.03498, section 4, by torchmetrics, over all images at once
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from pcpo_fast.digits.data import load_data
from pcpo_fast.digits.rewards import DigitClassifier, load_classifier


class PooledFeatures(nn.Module):
    """The last feature maps of a digit classifier, averaged over positions: images (N, 3, H, W) to float64 (N, 64)."""

    num_features = 64

    def __init__(self, classifier: DigitClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier.features(images * 2 - 1).mean(dim=(2, 3)).double()


class Quality:
    """Measures images of the digits models against the handwritten digits and against the base model's images.

    Args:
        device: where the classifier runs.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        classifier = load_classifier("eval", str(device))
        self.features = PooledFeatures(classifier)
        self.frechet = FrechetInceptionDistance(self.features, reset_real_features=False).to(device)
        with torch.no_grad():
            real, _ = load_data()
            self.frechet.update((real / 2 + 0.5).to(device), real=True)
        with warnings.catch_warnings():
            # it keeps the logits of all images, which are few
            warnings.simplefilter("ignore", UserWarning)
            self.inception = InceptionScore(classifier, splits=1).to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str], base: Tensor) -> dict[str, float]:
        """Numbers by name.

        Args:
            images: float (N, 3, 32, 32) in [0, 1].
            prompts: N prompts.
            base: the base model's images, of the same seeds and prompts.

        Returns:
            frechet_distance to the handwritten digits; inception_score; feature_diversity and pixel_diversity, the mean
            Euclidean distance between two images of one prompt (of pixels: the root mean square); feature_shift and
            pixel_shift, the same between an image and the base model's.
        """
        self.frechet.reset()
        self.frechet.update(images, real=False)
        self.inception.reset()
        self.inception.update(images)
        with warnings.catch_warnings(), torch.random.fork_rng(devices=()):
            # one split has no standard deviation
            warnings.simplefilter("ignore", UserWarning)
            # the images are shuffled, and the same ones have the same score to the last bit
            torch.manual_seed(0)
            score, _ = self.inception.compute()
        views = {
            "feature": (self.features(images), self.features(base)),
            "pixel": tuple(batch.double().flatten(1) / batch[0].numel() ** 0.5 for batch in (images, base)),
        }
        measured = {"frechet_distance": self.frechet.compute().item(), "inception_score": score.item()}
        for name, (ours, theirs) in views.items():
            measured[f"{name}_diversity"] = _within_prompts(ours, prompts)
            measured[f"{name}_shift"] = (ours - theirs).norm(dim=1).mean().item()
        return measured


def _within_prompts(vectors: Tensor, prompts: Sequence[str]) -> float:
    """The mean distance of two vectors of one prompt; NaN if no prompt has two."""
    rows: Mapping[str, list[int]] = {prompt: [] for prompt in prompts}
    for row, prompt in enumerate(prompts):
        rows[prompt].append(row)
    pairs = torch.tensor([pair for same in rows.values() for pair in combinations(same, 2)])
    if not len(pairs):
        return math.nan
    return (vectors[pairs[:, 0]] - vectors[pairs[:, 1]]).norm(dim=1).mean().item()
