import pytest
import torch

from pcpo_fast import policy_loss, step_log_prob
from pcpo_fast.columns import COLUMNS
from pcpo_fast.reference.step_log_prob import step_log_prob_oracle

EPS = torch.finfo(torch.float32).eps
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# dtypes of model_output, sample, prev_sample
DTYPES = {"fp32": (F32,) * 3, "bf16": (BF16,) * 3, "fp16": (F16,) * 3, "mixed": (F16, F32, BF16)}
SHAPES = [(5, 1), (1, 3, 5, 7), (6, 4, 8, 8), (3, 9001)]


def make_inputs(shape, table, dtypes=DTYPES["fp32"]):
    """Steps that the sampler could have taken; given three rows, the second is deterministic."""
    generator = torch.Generator().manual_seed(sum(shape))
    m, x, z = (torch.randn(shape, generator=generator) for _ in range(3))
    step = torch.randint(0, 19, shape[:1], generator=generator)
    if len(step) > 2:
        step[1] = 19
    device = table.rows.device
    a, b, s = (column.float().cpu().view(-1, *[1] * (m.dim() - 1)) for column in coefficients(table, step.to(device)))
    tensors = (m, x, a * x + b * m + s * z)
    return *(t.to(device, dtype) for t, dtype in zip(tensors, dtypes, strict=True)), step.to(device)


def coefficients(table, step):
    """a, b, s at each row, float64 (rows, 1)."""
    names = ("sample_coef", "output_coef", "std")
    return [table.rows[step, COLUMNS.index(name)].double()[:, None] for name in names]


def run(inputs, table, impl, **kwargs):
    m, x, prev_x, step = inputs
    m = m.detach().requires_grad_()
    log_prob = step_log_prob(m, x, prev_x, table, step, impl=impl, **kwargs)
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

    a, b, s = coefficients(table, inputs[3])
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
    a, b, s = coefficients(table, step)
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


def test_not_contiguous(table, impl):
    *tensors, step = make_inputs((4, 6, 5, 3), table)
    strided = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in tensors]
    both = (torch.stack([step, step], 1)[:, 0], step)
    results = [run([*t, s], table, impl) for t, s in zip((strided, tensors), both, strict=True)]
    assert all(map(torch.equal, *results))


def test_one_step_for_all_rows_and_small_integers(table, impl):
    *tensors, step = make_inputs((4, 6, 5), table)
    want = run([*tensors, torch.full_like(step, 7)], table, impl)
    zero_dim = [torch.tensor(7, dtype=dtype, device=step.device) for dtype in (torch.int64, torch.int32)]
    for one in (7, *zero_dim, torch.full_like(step, 7).int()):
        assert all(map(torch.equal, want, run([*tensors, one], table, impl)))


@pytest.mark.parametrize("outside", [-1, 20, 2**40])
def test_steps_outside_the_table(outside, table, impl):
    """ValueError that names them on the CPU; NaN in the row of the kernels."""
    *tensors, step = make_inputs((4, 6, 5), table)
    step[2] = outside
    if impl == "torch":
        with pytest.raises(ValueError, match=rf"^step holds .*{outside}.*; give indices from 0 to 19"):
            step_log_prob(*tensors, table, step, impl=impl)
        return
    log_prob, gradient = run([*tensors, step], table, impl)
    assert log_prob.isnan().tolist() == [False, False, True, False] and gradient[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("impl", ["torch"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradcheck(reduction, table, unnormalized_table, impl):
    m, x, prev_x, step = make_inputs((4, 2, 3), table)
    for kind in (table, unnormalized_table):
        assert torch.autograd.gradcheck(
            lambda m, kind=kind: step_log_prob(m, x, prev_x, kind, step, reduction=reduction),
            m.double().requires_grad_(),
        )


def test_agrees_with_the_policy_loss(native_table, impl):
    """The gradient of the on-policy log-ratio is the gradient of the log-probability."""
    table = native_table
    m, x, prev_x, step = make_inputs((4, 3, 5), table)
    a, b, s = (column.float()[:, None] for column in coefficients(table, step))
    noise = torch.where(s > 0, (prev_x - a * x - b * m) / s, 0)
    new = m.clone().requires_grad_()
    loss = policy_loss(new, m, noise, table, step, torch.ones_like(s[:, 0, 0]), objective="ppo", impl=impl).loss
    (gradient,) = torch.autograd.grad(-4 * loss, new)
    torch.testing.assert_close(gradient, run((m, x, prev_x, step), table, impl)[1], rtol=1e-4, atol=1e-6)


def test_means_in_the_place_of_outputs(table, impl):
    """`for_means`: the same log-probability of a mean that is carried, whose gradient is 1 / b of the output's."""
    m, x, prev_x, step = make_inputs((4, 3, 5), table)
    a, b, _ = (column[:, None] for column in coefficients(table, step))
    mean = (a * x + b * m).float()
    want, want_gradient = run((m, x, prev_x, step), table, impl)
    log_prob, gradient = run((mean, x, prev_x, step), table.for_means(), impl)
    torch.testing.assert_close(log_prob, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((b * gradient).float(), want_gradient, rtol=1e-3, atol=1e-5)
