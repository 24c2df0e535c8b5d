"""Policy loss with gradient: the usual eager formula with autograd against `policy_loss`."""

import pytest
import torch

from pcpo_fast import policy_loss

CLIP_RANGE = 1e-4


@pytest.mark.benchmark(group="policy loss with gradient, 8 x 4x64x64 float32")
@pytest.mark.parametrize("which", ["usual", "pcpo_fast"])
def test_policy_loss(which, benchmark, table, latents, usual_log_prob):
    x, m_old, m_new, z = latents
    step = torch.arange(0, 16, 2)
    advantages = torch.linspace(-1, 1, 8)
    a, b, std = (column.view(-1, 1, 1, 1) for column in table.rows[step].unbind(1)[:3])
    prev_x = a * x + b * m_old + std * z
    noise = (prev_x - a * x - b * m_old) / std
    old_log_prob = usual_log_prob(m_old, x, prev_x, step)
    m_new.requires_grad_()

    def usual():
        m_new.grad = None
        ratio = torch.exp(usual_log_prob(m_new, x, prev_x, step) - old_log_prob)
        unclipped = -advantages * ratio
        clipped = -advantages * torch.clamp(ratio, 1 - CLIP_RANGE, 1 + CLIP_RANGE)
        torch.mean(torch.maximum(unclipped, clipped)).backward()
        return m_new.grad

    def ours():
        m_new.grad = None
        policy_loss(
            m_new, m_old, noise, table, step, advantages, objective="ppo", clip_range=CLIP_RANGE
        ).loss.backward()
        return m_new.grad

    torch.testing.assert_close(ours(), usual(), rtol=1e-3, atol=1e-9)
    benchmark(usual if which == "usual" else ours)
