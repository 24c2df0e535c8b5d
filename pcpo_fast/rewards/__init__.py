"""Rewards: functions of (images, prompts) to one score per image, found by name or as `module:function`.

images: float tensor (N, 3, H, W) in [0, 1]; prompts: N strings; the result: (N,) numbers, higher is better. A score
that is not finite marks an image that could not be scored: the trainer leaves it out and counts it.

An image that is not finite itself scores NaN, whatever a reward makes of it; the reward finds 0 where it is not finite.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Reward = Callable[[Tensor, Sequence[str]], Tensor]

REWARDS = {
    "digit_alignment": "pcpo_fast.digits.rewards:alignment",
    "digit_accuracy": "pcpo_fast.digits.rewards:accuracy",
    "jpeg_compressibility": "pcpo_fast.rewards.jpeg:compressibility",
    "jpeg_incompressibility": "pcpo_fast.rewards.jpeg:incompressibility",
}


class RewardError(ValueError):
    """A reward cannot score what it is given, or returned something that is no score."""


class RewardSet:
    """Several rewards and their weighted sum.

    Args:
        specs: each `name`, `module:function`, or one of them with `=weight` behind it; the weight is 1 otherwise.

    Raises:
        ValueError: for a name that is not known, a module or function that is not there, a weight that is no finite
            number, or a reward named twice.
    """

    def __init__(self, specs: Sequence[str]) -> None:
        self.rewards: dict[str, tuple[Reward, float]] = {}
        for spec in specs:
            name, _, weight = spec.partition("=")
            if name in self.rewards:
                raise ValueError(f"the reward {name!r} is named twice; give it once, with the weight you want")
            self.rewards[name] = (_find(name), _weight(spec, weight))

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, float32 (N,) on the CPU, and each reward's own scores by name.

        Raises:
            RewardError: if a reward does not return one number per image; it names the reward.
        """
        whole = images.isfinite().flatten(1).all(dim=1).cpu()
        scores = {}
        for name, (reward, _) in self.rewards.items():
            # each has a copy of its own, which it may write into
            shown = images.nan_to_num(nan=0, posinf=0, neginf=0)
            score = torch.as_tensor(reward(shown, prompts)).to("cpu", torch.float32)
            if score.shape != (len(prompts),):
                raise RewardError(
                    f"the reward {name!r} returned shape {tuple(score.shape)} for {len(prompts)} images; it must "
                    "return one number per image"
                )
            scores[name] = score.where(whole, math.nan)
        total = torch.zeros(len(prompts))
        for name, (_, weight) in self.rewards.items():
            total += weight * scores[name]
        return total, scores


def _find(name: str) -> Reward:
    module_name, _, function_name = REWARDS.get(name, name).partition(":")
    if not module_name or module_name.startswith(".") or not function_name:
        raise ValueError(
            f"no reward is named {name!r}; choose one of {', '.join(REWARDS)}, or give your own as module:function"
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the reward {name!r} needs the module {error.name!r}, which cannot be imported; install it, or run from "
            "the folder that holds it"
        ) from error
    reward: Reward | None = getattr(module, function_name, None)
    if reward is None or not callable(reward):
        raise ValueError(f"the reward {name!r} is not there: module {module_name} has no function {function_name!r}")
    return reward


def _weight(spec: str, weight: str) -> float:
    if "=" not in spec:
        return 1.0
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"the reward {spec!r} has no finite number behind '='; write name=0.5, say")
    return value
