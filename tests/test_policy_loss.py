"""The policy loss's values and gradients, against the textbook in float64."""

import itertools

import pytest
import torch
from loss_cases import (
    BF16,
    DETERMINISTIC_ROW,
    DTYPES,
    EPS,
    F16,
    F32,
    GUIDANCE,
    KINDS,
    OBJECTIVES,
    ROW_SETTINGS,
    SHAPES,
    SOURCES,
    check,
    clip_range_between,
    column,
    make_rows,
    per_row,
    run,
    run_oracle,
    source,
    variant,
)

from pcpo_fast import (
    Guidance,
    NoiseKey,
    Reference,
    StepTable,
    StoredStates,
    policy_loss,
    sample_noise,
    sampler_step,
    step_log_prob,
    step_log_ratio,
)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_matches_float64_autograd(objective, kind, reduction, dtypes, shape, table, impl, device, poisoned):
    table, rows = variant(table, kind), make_rows(shape, device, DTYPES[dtypes])
    settings = {"objective": objective, "reduction": reduction, "kl": "number"}
    settings["clip_range"] = clip_range_between(rows, table, **settings)
    check(run(rows, table, impl, **settings), run_oracle(rows, table, **settings), rows, table, **settings)


CASES = list(itertools.product(KINDS, OBJECTIVES, SOURCES))


@pytest.mark.parametrize("case", range(len(CASES)), ids=[" ".join(case) for case in CASES])
def test_whatever_is_given_and_asked_for(case, table, impl, device, poisoned):
    """Every source of z and m_old with every reduction and weight of rows, KL term and guidance."""
    kind, objective, name = CASES[case]
    table, rows = variant(table, kind), make_rows((4, 3, 5, 7), device)
    given = source(name, rows, table, impl)
    # the kernels take one in six in turn, with which every pair of settings meets
    for asked in ROW_SETTINGS if impl == "torch" else ROW_SETTINGS[case % 6 :: 6]:
        settings = {"objective": objective, **asked}
        settings["clip_range"] = clip_range_between(rows, table, given, **settings)
        want = run_oracle(rows, table, impl, given, **settings)
        check(run(rows, table, impl, given, **settings), want, rows, table, given, **settings)


@pytest.mark.parametrize("shape", [(8, 4, 32, 32), (2, 4096, 64), (1, 1024, 1024)], ids=str)
def test_rounds_less_than_the_usual_formula(shape, native_table, impl, device):
    """Error of the log-ratio against float64, and of the same in float32 by subtracting log-probabilities."""
    table, rows = native_table, make_rows(shape, device, distance=1e-3)
    a, b, s = (per_row(table.rows[rows.step, i], rows.new) for i in range(3))
    s = torch.where(s > 0, s, 1.0)
    prev_sample = a * rows.sample + b * rows.old + s * rows.noise
    # on the noise that belongs to the stored x'
    rows = rows.replace(noise=(prev_sample - a * rows.sample - b * rows.old) / s)

    def eager_log_prob(m):
        return (-((prev_sample - (a * rows.sample + b * m)) ** 2) / (2 * s**2) - s.log()).flatten(1).mean(dim=1)

    want = run_oracle(rows, table).log_ratio
    ours = run(rows, table, impl).log_ratio
    eager = eager_log_prob(rows.new) - eager_log_prob(rows.old)
    random = table.trainable[rows.step]
    assert (ours - want).abs()[random].max() <= 2 * (eager - want).abs()[random].max()


def test_tiny_log_ratio_keeps_its_digits(table, impl, device):
    """Around 1e-6 the difference form is right to 1e-3, and subtracting float32 log-probabilities is not to 1e-1."""
    rows = make_rows((8, 4, 64, 64), device, distance=3e-4)
    rows = rows.replace(step=torch.arange(8, device=device) * 2)
    want = run_oracle(rows, table).log_ratio
    assert want.abs().median() < 3e-6
    assert ((run(rows, table, impl).log_ratio - want) / want).abs().max() < 1e-3

    weight = per_row(table.weight[rows.step].float(), rows.new)
    whitened = rows.noise - weight * rows.old
    log_probs = [(-0.5 * (whitened + weight * m) ** 2).mean(dim=(1, 2, 3)) for m in (rows.new, rows.old)]
    assert ((log_probs[0] - log_probs[1] - want) / want).abs().max() > 1e-1


@pytest.mark.parametrize("impl", ["torch"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradcheck(objective, kind, table, impl, device):
    """Rows without reduction, so that each gradient of a row is held against numbers."""
    table, rows = variant(table, kind), make_rows((4, 2, 3), device)
    arguments = (rows.old, rows.noise, table, rows.step, rows.advantages)
    settings = {"objective": objective, "clip_range": 0.5, "row_weights": rows.weights}

    def loss(m, uncond):
        guidance, kl = Guidance(uncond, GUIDANCE), Reference(rows.ref, rows.kl_weights)
        return policy_loss(m, *arguments, **settings, row_reduction="none", guidance=guidance, kl=kl).loss

    outputs = (output.double().requires_grad_() for output in (rows.new, rows.uncond))
    assert torch.autograd.gradcheck(loss, tuple(outputs))


def sampled(shape, device, table, impl, dtypes, guided=False):
    """A step as a rollout takes it: its rows, whose old output is the one that was used; what the sampler returned;
    and its key."""
    rows = make_rows(shape, device, (dtypes[0], dtypes[0], F32, F32))
    rows = rows.replace(sample=rows.sample.to(dtypes[1]))
    key = NoiseKey(torch.tensor(7, device=device), rows.index)
    guidance = Guidance(rows.uncond, GUIDANCE) if guided else None
    out = sampler_step(rows.old, rows.sample, table, rows.step, key, guidance=guidance, impl=impl)
    return rows.replace(old=out.model_output, noise=out.noise), out, key


@pytest.mark.parametrize("shape", [(4, 3, 5, 7), (3, 9001)], ids=str)
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32), (F16, F16)], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_source_of_z_gives_the_same_bits(objective, dtypes, shape, table, impl, device, poisoned):
    rows, out, key = sampled(shape, device, table, impl, dtypes)
    settings = {"objective": objective, "clip_range": 1.0}

    def from_(noise, old=rows.old):
        given = source("noise", rows, table, impl)
        given.noise, given.old_model_output = noise, old
        return run(rows, table, impl, given, **settings)

    assert from_(out.noise) == from_(StoredStates(rows.sample, out.prev_sample))
    # the z that was drawn, where rounding x' has not made another of it
    drawn = sample_noise(rows.new.shape, table, rows.step, key, impl=impl)
    assert from_(key) == from_(drawn)
    if dtypes[1] == F32:
        states = (StoredStates(rows.sample, out.prev_sample, noise) for noise in (key, drawn))
        assert from_(next(states), None) == from_(next(states), None)


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32)], ids=str)
@pytest.mark.parametrize("kl", [None, "number"])
def test_guidance_inside(kl, dtypes, table, impl, device, poisoned):
    """The combination and its two gradients, against autograd in float64; on-policy the log-ratio is exactly 0."""
    rows, *_ = sampled((4, 3, 5, 7), device, table, impl, dtypes, guided=True)
    settings = {"guided": True, "kl": kl, "clip_range": 1.0}
    near = rows.replace(old=(rows.old + 1e-2 * torch.randn_like(rows.old)).to(rows.old.dtype))
    want = run_oracle(near, table, impl, **settings)
    check(run(near, table, impl, **settings), want, near, table, **settings)

    same = make_rows((4, 3, 5, 7), device, (dtypes[0], dtypes[0], F32, F32))
    same = same.replace(new=same.old, old=rows.old, noise=rows.noise)
    on_policy = run(same, table, impl, **settings).log_ratio
    assert torch.equal(on_policy, torch.zeros_like(on_policy))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_log_ratio_alone(kind, dtypes, shape, table, impl, device, poisoned):
    """The policy loss's own log-ratio, bit for bit, and a gradient that gives back that of the loss."""
    table, rows = variant(table, kind), make_rows(shape, device, DTYPES[dtypes])
    whole = run(rows, table, impl, clip_range=1e9)
    new = rows.new.detach().requires_grad_()
    alone = step_log_ratio(new, rows.old, rows.noise, table, rows.step, impl=impl)
    assert torch.equal(alone, whole.log_ratio)
    scale = column(table, "loss_scale", rows.step).float()
    (gradient,) = torch.autograd.grad((-scale * rows.advantages * alone).mean(), new)
    storage = torch.finfo(new.dtype)
    torch.testing.assert_close(gradient, whole.gradients[0], rtol=2 * storage.eps, atol=storage.smallest_normal)


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_log_ratio_alone_from_every_source(reduction, name, table, impl, device, poisoned):
    rows = make_rows((4, 3, 5), device)
    given = source(name, rows, table, impl)
    whole = run(rows, table, impl, given, reduction=reduction)
    alone = step_log_ratio(
        rows.new, given.old_model_output, given.noise, table, rows.step, reduction=reduction, impl=impl
    )
    assert torch.equal(alone, whole.log_ratio)


@pytest.mark.parametrize("impl", ["torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_the_log_ratio(kind, table, impl, device):
    table, rows = variant(table, kind), make_rows((4, 2, 3), device)
    assert torch.autograd.gradcheck(
        lambda m: step_log_ratio(m, rows.old, rows.noise, table, rows.step, reduction="sum"),
        rows.new.double().requires_grad_(),
    )


@pytest.mark.parametrize("kind", ["plain", "unnormalized"])
def test_a_difference_of_log_probabilities_is_the_log_ratio(kind, native_table, impl, device):
    """Right to what their subtraction can be right to, on the sampler's own weight."""
    table = variant(native_table, kind)
    rows, out, _ = sampled((4, 3, 5, 7), device, table, impl, (F32, F32))
    new = rows.old + 0.1 * torch.randn_like(rows.old)
    states = StoredStates(rows.sample, out.prev_sample)
    log_ratio = step_log_ratio(new, rows.old, states, table, rows.step, impl=impl)
    subtracted = [step_log_prob(m.double(), rows.sample, out.prev_sample, table, rows.step) for m in (new, rows.old)]
    torch.testing.assert_close(log_ratio.double(), subtracted[0] - subtracted[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_on_policy_is_exact(objective, kind, table, impl, device):
    table, rows = variant(table, kind), make_rows((6, 4, 9, 7), device, DTYPES["bf16"])
    rows = rows.replace(new=rows.old)
    got = run(rows, table, impl, objective=objective, clip_range=0.25)
    assert torch.equal(got.log_ratio, torch.zeros_like(got.log_ratio))
    assert torch.equal(got.old_kl, torch.zeros_like(got.old_kl))
    assert not got.clipped.any()
    want = run_oracle(rows, table, objective=objective, clip_range=0.25).loss
    torch.testing.assert_close(got.loss.double(), want.mean(), rtol=4 * EPS, atol=0)


@pytest.mark.parametrize("form", ["key", "tensor"])
def test_without_old_output_the_log_ratio_of_an_unchanged_model_is_below_1e_7(form, table, impl, device):
    """m_old = (x' - a x - s z) / b of the stored x' carries its rounding, and nothing else."""
    rows, out, key = sampled((8, 4, 64, 64), device, table, impl, (F32, F32))
    noise = key if form == "key" else sample_noise(rows.new.shape, table, rows.step, key, impl=impl)
    given = source("noise", rows, table, impl)
    given.old_model_output, given.noise = None, StoredStates(rows.sample, out.prev_sample, noise)
    got = run(rows.replace(new=rows.old), table, impl, given)
    assert 0 < got.log_ratio.abs().max() < 1e-7
    assert got.log_ratio[DETERMINISTIC_ROW] == 0 and not got.gradients[0][DETERMINISTIC_ROW].any()
    alone = step_log_ratio(rows.old, None, given.noise, table, rows.step, impl=impl)
    assert torch.equal(alone, got.log_ratio)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_means_in_the_place_of_outputs(objective, kind, table, impl, device, poisoned):
    """A trainer that carries means and deviations: the loss is the same, and a gradient with respect to a mean is 1 / b
    of that to the output."""
    table, rows = variant(table, kind), make_rows((4, 3, 5), device)
    # the last step has no noise and a mean of its own
    settings = {"objective": objective, "clip_range": 0.5, "kl": "number", "row_reduction": "none"}
    want = run(rows, table, impl, **settings)
    a, b = (per_row(column(table, name, rows.step), rows.new) for name in ("sample_coef", "output_coef"))
    means = {name: (a * rows.sample + b * getattr(rows, name)).float() for name in ("new", "old", "ref")}
    got = run(rows.replace(**means), table.for_means(), impl, **settings)
    # a mean of order 1 is rounded before the difference, of 1e-3 at the smallest, is taken
    close = {"rtol": 1e-3, "atol": 1e-6}
    for ours, theirs in zip(got.tensors()[:4], want.tensors()[:4], strict=True):
        torch.testing.assert_close(ours, theirs, **close)
    torch.testing.assert_close(got.kl, want.kl, **close)
    gradient = (got.gradients[0] * b).float()
    largest = want.gradients[0].abs().max().item()
    torch.testing.assert_close(gradient, want.gradients[0], rtol=1e-3, atol=1e-3 * largest)


def test_tables_one_after_another(table, impl, device):
    """`StepTable.cat`: images of two sizes in one batch of steps, each as in its own table."""
    other = StepTable.flow([1.0, 0.75, 0.4, 0.2, 0.0], noise_level=0.5).to(device)
    both = StepTable.cat([table, other])
    rows = make_rows((4, 3, 5), device)
    rows = rows.replace(step=torch.tensor([3, 0, 2, 1], device=device))
    settings = {"row_reduction": "none", "kl": "per row", "weighted": True}
    assert run(rows.replace(step=rows.step + len(table)), both, impl, **settings) == run(rows, other, impl, **settings)
    assert run(rows, both, impl, **settings) == run(rows, table, impl, **settings)
