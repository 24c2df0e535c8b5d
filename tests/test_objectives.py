"""The objectives: which rows they clip, one that is added by its two functions, and statistics of their ratio."""

import pytest
import torch
import triton
import triton.language as tl
from loss_cases import KINDS, OBJECTIVES, SOURCES, UNIT, check, make_rows, run, run_oracle, source, variant

from pcpo_fast import kernels, policy_loss, ratio_stats, reference


def test_both_implementations_know_the_same_objectives():
    assert list(reference.OBJECTIVES) == list(kernels.OBJECTIVES) and {"pcpo", "ppo"} <= set(OBJECTIVES)


# log-ratios, advantages of both signs, and whether a row is clipped by (below, above) = (0.1, 0.3)
BELOW, ABOVE = 0.1, 0.3
SIDES = [
    (-0.5, 1.5, False),
    (-0.2, 1.5, False),
    (-0.05, 1.5, False),
    (0.05, 1.5, False),
    (0.2, 1.5, False),
    (0.5, 1.5, True),
    (-0.5, -0.7, True),
    (-0.2, -0.7, True),
    (-0.05, -0.7, False),
    (0.05, -0.7, False),
    (0.2, -0.7, False),
    (0.5, -0.7, False),
]


def rows_with(log_ratio: torch.Tensor, advantages: torch.Tensor, table, device):
    """Rows that have these log-ratios: w e = sqrt(9 - 2 log rho) - 3 on a noise of 3, or -log rho / 3 guarded."""
    rows = make_rows((len(log_ratio), 4), device)
    step = torch.arange(len(log_ratio), device=device)
    weight, std = table.weight[step], table.std[step]
    shift = -log_ratio / (3 * std) if table.guard else (9 - 2 * log_ratio).sqrt() - 3
    e = (shift / weight)[:, None].expand(-1, 4)
    noise = torch.full_like(rows.noise, 3.0)
    old = torch.zeros_like(rows.old)
    return rows.replace(new=e.float(), old=old, noise=noise, step=step, advantages=advantages.float())


@pytest.mark.parametrize("kind", ["plain", "guarded"])
@pytest.mark.parametrize("objective", ["pcpo", "ppo"])
def test_the_side_that_is_clipped(objective, kind, table, impl, device):
    """Above for A > 0, below for A < 0; a clipped row's gradient is 0 and its loss does not depend on its ratio."""
    table = variant(table, kind)
    log_ratio, advantages, clipped = (
        torch.tensor(column, device=device).double() for column in zip(*SIDES, strict=True)
    )
    rows = rows_with(log_ratio, advantages, table, device)
    settings = {"objective": objective, "clip_range": (BELOW, ABOVE), "row_reduction": "none"}
    got = run(rows, table, impl, **settings)
    torch.testing.assert_close(got.log_ratio.double(), log_ratio, rtol=1e-4, atol=1e-6)
    assert torch.equal(got.clipped, clipped.bool())
    moved = got.gradients[0].abs().sum(1) > 0
    assert torch.equal(moved, ~clipped.bool())
    h = table.interval[rows.step] if table.guard else torch.ones_like(log_ratio)
    rho = log_ratio.exp()
    want = {
        "pcpo": torch.where(advantages > 0, ABOVE, BELOW) * advantages.abs() - advantages * log_ratio,
        "ppo": -advantages * rho,
    }[objective]
    constant = {"pcpo": 0.0, "ppo": -advantages * torch.where(advantages > 0, 1 + ABOVE, 1 - BELOW)}[objective]
    torch.testing.assert_close(got.loss.double(), torch.where(clipped.bool(), constant, want) / h, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_number_is_a_pair_of_equals(objective, table, impl, device):
    rows = make_rows((6, 3, 5), device)
    number, pair = (run(rows, table, impl, objective=objective, clip_range=xi) for xi in (1e-4, (1e-4, 1e-4)))
    assert number == pair


def test_a_clip_range_below_of_more_than_1(table, impl, device):
    """1 - below is then negative, and no ratio is: A < 0 is never clipped by ppo."""
    rows = make_rows((6, 3, 5), device, distance=3.0)
    rows = rows.replace(advantages=-rows.advantages.abs())
    settings = {"objective": "ppo", "clip_range": (1.5, 0.1)}
    got = run(rows, table, impl, **settings)
    assert got.log_ratio.min() < -1 and not got.clipped.any()
    check(got, run_oracle(rows, table, **settings), rows, table, **settings)


# an objective that is added: a squared hinge, max(0, xi |A| - A log rho)^2


def squared_hinge(log_ratio, advantages, below, above):
    xi = torch.where(advantages > 0, above, below)
    margin = (xi * advantages.abs() - advantages * log_ratio).clamp(min=0)
    return margin.square(), 2 * margin * advantages, margin == 0


@triton.jit
def squared_hinge_in_triton(log_ratio, advantage, below, above, lowest, highest):
    xi = tl.where(advantage > 0, above, below)
    margin = tl.maximum(xi * tl.abs(advantage) - advantage * log_ratio, 0.0)
    return margin * margin, 2.0 * margin * advantage, margin == 0


# and one without a clip range: REINFORCE on the log-ratio, -A log rho


def reinforce(log_ratio, advantages, below, above):
    return -advantages * log_ratio, advantages, torch.zeros_like(advantages, dtype=torch.bool)


@triton.jit
def reinforce_in_triton(log_ratio, advantage, below, above, lowest, highest):
    return -advantage * log_ratio, advantage, advantage != advantage


@triton.jit
def arguments_in_triton(log_ratio, advantage, below, above, lowest, highest):
    return log_ratio, advantage, False


ADDED = {"squared hinge": (squared_hinge, squared_hinge_in_triton), "reinforce": (reinforce, reinforce_in_triton)}


@pytest.fixture(params=ADDED)
def added(request, monkeypatch):
    in_torch, in_triton = ADDED[request.param]
    monkeypatch.setitem(reference.OBJECTIVES, request.param, in_torch)
    monkeypatch.setitem(kernels.OBJECTIVES, request.param, in_triton)
    return request.param


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_objective_is_added_by_its_two_functions(kind, name, added, table, impl, device, poisoned):
    """Run by name through the public op; the derivative that it returns is held against autograd of its loss."""
    table, rows = variant(table, kind), make_rows((6, 3, 5), device)
    given = source(name, rows, table, impl)
    clip_range = (2e-3, 1e-3) if table.normalized else (4e-4, 2e-4)
    for asked in ({}, {"kl": "per row", "weighted": True, "row_reduction": "none", "guided": True}):
        settings = {"objective": added, "clip_range": clip_range, **asked}
        want = run_oracle(rows, table, impl, given, **settings)
        got = run(rows, table, impl, given, **settings)
        check(got, want, rows, table, given, **settings)
        assert got.gradients[0].any() and bool(got.loss.isfinite().all())


def test_added_objectives_agree_in_both_implementations(added, table, device):
    rows = make_rows((6, 3, 5), device)
    ours, theirs = (
        policy_loss(rows.new, rows.old, rows.noise, table, rows.step, rows.advantages, objective=added, impl=impl)
        for impl in ("torch", "triton")
    )
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-9)


def test_an_objective_that_is_gone_is_unknown(table, impl, device):
    rows = make_rows((3, 4), device)
    with pytest.raises(ValueError, match="objective='squared hinge' is not known"):
        policy_loss(
            *(rows.new, rows.old, rows.noise, table, rows.step, rows.advantages), objective="squared hinge", impl=impl
        )


def test_an_objective_may_return_its_arguments(table, impl, device, monkeypatch):
    """Neither the log-ratio handed back nor the caller's advantages change."""
    name, rows = "returns its arguments", make_rows((3, 4), device)
    monkeypatch.setitem(reference.OBJECTIVES, name, lambda ratio, a, below, above: (ratio, a, a != a))
    monkeypatch.setitem(kernels.OBJECTIVES, name, arguments_in_triton)
    table, advantages = table.guarded(), rows.advantages.double()
    before = advantages.clone()
    given = (rows.new, rows.old, rows.noise, table, rows.step, advantages)
    out = policy_loss(*given, objective=name, row_reduction="none", impl=impl)
    assert torch.equal(advantages, before)
    assert torch.equal(out.log_ratio, policy_loss(*given, impl=impl).log_ratio)
    torch.testing.assert_close(out.loss, (out.log_ratio / table.interval[rows.step]).float())


# statistics


@pytest.mark.parametrize("clip_range", [0.2, (0.1, 0.3)], ids=str)
def test_ratio_stats(clip_range, device):
    below, above = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    log_ratio = 0.3 * torch.randn(64, generator=torch.Generator().manual_seed(0)).to(device)
    stats, rho = ratio_stats(log_ratio.requires_grad_(), clip_range), log_ratio.detach().double().exp()
    want = {
        "approx_kl": (rho - 1 - log_ratio.detach().double()).mean(),
        "clip_fraction_below": (rho < 1 - below).double().mean(),
        "clip_fraction_above": (rho > 1 + above).double().mean(),
        "ratio_mean": rho.mean(),
        "ratio_std": ((rho - rho.mean()) ** 2).mean().sqrt(),
    }
    assert want["clip_fraction_below"] > 0 and want["clip_fraction_above"] > 0
    assert stats._fields == tuple(want)
    for name, value in want.items():
        got = getattr(stats, name)
        assert got.shape == () and got.dtype == torch.float32 and got.device == log_ratio.device
        assert not got.requires_grad
        torch.testing.assert_close(got.double(), value, rtol=UNIT, atol=0)


def test_ratio_stats_of_tiny_log_ratios():
    """Of an approximate KL of 5e-13, float32 would leave nothing."""
    log_ratio = torch.tensor([1e-6, -1e-6])
    stats = ratio_stats(log_ratio, 1e-7)
    assert float(stats.approx_kl) == pytest.approx(5e-13, rel=1e-4)
    assert float(stats.clip_fraction_below) == float(stats.clip_fraction_above) == 0.5
    assert float(stats.ratio_mean) == 1 and float(stats.ratio_std) == pytest.approx(1e-6, rel=1e-4)
    still = ratio_stats(torch.zeros(3), 1e-4)
    assert [float(value) for value in still] == [0, 0, 0, 1, 0]
