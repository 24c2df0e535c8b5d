"""The numbers of an epoch's metrics record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pcpo_fast.metrics import Record
from pcpo_fast.ops import PolicyLoss
from pcpo_fast.samplers import StepTable
from pcpo_fast.terminal import say

# quantiles of the rewards over an epoch's images
REWARD_QUANTILES = (0.1, 0.9)
# quantiles of the log-ratio over an epoch's rows
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def reward_summary(
    rewards: Tensor, scores: Mapping[str, Tensor], seconds: Mapping[str, float], failed: Mapping[str, int]
) -> Record:
    """Mean, std and quantiles of the finite rewards, float32 (N,), how many are not finite; and of each score by name
    the mean, how many are not finite, how many of these a server failed to score, and how long it took."""
    finite = rewards[rewards.isfinite()]
    return {
        "reward/mean": finite.mean().item(),
        "reward/std": finite.std(correction=0).item(),
        "reward/quantiles": finite.quantile(finite.new_tensor(REWARD_QUANTILES)).tolist(),
        "reward/not_finite": len(rewards) - len(finite),
        **{f"reward/{name}": finite_mean(score) for name, score in scores.items()},
        **{f"reward/not_finite/{name}": int((~score.isfinite()).sum()) for name, score in scores.items()},
        **{f"reward/failed/{name}": count for name, count in failed.items()},
        **{f"time/reward/{name}": value for name, value in seconds.items()},
    }


class UpdateLog:
    """What an update saw, row by row. All of it stays on the device until `summary`, so nothing waits for a GPU.

    Args:
        table: the sampler of the rows.
    """

    def __init__(self, table: StepTable) -> None:
        self.table = table
        self.seen: list[tuple[Tensor, ...]] = []
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        # micro-batches before the first optimizer step, when the policy was still the one that sampled
        self.on_policy = 0

    def rows(self, step: Tensor, result: PolicyLoss, output: Tensor, scale: Tensor) -> None:
        """Notes a micro-batch after its backward pass.

        Args:
            step: int64 (rows,).
            result: their loss.
            output: the model output that the loss was taken of, (rows, ...), with its gradient.
            scale: what the gradient of the mean loss was multiplied by, 0-d.
        """
        assert output.grad is not None
        # the gradient of each row's own loss: the mean over rows is undone
        norm = torch.linalg.vector_norm(output.grad.flatten(1), dim=1, dtype=torch.float32) * (len(step) / scale)
        self.seen.append((step, result.log_ratio, result.clipped, norm))
        self.losses.append(result.loss.detach())
        self.on_policy += not self.norms

    def step(self, norm: Tensor) -> None:
        """Notes an optimizer step, with the norm of its gradient, 0-d."""
        self.norms.append(norm)

    def summary(self) -> Record:
        """Means over all rows and per step of the sampler; warns if the first ratio was not exactly 1.

        `output_grad_norm` is the norm of the gradient of a row's loss at the model output: the credit of the step
        times the row's advantage, 0 where the row was clipped. `taylor_error` is what log rho misses of rho - 1:
        the sum of |rho - 1 - log rho| over that of |rho - 1|, of rows where both are finite.
        """
        step, log_ratio, clipped, gradient = (torch.cat(parts).cpu() for parts in zip(*self.seen, strict=True))
        log_ratio, clipped, steps = log_ratio.float(), clipped.float(), len(self.table)
        first_ratio = log_ratio[: sum(len(step) for step, *_ in self.seen[: self.on_policy])].abs()
        first_per_step = _per_step(first_ratio, step, steps, "amax")
        if first_ratio.max() != 0:
            _warn(self.table, first_per_step)
        norm = torch.stack(self.norms).cpu()
        mean_gradient = _mean_per_step(gradient, step, steps)
        spread = (gradient.double() - mean_gradient[step]) ** 2
        change = torch.expm1(log_ratio.double())
        missed = (change - log_ratio).abs()
        # one row whose ratio overflowed would hide all others
        finite = missed.isfinite()
        return {
            "update/loss": torch.stack(self.losses).mean().item(),
            "update/clip_fraction": clipped.mean().item(),
            "update/clip_fraction_per_step": _per_step(clipped, step, steps, "mean"),
            "update/abs_log_ratio": log_ratio.abs().mean().item(),
            "update/log_ratio_quantiles": torch.nanquantile(log_ratio, torch.tensor(QUANTILES)).tolist(),
            "update/taylor_error": (missed[finite].sum() / change[finite].abs().sum()).item(),
            "update/first_abs_log_ratio": first_ratio.max().item(),
            "update/first_abs_log_ratio_per_step": first_per_step,
            "update/output_grad_norm_per_step": _listed(mean_gradient),
            "update/output_grad_norm_variance_per_step": _listed(_mean_per_step(spread, step, steps)),
            "update/grad_norm": finite_mean(norm),
            "update/skipped_steps": int((~norm.isfinite()).sum()),
        }


def finite_mean(values: Tensor) -> float | None:
    """The mean of the finite values, or None if there are none."""
    finite = values[values.isfinite()]
    return finite.mean().item() if len(finite) else None


def _per_step(values: Tensor, step: Tensor, steps: int, reduce: str) -> list[float | None]:
    start = torch.full((steps,), math.nan, dtype=values.dtype)
    return _listed(start.scatter_reduce(0, step[: len(values)], values, reduce, include_self=False))


def _mean_per_step(values: Tensor, step: Tensor, steps: int) -> Tensor:
    """float64 (T,): the mean of a step's rows; NaN for a step without rows."""
    start = torch.full((steps,), math.nan, dtype=torch.float64)
    return start.scatter_reduce(0, step, values.double(), "mean", include_self=False)


def _listed(per_step: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in per_step.tolist()]


def _warn(table: StepTable, first_per_step: Sequence[float | None]) -> None:
    listing = ", ".join(
        f"{timestep:.0f}: {value:.1e}"
        for timestep, value in zip(table.timesteps.tolist(), first_per_step, strict=True)
        if value
    )
    say(
        "warning: before the first update the policy should equal the one that sampled, so its log-ratio should be 0; "
        "if the training forward pass differs from the rollout's, as with --compile, use --old-outputs recompute. "
        f"Largest |log-ratio| per timestep: {listing}"
    )
