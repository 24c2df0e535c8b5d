"""Rewards: functions of (images, prompts) that return one score per image.

images: float tensor (N, 3, H, W) in [0, 1]; prompts: N strings; the result: (N,) numbers, higher is better, or a pair
of them and anything else. A reward with a third parameter also gets the prompts' metadata: N dicts. A score that is not
finite marks an image that could not be scored: the trainer leaves it out and counts it.

An image that is not finite itself scores NaN, whatever a reward returns for it; the reward sees 0 in the place of each
value that is not finite.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pcpo_fast.config import DataSettings
from pcpo_fast.errors import RewardError, SettingError, describe_error
from pcpo_fast.functions import import_function
from pcpo_fast.isolation import OutOfTime, kept_globals, seed_generators, time_limit
from pcpo_fast.policies import find_device
from pcpo_fast.prompts import Prompts
from pcpo_fast.reward_settings import RewardSettings
from pcpo_fast.rewards.clip import ModelOptions
from pcpo_fast.rewards.http import HttpReward
from pcpo_fast.rewards.scores import to_scores
from pcpo_fast.terminal import say, warn

# a function (images, prompts) or (images, prompts, metadata)
Reward = Callable[..., Any]
# functions by name, with a weight where it is not 1
Rewards = Mapping[str, Reward | tuple[Reward, float]]

REWARDS = {
    "digit_alignment": "pcpo_fast.digits.rewards:alignment",
    "digit_accuracy": "pcpo_fast.digits.rewards:accuracy",
    "jpeg_compressibility": "pcpo_fast.rewards.jpeg:compressibility",
    "jpeg_incompressibility": "pcpo_fast.rewards.jpeg:incompressibility",
    "ocr": "pcpo_fast.rewards.ocr:Ocr",
}
# models, which may be followed by a colon and weights: a local path, or a hub name
MODELS = {
    "aesthetic": "pcpo_fast.rewards.clip:Aesthetic",
    "clip_score": "pcpo_fast.rewards.clip:ClipScore",
    "hpsv2": "pcpo_fast.rewards.hps:HpsV2",
    "pickscore": "pcpo_fast.rewards.clip:PickScore",
}
# names of the metrics of all rewards together
RESERVED = {"mean", "std", "quantiles", "not_finite", "failed", "reward"}


class RewardSet:
    """Several rewards and their weighted sum. They are found and checked when the set is made.

    Args:
        rewards: a sequence of specs, each a `name`, `model:weights`, `module:function`, or one of them followed by
            `=weight`; or a mapping from names to functions, or to pairs (function, weight). The weight is 1 where none
            is given. A class is built without arguments, once in a process, and its object is the function.
        setting: the setting that the rewards come from, for error messages.
        timeout: seconds that one call of a reward may take; None for any time.
        options: how models score, and the servers.

    Attributes:
        rewards: functions and weights, by name.
        seconds: how long each reward took in the last call, by name.

    Raises:
        SettingError: for an unknown name, a model whose weights or packages are missing, a module or function that is
            not there, a function that takes neither (images, prompts) nor (images, prompts, metadata), a class that
            cannot be built, a weight that is not a finite number, or a reward that is named twice.
    """

    def __init__(
        self,
        rewards: Sequence[str] | Rewards,
        *,
        setting: str = "rewards",
        timeout: float | None = None,
        options: RewardSettings | None = None,
    ) -> None:
        self.setting, self.timeout, self.options = setting, timeout, options or RewardSettings()
        self.rewards: dict[str, tuple[Reward, float]] = {}
        self.seconds: dict[str, float] = {}
        # rewards of which it was said that they do not tell images apart
        self._constant: set[str] = set()
        if isinstance(rewards, str):
            raise SettingError(setting, f"{rewards!r} is a single string; give a list of rewards")
        given: list[tuple[str, Any]] = []
        if isinstance(rewards, Mapping):
            given = list(rewards.items())
        else:
            for spec in rewards:
                name, equals, weight = spec.partition("=")
                given.append((name, (_find(name, setting, self.options), _number(weight) if equals else 1.0)))
        for name, value in given:
            pair: Any = value if isinstance(value, tuple) and len(value) == 2 else (value, 1.0)
            reward, weight = pair
            if isinstance(weight, bool) or not isinstance(weight, int | float):
                raise SettingError(setting, f"{name!r} is given as {value!r}; give a function, or (function, weight)")
            if name in self.rewards:
                raise SettingError(setting, f"the reward {name!r} is named twice; give it once, with its weight")
            if name in RESERVED:
                raise SettingError(setting, f"the metrics have a number {name!r} already; give the reward another name")
            if not math.isfinite(weight):
                raise SettingError(
                    setting, f"the reward {name!r} has a weight that is not a finite number; write {name}=0.5, say"
                )
            _of_three(name, reward, setting)
            self.rewards[name] = reward, float(weight)

    def __call__(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]] | None = None,
        *,
        seed: int = 0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, float32 (N,) on the CPU, and each reward's own scores by name.

        Args:
            images: float (N, 3, H, W) in [0, 1].
            prompts: N strings.
            metadata: N dicts of what else is known about the prompts; None for empty ones.
            seed: of the random generators that each reward finds.

        Raises:
            RewardError: if a reward fails, takes too long, or does not return one number per image; it names the
                reward.
        """
        total, scores = self._sum(images, prompts, [{} for _ in prompts] if metadata is None else metadata, seed)
        for name, failed in self.failed.items():
            if failed:
                warn(f"{self._failure(name, len(prompts))}; they count as not finite")
        return total, scores

    def _sum(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]], seed: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        finite = images.isfinite().flatten(1).all(dim=1).cpu()
        scores = {}
        for name, (reward, _) in self.rewards.items():
            started = time.perf_counter()
            # each has copies of its own, which it may write into
            inputs = images.nan_to_num(nan=0, posinf=0, neginf=0), list(prompts), copy.deepcopy(list(metadata))
            function = _of_three(name, reward, self.setting)
            scores[name] = self._score(name, function, inputs, seed).where(finite, math.nan)
            self.seconds[name] = time.perf_counter() - started
        total = torch.zeros(len(prompts))
        for name, (_, weight) in self.rewards.items():
            total += weight * scores[name]
        return total, scores

    def try_out(self, prompts: Prompts, size: tuple[int, int], device: torch.device) -> None:
        """Calls every reward once, on two images of noise, of this height and width, with the first prompts. Servers
        must be there and score them.

        Raises:
            SettingError: if a reward cannot score them.
        """
        images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
        try:
            for server in self._servers().values():
                server.check_health()
            first = (list(prompts) * 2)[:2]
            self._sum(images, first, prompts.about(first), seed=0)
            for name, server in self._servers().items():
                if server.failed:
                    raise RewardError(f"the reward {name!r}: the server {server.url} failed: {server.last_error}")
        except RewardError as error:
            raise SettingError(self.setting, f"{error}. This was a trial before the run, on two images") from error

    def check(self, rewards: Tensor, scores: Mapping[str, Tensor], epoch: int, peers: int) -> None:
        """Says, once, which rewards tell no image from the `peers` - 1 others that it is compared with.

        Raises:
            RewardError: if no reward of the epoch is finite, or a server failed to score too many of its images.
        """
        for name, failed in self.failed.items():
            limit = self.options.reward_failures
            if failed > limit * len(rewards):
                raise RewardError(
                    f"{self._failure(name, len(rewards))} in epoch {epoch}, more than the {limit} of reward_failures; "
                    "look at the server, then --resume"
                )
        if not rewards.isfinite().any():
            raise RewardError(
                f"every reward of epoch {epoch} is NaN or infinite ({', '.join(scores)}); look at the reward, or at "
                "the images: the policy may have diverged at this learning_rate"
            )
        for name, score in scores.items():
            groups = [group[group.isfinite()] for group in score.split(peers)]
            told = name in self._constant or not score.isfinite().any()
            if not told and all((group == group[:1]).all() for group in groups):
                self._constant.add(name)
                say(
                    f"warning: the reward {name!r} gave all images that are compared with one another the same score "
                    f"in epoch {epoch}; there it teaches nothing"
                )

    @property
    def failed(self) -> dict[str, int]:
        """How many images of the last call each server failed to score, by name."""
        return {name: server.failed for name, server in self._servers().items()}

    def _servers(self) -> dict[str, HttpReward]:
        return {name: reward for name, (reward, _) in self.rewards.items() if isinstance(reward, HttpReward)}

    def _failure(self, name: str, count: int) -> str:
        server = self._servers()[name]
        return (
            f"the server of the reward {name!r} failed to score {server.failed} of {count} images ({server.last_error})"
        )

    def _score(self, name: str, reward: Reward, inputs: Sequence[Any], seed: int) -> Tensor:
        what, started = f"the reward {name!r} (setting {self.setting})", time.perf_counter()
        late = (
            f"{what} took more than the {self.timeout} seconds of reward_timeout; raise it, or make the reward faster"
        )
        try:
            with kept_globals(), torch.no_grad():
                seed_generators(seed)
                with time_limit(self.timeout):
                    result = reward(*inputs)
                    try:
                        scores = to_scores(result, len(inputs[1]))
                    except ValueError as error:
                        raise RewardError(str(error)) from error
        except KeyboardInterrupt:
            raise
        except OutOfTime as error:
            raise RewardError(late) from error
        except RewardError as error:
            raise RewardError(f"{what}: {error}") from error
        except BaseException as error:
            raise RewardError(f"{what} failed: {describe_error(error)}") from error
        # where no alarm could interrupt it
        if self.timeout is not None and time.perf_counter() - started > self.timeout:
            raise RewardError(late)
        return scores


def reward_sets(
    data: DataSettings, rewards: Rewards | None, *, timeout: float | None = None
) -> tuple[RewardSet, RewardSet]:
    """What a run is trained on, and what it only measures: the eval rewards that are not trained on.

    Args:
        data: the settings.
        rewards: functions in the place of the settings' rewards, if they are given.
        timeout: as for `RewardSet`.

    Raises:
        SettingError: as `RewardSet`.
    """
    trained = RewardSet(data.rewards if rewards is None else rewards, timeout=timeout, options=data)
    held_out = [name for name in data.eval_rewards if name not in trained.rewards]
    return trained, RewardSet(held_out, setting="eval_rewards", timeout=timeout, options=data)


def is_own(spec: str) -> bool:
    """Whether a name, without a weight, is a function of the user's own: importing it runs a program."""
    return ":" in spec and spec.partition(":")[0] not in MODELS


def _find(name: str, setting: str, options: RewardSettings) -> Reward:
    url = options.servers().get(name)
    model, colon, weights = name.partition(":")
    try:
        if url is not None:
            if name in REWARDS or name in MODELS:
                raise SettingError("reward_servers", f"a reward {name!r} is built in; give the server another name")
            return HttpReward(url, options.reward_batch_size)
        if model in MODELS:
            kind: Any = import_function(MODELS[model], setting)
            return _build(kind, weights if colon else None, _model_options(options))
    except RewardError as error:
        raise SettingError(setting, f"the reward {name!r} {error}") from error
    spec = REWARDS.get(name, name)
    if ":" not in spec:
        raise SettingError(
            setting,
            f"no reward is named {name!r}; choose one of {', '.join([*REWARDS, *MODELS])}, or give your own as "
            "module:function",
        )
    return import_function(spec, setting)


def _model_options(options: RewardSettings) -> ModelOptions:
    try:
        device = None if options.reward_device is None else find_device(options.reward_device)
    except SettingError as error:
        raise SettingError("reward_device", error.reason) from error
    return ModelOptions(options.reward_batch_size, options.reward_dtype, device)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


@functools.cache
def _build(kind: type, *arguments: Any) -> Any:
    """The one object of a class with these arguments, which may hold a large model."""
    with kept_globals():
        return kind(*arguments)


def _of_three(name: str, reward: Reward, setting: str) -> Reward:
    """The reward as a function of (images, prompts, metadata). It is given the metadata if it has a parameter of that
    name, or a third one without a default."""
    what = f"the reward {name!r}"
    if inspect.isclass(reward):
        try:
            reward = _build(reward)
        except KeyboardInterrupt:
            raise
        except RewardError as error:
            raise SettingError(setting, f"{what} {error}") from error
        except BaseException as error:
            raise SettingError(
                setting, f"{what} is a class that cannot be built without arguments: {describe_error(error)}"
            ) from error
        what = f"the object of the class {name!r}"
    if not callable(reward):
        raise SettingError(
            setting, f"{what} is {reward!r}; give a function of (images, prompts) or (images, prompts, metadata)"
        )
    try:
        signature = inspect.signature(reward)
    except (TypeError, ValueError):
        # written in C: only a call can tell
        return lambda images, prompts, metadata: reward(images, prompts)
    if "metadata" in signature.parameters and _takes(signature, None, None, metadata=None):
        return lambda images, prompts, metadata: reward(images, prompts, metadata=metadata)
    if _takes(signature, None, None):
        return lambda images, prompts, metadata: reward(images, prompts)
    if _takes(signature, None, None, None):
        return reward
    raise SettingError(
        setting,
        f"{what} has the parameters {signature}; write it with (images, prompts) or (images, prompts, metadata)",
    )


def _takes(signature: inspect.Signature, *arguments: None, **named: None) -> bool:
    try:
        signature.bind(*arguments, **named)
    except TypeError:
        return False
    return True
