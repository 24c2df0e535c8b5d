import pytest
import torch

from pcpo_fast import ops
from pcpo_fast.reference.step_log_prob import step_log_prob_oracle

EPS = torch.finfo(torch.float32).eps
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# of model_output, sample, prev_sample
DTYPES = {"fp32": (F32,) * 3, "bf16": (BF16,) * 3, "fp16": (F16,) * 3, "mixed": (F16, F32, BF16)}
SHAPES = [(5, 1), (1, 3, 5, 7), (6, 4, 8, 8), (3, 9001)]


def make_inputs(shape, table, dtypes=DTYPES["fp32"]):
    """Steps that the sampler could have taken; given three rows, the second is deterministic."""
    generator = torch.Generator().manual_seed(sum(shape))
    m, x, z = (torch.randn(shape, generator=generator) for _ in range(3))
    step = torch.randint(0, 19, shape[:1], generator=generator)
    if len(step) > 2:
        step[1] = 19
    a, b, s, *_ = (column.view(-1, *[1] * (m.dim() - 1)).cpu() for column in table.rows[step].unbind(1))
    tensors = (m, x, a * x + b * m + s * z)
    device = table.rows.device
    return *(t.to(device, dtype) for t, dtype in zip(tensors, dtypes, strict=True)), step.to(device)


def run(inputs, table, impl, **kwargs):
    m, x, prev_x, step = inputs
    m = m.detach().requires_grad_()
    log_prob = ops.step_log_prob(m, x, prev_x, table, step, impl=impl, **kwargs)
    (gradient,) = torch.autograd.grad(log_prob.sum(), m)
    assert gradient.dtype == m.dtype
    return log_prob.detach(), gradient


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_matches_float64_autograd(reduction, dtypes, shape, table, impl, poisoned):
    inputs = make_inputs(shape, table, DTYPES[dtypes])
    log_prob, gradient = run(inputs, table, impl, reduction=reduction)
    assert log_prob.dtype == F32
    m, x, prev_x = (t.double().flatten(1) for t in inputs[:3])
    m.requires_grad_()
    want = step_log_prob_oracle(m, x, prev_x, table.rows, inputs[3], reduction=reduction)
    (want_gradient,) = torch.autograd.grad(want.sum(), m)
    m = m.detach()

    a, b, s, *_ = (column[:, None].double() for column in table.rows[inputs[3]].unbind(1))
    random = s > 0
    inverse = torch.where(random, 1 / s, 0)
    scale = 1 / m.shape[1] if reduction == "mean" else 1.0
    # z carries the rounding of two products, two sums and a division, which 1/s magnifies
    z = (prev_x - a * x - b * m) * inverse
    z_error = 2 * EPS * ((a * x).abs() + (b * m).abs() + prev_x.abs()) * inverse + 2 * EPS * z.abs()
    # and a sum of rounded squares by a tree or in chunks adds at most (2 + log2(numel) + 16) half units per term
    constant = torch.where(random, s, 1.0).log().abs() + 0.92
    error = scale * (z.abs() * z_error + 16 * EPS * (z.square() + constant)).sum(1)
    assert ((log_prob - want).abs() <= error).all()

    storage = torch.finfo(gradient.dtype)
    factor = scale * (b * inverse).abs()
    tolerance = factor * (z_error + (2 * storage.eps + 4 * EPS) * z.abs()) + storage.smallest_normal * storage.eps
    assert ((gradient.double().flatten(1) - want_gradient).abs() <= tolerance).all()


@pytest.mark.parametrize("shape", [(6, 4, 8, 8), (3, 9001)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_unnormalized_matches_float64_autograd(reduction, shape, unnormalized_table, impl, poisoned):
    """-(x' - a x - b m)^2, with the gradient of exactly that."""
    table = unnormalized_table
    m, x, prev_x, step = inputs = make_inputs(shape, table)
    log_prob, gradient = run(inputs, table, impl, reduction=reduction)
    m = m.double().requires_grad_()
    want = step_log_prob_oracle(m, x, prev_x, table.rows, step, reduction=reduction, normalized=False)
    (want_gradient,) = torch.autograd.grad(want.sum(), m)
    a, b, s, *_ = (column[:, None].double() for column in table.rows[step].unbind(1))
    m, x, prev_x = (t.detach().double().flatten(1) for t in (m, x, prev_x))
    scale = 1 / m.shape[1] if reduction == "mean" else 1.0
    random = s > 0
    # the distance x' - mu is found as s z, with two roundings more
    distance = torch.where(random, prev_x - a * x - b * m, 0)
    distance_error = 2 * EPS * ((a * x).abs() + (b * m).abs() + prev_x.abs() + 2 * distance.abs())
    error = scale * (2 * distance.abs() * distance_error + 16 * EPS * distance.square()).sum(1)
    assert ((log_prob - want).abs() <= error).all()
    tolerance = scale * 2 * b.abs() * (distance_error + 8 * EPS * distance.abs())
    assert ((gradient - want_gradient).flatten(1).abs() <= torch.where(random, tolerance, 0)).all()
    assert log_prob[1] == 0 and log_prob[0] < 0


def test_deterministic_rows_are_zero(table, impl):
    log_prob, gradient = run(make_inputs((4, 3, 5), table), table, impl)
    assert log_prob[1] == 0 and not gradient[1].any()
    assert log_prob[[0, 2, 3]].abs().min() > 0


@pytest.mark.parametrize("shape", [(4, 1237), (3, 40001), (5, 1)], ids=str)
def test_a_row_alone_has_the_same_bits_on_every_run(shape, table, impl):
    inputs = make_inputs(shape, table)
    together = run(inputs, table, impl)
    assert all(map(torch.equal, together, run(inputs, table, impl)))
    for i in range(shape[0]):
        alone = run([t[i : i + 1] for t in inputs], table, impl)
        assert all(torch.equal(a, t[i : i + 1]) for a, t in zip(alone, together, strict=True))


def test_not_contiguous_and_int_step(table, impl):
    *tensors, step = make_inputs((4, 6, 5, 3), table)
    step = torch.full_like(step, 7)
    strided = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in tensors]
    assert all(map(torch.equal, run([*tensors, step], table, impl), run([*strided, 7], table, impl)))


@pytest.mark.parametrize("impl", ["torch"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradcheck(reduction, table, unnormalized_table, impl):
    m, x, prev_x, step = make_inputs((4, 2, 3), table)
    for kind in (table, unnormalized_table):
        assert torch.autograd.gradcheck(
            lambda m, kind=kind: ops.step_log_prob(m, x, prev_x, kind, step, reduction=reduction),
            m.double().requires_grad_(),
        )


def test_agrees_with_the_policy_loss(table, impl):
    """The gradient of the on-policy log-ratio is the gradient of the log-probability."""
    m, x, prev_x, step = make_inputs((4, 3, 5), table)
    table.rows[:, 3] = table.rows[:, 4]
    a, b, s, *_ = (column.view(-1, 1, 1) for column in table.rows[step].unbind(1))
    noise = torch.where(s > 0, (prev_x - a * x - b * m) / s, 0)
    new = m.clone().requires_grad_()
    loss = ops.policy_loss(new, m, noise, table, step, torch.ones_like(s[:, 0, 0]), objective="ppo", impl=impl).loss
    (gradient,) = torch.autograd.grad(-4 * loss, new)
    torch.testing.assert_close(gradient, run((m, x, prev_x, step), table, impl)[1], rtol=1e-4, atol=1e-6)
