"""Rewards: functions of (images, prompts) that return one score per image.

images: float tensor (N, 3, H, W) in [0, 1]; prompts: N strings; the result: (N,) numbers, higher is better. A score
that is not finite marks an image that could not be scored: the trainer leaves it out and counts it.

An image that is not finite itself scores NaN, whatever a reward returns for it; the reward sees 0 in the place of each
value that is not finite.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pcpo_fast.errors import SettingError
from pcpo_fast.functions import import_function

Reward = Callable[[Tensor, Sequence[str]], Any]
# functions by name, with a weight where it is not 1
Rewards = Mapping[str, Reward | tuple[Reward, float]]

REWARDS = {
    "digit_alignment": "pcpo_fast.digits.rewards:alignment",
    "digit_accuracy": "pcpo_fast.digits.rewards:accuracy",
    "jpeg_compressibility": "pcpo_fast.rewards.jpeg:compressibility",
    "jpeg_incompressibility": "pcpo_fast.rewards.jpeg:incompressibility",
}


class RewardError(ValueError):
    """A reward cannot score its images or prompts, or its result is not a score per image."""


class RewardSet:
    """Several rewards and their weighted sum. They are found and checked when the set is made.

    Args:
        rewards: a sequence of specs, each a `name`, `module:function`, or one of them followed by `=weight`; or a
            mapping from names to functions, or to pairs (function, weight). The weight is 1 where none is given.
        setting: the setting that the rewards come from, for error messages.

    Raises:
        SettingError: for an unknown name, a module or function that is not there, a function that does not take
            (images, prompts), a weight that is not a finite number, or a reward that is named twice.
    """

    def __init__(self, rewards: Sequence[str] | Rewards, *, setting: str = "rewards") -> None:
        self.setting = setting
        self.rewards: dict[str, tuple[Reward, float]] = {}
        if isinstance(rewards, str):
            raise SettingError(setting, f"{rewards!r} is a single string; give a list of rewards")
        given: list[tuple[str, Any]] = []
        if isinstance(rewards, Mapping):
            given = list(rewards.items())
        else:
            for spec in rewards:
                name, equals, weight = spec.partition("=")
                given.append((name, (_find(name, setting), _number(weight) if equals else 1.0)))
        for name, value in given:
            pair: Any = value if isinstance(value, tuple) and len(value) == 2 else (value, 1.0)
            reward, weight = pair
            if isinstance(weight, bool) or not isinstance(weight, int | float):
                raise SettingError(setting, f"{name!r} is given as {value!r}; give a function, or (function, weight)")
            if name in self.rewards:
                raise SettingError(setting, f"the reward {name!r} is named twice; give it once, with its weight")
            if not math.isfinite(weight):
                raise SettingError(
                    setting, f"the reward {name!r} has a weight that is not a finite number; write {name}=0.5, say"
                )
            _check_signature(name, reward, setting)
            self.rewards[name] = reward, float(weight)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, float32 (N,) on the CPU, and each reward's own scores by name.

        Raises:
            RewardError: if a reward does not return one number per image; it names the reward.
        """
        finite = images.isfinite().flatten(1).all(dim=1).cpu()
        scores = {}
        for name, (reward, _) in self.rewards.items():
            # each has copies of its own, which it may write into
            try:
                result = reward(images.nan_to_num(nan=0, posinf=0, neginf=0), list(prompts))
            except RewardError as error:
                raise RewardError(f"the reward {name!r} (setting {self.setting}): {error}") from error
            try:
                score = torch.as_tensor(result).to("cpu", torch.float32)
            except (TypeError, ValueError, RuntimeError) as error:
                raise RewardError(
                    f"the reward {name!r} returned a {type(result).__name__} that cannot be made a tensor of numbers "
                    f"({error}); it must return one number per image"
                ) from error
            if score.shape != (len(prompts),):
                raise RewardError(
                    f"the reward {name!r} returned shape {tuple(score.shape)} for {len(images)} images and "
                    f"{len(prompts)} prompts; it must return one number per image"
                )
            scores[name] = score.where(finite, math.nan)
        total = torch.zeros(len(prompts))
        for name, (_, weight) in self.rewards.items():
            total += weight * scores[name]
        return total, scores


def _find(name: str, setting: str) -> Reward:
    spec = REWARDS.get(name, name)
    if ":" not in spec:
        raise SettingError(
            setting,
            f"no reward is named {name!r}; choose one of {', '.join(REWARDS)}, or give your own as module:function",
        )
    return import_function(spec, setting)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _check_signature(name: str, reward: Reward, setting: str) -> None:
    if not callable(reward):
        raise SettingError(setting, f"the reward {name!r} is {reward!r}; give a function of (images, prompts)")
    try:
        signature = inspect.signature(reward)
    except ValueError:
        # written in C: only a call can tell
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise SettingError(
            setting,
            f"the reward {name!r} has the arguments {signature} and is called with two: write it as a function of "
            "(images, prompts)",
        ) from error
