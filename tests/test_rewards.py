import contextlib
import io
import json
import math
import os
import random
import re
import signal
import sys
import threading
import time
import warnings

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from torch.overrides import _get_current_function_mode_stack

from pcpo_fast.errors import SettingError
from pcpo_fast.rewards import REWARDS, RewardError, RewardSet
from pcpo_fast.rewards.jpeg import compressibility, incompressibility
from pcpo_fast.rewards.scores import to_scores

IMAGES = torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(0))
PROMPTS = ["cat", "dog", "horse"]


def without_address(value):
    """A test's name, the same in every process."""
    return re.sub(r" at 0x\w+", "", repr(value))


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


def four(images, prompts, metadata, more):
    return images.mean(dim=(1, 2, 3))


class Cannot:
    def __init__(self):
        open("not_there.json")  # noqa: SIM115

    def __call__(self, images, prompts):
        return brightness(images, prompts)


class Counts:
    """A class is built once, and its object is the reward."""

    built = 0

    def __init__(self):
        Counts.built += 1

    def __call__(self, images, prompts):
        return brightness(images, prompts)


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
    with pytest.raises(RewardError, match="returned shape"):
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
    assert f"the reward {reward!r} (setting rewards): returned shape {shape} for 3 images; it must" in str(error.value)
    assert ("squeeze(1)" in str(error.value)) == (shape == "(3, 1)")


SCORES = torch.tensor([3.0, 2.0, 1.0])


@pytest.mark.parametrize(
    "result",
    [
        SCORES.double(),
        SCORES.bfloat16(),
        SCORES.to(torch.uint16),
        SCORES.clone().requires_grad_(),
        SCORES.to_sparse(),
        list(SCORES),
        list(SCORES[:, None]),
        (3, 2, 1),
        [3, 2.0, np.float32(1)],
        np.array([1.0, 2.0, 3.0])[::-1],
        np.array([3, 2, 1], ">i2"),
        np.array([3, 2, 1], np.longdouble),
        pandas.Series([3, 2, 1], index=[7, 8, 9]),
        (SCORES, {}),
        ([3, 2, 1], None),
        ((3, 2, 1), "info"),
    ],
    ids=without_address,
)
def test_one_number_per_image_in_any_container_or_with_info(result):
    total, _ = RewardSet({"good": lambda images, prompts: result})(IMAGES, PROMPTS)
    assert torch.equal(total, SCORES) and not total.requires_grad


def test_a_pair_of_numbers_is_the_scores_of_two_images():
    for pair in ((0.5, 2), (torch.tensor(0.5), torch.tensor(2))):
        assert to_scores(pair, 2).tolist() == [0.5, 2]


@pytest.mark.parametrize(
    ("result", "found"),
    [
        (None, "returned None"),
        ({"score": 1}, "returned a dict that holds no numbers"),
        ({1, 2, 3}, "returned a set"),
        ("good", "returned a str"),
        (["a", "b", "c"], "returned a list that holds no numbers"),
        ([None, 1, 2], "returned a list that holds no numbers"),
        ([[1, 2], [3]], "returned a list that holds no numbers"),
        ([SCORES] * 3, "returned a list that holds no numbers"),
        ((score for score in (1, 2, 3)), "returned a generator"),
        (np.array([1, 2, None]), "returned a ndarray that holds no numbers .its dtype is object"),
        (np.array(["2020-01-01"] * 3, "M8[D]"), "returned a ndarray"),
        (np.ma.masked_array([1, 2, 3], [0, 1, 0]), "returned a MaskedArray"),
        (SCORES.to(torch.complex64), "returned a Tensor that holds no numbers .its dtype is torch.complex64"),
        ([1j, 2, 3], "returned a list"),
        (SCORES.to("meta"), "returned a Tensor"),
        ([1, 2], r"returned shape \(2,\) for 3 images"),
        (1.0, r"returned shape \(\) for 3 images"),
        (({"avg": SCORES}, {}), r"returned a dict that holds no numbers .* as the scores of a pair \(scores, info\)"),
        (([1, 2], {}), r"returned shape \(2,\) as the scores of a pair"),
        ((SCORES, {}, 1), "returned a tuple that holds no numbers"),
    ],
    ids=without_address,
)
def test_a_reward_that_returns_anything_else_is_named(result, found):
    with pytest.raises(
        RewardError, match=rf"^the reward 'bad' \(setting rewards\): {found}.*it must return one number"
    ):
        RewardSet({"bad": lambda images, prompts: result})(IMAGES, PROMPTS)


class Stops(BaseException):
    """As asyncio's CancelledError is one."""


@pytest.mark.parametrize("error", [KeyError("score"), SystemExit(0), Stops(), RuntimeError("CUDA\nout of memory")])
def test_a_reward_that_fails_is_named_with_the_place(error):
    def inner():
        raise error

    with pytest.raises(RewardError) as raised:
        RewardSet({"bad": lambda images, prompts: inner()}, setting="eval_rewards")(IMAGES, PROMPTS)
    start = f"the reward 'bad' (setting eval_rewards) failed: {type(error).__name__}"
    assert str(raised.value).startswith(start)
    assert re.search(r"\(test_rewards.py, line \d+, in inner\)$", str(raised.value))
    assert raised.value.__cause__ is error


def test_the_place_of_an_error_is_in_the_users_code():
    with pytest.raises(RewardError, match=r"JSONDecodeError: .* \(test_rewards.py, line \d+, in <lambda>\)$"):
        RewardSet({"bad": lambda images, prompts: json.loads("{")})(IMAGES, PROMPTS)


def test_an_interrupt_stays_one():
    def interrupted(images, prompts):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RewardSet({"waits": interrupted})(IMAGES, PROMPTS)


def by_position(images, prompts, known):
    return [row["score"] for row in known]


def by_position_only(images, prompts, metadata, /):
    return [row["score"] for row in metadata]


def by_name(images, prompts, *, metadata):
    return [row["score"] for row in metadata]


def with_default(images, prompts, scale=1.0, metadata=None):
    return [scale * row["score"] for row in metadata]


@pytest.mark.parametrize("reward", [by_position, by_position_only, by_name, with_default])
def test_rewards_may_take_metadata(reward):
    """Each has a copy of its own; without any there are empty dicts."""
    metadata = [{"score": index, "list": []} for index in range(3)]

    def writes(images, prompts, metadata):
        for row in metadata:
            row["list"].append(row.pop("score"))
        metadata.reverse()
        return [0, 0, 0]

    rewards = RewardSet({"writes": writes, "reads": reward, "no": brightness})
    assert rewards(IMAGES, PROMPTS, metadata)[1]["reads"].tolist() == [0, 1, 2]
    assert metadata == [{"score": index, "list": []} for index in range(3)]
    seen = []
    RewardSet({"sees": lambda images, prompts, metadata: seen.append(metadata) or [0, 0, 0]})(IMAGES, PROMPTS)
    assert seen == [[{}, {}, {}]]


def changes_globals(images, prompts):
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_num_threads(torch.get_num_threads() + 3)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(not torch.are_deterministic_algorithms_enabled(), warn_only=True)
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    torch.backends.cudnn.allow_tf32 = not torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    np.seterr(all="raise")
    warnings.simplefilter("error")
    os.chdir("/")
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    return [torch.rand((), device="cpu").item(), np.random.rand(), random.random()]


def read_globals():
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "modes": len(_get_current_function_mode_stack()),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "benchmark": torch.backends.cudnn.benchmark,
        "cudnn tf32": torch.backends.cudnn.allow_tf32,
        "tf32": torch.backends.cuda.matmul.fp32_precision,
        "numpy errors": np.geterr(),
        "warnings": list(warnings.filters),
        "folder": os.getcwd(),
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
    }


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_reward_changes_in_the_process_is_put_back(monkeypatch, tmp_path, fails):
    """Also where it fails, and where its module does it when it is imported."""
    before = read_globals()
    (tmp_path / "changes.py").write_text(
        "from own import changes_globals, brightness\nchanges_globals(None, None)\n" + ("1 / 0" if fails else "")
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "changes", raising=False)
    with pytest.raises(SettingError) if fails else contextlib.nullcontext():
        RewardSet(["changes:brightness"])
    assert read_globals() == before

    def seen(images, prompts):
        inside = read_globals()
        assert not inside.pop("gradients")
        assert inside.items() <= (before | {name: inside[name] for name in ("torch", "numpy", "python")}).items()
        return [0, 0, 0]

    def failing(images, prompts):
        changes_globals(images, prompts)
        raise KeyError

    rewards = {"seen first": seen, "changes": failing if fails else changes_globals, "seen last": seen}
    with pytest.raises(RewardError, match="'changes'") if fails else contextlib.nullcontext():
        RewardSet(rewards)(IMAGES, PROMPTS)
    assert read_globals() == before


def test_a_reward_has_random_states_of_its_own():
    """They follow from the seed alone, and not from what other rewards drew."""

    def draws(images, prompts):
        return [torch.rand(()).item(), np.random.rand(), random.random()]

    def scores(seed, **others):
        return RewardSet(others | {"draws": draws})(IMAGES, PROMPTS, seed=seed)[1]["draws"].tolist()

    assert scores(1) == scores(1, noisy=draws) != scores(2)
    # as a generator of PyTorch has them
    assert len(scores(2**63 - 1)) == 3


def test_a_reward_that_takes_too_long_is_named():
    def sleeps(images, prompts):
        # as code that asks a server again and again
        while time.monotonic() - started < 60:
            with contextlib.suppress(Exception):
                time.sleep(60)
        return [0, 0, 0]

    handler, started = signal.getsignal(signal.SIGALRM), time.monotonic()
    with pytest.raises(
        RewardError, match=r"'sleeps' \(setting rewards\) took more than the 0.05 seconds of reward_timeout"
    ):
        RewardSet({"sleeps": sleeps}, timeout=0.05)(IMAGES, PROMPTS)
    assert time.monotonic() - started < 30
    assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    RewardSet({"bright": brightness}, timeout=60)(IMAGES, PROMPTS)
    assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_reward_that_cannot_be_interrupted_is_late_all_the_same():
    """In another thread there is no alarm; and a reward may catch everything."""

    def slow(images, prompts):
        with contextlib.suppress(BaseException):
            time.sleep(0.1)
        return [0, 0, 0]

    found = []

    def score():
        with pytest.raises(RewardError, match=r"took more than the 0\.05 seconds"):
            RewardSet({"slow": slow}, timeout=0.05)(IMAGES, PROMPTS)
        found.append(True)

    score()
    thread = threading.Thread(target=score)
    thread.start()
    thread.join()
    assert found == [True, True]


def test_a_class_is_built_once():
    for _ in range(2):
        assert torch.equal(RewardSet(["own:Counts"])(IMAGES, PROMPTS)[0], brightness(IMAGES, PROMPTS))
    assert Counts.built == 1


@pytest.mark.parametrize(
    ("scores", "peers", "said"),
    [
        ([1, 1, 2, 2], 2, True),
        ([1, 1, 2, 2], 4, False),
        ([1, 1, 2, 3], 2, False),
        ([1, math.nan, 2, 2], 2, True),
        ([1, math.inf, 2, 3], 2, False),
    ],
)
def test_a_reward_that_tells_nothing_apart_is_said_once(capsys, scores, peers, said):
    rewards = RewardSet({"flat": brightness})
    for epoch in (1, 2):
        rewards.check(torch.tensor(scores), {"flat": torch.tensor(scores).float()}, epoch, peers)
    assert capsys.readouterr().out.count("warning: the reward 'flat' gave all images") == said


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
        ("open('not_there.json')", r"FileNotFoundError: .*not_there.json' \(fails_here.py, line 1, in <module>\)"),
        ("raise ModuleNotFoundError('run make first')", "ModuleNotFoundError: run make first"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
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
        (["own:PROMPTS"], "'own:PROMPTS' is a list, which cannot be called; name a function of the module"),
        (["own:brightness="], "'own:brightness' has a weight that is not a finite number; write own:brightness=0.5"),
        (["own:brightness=half"], "a weight that is not a finite number"),
        ([f"own:brightness={math.nan}"], "a weight that is not a finite number"),
        ({"bright": (brightness, math.inf)}, "'bright' has a weight that is not a finite number"),
        (
            ["own:images_only"],
            r"'own:images_only' has the parameters \(images\); write it with \(images, prompts\) or",
        ),
        (
            {"bright": four},
            r"'bright' has the parameters \(images, prompts, metadata, more\); write it with \(images, prompts\) or",
        ),
        (
            ["own:Cannot"],
            r"'own:Cannot' is a class that cannot be built without arguments: FileNotFoundError: .*, line",
        ),
        (["own:Stops"], "the object of the class 'own:Stops' is Stops"),
        ({"mean": brightness}, "the metrics have a number 'mean' already; give the reward another name"),
        ({"bright": "own:brightness"}, r"'bright' is 'own:brightness'; give a function of \(images, prompts\) or"),
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
