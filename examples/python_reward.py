"""A reward of your own, a function of images and prompts. By name on the command line:

    pcpo train digits --rewards examples.python_reward:ink --eval-rewards digit_accuracy

or as a Python function, in a notebook: see `main`, which `python examples/python_reward.py FOLDER` runs.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


def ink(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """How much ink a picture has: the share of its pixels that are not background.

    Args:
        images: float (N, 3, H, W) in [0, 1].
        prompts: N strings, not used.

    Returns:
        (N,) numbers, higher is better.
    """
    return (images.mean(dim=1) > 0.5).float().mean(dim=(1, 2))


def main(folder: Path, epochs: int = 2) -> list[float]:
    """Trains on the function itself. Returns the mean reward of each epoch."""
    from pcpo_fast.presets import PRESETS
    from pcpo_fast.train import make_trainer

    settings = {"epochs": epochs, "eval_rewards": (), "eval_samples": 32, "output_dir": str(folder)}
    trainer = make_trainer(PRESETS["digits"].replace(**settings), rewards={"ink": ink})
    trainer.train()
    return trainer.metrics.series("reward/mean")[1]


if __name__ == "__main__":
    torch.manual_seed(0)
    print(main(Path(sys.argv[1])))
