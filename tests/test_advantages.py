import collections
import json
import math

import numpy as np
import pytest
import torch

from pcpo_fast.advantages import EPSILON, Advantages
from pcpo_fast.config import LossSettings

GROUP = 4
# "cat" is drawn twice, so a prompt may have more than one group
PROMPTS = [prompt for prompt in ("cat", "dog", "cat") for _ in range(GROUP)]


def make(kind, clip=5.0, buffer_size=10, buffer_min=6):
    return Advantages(
        LossSettings(advantage=kind, advantage_clip=clip, prompt_buffer_size=buffer_size, prompt_buffer_min=buffer_min)
    )


def draw(epochs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(len(PROMPTS), generator=generator) - 7 for _ in range(epochs)]


def normalised(reward, peers):
    return (reward - np.mean(peers)) / (np.std(peers) + EPSILON)


def naive(kind, epochs, clip=5.0, buffer_size=10, buffer_min=6):
    """Advantages of every epoch, one reward at a time, in float64."""
    buffers = collections.defaultdict(list)
    results = []
    for rewards in ([float(reward) for reward in rewards] for rewards in epochs):
        result = []
        for prompt, reward in zip(PROMPTS, rewards, strict=True):
            buffers[prompt] = (buffers[prompt] + [reward])[-buffer_size:]
        for index, (prompt, reward) in enumerate(zip(PROMPTS, rewards, strict=True)):
            peers = rewards
            if kind == "group":
                start = index // GROUP * GROUP
                peers = rewards[start : start + GROUP]
            elif kind == "prompt" and len(buffers[prompt]) >= buffer_min:
                peers = buffers[prompt]
            result.append(np.clip(normalised(reward, peers), -clip, clip))
        results.append(result)
    return results


@pytest.mark.parametrize("kind", ["group", "prompt", "batch"])
def test_advantages_equal_the_naive_ones_over_epochs(kind):
    """With buffer 10 and 6 needed, "dog" starts on the batch's statistics, and both buffers roll over."""
    epochs = draw(4)
    advantages = make(kind)
    for rewards, expected in zip(epochs, naive(kind, epochs), strict=True):
        # float32 mean and std of numbers near 7 with spread 3
        torch.testing.assert_close(
            advantages(rewards, PROMPTS, GROUP), torch.tensor(expected).float(), rtol=1e-5, atol=1e-5
        )


def test_the_kinds_differ():
    epochs = draw(3)
    results = [torch.tensor(naive(kind, epochs)[-1]) for kind in ("group", "prompt", "batch")]
    assert all((a - b).abs().max() > 0.1 for a, b in zip(results, results[1:] + results[:1], strict=True))


def test_advantages_are_clipped_on_both_sides():
    rewards = torch.zeros(64)
    rewards[0] = 1
    for sign in (1, -1):
        advantages = make("batch", clip=2.0)(sign * rewards, ["cat"] * 64, 64)
        assert advantages[0] == 2 * sign
        assert advantages[1:].abs().max() < 2


@pytest.mark.parametrize("kind", ["group", "prompt", "batch"])
def test_equal_rewards_have_no_advantage(kind):
    """Also where sums of them round in float32."""
    advantages = make(kind)
    for reward in (-3.25, 12345.678, 1e8 / 3):
        advantages.buffers.clear()
        result = advantages(torch.full((len(PROMPTS),), reward), PROMPTS, GROUP)
        assert result.dtype == torch.float32
        assert result.tolist() == [0.0] * len(PROMPTS)


@pytest.mark.parametrize("kind", ["group", "prompt", "batch"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rewards_that_are_not_finite_take_no_part(kind, bad):
    (rewards,) = draw(1)
    rewards[2] = bad
    # a whole group, and with it all rewards of one prompt
    rewards[4:8] = bad
    advantages = make(kind, buffer_min=7)
    result = advantages(rewards, PROMPTS, GROUP)
    finite = [index for index in range(len(rewards)) if rewards[index].isfinite()]
    for index in finite:
        peers = [i for i in finite if i // GROUP == index // GROUP] if kind == "group" else finite
        assert result[index].item() == pytest.approx(
            normalised(rewards[index].item(), rewards[peers].numpy()), rel=1e-5
        )
    assert all(result[index] == 0 for index in set(range(len(rewards))) - set(finite))
    assert all(map(math.isfinite, advantages.buffers.get("cat", [])))


def test_state_survives_json():
    first, second = draw(2)
    whole, cut = make("prompt"), make("prompt")
    whole(first, PROMPTS, GROUP)
    cut(first, PROMPTS, GROUP)
    restored = make("prompt")
    restored.load_state_dict(json.loads(json.dumps(cut.state_dict())))
    assert torch.equal(restored(second, PROMPTS, GROUP), whole(second, PROMPTS, GROUP))
    # without the state the result is another, and the restored buffers still roll over
    assert not torch.equal(make("prompt")(second, PROMPTS, GROUP), restored(second, PROMPTS, GROUP))
    assert [len(buffer) for buffer in restored.buffers.values()] == [10, 10]
