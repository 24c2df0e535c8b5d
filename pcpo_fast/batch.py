"""An epoch's images as training sees them: rows of (image, step)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from pcpo_fast.advantages import Advantages
from pcpo_fast.metrics import Record
from pcpo_fast.policies import Conditioning
from pcpo_fast.rollout import Trajectory


@dataclasses.dataclass
class Batch:
    """N images, sampled and scored.

    Attributes:
        trajectory: how they were sampled.
        advantages: float32 (N,).
        generator: draws the order of the rows.
        record: the metrics of sampling and scoring.
        tracker: the rewards that later epochs are compared with; the trainer's once it has trained on the batch.
    """

    trajectory: Trajectory
    advantages: Tensor
    generator: torch.Generator
    record: Record = dataclasses.field(default_factory=dict)
    tracker: Advantages | None = None

    def micro_batches(self, size: int, timestep_fraction: float = 1.0) -> Iterator[tuple[Tensor, Tensor]]:
        """The rows of one pass, shuffled across images and steps, as (sample, step) per micro-batch, int64 (size,).

        Args:
            size: rows per micro-batch; N is a multiple of it.
            timestep_fraction: share of each image's trained steps, drawn anew for every image.
        """
        samples = len(self.advantages)
        trained = self.trajectory.table.trainable.nonzero().squeeze(1).cpu()
        count = max(1, round(timestep_fraction * len(trained)))
        chosen = torch.rand(samples, len(trained), generator=self.generator).argsort(dim=1)[:, :count]
        rows = torch.stack([torch.arange(samples).repeat_interleave(count), trained[chosen].flatten()])
        order = torch.randperm(samples * count, generator=self.generator)
        sample, step = rows[:, order].to(self.trajectory.states.device)
        yield from zip(sample.split(size), step.split(size), strict=True)

    def inputs(self, sample: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Conditioning]:
        """The denoiser's inputs for rows (sample, step): latents, timesteps, conditioning."""
        trajectory = self.trajectory
        conditioning = trajectory.conditioning[trajectory.prompt[sample]]
        return trajectory.states[sample, step], trajectory.table.timesteps[step], conditioning
