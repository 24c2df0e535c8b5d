import io
import math
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from pcpo_fast.errors import SettingError
from pcpo_fast.rewards import REWARDS, RewardError, RewardSet
from pcpo_fast.rewards.jpeg import compressibility, incompressibility

IMAGES = torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(0))
PROMPTS = ["cat", "dog", "horse"]


def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))


def prompt_length(images, prompts):
    """As plain a return value as a reward may have."""
    return [len(prompt) for prompt in prompts]


def one_number(images, prompts):
    return images.mean()


def darken(images, prompts):
    """Writes into what it was given, as a reward must not."""
    return images.mul_(0).mean(dim=(1, 2, 3))


def refuses_nan(images, prompts):
    assert images.isfinite().all()
    return brightness(images, prompts)


def column(images, prompts):
    return images.mean(dim=(1, 2, 3))[:, None]


def images_only(images):
    return images.mean(dim=(1, 2, 3))


def three(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3))


@pytest.fixture(autouse=True)
def own_module(monkeypatch):
    """`own:brightness` names a function of this file."""
    monkeypatch.setitem(sys.modules, "own", sys.modules[__name__])


def test_jpeg_sizes_are_those_of_files(tmp_path):
    flat = torch.zeros(1, 3, 16, 24)
    images = torch.cat([IMAGES, flat])
    sizes = []
    for index, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        path = tmp_path / f"{index}.jpg"
        Image.fromarray(np.uint8(np.rint(image * 255))).save(path, quality=95)
        sizes.append(path.stat().st_size / 1000)
    expected = torch.tensor(sizes)
    assert torch.equal(incompressibility(images, []), expected)
    assert torch.equal(compressibility(images, []), -expected)
    assert sizes[-1] < min(sizes[:-1])


def test_jpeg_keeps_colours_and_orientation():
    """Transposed or channel-swapped pixels make files of another size."""
    image = torch.zeros(1, 3, 8, 32)
    image[:, 0, :, ::2] = 1
    image[:, 1, :4] = 0.5
    file = io.BytesIO()
    Image.fromarray(np.uint8(np.rint(image[0].permute(1, 2, 0).numpy() * 255))).save(file, "JPEG", quality=95)
    assert incompressibility(image, []).item() == pytest.approx(len(file.getvalue()) / 1000)


def test_rewards_by_name_and_by_module_add_up_with_their_weights():
    total, scores = RewardSet(["jpeg_compressibility", "own:brightness=2.5", "own:prompt_length=-1"])(IMAGES, PROMPTS)
    assert list(scores) == ["jpeg_compressibility", "own:brightness", "own:prompt_length"]
    assert torch.equal(scores["jpeg_compressibility"], compressibility(IMAGES, PROMPTS))
    assert scores["own:prompt_length"].tolist() == [3, 3, 5]
    expected = compressibility(IMAGES, PROMPTS) + 2.5 * brightness(IMAGES, PROMPTS) - torch.tensor([3, 3, 5])
    torch.testing.assert_close(total, expected)
    assert total.dtype == torch.float32


def test_scores_carry_no_gradient(monkeypatch):
    """And none is recorded on the way: a reward may keep a large model."""
    images, seen = IMAGES.clone().requires_grad_(), []
    monkeypatch.setattr(sys.modules["own"], "spy", lambda *_: seen.append(torch.is_grad_enabled()) or 1, raising=False)
    total, _ = RewardSet(["own:brightness"])(images, PROMPTS)
    assert not total.requires_grad
    with pytest.raises(ValueError, match="returned shape"):
        RewardSet(["own:spy"])(images, PROMPTS)
    assert seen == [False]


def test_a_reward_that_writes_into_its_images_harms_no_other():
    images = IMAGES.clone()
    _, scores = RewardSet(["own:darken", "own:brightness"])(images, PROMPTS)
    assert torch.equal(scores["own:brightness"], brightness(IMAGES, PROMPTS))
    assert torch.equal(images, IMAGES)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_images_that_are_not_finite_score_nan(bad):
    """Whatever the reward: as pixels they might pass for black, which is the smallest of all JPEG files."""
    images = IMAGES.clone()
    images[1, 2, 3, 4] = bad
    names = ["jpeg_compressibility", "own:prompt_length", "own:refuses_nan"]
    total, scores = RewardSet(names)(images, PROMPTS)
    for score in (total, *scores.values()):
        assert score.isfinite().tolist() == [True, False, True]
    assert torch.equal(scores["jpeg_compressibility"][[0, 2]], compressibility(IMAGES[[0, 2]], PROMPTS))


@pytest.mark.parametrize(("reward", "shape"), [("own:one_number", "()"), ("own:column", "(3, 1)")])
def test_a_reward_of_a_wrong_shape_is_named(reward, shape):
    with pytest.raises(RewardError) as error:
        RewardSet([reward])(IMAGES, PROMPTS)
    assert f"{reward!r} returned shape {shape} for 3 images" in str(error.value)


@pytest.mark.parametrize("result", [None, {"score": 1}, ([1.0, 2.0, 3.0], {}), "good", ["a", "b", "c"]])
def test_a_reward_that_returns_no_numbers_is_named(result):
    with pytest.raises(RewardError, match=rf"^the reward 'bad' returned a {type(result).__name__} that cannot be"):
        RewardSet({"bad": lambda images, prompts: result})(IMAGES, PROMPTS)


def test_a_reward_has_its_own_list_of_prompts():
    def sorts(images, prompts):
        prompts.sort(reverse=True)
        return [0] * len(prompts)

    prompts = list(PROMPTS)
    RewardSet({"sorts": sorts})(IMAGES, prompts)
    assert prompts == PROMPTS


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def f(:", "SyntaxError"),
        ("open('not_there.json')", "FileNotFoundError: .*not_there.json"),
    ],
)
def test_a_module_that_cannot_be_imported_is_named(tmp_path, monkeypatch, code, message):
    (tmp_path / "fails_here.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        SettingError, match=f"^rewards: the module 'fails_here' of 'fails_here:f' cannot be imported: .*{message}"
    ):
        RewardSet(["fails_here:f"])


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["jpeg"], "no reward is named 'jpeg'; choose one of .*jpeg_compressibility.* or give your own as module:fun"),
        ([":f"], "':f' names no function; give module:function"),
        ([".own:f"], "'.own:f' names no function"),
        (["own:"], "'own:' names no function"),
        (["not_there.at_all:f"], "'not_there.at_all:f' needs the module 'not_there', .*install it"),
        (["own:f"], "module 'own' has no function 'f'"),
        (["own:PROMPTS"], "module 'own' has no function 'PROMPTS'"),
        (["own:brightness="], "'own:brightness' has a weight that is not a finite number; write own:brightness=0.5"),
        (["own:brightness=half"], "a weight that is not a finite number"),
        ([f"own:brightness={math.nan}"], "a weight that is not a finite number"),
        ({"bright": (brightness, math.inf)}, "'bright' has a weight that is not a finite number"),
        (
            ["own:images_only"],
            r"has the arguments \(images\) and is called with two: write it as a function",
        ),
        ({"bright": three}, r"'bright' has the arguments \(images, prompts, metadata\) and is called with two"),
        ({"bright": "own:brightness"}, r"'bright' is 'own:brightness'; give a function of \(images, prompts\)"),
        ("own:brightness", "'own:brightness' is a single string; give a list of rewards"),
        (["own:brightness", "own:brightness=2"], "'own:brightness' is named twice; give it once"),
    ],
)
def test_specs_that_cannot_be_used_are_refused(specs, message):
    for setting in ("rewards", "eval_rewards"):
        with pytest.raises(SettingError, match=f"^{setting}: .*{message}") as error:
            RewardSet(specs, setting=setting)
        assert error.value.name == setting


def test_rewards_may_be_functions():
    """With a weight or without; bound methods, lambdas, and functions with further defaults, too."""

    class Model:
        def score(self, images, prompts):
            return 2 * brightness(images, prompts)

    def scaled(images, prompts, scale=3.0):
        return scale * brightness(images, prompts)

    functions = {"bright": brightness, "double": (Model().score, 0.5), "any": lambda *inputs: scaled(*inputs)}
    total, scores = RewardSet(functions | {"scaled": (scaled, -1)})(IMAGES, PROMPTS)
    bright = brightness(IMAGES, PROMPTS)
    assert list(scores) == ["bright", "double", "any", "scaled"]
    for name, scale in (("bright", 1), ("double", 2), ("any", 3), ("scaled", 3)):
        torch.testing.assert_close(scores[name], scale * bright)
    torch.testing.assert_close(total, 2 * bright)


def test_rewards_are_found_in_the_current_folder(tmp_path, monkeypatch):
    """Also by the console script, whose path does not have it."""
    (tmp_path / "found_here.py").write_text("def zero(images, prompts):\n    return [0] * len(prompts)\n")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", os.getcwd())])
    monkeypatch.chdir(tmp_path)
    assert RewardSet(["found_here:zero"])(IMAGES, PROMPTS)[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", REWARDS)
def test_registered_rewards_are_there(name):
    assert RewardSet([f"{name}=2"]).rewards[name][1] == 2
