"""The numbers of an epoch's metrics record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from pcpo_fast.metrics import Record
from pcpo_fast.ops import PolicyLoss
from pcpo_fast.samplers import StepTable


def reward_summary(rewards: Tensor, scores: Mapping[str, Tensor]) -> Record:
    """Mean and std of the finite rewards, float32 (N,), how many are not finite, and the mean of each score by name."""
    finite = rewards.isfinite()
    return {
        "reward/mean": rewards[finite].mean().item(),
        "reward/std": rewards[finite].std(correction=0).item(),
        "reward/not_finite": int((~finite).sum()),
        **{f"reward/{name}": finite_mean(score) for name, score in scores.items()},
    }


def update_summary(
    table: StepTable, seen: Sequence[tuple[Tensor, PolicyLoss]], on_policy: int, norms: Sequence[Tensor]
) -> Record:
    """Means over all rows and per step; warns if the first ratio was not exactly 1. Waits for the GPU.

    Args:
        table: the sampler of the rows.
        seen: (step, loss) of every micro-batch, in the order in which they were taken.
        on_policy: micro-batches before the first optimizer step, when the policy was still the one that sampled.
        norms: the gradient norm of every optimizer step, 0-d.
    """
    step = torch.cat([step for step, _ in seen]).cpu()
    log_ratio, clipped = (
        torch.cat([getattr(loss, name) for _, loss in seen]).float().cpu() for name in ("log_ratio", "clipped")
    )
    first_ratio = log_ratio[: sum(len(step) for step, _ in seen[:on_policy])].abs()
    first_per_step = _per_step(first_ratio, step, len(table), "amax")
    if first_ratio.max() != 0:
        _warn(table, first_per_step)
    norm = torch.stack(list(norms)).cpu()
    return {
        "update/loss": torch.stack([loss.loss for _, loss in seen]).mean().item(),
        "update/clip_fraction": clipped.mean().item(),
        "update/clip_fraction_per_step": _per_step(clipped, step, len(table), "mean"),
        "update/abs_log_ratio": log_ratio.abs().mean().item(),
        "update/first_abs_log_ratio": first_ratio.max().item(),
        "update/first_abs_log_ratio_per_step": first_per_step,
        "update/grad_norm": finite_mean(norm),
        "update/skipped_steps": int((~norm.isfinite()).sum()),
    }


def finite_mean(values: Tensor) -> float | None:
    """The mean of the finite values, or None if there are none."""
    finite = values[values.isfinite()]
    return finite.mean().item() if len(finite) else None


def _per_step(values: Tensor, step: Tensor, steps: int, reduce: str) -> list[float | None]:
    start = torch.full((steps,), math.nan)
    result = start.scatter_reduce(0, step[: len(values)], values, reduce, include_self=False)
    return [None if math.isnan(value) else value for value in result.tolist()]


def _warn(table: StepTable, first_per_step: Sequence[float | None]) -> None:
    listing = ", ".join(
        f"{timestep:.0f}: {value:.1e}"
        for timestep, value in zip(table.timesteps.tolist(), first_per_step, strict=True)
        if value
    )
    tqdm.write(
        "warning: before the first update the policy should equal the one that sampled, so its log-ratio should be 0; "
        "if the training forward pass differs from the rollout's, as with --compile, use --old-outputs recompute. "
        f"Largest |log-ratio| per timestep: {listing}"
    )
