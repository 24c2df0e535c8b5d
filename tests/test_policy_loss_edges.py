"""The policy loss where numbers end: nothing to learn from, overflow, what is not finite; and its backward pass."""

import pytest
import torch
from loss_cases import (
    DETERMINISTIC_ROW,
    DTYPES,
    EPS,
    F16,
    F32,
    KINDS,
    OBJECTIVES,
    Rows,
    Source,
    make_rows,
    run,
    source,
    variant,
)

from pcpo_fast import NoiseKey, Reference, policy_loss, step_log_ratio


def arguments(rows: Rows, table):
    return rows.old, rows.noise, table, rows.step, rows.advantages


@pytest.mark.parametrize("kind", KINDS)
def test_deterministic_rows_and_zero_advantages_have_no_gradient(kind, table, impl, device):
    rows = make_rows((4, 3, 5), device)
    got = run(rows, variant(table, kind), impl, clip_range=1.0)
    (gradient,) = got.gradients
    assert got.log_ratio[DETERMINISTIC_ROW] == got.old_kl[DETERMINISTIC_ROW] == 0
    assert not got.clipped[DETERMINISTIC_ROW]
    assert torch.equal(gradient[:2], torch.zeros_like(gradient[:2]))
    assert gradient[2:].abs().min() > 0


def test_a_row_of_weight_0_is_masked(table, impl, device):
    """Its loss and gradient are 0, KL term included, and the other rows' are those of a batch with it."""
    rows = make_rows((4, 3, 5), device)
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0], device=device)
    settings = {"kl": "number", "clip_range": 1.0, "row_reduction": "none"}
    plain = run(rows, table, impl, **settings)
    masked = run(rows.replace(weights=weights), table, impl, weighted=True, **settings)
    assert masked.loss[2] == 0 and not masked.gradients[0][2].any() and plain.loss[2] != 0
    kept = [0, 1, 3]
    assert torch.equal(masked.loss[kept], plain.loss[kept])
    assert torch.equal(masked.gradients[0][kept], plain.gradients[0][kept])
    assert torch.equal(masked.log_ratio, plain.log_ratio)


def test_backward_scales_and_repeats(table, impl, device):
    """Gradient scaling, accumulation and retain_graph: the backward pass leaves what it saved alone."""
    rows = make_rows((4, 3, 5), device, DTYPES["fp16"])
    new = rows.new.requires_grad_()
    loss = policy_loss(new, *arguments(rows, table), impl=impl, clip_range=1.0).loss
    once, again = (torch.autograd.grad(loss * 1024, new, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, again)
    # a factor as small as a mean over a large batch has, times the scale that undoes it, keeps its digits
    (tiny,) = torch.autograd.grad((loss * 2.0**-30) * 2.0**40, new)
    assert torch.equal(tiny, once)


def test_incoming_gradients_of_rows(table, impl, device):
    """Without a reduction each row's gradient is multiplied by its own, whatever its strides and dtype."""
    rows = make_rows((4, 3, 5), device)
    new = rows.new.requires_grad_()
    loss = policy_loss(new, *arguments(rows, table), impl=impl, clip_range=1.0, row_reduction="none").loss
    (ones,) = torch.autograd.grad(loss.sum(), new, retain_graph=True)
    (mean,) = torch.autograd.grad(loss.mean(), new, retain_graph=True)
    torch.testing.assert_close(mean * 4, ones, rtol=4 * EPS, atol=0)
    incoming = torch.tensor([[1.0, 9.0], [2.0, 9.0], [0.0, 9.0], [-0.5, 9.0]], device=device)[:, 0]
    (scaled,) = torch.autograd.grad(loss, new, incoming)
    torch.testing.assert_close(scaled, ones * incoming[:, None, None], rtol=4 * EPS, atol=0)


@pytest.mark.parametrize("row_reduction", ["mean", "none"])
def test_no_double_backward(row_reduction, table, impl, device):
    rows = make_rows((2, 3), device)
    new = rows.new.requires_grad_()
    settings = {"clip_range": 1.0, "row_reduction": row_reduction, "impl": impl}
    loss = policy_loss(new, *arguments(rows, table), **settings).loss
    (gradient,) = torch.autograd.grad((loss * loss).sum(), new, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_nothing_but_the_loss_has_a_gradient(table, impl, device):
    rows = make_rows((3, 4), device).map(lambda t: t.requires_grad_() if t.is_floating_point() else t)
    kl = Reference(rows.ref, rows.kl_weights)
    out = policy_loss(rows.new, *arguments(rows, table), row_weights=rows.weights, kl=kl, impl=impl)
    assert out.loss.requires_grad
    assert not any(t.requires_grad for t in (out.log_ratio, out.clipped, out.kl, out.old_kl))
    out.loss.backward()
    assert rows.new.grad is not None
    others = (rows.old, rows.noise, rows.advantages, rows.ref, rows.weights, rows.kl_weights)
    assert all(t.grad is None for t in others)


def test_without_gradient_only_the_sums_are_made(table, impl, device):
    """The same numbers under no_grad and for an output that wants no gradient, and nothing as large as the inputs."""
    rows = make_rows((4, 3, 9), device)
    with_gradient = run(rows, table, impl)
    without = policy_loss(rows.new, *arguments(rows, table), impl=impl)
    with torch.no_grad():
        under_no_grad = policy_loss(rows.new.clone().requires_grad_(), *arguments(rows, table), impl=impl)
    for name in ("loss", "log_ratio", "clipped", "old_kl"):
        values = [getattr(out, name) for out in (with_gradient, without, under_no_grad)]
        assert torch.equal(values[0], values[1]) and torch.equal(values[1], values[2])
    assert without.kl is None
    operator = torch.ops.pcpo_fast.policy_loss
    given = {"old_model_output": rows.old, "noise": rows.noise, "advantages": rows.advantages}
    *_, direction, _ = operator(*operator_arguments(rows, table, with_gradient=False, impl=impl, **given))
    assert direction.numel() == 0


def operator_arguments(rows: Rows, table, **given):
    """All arguments of the operator `policy_loss`, in order; what is not given is left out."""
    names = [argument.name for argument in torch.ops.pcpo_fast.policy_loss.default._schema.arguments]
    defaults = {"model_output": rows.new, "table": table.rows, "step": rows.step, "guidance_scale": 1.0}
    defaults |= {"objective": "pcpo", "clip_below": 1e-4, "clip_above": 1e-4, "reduction": "mean"}
    defaults |= {"row_reduction": "mean", "kl_weight": 0.0}
    return [{**defaults, **given}.get(name) for name in names]


def test_under_autocast_with_gradient_accumulation(table, impl, device):
    """The loss stays float32 under autocast, and two micro-batches' gradients add up to those of one batch."""
    rows = make_rows((4, 3, 5), device)
    new = rows.new.requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        whole = policy_loss(new, *arguments(rows, table), clip_range=1.0, impl=impl).loss
        assert whole.dtype == F32
        halves = [
            policy_loss(rows[part].new, *arguments(rows[part], table), clip_range=1.0, impl=impl).loss
            for part in (slice(0, 2), slice(2, 4))
        ]
    (at_once,) = torch.autograd.grad(whole, new)
    for half in halves:
        (half / 2).backward()
    torch.testing.assert_close(new.grad, at_once, rtol=4 * EPS, atol=0)


def test_ragged_micro_batches_add_up(table, impl, device):
    """`row_reduction="sum"` divided by the rows of all micro-batches, which need not be of one size."""
    rows = make_rows((5, 3, 5), device)
    (at_once,) = run(rows, table, impl, clip_range=1.0, weighted=True).gradients
    sums = [run(rows[part], table, impl, clip_range=1.0, weighted=True, row_reduction="sum") for part in (
        slice(0, 3), slice(3, 5)
    )]  # fmt: skip
    torch.testing.assert_close(torch.cat([s.gradients[0] for s in sums]) / 5, at_once, rtol=4 * EPS, atol=0)


@pytest.mark.parametrize("kind", ["plain", "guarded"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_is_not_finite_shows(objective, kind, table, impl, device):
    rows = make_rows((4, 3, 5), device)
    rows.new[2, 1, 1] = float("nan")
    got = run(rows, variant(table, kind), impl, objective=objective)
    (gradient,) = got.gradients
    assert got.loss.isnan()
    for per_row in (got.log_ratio, got.old_kl):
        assert per_row.isnan().tolist() == [False, False, True, False]
    assert not got.clipped[2] and gradient[2].isnan().any() and gradient[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    ("field", "settings", "name"),
    [
        ("advantages", {}, "advantages"),
        ("weights", {"weighted": True}, "row_weights"),
        ("kl_weights", {"kl": "per row"}, r"Reference\.weight"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_per_row_that_are_not_finite(value, field, settings, name, objective, table, impl, device):
    """Refused by name on the CPU; NaN or infinite in that row of the kernels, which cannot wait for the numbers."""
    rows = make_rows((4, 3, 5), device)
    getattr(rows, field)[2] = value
    for row_reduction in ("mean", "none"):
        asked = {"objective": objective, "clip_range": 1.0, "row_reduction": row_reduction, **settings}
        if impl == "torch":
            with pytest.raises(ValueError, match=rf"^{name} holds {value} in row 2; give finite numbers"):
                run(rows, table, impl, **asked)
            continue
        loss = run(rows, table, impl, **asked).loss
        if row_reduction == "none":
            assert loss.isfinite().tolist() == [True, True, False, True]
        else:
            assert not loss.isfinite()


@pytest.mark.parametrize("output", [1e20, -1e20])
@pytest.mark.parametrize("kind", ["plain", "guarded"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_log_ratio_that_overflows_leaves_rows_without_advantage_alone(objective, kind, output, table, impl, device):
    rows = make_rows((2, 64), device)
    rows = rows.replace(
        new=torch.full_like(rows.new, output),
        old=torch.zeros_like(rows.old),
        noise=torch.ones_like(rows.noise),
        step=torch.full_like(rows.step, 4),
        advantages=torch.zeros_like(rows.advantages),
    )
    got = run(rows, variant(table, kind), impl, objective=objective)
    assert got.log_ratio.isinf().all() or kind == "guarded"
    assert got.loss == 0 and not got.gradients[0].any()


@pytest.mark.parametrize("kind", ["plain", "guarded"])
def test_a_ratio_that_overflows_leaves_rows_without_advantage_alone(kind, table, impl, device):
    rows = make_rows((2, 4096), device)
    rows = rows.replace(
        new=torch.ones_like(rows.new),
        old=torch.zeros_like(rows.old),
        noise=torch.full_like(rows.noise, -3.0),
        step=torch.full_like(rows.step, 4),
        advantages=torch.tensor([0.0, 1.0], device=device),
    )
    got = run(rows, variant(table, kind), impl, objective="ppo", reduction="sum")
    assert got.log_ratio.min() > 710 and got.loss.isfinite() and not got.gradients[0][0].any()


def test_a_direction_that_overflows_leaves_rows_without_gradient_alone(table, impl, device):
    rows = make_rows((2, 8), device)
    rows = rows.replace(
        new=torch.full_like(rows.new, 6e4, dtype=F16),
        old=torch.zeros_like(rows.old),
        noise=torch.full_like(rows.noise, 6e4),
        step=torch.full_like(rows.step, 17),
        advantages=torch.tensor([0.0, 1.0], device=device),
    )
    # 6e4 (1 + w) is beyond the largest half
    assert table.weight[17] > 0.5
    assert not run(rows, table, impl, clip_range=1e9).gradients[0][0].any()


@pytest.mark.parametrize("name", ["noise", "key", "states", "states and noise"])
@pytest.mark.parametrize("outside", [-1, 20, 2**31 - 1])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_steps_outside_the_table(dtype, outside, name, table, impl, device):
    """ValueError that names them on the CPU; the kernels read no foreign memory, and the row is NaN."""
    rows = make_rows((4, 3, 5), device)
    rows = rows.replace(step=torch.tensor([3, 4, 5, 6], device=device))
    given = source(name, rows, table, impl)
    rows.step[2] = outside
    rows = rows.replace(step=rows.step.to(dtype))
    arguments = (given.old_model_output, given.noise, table, rows.step)
    if impl == "torch":
        with pytest.raises(ValueError, match=rf"^step holds .*{outside}.*; give indices from 0 to 19"):
            policy_loss(rows.new, *arguments, rows.advantages, impl=impl)
        with pytest.raises(ValueError, match=r"^step holds"):
            step_log_ratio(rows.new, *arguments, impl=impl)
        return
    got = run(rows, table, impl, given, kl="per row", row_reduction="none")
    alone = step_log_ratio(rows.new, *arguments, impl=impl)
    for values in (got.loss, got.log_ratio, got.kl, got.old_kl, alone):
        assert values.isnan().tolist() == [False, False, True, False]
    assert run(rows, table, impl, given).loss.isnan()


def test_a_row_too_long_is_refused():
    from pcpo_fast.kernels.launch import launch

    with pytest.raises(ValueError, match="impl='torch'"):
        launch(2**26 + 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, F16], ids=str)
@pytest.mark.parametrize("which", ["sample", "prev_sample"])
def test_without_old_output_rounded_states_are_refused(which, dtype, table, impl, device):
    rows = make_rows((3, 4), device)
    given: Source = source("states and noise", rows, table, impl)
    key = NoiseKey(7, rows.index)
    for noise in (rows.noise, key):
        states = given.noise._replace(noise=noise)
        states = states._replace(**{which: getattr(states, which).to(dtype)})
        for op, rest in ((policy_loss, (rows.advantages,)), (step_log_ratio, ())):
            with pytest.raises(ValueError, match=f"{dtype}.*store them in float32, or give old_model_output"):
                op(rows.new, None, states, table, rows.step, *rest, impl=impl)
