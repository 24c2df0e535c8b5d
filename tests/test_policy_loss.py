import pytest
import torch

from pcpo_fast import ops
from pcpo_fast.reference import affine
from pcpo_fast.reference.policy_loss import policy_loss_oracle

EPS = torch.finfo(torch.float32).eps
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# of model_output, old_model_output, noise, ref_model_output
DTYPES = {"fp32": (F32,) * 4, "bf16": (BF16,) * 4, "fp16": (F16,) * 4, "mixed": (F16, BF16, F32, F32)}
# one element, one row, a power of two, a row split over programs
OBJECTIVES = ["pcpo", "ppo", "guard"]
GUIDANCE = 5.0
SHAPES = [(5, 1), (1, 3, 5, 7), (6, 4, 8, 8), (3, 9001)]


def make_inputs(shape, device, dtypes=DTYPES["fp32"], distance=1e-2):
    """Inputs whose first advantage is 0 and, given three rows, whose second row is deterministic."""
    generator = torch.Generator().manual_seed(sum(shape))
    old, change, noise, ref = (torch.randn(shape, generator=generator) for _ in range(4))
    tensors = (old + distance * change, old, noise, ref)
    new, old, noise, ref = (t.to(device, dtype) for t, dtype in zip(tensors, dtypes, strict=True))
    step = torch.randint(0, 19, shape[:1], generator=generator)
    advantages = torch.randn(shape[:1], generator=generator)
    if len(step) > 2:
        step[1] = 19
        advantages[0] = 0
    return new, old, noise, step.to(device), advantages.to(device), ref


def run(inputs, table, impl, kl_weight=0.0, **kwargs):
    new, old, noise, step, advantages, ref = inputs
    new = new.detach().requires_grad_()
    ref = ref if kl_weight else None
    out = ops.policy_loss(
        new, old, noise, table, step, advantages, ref_model_output=ref, kl_weight=kl_weight, impl=impl, **kwargs
    )
    (gradient,) = torch.autograd.grad(out.loss, new)
    assert gradient.dtype == new.dtype
    return *out, gradient


def run_oracle(inputs, table, kl_weight=0.0, **kwargs):
    new, old, noise, step, advantages, ref = inputs
    new = new.detach().double().requires_grad_()
    ref = ref if kl_weight else None
    loss, log_ratio, clipped = policy_loss_oracle(
        new, old, noise, table.rows, step, advantages, ref_model_output=ref, kl_weight=kl_weight, **kwargs
    )
    (gradient,) = torch.autograd.grad(loss, new)
    return loss.detach(), log_ratio.detach(), clipped, gradient


def clip_range_between(inputs, table, reduction, objective):
    """A clip range halfway between two rows' log-ratios, so that some rows are clipped and none is a close call."""
    log_ratio = run_oracle(inputs, table, reduction=reduction, objective=objective)[1].abs().sort().values
    middle = len(log_ratio) // 2
    return max(1e-12, log_ratio[middle - 1 : middle + 1].mean().item() if middle else 2 * log_ratio[0].item())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_matches_float64_autograd(objective, reduction, kl_weight, dtypes, shape, table, impl, device, poisoned):
    inputs = make_inputs(shape, device, DTYPES[dtypes])
    settings = {"objective": objective, "reduction": reduction, "kl_weight": kl_weight}
    settings["clip_range"] = clip_range_between(inputs, table, reduction, objective)
    loss, log_ratio, clipped, gradient = run(inputs, table, impl, **settings)
    want_loss, want_log_ratio, want_clipped, want_gradient = run_oracle(inputs, table, **settings)
    assert torch.equal(clipped, want_clipped)
    assert loss.dtype == log_ratio.dtype == F32

    new, old, noise, step, advantages, ref = (t.double() if t.is_floating_point() else t for t in inputs)
    rows, numel = shape[0], new[0].numel()
    scale = 1 / numel if reduction == "mean" else 1.0
    s, w, w_native, h = (table.rows[step, column].double() for column in (2, 3, 4, 5))
    e, z, away = (t.flatten(1) for t in (new - old, noise, new - ref))
    if objective == "guard":
        w, second, per_row = s * w, 0, 1 / h
    else:
        second, per_row = (w[:, None] * e).square(), 1
    # a sum of rounded products by a tree or in chunks: each term is off by at most (2 + log2(numel) + 16) half units
    unit = 16 * EPS
    error = unit * scale * (w[:, None] * e * z).abs().add(second).sum(1)
    assert ((log_ratio - want_log_ratio).abs() <= error).all()
    # the loss adds the error of exp and of the sum over rows
    kl_size = kl_weight * scale * 0.5 * (w_native[:, None] * away).square().sum(1)
    loss_size = per_row * advantages.abs() * (error + unit) + unit * kl_size
    assert (loss - want_loss).abs() <= loss_size.mean()
    # the direction and the gradient are rounded to the output's dtype, at worst towards 0 (as the interpreter does)
    storage = torch.finfo(gradient.dtype)
    slope = per_row * advantages.abs() * want_log_ratio.exp() * scale / rows
    term = (slope * w).abs()[:, None] * (z.abs() + (w[:, None] * e).abs())
    kl_term = (kl_weight * w_native.square() * scale / rows)[:, None] * away.abs()
    tolerance = (2 * storage.eps + unit + error[:, None]) * (term + kl_term) + storage.smallest_normal * storage.eps
    assert ((gradient.double() - want_gradient).flatten(1).abs() <= tolerance).all()


@pytest.mark.parametrize("shape", [(6, 4, 8, 8), (3, 9001)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_unnormalized_matches_float64_autograd(
    objective, reduction, shape, table, unnormalized_table, impl, device, poisoned
):
    """2 s^2 times the log-ratio and its gradient; the KL term is that of the Gaussians."""
    inputs = make_inputs(shape, device)
    settings = {"objective": objective, "reduction": reduction, "clip_range": 1e9, "kl_weight": 0.3}
    loss, log_ratio, clipped, gradient = run(inputs, unnormalized_table, impl, **settings)
    want_loss, want_log_ratio, want_clipped, want_gradient = run_oracle(inputs, table, normalized=False, **settings)
    assert torch.equal(clipped, want_clipped)
    new, old, noise, step, advantages, ref = (t.double() if t.is_floating_point() else t for t in inputs)
    s, w, w_native, h = (table.rows[step, column].double() for column in (2, 3, 4, 5))
    e, z, away = (t.flatten(1) for t in (new - old, noise, new - ref))
    scale = 1 / e.shape[1] if reduction == "mean" else 1.0
    w, second, per_row = (s * w, 0, 1 / h) if objective == "guard" else (w, (w[:, None] * e).square(), 1)
    unit, k = 20 * EPS, 2 * s.square()
    error = unit * k * scale * (w[:, None] * e * z).abs().add(second).sum(1)
    assert ((log_ratio - want_log_ratio).abs() <= error).all()
    # xi |A| is 1e9 |A| for pcpo
    size = 1e9 if objective == "pcpo" else want_log_ratio.exp()
    kl_size = 0.3 * scale * 0.5 * (w_native[:, None] * away).square().sum(1)
    loss_size = per_row * advantages.abs() * size * (error + unit) + unit * kl_size
    assert (loss - want_loss).abs() <= loss_size.mean()
    slope = per_row * advantages.abs() * want_log_ratio.exp() * scale / len(step)
    term = (slope * k * w).abs()[:, None] * (z.abs() + (w[:, None] * e).abs())
    kl_term = (0.3 * w_native.square() * scale / len(step))[:, None] * away.abs()
    assert ((gradient - want_gradient).flatten(1).abs() <= (unit + error[:, None]) * (term + kl_term)).all()

    normalized = run(inputs, table, impl, **settings)[1]
    torch.testing.assert_close(log_ratio.double(), k * normalized, rtol=4 * EPS, atol=0)
    on_policy = run((inputs[1], *inputs[1:]), unnormalized_table, impl, **settings)[1]
    assert torch.equal(on_policy, torch.zeros_like(on_policy))


@pytest.mark.parametrize("shape", [(8, 4, 32, 32), (2, 4096, 64), (1, 1024, 1024)], ids=str)
def test_rounds_less_than_the_usual_formula(shape, table, impl, device):
    """Error of the log-ratio against float64, and of the same in float32 by subtracting log-probabilities."""
    inputs = make_inputs(shape, device, distance=1e-3)
    new, old, noise, step, *_ = inputs
    a, b, s, *_ = (column.view(-1, *[1] * (len(shape) - 1)) for column in table.rows[step].unbind(1))
    sample = torch.randn_like(new)
    s = torch.where(s > 0, s, 1.0)
    prev_sample = a * sample + b * old + s * noise
    # on the noise that belongs to the stored x', and on the sampler's own weight
    table.rows[:, 3] = table.rows[:, 4]
    inputs = (new, old, (prev_sample - a * sample - b * old) / s, *inputs[3:])

    def eager_log_prob(m):
        return (-((prev_sample - (a * sample + b * m)) ** 2) / (2 * s**2) - s.log()).flatten(1).mean(dim=1)

    want = run_oracle(inputs, table)[1]
    ours = run(inputs, table, impl)[1]
    eager = eager_log_prob(new) - eager_log_prob(old)
    random = table.rows[step, 2] > 0
    assert (ours - want).abs()[random].max() <= 2 * (eager - want).abs()[random].max()


def test_tiny_log_ratio_keeps_its_digits(table, impl, device):
    """Around 1e-6 the difference form is right to 1e-3, and subtracting float32 log-probabilities is not to 1e-1."""
    new, old, noise, step, advantages, ref = make_inputs((8, 4, 64, 64), device, distance=3e-4)
    step = torch.arange(8, device=device) * 2
    inputs = (new, old, noise, step, advantages, ref)
    want = run_oracle(inputs, table)[1]
    assert want.abs().median() < 3e-6
    assert ((run(inputs, table, impl)[1] - want) / want).abs().max() < 1e-3

    weight = table.rows[step, 3].view(-1, 1, 1, 1)
    whitened = noise - weight * old
    log_probs = [(-0.5 * (whitened + weight * m) ** 2).mean(dim=(1, 2, 3)) for m in (new, old)]
    assert ((log_probs[0] - log_probs[1] - want) / want).abs().max() > 1e-1


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_on_policy_is_exact(objective, table, impl, device):
    new, _, noise, step, advantages, ref = make_inputs((6, 4, 9, 7), device, DTYPES["bf16"])
    loss, log_ratio, clipped, _ = run(
        (new, new.clone(), noise, step, advantages, ref), table, impl, objective=objective, clip_range=0.25
    )
    assert torch.equal(log_ratio, torch.zeros_like(log_ratio))
    assert not clipped.any()
    row_loss = 0.25 * advantages.abs() if objective == "pcpo" else -advantages
    if objective == "guard":
        row_loss = row_loss / table.rows[step, 5]
    torch.testing.assert_close(loss, row_loss.mean(), rtol=2 * EPS, atol=0)


def test_deterministic_rows_and_zero_advantages_have_no_gradient(table, impl, device):
    inputs = make_inputs((4, 3, 5), device)
    _, log_ratio, clipped, gradient = run(inputs, table, impl, clip_range=1.0)
    assert log_ratio[1] == 0 and not clipped[1]
    assert torch.equal(gradient[:2], torch.zeros_like(gradient[:2]))
    assert gradient[2:].abs().min() > 0


@pytest.mark.parametrize("shape", [(4, 1237), (3, 40001), (3, 4, 64, 64), (5, 1)], ids=str)
def test_a_row_alone_has_the_same_bits(shape, table, impl, device, monkeypatch):
    # tiles of one row's part and of several rows
    monkeypatch.setattr(affine, "TILE_CHUNKS_PER_THREAD", 1 if shape[-1] > 5000 else 4)
    inputs = make_inputs(shape, device, distance=1e-3)
    _, log_ratio, clipped, gradient = run(inputs, table, impl, reduction="sum", kl_weight=0.1)
    for i in range(shape[0]):
        alone = run([t[i : i + 1] for t in inputs], table, impl, reduction="sum", kl_weight=0.1)
        assert torch.equal(alone[1], log_ratio[i : i + 1]) and torch.equal(alone[2], clipped[i : i + 1])
        # the gradient of the batch carries 1/rows: exact for powers of two, else compared without it
        rows = shape[0]
        if rows & (rows - 1) == 0:
            assert torch.equal(alone[3] / rows, gradient[i : i + 1])
        else:
            torch.testing.assert_close(alone[3] / rows, gradient[i : i + 1], rtol=4 * EPS, atol=0)


def test_the_same_bits_on_every_run_and_any_number_of_threads(table, impl, device):
    inputs = make_inputs((3, 4, 64, 64), device)
    first = run(inputs, table, impl, kl_weight=0.1)
    threads = torch.get_num_threads()
    for count in (threads, 1, 2, 3):
        torch.set_num_threads(count)
        assert all(map(torch.equal, first, run(inputs, table, impl, kl_weight=0.1)))
    torch.set_num_threads(threads)


def test_not_contiguous(table, impl, device):
    inputs = make_inputs((4, 6, 5, 3), device)
    strided = [
        t.transpose(1, 3).contiguous().transpose(1, 3) if t.dim() == 4 else torch.stack([t, t], 1)[:, 0] for t in inputs
    ]
    assert not any(t.is_contiguous() for t in strided)
    assert all(map(torch.equal, run(inputs, table, impl, kl_weight=0.2), run(strided, table, impl, kl_weight=0.2)))


def test_step_may_be_an_int(table, impl, device):
    inputs = list(make_inputs((3, 4, 5), device))
    inputs[3] = torch.full_like(inputs[3], 4)
    by_tensor = run(inputs, table, impl)
    inputs[3] = 4
    assert all(map(torch.equal, by_tensor, run(inputs, table, impl)))


def test_backward_scales_and_repeats(table, impl, device):
    """Gradient scaling, accumulation and retain_graph: the backward pass leaves what it saved alone."""
    new, old, noise, step, advantages, _ = make_inputs((4, 3, 5), device, DTYPES["fp16"])
    new.requires_grad_()
    loss = ops.policy_loss(new, old, noise, table, step, advantages, impl=impl, clip_range=1.0).loss
    once, again = (torch.autograd.grad(loss * 1024, new, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, again)
    # a factor as small as a mean over a large batch has, times the scale that undoes it, keeps its digits
    (tiny,) = torch.autograd.grad((loss * 2.0**-30) * 2.0**40, new)
    assert torch.equal(tiny, once)


def test_no_double_backward(table, impl, device):
    new, old, noise, step, advantages, _ = make_inputs((2, 3), device)
    new.requires_grad_()
    loss = ops.policy_loss(new, old, noise, table, step, advantages, impl=impl, clip_range=1.0).loss
    (gradient,) = torch.autograd.grad(loss * loss, new, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_nothing_but_the_loss_has_a_gradient(table, impl, device):
    new, old, noise, step, advantages, ref = (
        t.requires_grad_() if t.is_floating_point() else t for t in make_inputs((3, 4), device)
    )
    out = ops.policy_loss(new, old, noise, table, step, advantages, ref_model_output=ref, kl_weight=0.1, impl=impl)
    assert out.loss.requires_grad and not out.log_ratio.requires_grad and not out.clipped.requires_grad
    out.loss.backward()
    assert new.grad is not None and all(t.grad is None for t in (old, noise, advantages, ref))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_is_not_finite_shows(objective, table, impl, device):
    inputs = make_inputs((4, 3, 5), device)
    inputs[0][2, 1, 1] = float("nan")
    loss, log_ratio, clipped, gradient = run(inputs, table, impl, objective=objective)
    assert loss.isnan() and log_ratio.isnan().tolist() == [False, False, True, False]
    assert not clipped[2] and gradient[2].isnan().any() and gradient[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("impl", ["torch"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradcheck(objective, table, impl, device):
    new, old, noise, step, advantages, ref = make_inputs((4, 2, 3), device)
    new = new.double().requires_grad_()

    def loss(m):
        return ops.policy_loss(
            m,
            old,
            noise,
            table,
            step,
            advantages,
            objective=objective,
            clip_range=0.5,
            ref_model_output=ref,
            kl_weight=0.2,
        ).loss

    assert torch.autograd.gradcheck(loss, new)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "dpo"}, "'pcpo', 'ppo', 'guard'"),
        ({"reduction": "max"}, "'mean', 'sum'"),
        ({"clip_range": 0.0}, "positive"),
        ({"kl_weight": 0.1}, "needs ref_model_output"),
        ({"advantages": torch.ones(4)}, r"one per row, \(3,\)"),
        ({"advantages": torch.ones(3, dtype=torch.int64)}, "floating type"),
        ({"noise": torch.ones(3, 5)}, r"noise has shape \(3, 5\)"),
        ({"noise": None}, "z is given by nothing"),
        ({"seed": 1}, "z is given by noise, seed; give exactly one"),
        ({"noise": None, "sample": torch.ones(3, 4)}, "z is given by sample; give exactly one"),
        ({"noise": None, "seed": -1}, "0 <= seed"),
        ({"uncond_output": torch.ones(3, 4).half()}, "uncond_output has dtype torch.float16"),
    ],
    ids=str,
)
@pytest.mark.parametrize("impl", ["torch"])
def test_errors_say_what_to_change(change, message, table, impl, device):
    new, old, noise, step, advantages, _ = make_inputs((3, 4), device)
    arguments = {
        "old_model_output": old,
        "noise": noise,
        "table": table,
        "step": step,
        "advantages": advantages,
        "impl": impl,
    }
    with pytest.raises(ValueError, match=message):
        ops.policy_loss(new, **arguments | change)


def sampled(shape, device, table, impl, dtypes, guided=False):
    """A step as a rollout takes it: the outputs that made it, the sample, what the sampler returned, and its key."""
    cond, uncond, x, step, *_ = make_inputs(shape, device, (dtypes[0], dtypes[0], dtypes[1], F32))
    key = {"seed": torch.tensor(7, device=device), "sample_index": torch.arange(len(step), device=device) + 2**33}
    guidance = {"uncond_output": uncond, "guidance_scale": GUIDANCE} if guided else {}
    return cond, uncond, x, step, key, ops.sampler_step(cond, x, table, step, **key, **guidance, impl=impl)


@pytest.mark.parametrize("shape", [(4, 3, 5, 7), (3, 9001)], ids=str)
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32), (F16, F16)], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_source_of_z_gives_the_same_bits(objective, dtypes, shape, table, impl, device, poisoned):
    _, new, x, step, key, out = sampled(shape, device, table, impl, dtypes)
    inputs = [new, out.model_output, out.noise, step, torch.randn(len(step), device=device), None]
    stored = run(inputs, table, impl, objective=objective, clip_range=1.0)
    inputs[2] = None
    states = {"sample": x, "prev_sample": out.prev_sample}
    from_states = run(inputs, table, impl, objective=objective, clip_range=1.0, **states)
    assert all(map(torch.equal, stored, from_states))
    # the z that was drawn, where rounding x' has not made another of it
    by_key = run(inputs, table, impl, objective=objective, clip_range=1.0, **key)
    inputs[2] = ops.sample_noise(new.shape, table, step, **key, impl=impl)
    assert all(map(torch.equal, by_key, run(inputs, table, impl, objective=objective, clip_range=1.0)))


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32)], ids=str)
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_guidance_inside(kl_weight, dtypes, table, impl, device, poisoned):
    """The combination and its two gradients, against autograd in float64; on-policy the log-ratio is exactly 0."""
    cond, uncond, _, step, _, out = sampled((4, 3, 5, 7), device, table, impl, dtypes, guided=True)
    advantages, ref = torch.randn(len(step), device=device), torch.randn_like(cond)
    old = (out.model_output + 1e-2 * torch.randn_like(cond)).to(cond.dtype)
    settings = {"uncond_output": uncond.requires_grad_(), "guidance_scale": GUIDANCE, "clip_range": 1.0}
    settings |= {"ref_model_output": ref if kl_weight else None, "kl_weight": kl_weight, "impl": impl}
    cond.requires_grad_()
    loss, log_ratio, _ = ops.policy_loss(cond, old, out.noise, table, step, advantages, **settings)
    gradients = torch.autograd.grad(loss, (cond, uncond))

    # the rounded combination, with the gradient of the exact one
    combined = uncond.double() + GUIDANCE * (cond.double() - uncond.double())
    combined = combined + (out.model_output.double() - combined).detach()
    kl = {"ref_model_output": ref, "kl_weight": kl_weight} if kl_weight else {}
    want, want_log_ratio, _ = policy_loss_oracle(
        combined, old, out.noise, table.rows, step, advantages, clip_range=1.0, **kl
    )
    want_gradients = torch.autograd.grad(want, (cond, uncond))
    torch.testing.assert_close(log_ratio.double(), want_log_ratio, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-7)
    rounding = 4 * torch.finfo(cond.dtype).eps
    for gradient, wanted in zip(gradients, want_gradients, strict=True):
        assert gradient.dtype == cond.dtype
        torch.testing.assert_close(gradient, wanted, rtol=rounding, atol=rounding * wanted.abs().max().item())

    on_policy = ops.policy_loss(cond, out.model_output, out.noise, table, step, advantages, **settings)
    assert torch.equal(on_policy.log_ratio, torch.zeros_like(on_policy.log_ratio))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("normalized", [True, False])
def test_log_ratio_alone(normalized, dtypes, shape, table, unnormalized_table, impl, device, poisoned):
    """The policy loss's own log-ratio, bit for bit, and a gradient that gives back that of the loss."""
    table = table if normalized else unnormalized_table
    inputs = make_inputs(shape, device, DTYPES[dtypes])
    new, old, noise, step, advantages, _ = inputs
    _, log_ratio, _, gradient = run(inputs, table, impl, objective="pcpo", clip_range=1e9)
    new = new.detach().requires_grad_()
    alone = ops.step_log_ratio(new, old, noise, table, step, impl=impl)
    assert torch.equal(alone, log_ratio)
    (alone_gradient,) = torch.autograd.grad((-advantages * alone).mean(), new)
    storage = torch.finfo(new.dtype)
    torch.testing.assert_close(alone_gradient, gradient, rtol=2 * storage.eps, atol=storage.smallest_normal)


@pytest.mark.parametrize("impl", ["torch"])
def test_gradcheck_of_the_log_ratio(table, impl, device):
    new, old, noise, step, *_ = make_inputs((4, 2, 3), device)
    assert torch.autograd.gradcheck(
        lambda m: ops.step_log_ratio(m, old, noise, table, step, reduction="sum"), new.double().requires_grad_()
    )


@pytest.mark.parametrize("normalized", [True, False])
def test_a_difference_of_log_probabilities_is_the_log_ratio(normalized, table, unnormalized_table, impl, device):
    """Right to what their subtraction can be right to, on the sampler's own weight."""
    table = table if normalized else unnormalized_table
    table.rows[:, 3] = table.rows[:, 4]
    new, old, x, step, _, out = sampled((4, 3, 5, 7), device, table, impl, (F32, F32))
    new = old + 0.1 * torch.randn_like(old)
    states = {"sample": x, "prev_sample": out.prev_sample}
    old = out.model_output
    log_ratio = ops.step_log_ratio(new, old, None, table, step, impl=impl, **states)
    subtracted = [ops.step_log_prob(m.double(), x, out.prev_sample, table, step) for m in (new, old)]
    torch.testing.assert_close(log_ratio.double(), subtracted[0] - subtracted[1], rtol=1e-4, atol=1e-5)


def test_under_autocast_with_gradient_accumulation(table, impl, device):
    """The loss stays float32 under autocast, and two micro-batches' gradients add up to those of one batch."""
    new, old, noise, step, advantages, _ = make_inputs((4, 3, 5), device)
    new.requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        whole = ops.policy_loss(new, old, noise, table, step, advantages, clip_range=1.0, impl=impl).loss
        assert whole.dtype == F32
        halves = [
            ops.policy_loss(new[r], old[r], noise[r], table, step[r], advantages[r], clip_range=1.0, impl=impl).loss
            for r in (slice(0, 2), slice(2, 4))
        ]
    (at_once,) = torch.autograd.grad(whole, new)
    for half in halves:
        (half / 2).backward()
    torch.testing.assert_close(new.grad, at_once, rtol=4 * EPS, atol=0)


def test_without_gradient_only_the_sums_are_made(table, impl, device):
    """The same numbers under no_grad and for an output that wants no gradient, and nothing as large as the inputs."""
    new, old, noise, step, advantages, _ = make_inputs((4, 3, 9), device)
    with_gradient = run((new, old, noise, step, advantages, None), table, impl)
    arguments = (old, noise, table, step, advantages)
    without = ops.policy_loss(new, *arguments, impl=impl)
    with torch.no_grad():
        under_no_grad = ops.policy_loss(new.clone().requires_grad_(), *arguments, impl=impl)
    assert all(map(torch.equal, with_gradient, without)) and all(map(torch.equal, without, under_no_grad))
    settings = ("pcpo", 1e-4, "mean", 0.0, False, impl)
    sources = (noise, None, None, None, None)
    *_, direction, _ = torch.ops.pcpo_fast.policy_loss(
        new, None, 1.0, old, *sources, table.rows, step, advantages, None, *settings
    )
    assert direction.numel() == 0


@pytest.mark.parametrize("output", [1e20, -1e20])
@pytest.mark.parametrize("objective", ["pcpo", "ppo", "guard"])
def test_a_log_ratio_that_overflows_leaves_rows_without_advantage_alone(objective, output, table, impl, device):
    new = torch.full((2, 64), output, device=device)
    inputs = (new, torch.zeros_like(new), torch.ones_like(new), torch.full((2,), 4, device=device))
    loss, log_ratio, _, gradient = run((*inputs, torch.zeros(2, device=device), None), table, impl, objective=objective)
    assert log_ratio.isinf().all() or objective == "guard"
    assert loss == 0 and not gradient.any()


@pytest.mark.parametrize("objective", ["ppo", "guard"])
def test_a_ratio_that_overflows_leaves_rows_without_advantage_alone(objective, table, impl, device):
    new, old = torch.full((2, 4096), 1.0, device=device), torch.zeros((2, 4096), device=device)
    noise, step = torch.full_like(new, -3.0), torch.full((2,), 4, device=device)
    inputs = (new, old, noise, step, torch.tensor([0.0, 1.0], device=device), None)
    loss, log_ratio, _, gradient = run(inputs, table, impl, objective=objective, reduction="sum")
    assert log_ratio.min() > 710 and loss.isfinite() and not gradient[0].any()


def test_a_direction_that_overflows_leaves_rows_without_gradient_alone(table, impl, device):
    new = torch.full((2, 8), 6e4, dtype=F16, device=device)
    noise, step = torch.full((2, 8), 6e4, device=device), torch.full((2,), 4, device=device)
    inputs = (new, torch.zeros_like(new), noise, step, torch.tensor([0.0, 1.0], device=device), None)
    assert not run(inputs, table, impl, clip_range=1e9)[3][0].any()


@pytest.mark.parametrize("impl", ["torch"])
def test_a_table_of_another_dtype_or_width_is_refused(table, impl, device):
    new, old, noise, step, advantages, _ = make_inputs((3, 4), device)
    rows = table.rows
    table.rows = rows.double()
    with pytest.raises(ValueError, match=r"float64; convert it with \.float\(\)"):
        ops.policy_loss(new, old, noise, table, step, advantages, impl=impl)
    table.rows = rows[:, :6]
    with pytest.raises(ValueError, match=r"shape \(20, 6\); give \(T, 8\)"):
        ops.policy_loss(new, old, noise, table, step, advantages, impl=impl)


def test_a_row_too_long_is_refused():
    from pcpo_fast.kernels.launch import launch

    with pytest.raises(ValueError, match="impl='torch'"):
        launch(2**26 + 1)
