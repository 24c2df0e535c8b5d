"""Quality, against torchmetrics called here, and against the definitions in numpy and scipy."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

pytest.importorskip("torchmetrics")
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from pcpo_fast.digits.data import load_data
from pcpo_fast.digits.rewards import load_classifier
from pcpo_fast.study.measure import Quality

# float32, in which the features and the logits are made
EPS = torch.finfo(torch.float32).eps
PROMPTS = ["the digit 3", "3", "3", "seven", "the digit 3", "3", "seven", "alone"]


@pytest.fixture(scope="module")
def quality():
    return Quality()


@pytest.fixture(scope="module")
def digits():
    """All real digits, as images in [0, 1]."""
    return load_data()[0] / 2 + 0.5


@pytest.fixture(scope="module")
def images(digits):
    """Real digits, blurred and noisy ones, and noise: 96 images, of many qualities."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(64, 3, 32, 32, generator=generator)
    chosen = digits[torch.randperm(len(digits), generator=generator)[:64]]
    return torch.cat([chosen[:32], 0.7 * chosen[32:] + 0.3 * noise[:32], noise[32:]])


class Features(torch.nn.Module):
    """What the classifier's head reads, averaged over the 4 x 4 places."""

    num_features = 64

    def forward(self, images):
        seen = []
        classifier = load_classifier("eval")
        hook = classifier.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        classifier(images)
        hook.remove()
        return seen[0].double().mean(dim=3).mean(dim=2)


class Logits(torch.nn.Module):
    def forward(self, images):
        return load_classifier("eval")(images)


def features(images):
    return Features()(images).numpy()


def frechet(first, second):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), with covariances that divide by N - 1."""
    (mean, covariance), (other_mean, other) = (
        (x.mean(axis=0), np.cov(x, rowvar=False, ddof=1)) for x in (first, second)
    )
    root = sqrtm(covariance @ other)
    return ((mean - other_mean) ** 2).sum() + np.trace(covariance + other - 2 * root.real)


def inception(logits):
    """exp of the mean KL divergence of p(y | x) from p(y)."""
    p = torch.softmax(logits.double(), dim=1).numpy()
    return math.exp((p * np.log(p / p.mean(axis=0))).sum(axis=1).mean())


def prompts_of(count):
    return [str(index % 10) for index in range(count)]


def measure(quality, images, prompts=None, base=None):
    return quality(images, prompts or prompts_of(len(images)), images if base is None else base)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_torchmetrics_says_the_same(quality, images, digits):
    ours = measure(quality, images)
    distance = FrechetInceptionDistance(Features())
    distance.update(digits, real=True)
    distance.update(images, real=False)
    # the mean over places is taken in float64 here, and in float32 by the package
    assert ours["frechet_distance"] == pytest.approx(float(distance.compute()), rel=1e-5)
    score = InceptionScore(Logits(), splits=1)
    score.update(images)
    assert ours["inception_score"] == pytest.approx(float(score.compute()[0]), rel=1e-5)


def test_the_definitions_say_the_same(quality, images, digits):
    ours = measure(quality, images)
    real, generated = features(digits), features(images)
    # float32 features, roundings of a mean over 16 places; the distance is a difference of traces
    size = np.trace(np.cov(real, rowvar=False)) + np.trace(np.cov(generated, rowvar=False))
    assert ours["frechet_distance"] == pytest.approx(frechet(real, generated), abs=64 * EPS * size)
    # a logit of size l moves log p by l roundings, and the score by as much of itself
    logits = load_classifier("eval")(images)
    assert ours["inception_score"] == pytest.approx(inception(logits), rel=8 * EPS * float(logits.abs().max()))
    # far from 1 and 10, where any definition gives the same
    assert 2 < ours["inception_score"] < 9


def test_real_digits_are_near_and_noise_is_far(quality, digits, images):
    # a prompt of its own for each, since the pairs of so many would take long
    sets = (digits, digits[::2], images[64:])
    itself, near, far = (measure(quality, some, list(map(str, range(len(some)))))["frechet_distance"] for some in sets)
    # the square root of a singular product has the square root of rounding
    assert abs(itself) < 1e-6 < near < 0.01 * far


def test_diversity_is_the_mean_distance_within_a_prompt(quality, images):
    some, vectors = images[20:28], features(images[20:28])
    pairs = [(i, j) for i, j in itertools.combinations(range(8), 2) if PROMPTS[i] == PROMPTS[j]]
    assert len(pairs) == 1 + 3 + 1
    ours = measure(quality, some, PROMPTS)
    wanted = sum(math.dist(vectors[i], vectors[j]) for i, j in pairs) / len(pairs)
    assert ours["feature_diversity"] == pytest.approx(wanted, rel=1e-5)
    wanted = 0.0
    for i, j in pairs:
        squares = ((some[i].double() - some[j].double()) ** 2).flatten().tolist()
        wanted += math.sqrt(sum(squares) / len(squares)) / len(pairs)
    assert ours["pixel_diversity"] == pytest.approx(wanted, rel=1e-9)


def test_shift_is_the_mean_distance_from_the_base_model(quality, images):
    ours = measure(quality, images[:8], PROMPTS, base=images[40:48])
    vectors, base = features(images[:8]), features(images[40:48])
    wanted = sum(math.dist(a, b) for a, b in zip(vectors, base, strict=True)) / 8
    assert ours["feature_shift"] == pytest.approx(wanted, rel=1e-5)
    roots = [((a.double() - b.double()) ** 2).mean().sqrt() for a, b in zip(images[:8], images[40:48], strict=True)]
    assert ours["pixel_shift"] == pytest.approx(float(sum(roots) / 8), rel=1e-9)
    same = measure(quality, images[:8])
    assert same["feature_shift"] == same["pixel_shift"] == 0


def test_without_two_images_of_a_prompt_there_is_no_diversity(quality, images):
    ours = measure(quality, images[:3], ["one", "two", "three"])
    assert math.isnan(ours["feature_diversity"]) and math.isnan(ours["pixel_diversity"])
    assert not any(math.isnan(value) for name, value in ours.items() if "diversity" not in name)
    equal = measure(quality, images[:1].expand(3, -1, -1, -1), ["one"] * 3)
    assert equal["feature_diversity"] == equal["pixel_diversity"] == 0


def test_a_call_remembers_nothing_of_the_one_before(images):
    one = Quality()
    first = measure(one, images[:40])
    measure(one, images[64:])
    # nor does it depend on what else is random
    torch.rand(1)
    assert measure(one, images[:40]) == first


def test_all_images_count_once_and_their_order_does_not(quality, images):
    whole, turned = measure(quality, images), measure(quality, images.flip(0), prompts_of(96)[::-1])
    assert whole == {name: pytest.approx(value, rel=1e-4, abs=1e-9) for name, value in turned.items()}
    assert measure(quality, images[:-1])["frechet_distance"] != whole["frechet_distance"]
