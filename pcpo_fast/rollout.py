"""Rollouts: a policy run through a step table, step by step, keeping what the update needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from pcpo_fast.ops import sample_noise, sampler_step
from pcpo_fast.policies import Conditioning, DiffusersPolicy
from pcpo_fast.tables import StepTable

# the stream of the latents that sampling starts from; stream 0 is the sampler steps' own
INITIAL_LATENTS = 1


@dataclasses.dataclass
class Trajectory:
    """N samples over T steps. Everything that the loss needs is as the sampler left it: nothing is recomputed but the
    noise, z = (x' - a x - b m)/s, which the loss makes from the states that are here anyway.

    Attributes:
        states: float32 (N, T + 1, ...), the latents x before the first step and after every one.
        model_outputs: (N, T, ...) in the policy's dtype, the rounded, guided outputs m.
        conditioning: of the N prompts.
    """

    states: Tensor
    model_outputs: Tensor
    conditioning: Conditioning

    @property
    def latents(self) -> Tensor:
        """float32 (N, ...), where sampling ended."""
        return self.states[:, -1]

    def mend(self) -> Tensor:
        """Overwrites the samples that are not finite by one that is, where there is one, so that nothing which is
        computed from the rows meets a NaN. Returns which samples were finite, bool (N,).

        A sampler keeps a latent that is not finite so, to the end: the last ones tell.
        """
        finite = self.latents.isfinite().flatten(1).all(dim=1)
        if finite.any() and not finite.all():
            for values in (self.states, self.model_outputs, *self.conditioning.tensors()):
                values[~finite] = values[finite][:1]
        return finite


class Interrupted(Exception):
    """The run was asked to stop in the middle of a rollout."""


@torch.no_grad()
def rollout(
    policy: DiffusersPolicy,
    table: StepTable,
    conditioning: Conditioning,
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
        conditioning: of N prompts, from `policy.encode`.
        seed: the run's seed.
        first_index: global index of the first sample; the others follow.
        batch_size: rows per call of the denoiser; the last call has fewer where it does not divide N.
        record: keep the steps; without, there is only the last state, and T = 0.
        after_step: called after every step of every batch, for progress; what it raises ends the rollout.
    """
    device, count = policy.device, len(conditioning)
    steps, shape = len(table) if record else 0, policy.latent_shape
    trajectory = Trajectory(
        states=torch.empty((count, steps + 1, *shape), device=device),
        model_outputs=torch.empty((count, steps, *shape), device=device, dtype=policy.dtype),
        conditioning=conditioning,
    )
    for start in range(0, count, batch_size):
        rows = slice(start, min(start + batch_size, count))
        index = torch.arange(first_index + rows.start, first_index + rows.stop, device=device)
        sample = sample_noise((len(index), *shape), table, 0, seed=seed, sample_index=index, stream=INITIAL_LATENTS)
        for step in range(len(table)):
            output = policy.predict(sample, table.timesteps[step].expand(len(index)), conditioning[rows])
            stepped = sampler_step(output, sample, table, step, seed=seed, sample_index=index)
            if record:
                trajectory.states[rows, step] = sample
                trajectory.model_outputs[rows, step] = stepped.model_output
            sample = stepped.prev_sample
            after_step()
        trajectory.states[rows, -1] = sample
    return trajectory
