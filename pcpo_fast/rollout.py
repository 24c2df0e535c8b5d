"""Rollouts: a policy run through a step table, step by step, keeping what the update needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from pcpo_fast.ops import sample_noise, sampler_step
from pcpo_fast.policies import StableDiffusionPolicy
from pcpo_fast.tables import StepTable

# the stream of the latents that sampling starts from; stream 0 is the sampler steps' own
INITIAL_LATENTS = 1


@dataclasses.dataclass
class Trajectory:
    """N samples over T steps. Everything that the loss needs is as the sampler left it: nothing is recomputed.

    Attributes:
        samples: float32 (N, T, C, H, W), the latents x before each step.
        model_outputs: (N, T, C, H, W) in the policy's dtype, the rounded, guided outputs m.
        noise: float32 (N, T, C, H, W), the z of the stored next latent.
        latents: float32 (N, C, H, W), where sampling ended.
        conditioning: (N, tokens, width).
    """

    samples: Tensor
    model_outputs: Tensor
    noise: Tensor
    latents: Tensor
    conditioning: Tensor

    def mend(self) -> Tensor:
        """Overwrites the samples that are not finite by one that is, where there is one, so that nothing which is
        computed from the rows meets a NaN. Returns which samples were finite, bool (N,).

        A sampler keeps a latent that is not finite so, to the end: the last ones tell.
        """
        finite = self.latents.isfinite().flatten(1).all(dim=1)
        if finite.any() and not finite.all():
            for field in dataclasses.fields(self):
                values = getattr(self, field.name)
                values[~finite] = values[finite][:1]
        return finite


class Interrupted(Exception):
    """The run was asked to stop in the middle of a rollout."""


@torch.no_grad()
def rollout(
    policy: StableDiffusionPolicy,
    table: StepTable,
    conditioning: Tensor,
    *,
    seed: int,
    first_index: int,
    batch_size: int,
    record: bool = True,
    after_step: Callable[[], None] = lambda: None,
) -> Trajectory:
    """Samples one latent per row of `conditioning`, `batch_size` at a time.

    Noise depends on the seed, the sample's global index, the step and the element only: not on the batch size.

    Args:
        policy: the denoiser, with guidance.
        table: the sampler, on the policy's device.
        conditioning: (N, tokens, width) from `policy.encode`.
        seed: the run's seed.
        first_index: global index of the first sample; the others follow.
        batch_size: rows per call of the denoiser; the last call has fewer where it does not divide N.
        record: keep the steps; without, only `latents` is filled and the steps have T = 0.
        after_step: called after every step of every batch, for progress; what it raises ends the rollout.
    """
    device, count = policy.device, len(conditioning)
    steps, shape = len(table) if record else 0, policy.latent_shape
    trajectory = Trajectory(
        samples=torch.empty((count, steps, *shape), device=device),
        model_outputs=torch.empty((count, steps, *shape), device=device, dtype=policy.dtype),
        noise=torch.empty((count, steps, *shape), device=device),
        latents=torch.empty((count, *shape), device=device),
        conditioning=conditioning,
    )
    for start in range(0, count, batch_size):
        rows = slice(start, min(start + batch_size, count))
        index = torch.arange(first_index + rows.start, first_index + rows.stop, device=device)
        sample = sample_noise((len(index), *shape), table, 0, seed=seed, sample_index=index, stream=INITIAL_LATENTS)
        for step in range(len(table)):
            output = policy.predict(sample, table.timesteps[step].expand(len(index)), conditioning[rows])
            stepped = sampler_step(output, sample, table, step, seed=seed, sample_index=index, return_noise=record)
            if stepped.noise is not None:
                trajectory.samples[rows, step] = sample
                trajectory.model_outputs[rows, step] = stepped.model_output
                trajectory.noise[rows, step] = stepped.noise
            sample = stepped.prev_sample
            after_step()
        trajectory.latents[rows] = sample
    return trajectory
