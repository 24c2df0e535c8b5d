"""Advantages: rewards normalised per group, per prompt or per batch."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pcpo_fast.config import LossSettings

# the peers of a reward
Baseline = Literal["group", "prompt", "batch"]
# far below the spread of any reward; a group of equal rewards gets advantages of 0
EPSILON = 1e-4


class Advantages:
    """(reward - mean) / (std + 1e-4), clipped. The baseline decides which samples give the mean and the std.

    "group": the samples of the same prompt in this epoch, as in GRPO (Shao et al., arXiv 2402.03300, section 4.1).
    "prompt": the last `prompt_buffer_size` rewards of the same prompt over epochs, or the whole epoch's until there are
    `prompt_buffer_min` of them, as in DDPO (Black et al., arXiv 2305.13301, appendix on per-prompt tracking).
    "batch": all samples of this epoch.

    Rewards that are not finite are excluded and get advantage 0. The arithmetic is float64: the mean of equal float32
    rewards is exact there, so their advantage is 0, however large they are.
    """

    def __init__(self, settings: LossSettings) -> None:
        self.settings = settings
        self.buffers: dict[str, collections.deque[float]] = {}

    def __call__(self, rewards: Tensor, prompts: Sequence[str], group_size: int) -> Tensor:
        """float32 (N,) advantages of float32 (N,) rewards; the samples of a group are adjacent."""
        rewards = rewards.double()
        finite = rewards.isfinite()
        advantages = torch.zeros_like(rewards)
        for members, peers in self._comparisons(rewards, finite, prompts, group_size):
            if len(peers) > 0:
                # the biased std is defined for a single reward too
                std = peers.std(correction=0)
                advantages[members] = (rewards[members] - peers.mean()) / (std + EPSILON)
        clip = self.settings.advantage_clip
        return advantages.clamp(-clip, clip).float()

    def _comparisons(self, rewards: Tensor, finite: Tensor, prompts: Sequence[str], group_size: int) -> Any:
        """(mask of samples, the finite rewards they are compared with), over all finite samples."""
        if self.settings.advantage == "batch":
            yield finite, rewards[finite]
        elif self.settings.advantage == "group":
            group = torch.arange(len(rewards)) // group_size
            for index in group.unique():
                members = finite & (group == index)
                yield members, rewards[members]
        else:
            for prompt in dict.fromkeys(prompts):
                members = finite & torch.tensor([other == prompt for other in prompts])
                buffer = self.buffers.setdefault(prompt, collections.deque(maxlen=self.settings.prompt_buffer_size))
                buffer.extend(rewards[members].tolist())
                full = len(buffer) >= self.settings.prompt_buffer_min
                yield members, rewards.new_tensor(list(buffer)) if full else rewards[finite]

    def state_dict(self) -> dict[str, list[float]]:
        return {prompt: list(buffer) for prompt, buffer in self.buffers.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        size = self.settings.prompt_buffer_size
        self.buffers = {prompt: collections.deque(rewards, maxlen=size) for prompt, rewards in state.items()}
