"""Flow-GRPO's loss, and the op that takes its place in a trainer that keeps states.

Flow-GRPO's trainer (Liu et al., arXiv 2505.05470) keeps the latents and the log-probability of every step. Its update
recomputes the log-probability, exponentiates the difference and clips. `theirs` below is that computation, written from
the paper's formulas; `ours` is one call. They agree on the loss and the gradient. With latents in float32 both find a
ratio of 1 before the first update. Where latents are cast to bfloat16 after their log-probability was taken, as the
trainer does for FLUX, only `ours` does. Run it with `python examples/flow_grpo_loss.py`.
"""

import math

import torch
from torch import Tensor

from pcpo_fast import NoiseKey, StepTable, StoredStates, policy_loss, sampler_step, shifted_sigmas

SIGMAS, NOISE_LEVEL, CLIP_RANGE = shifted_sigmas(10, shift=3.0), 0.7, 1e-4
# the credit is Flow-GRPO's own; "constant" is one word away
TABLE = StepTable.flow(SIGMAS, sde="flow", noise_level=NOISE_LEVEL, credit="native")


def theirs(velocity: Tensor, x: Tensor, prev_x: Tensor, old_log_prob: Tensor, step: int, advantages: Tensor) -> Tensor:
    """Equation 9's step as a log-probability, then the clipped ratio."""
    log_prob = log_prob_of_step(velocity, x, prev_x, step)
    ratio = torch.exp(log_prob - old_log_prob)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE)
    return torch.maximum(unclipped, clipped).mean()


def log_prob_of_step(velocity: Tensor, x: Tensor, prev_x: Tensor, step: int) -> Tensor:
    """log N(x'; mean, s^2) of the Flow-SDE, a mean over the elements of each row."""
    t, dt = float(SIGMAS[step]), float(SIGMAS[step + 1] - SIGMAS[step])
    g = NOISE_LEVEL * math.sqrt(t / (1 - (t if t < 1 else float(SIGMAS[step + 1]))))
    std = g * math.sqrt(-dt)
    mean = x * (1 + g**2 / (2 * t) * dt) + velocity * (1 + g**2 * (1 - t) / (2 * t)) * dt
    log_prob = -((prev_x - mean) ** 2) / (2 * std**2) - math.log(std) - math.log(2 * math.pi) / 2
    return log_prob.mean(dim=tuple(range(1, x.ndim)))


def ours(velocity: Tensor, old_velocity: Tensor, x: Tensor, prev_x: Tensor, step: int, advantages: Tensor) -> Tensor:
    states = StoredStates(x, prev_x)
    loss = policy_loss(velocity, old_velocity, states, TABLE, step, advantages, objective="ppo", clip_range=CLIP_RANGE)
    return loss.loss


def main(step: int = 3) -> dict[str, float]:
    """How far the two are apart: loss, gradient, and each one's log-ratio before any update."""
    torch.manual_seed(0)
    x, old_velocity = torch.randn(2, 8, 16, 32, 32)
    advantages = torch.randn(8)
    stepped = sampler_step(old_velocity, x, TABLE, step, NoiseKey(0, torch.arange(8)))
    prev_x = stepped.prev_sample
    old_log_prob = log_prob_of_step(old_velocity, x, prev_x, step)

    velocity = (old_velocity + 1e-5 * torch.randn_like(old_velocity)).requires_grad_()
    their_loss = theirs(velocity, x, prev_x, old_log_prob, step, advantages)
    our_loss = ours(velocity, old_velocity, x, prev_x, step, advantages)
    (their_gradient,) = torch.autograd.grad(their_loss, velocity)
    (our_gradient,) = torch.autograd.grad(our_loss, velocity)

    # the same weights again, as in the first update after a rollout; x' was cast when it was stored
    cast = prev_x.bfloat16()
    again = log_prob_of_step(old_velocity, x, cast.float(), step)
    ratio = policy_loss(old_velocity, old_velocity, StoredStates(x, cast), TABLE, step, advantages)
    return {
        "loss": (their_loss - our_loss).abs().item(),
        "gradient": ((their_gradient - our_gradient).norm() / their_gradient.norm()).item(),
        "their first log-ratio, latents cast": (again - old_log_prob).abs().max().item(),
        "our first log-ratio, latents cast": ratio.log_ratio.abs().max().item(),
    }


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name}: {value:.1e}")
