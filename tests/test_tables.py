"""Step tables: the coefficients, the credit schemes and their measured facts, the schedulers, the errors.

Everything is float64: a tolerance is a multiple of its roundoff (2.2e-16) times the size of the terms that cancel.
"""

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pcpo_fast.tables import CREDITS, PREDICTION_TYPES, StepTable, ddim_table

EPS = float(np.finfo(np.float64).eps)

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

# the same cases every run; the schedules are small, so hundreds of them cost seconds
property_test = settings(max_examples=150, deadline=None, derandomize=True)


def sd_alphas() -> torch.Tensor:
    betas = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2
    return torch.from_numpy(np.cumprod(1 - betas))


def sd_steps(num_steps: int) -> torch.Tensor:
    """Leading spacing, offset 1."""
    return torch.arange(num_steps - 1, -1, -1) * (1000 // num_steps) + 1


def sd_table(num_steps: int = 50, **kwargs) -> StepTable:
    return ddim_table(sd_alphas(), sd_steps(num_steps), **kwargs)


def alpha_pairs(alphas: torch.Tensor, steps: torch.Tensor, final: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    at = alphas.numpy()[steps.numpy()]
    return at, np.append(at[1:], float(alphas[0]) if final is None else final)


def credit_symbols(at: np.ndarray, ap: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """c1 and b0."""
    return np.sqrt((1 - at) * ap / at), np.sqrt(1 - ap)


def eta_one_std(at: np.ndarray, ap: np.ndarray) -> np.ndarray:
    return np.sqrt((1 - ap) / (1 - at)) * np.sqrt((ap - at) / ap)


def split(x, m, at, prediction_type):
    """(sample, noise) that a model output stands for, from its definition."""
    if prediction_type == "epsilon":
        return (x - np.sqrt(1 - at) * m) / np.sqrt(at), m
    if prediction_type == "v_prediction":
        return np.sqrt(at) * x - np.sqrt(1 - at) * m, np.sqrt(at) * m + np.sqrt(1 - at) * x
    return m, (x - np.sqrt(at) * m) / np.sqrt(1 - at)


def output_for(x, epsilon, at, prediction_type):
    """The model output that stands for `epsilon` at `x`."""
    x0 = (x - np.sqrt(1 - at) * epsilon) / np.sqrt(at)
    return {"epsilon": epsilon, "v_prediction": np.sqrt(at) * epsilon - np.sqrt(1 - at) * x0, "sample": x0}[
        prediction_type
    ]


def ddim_mean(x, m, at, ap, std, prediction_type):
    """Mean of DDIM's step, arXiv 2010.02502 equation 12: the predicted sample, noised again."""
    x0, noise = split(x, m, at, prediction_type)
    return np.sqrt(ap) * x0 + np.sqrt(np.maximum(1 - ap - std**2, 0)) * noise


def closest_valid_root(c1, b0, target, native):
    """The s nearest `native` with (c1 - sqrt(b0^2 - s^2)) / s = target; None where there is none."""
    roots = np.roots([1 + target**2, -2 * target * c1, c1**2 - b0**2])
    valid = [float(r.real) for r in roots if abs(r.imag) == 0 and c1 - target * r.real >= 0]
    return min(valid, key=lambda r: abs(r - native), default=None)


def residual_bound(c1, b0, std, target):
    """What rounding may leave of (c1 - sqrt(b0^2 - s^2)) / s - w*.

    A root computed in float64 solves (c1 - w* s)^2 = b0^2 - s^2 + r, with |r| a few roundoffs of the terms that
    cancel, so c1 - w* s and d = sqrt(b0^2 - s^2) differ by r / (c1 - w* s + d), and by sqrt(r) at most.
    """
    rounding = 100 * EPS * (c1**2 + (1 + target**2) * b0**2)
    both = np.abs(c1 - target * std) + np.sqrt(np.maximum(b0**2 - std**2, 0))
    return rounding / np.maximum(both, np.sqrt(rounding)) / std


@st.composite
def schedules(draw):
    """(alphas_cumprod, timesteps, final alpha) of a random schedule with at least one stochastic step."""
    size = draw(st.integers(2, 40))
    start = draw(st.floats(-1.0, 8.0))
    fall = draw(st.lists(st.floats(0.02, 1.0), min_size=size - 1, max_size=size - 1))
    log_snr = start - np.concatenate([[0.0], np.cumsum(fall)])
    # alphas below 1e-9 would only test how the square of 1e9 rounds
    log_snr = log_snr[log_snr > -20.0]
    alphas = torch.from_numpy(1 / (1 + np.exp(-log_snr)))
    chosen = draw(st.sets(st.integers(0, len(alphas) - 1), min_size=1, max_size=12))
    steps = torch.tensor(sorted(chosen, reverse=True))
    last = float(alphas[steps[-1]])
    final = draw(st.one_of(st.none(), st.just(1.0), st.floats(0.0, 0.99).map(lambda f: last + f * (1 - last))))
    at, ap = alpha_pairs(alphas, steps, final)
    assume(bool((eta_one_std(at, ap) > 0).any()))
    return alphas, steps, final


prediction_types = st.sampled_from(PREDICTION_TYPES)
etas = st.floats(0.05, 1.0)
# None is the default; otherwise a multiple of the smallest weight that some step can have
target_factors = st.one_of(st.none(), st.floats(1.0001, 50.0))


def drawn_table(schedule, eta, prediction_type, credit, factor):
    alphas, steps, final = schedule
    at, ap = alpha_pairs(alphas, steps, final)
    c1, b0 = credit_symbols(at, ap)
    target = None
    if factor is not None and credit != "native":
        stochastic = eta_one_std(at, ap) > 0
        target = float(np.sqrt((c1[stochastic] / b0[stochastic]) ** 2 - 1).min() * factor)
    table = ddim_table(
        alphas,
        steps,
        eta=eta,
        prediction_type=prediction_type,
        final_alpha_cumprod=final,
        credit=credit,
        target_weight=target,
    )
    return table, at, ap, c1, b0


@pytest.mark.parametrize(
    ("num_steps", "mean", "smallest", "largest", "timestep"),
    [(50, 0.5169, 0.3741, 3.2748, 21), (40, 0.5964, 0.4218, 3.6905, 26), (20, 0.9802, 0.6227, 5.4309, 51)],
)
def test_native_weights_of_stable_diffusion(num_steps, mean, smallest, largest, timestep):
    table = sd_table(num_steps)
    weight = table.native_weight
    assert float(weight.mean()) == pytest.approx(mean, abs=5e-5)
    assert float(weight.min()) == pytest.approx(smallest, abs=5e-5)
    assert float(weight.max()) == pytest.approx(largest, abs=5e-5)
    assert int(table.timesteps[weight.argmax()]) == timestep


def test_eta_one_weight_has_a_closed_form():
    at, ap = alpha_pairs(sd_alphas(), sd_steps(50))
    c1, b0 = credit_symbols(at, ap)
    np.testing.assert_allclose(sd_table(50).native_weight.numpy(), np.sqrt((c1 / b0) ** 2 - 1), rtol=1e-10)


@pytest.mark.parametrize("num_steps", [20, 50])
def test_eta_one_is_the_minimum_of_the_weight_over_the_std(num_steps):
    at, ap = alpha_pairs(sd_alphas(), sd_steps(num_steps))
    c1, b0 = credit_symbols(at, ap)
    table = sd_table(num_steps)
    fractions = np.linspace(0, 1, 20_001)[1:]
    for row in range(num_steps):
        std = b0[row] * fractions
        weight = (c1[row] - np.sqrt(np.maximum(b0[row] ** 2 - std**2, 0))) / std
        native = float(table.native_weight[row])
        assert (weight >= native * (1 - 1e-10)).all()
        # and the grid's own minimum is where eta = 1 is, one grid step aside at most
        assert abs(std[weight.argmin()] - float(table.std[row])) <= b0[row] / 20_000


@pytest.mark.parametrize(
    ("num_steps", "infeasible"), [(50, [121, 101, 81, 61, 41, 21, 1]), (40, [101, 76, 51, 26, 1]), (20, [101, 51, 1])]
)
def test_mean_weight_is_out_of_reach_at_the_low_noise_steps(num_steps, infeasible):
    for credit in ("variance", "proportionate"):
        table = sd_table(num_steps, credit=credit)
        assert table.target_weight == pytest.approx(float(sd_table(num_steps).native_weight.mean()), rel=1e-12)
        assert table.timesteps[~table.resolved].tolist() == infeasible


def test_roots_of_the_credit_equation():
    """No root below native, both from there to c1 / b0, and the minus root alone above."""
    at, ap = alpha_pairs(sd_alphas(), sd_steps(50))
    c1, b0 = credit_symbols(at, ap)
    native = sd_table(50).native_weight.numpy()
    fractions = np.linspace(0, 1, 200_001)[1:]
    for row in (0, 10, 25, 40, 48, 49):
        std = b0[row] * fractions
        weight = (c1[row] - np.sqrt(np.maximum(b0[row] ** 2 - std**2, 0))) / std
        bound = c1[row] / b0[row]
        targets = {0.98 * native[row]: 0, (native[row] + bound) / 2: 2, 1.05 * bound: 1, 3 * bound: 1}
        for target, count in targets.items():
            crossings = np.flatnonzero(np.diff(np.sign(weight - target)))
            assert len(crossings) == count
            if count == 0:
                assert closest_valid_root(c1[row], b0[row], target, b0[row]) is None
                continue
            table = sd_table(50, credit="variance", target_weight=float(target))
            assert bool(table.resolved[row])
            # the table's root is one of the crossings, and with eta = 1 the nearer one
            nearest = std[crossings][np.abs(std[crossings] - float(sd_table(50).std[row])).argmin()]
            assert float(table.std[row]) == pytest.approx(nearest, abs=2 * b0[row] / 200_000)


@pytest.mark.parametrize(("num_steps", "mean"), [(50, 5.00), (40, 4.56), (20, 3.62)])
def test_published_target_is_the_mean_with_the_sign_flipped(num_steps, mean):
    at, ap = alpha_pairs(sd_alphas(), sd_steps(num_steps))
    c1, b0 = credit_symbols(at, ap)
    std = eta_one_std(at, ap)
    flipped = (c1 + np.sqrt(b0**2 - std**2)) / std
    table = sd_table(num_steps, credit="published")
    assert table.target_weight == pytest.approx(mean, abs=5e-3)
    assert table.target_weight == pytest.approx(flipped.mean(), rel=1e-12)


def test_published_root_achieves_almost_native_weights():
    at, ap = alpha_pairs(sd_alphas(), sd_steps(50))
    c1, b0 = credit_symbols(at, ap)
    table = sd_table(50, credit="published", target_weight=4.5)
    std = table.std.numpy()
    assert bool(table.resolved.all()) and not bool(table.reweighted.any())
    # it solves the equation with + in front of the square root, at every step
    np.testing.assert_allclose((c1 + np.sqrt(b0**2 - std**2)) / std, 4.5, rtol=1e-9)
    achieved = table.weight
    assert float(achieved.min()) == pytest.approx(0.385, abs=5e-4)
    assert float(achieved.max()) == pytest.approx(3.37, abs=5e-3)
    native = sd_table(50).native_weight
    assert float(achieved.mean() / native.mean()) == pytest.approx(1.0, abs=0.03)
    assert torch.equal(table.weight, table.native_weight)


def test_native_credit_is_the_sampler_s_own():
    at, ap = alpha_pairs(sd_alphas(), sd_steps(50))
    table = sd_table(50)
    np.testing.assert_allclose(table.std.numpy(), eta_one_std(at, ap), rtol=1e-12)
    assert torch.equal(table.weight, table.native_weight)
    assert table.target_weight is None and table.credit == "native"
    assert not bool(table.resolved.any()) and not bool(table.reweighted.any())


@pytest.mark.parametrize("target_weight", [None, 0.1, 2.0])
def test_uniform_credit_reweights_and_leaves_the_sampler_alone(target_weight):
    native, table = sd_table(50), sd_table(50, credit="uniform", target_weight=target_weight)
    for name in ("sample_coef", "output_coef", "std", "native_weight"):
        assert torch.equal(getattr(table, name), getattr(native, name))
    wanted = float(native.native_weight.mean()) if target_weight is None else target_weight
    np.testing.assert_allclose(table.weight.numpy(), wanted, rtol=1e-12)
    assert not bool(table.resolved.any()) and bool(table.reweighted.all())


def test_variance_credit_changes_the_sampler_and_keeps_its_weights():
    native, table = sd_table(50), sd_table(50, credit="variance")
    assert torch.equal(table.weight, table.native_weight)
    assert not bool(table.reweighted.any())
    np.testing.assert_allclose(table.weight[table.resolved].numpy(), table.target_weight, rtol=1e-9)
    kept = ~table.resolved
    assert torch.equal(table.std[kept], native.std[kept])
    assert bool((table.weight[kept] > table.target_weight).all())
    assert bool((table.std[table.resolved] != native.std[table.resolved]).all())


def test_proportionate_credit_is_variance_with_the_rest_reweighted():
    variance, table = sd_table(50, credit="variance"), sd_table(50, credit="proportionate")
    for name in ("sample_coef", "output_coef", "std", "native_weight", "resolved"):
        assert torch.equal(getattr(table, name), getattr(variance, name))
    assert torch.equal(table.reweighted, ~table.resolved)
    assert bool((table.epsilon_weight == table.target_weight).all())


def test_target_weight_above_every_step_resolves_all():
    table = sd_table(50, credit="proportionate", target_weight=3.3)
    assert bool(table.resolved.all()) and not bool(table.reweighted.any())
    np.testing.assert_allclose(table.native_weight.numpy(), 3.3, rtol=1e-9)


def test_one_step_keeps_its_own_credit():
    """The default target is then the double root itself, and rounding must not make it infeasible."""
    for timestep in range(1, 1000, 7):
        table = ddim_table(
            sd_alphas(),
            torch.tensor([timestep]),
            credit="variance",
            prediction_type="epsilon",
            final_alpha_cumprod=0.9995,
        )
        assert bool(table.resolved.all())
        assert float(table.weight) == pytest.approx(table.target_weight, rel=1e-6)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("final", [None, 1.0])
def test_rows_are_ddim_s_equation(prediction_type, eta, final):
    alphas, steps = sd_alphas(), sd_steps(50)
    at, ap = alpha_pairs(alphas, steps, final)
    table = ddim_table(alphas, steps, eta=eta, prediction_type=prediction_type, final_alpha_cumprod=final)
    std = eta * eta_one_std(at, ap)
    np.testing.assert_allclose(table.std.numpy(), std, rtol=1e-12)
    # the mean is linear: its value at (1, 0) and (0, 1) are the coefficients
    np.testing.assert_allclose(table.sample_coef, ddim_mean(1.0, 0.0, at, ap, std, prediction_type), rtol=1e-11)
    np.testing.assert_allclose(table.output_coef, ddim_mean(0.0, 1.0, at, ap, std, prediction_type), atol=1e-13)
    assert torch.equal(table.timesteps, steps) and table.timesteps.dtype == torch.int64


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize(
    ("spacing", "num_train", "num_steps", "offset"),
    [("leading", 1000, 50, 1), ("leading", 40, 8, 0), ("trailing", 1000, 20, 0), ("linspace", 40, 40, 0)],
)
def test_rows_are_the_step_of_diffusers(prediction_type, eta, spacing, num_train, num_steps, offset):
    diffusers = pytest.importorskip("diffusers")
    for to_one in (False, True):
        scheduler = diffusers.DDIMScheduler(
            **SD,
            num_train_timesteps=num_train,
            clip_sample=False,
            set_alpha_to_one=to_one,
            steps_offset=offset,
            prediction_type=prediction_type,
            timestep_spacing=spacing,
        )
        table = ddim_table.from_scheduler(scheduler, num_steps, eta=eta)
        # diffusers computes in the dtype of its alphas
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
        scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
        scheduler.set_timesteps(num_steps)
        assert torch.equal(table.timesteps, scheduler.timesteps)
        x, m, z = torch.randn(3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for row, timestep in enumerate(scheduler.timesteps):
            theirs = scheduler.step(m, timestep, x, eta=eta, variance_noise=z, return_dict=False)[0]
            ours = table.sample_coef[row] * x + table.output_coef[row] * m + table.std[row] * z
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_prediction_types_give_the_same_distribution_and_credit(credit, eta):
    at, _ = alpha_pairs(sd_alphas(), sd_steps(50))
    x, epsilon = np.random.default_rng(0).standard_normal((2, 7, 1))
    tables = {kind: sd_table(50, eta=eta, credit=credit, prediction_type=kind) for kind in PREDICTION_TYPES}
    reference = tables["epsilon"]
    mean = reference.sample_coef.numpy() * x + reference.output_coef.numpy() * epsilon
    for kind, table in tables.items():
        assert torch.equal(table.std, reference.std)
        m = output_for(x, epsilon, at, kind)
        np.testing.assert_allclose(
            table.sample_coef.numpy() * x + table.output_coef.numpy() * m, mean, rtol=1e-11, atol=1e-12
        )
        # -b is the difference of two terms of order c1; divided by s that leaves 1e-12
        torch.testing.assert_close(table.epsilon_weight, reference.epsilon_weight, rtol=1e-11, atol=1e-12)
        assert torch.equal(table.resolved, reference.resolved) and torch.equal(table.reweighted, reference.reweighted)
        assert table.target_weight == reference.target_weight


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_epsilon_scale_is_the_derivative_of_epsilon(prediction_type):
    at, _ = alpha_pairs(sd_alphas(), sd_steps(20))
    difference = split(0.3, 2.5, at, prediction_type)[1] - split(0.3, 1.5, at, prediction_type)[1]
    np.testing.assert_allclose(sd_table(20, prediction_type=prediction_type).epsilon_scale, difference, rtol=1e-12)


@property_test
@given(schedules(), etas, prediction_types, target_factors)
def test_proportionate_credit_is_constant(schedule, eta, prediction_type, factor):
    try:
        table, at, ap, _, _ = drawn_table(schedule, eta, prediction_type, "proportionate", factor)
    except ValueError as error:
        pytest.fail(f"a feasible target was refused: {error}")
    credit = table.epsilon_weight[table.trainable]
    assert bool(((credit / table.target_weight - 1).abs() <= 1e-12).all())
    assert torch.equal(table.trainable, torch.from_numpy(eta_one_std(at, ap) > 0))
    assert bool((table.weight[~table.trainable] == 0).all())
    # every trainable step is either re-solved or reweighted, and says which
    assert torch.equal(table.resolved ^ table.reweighted, table.trainable)
    assert not bool((table.resolved & table.reweighted).any())


@property_test
@given(schedules(), etas, prediction_types, target_factors)
def test_resolved_variances_satisfy_the_equation(schedule, eta, prediction_type, factor):
    table, at, ap, c1, b0 = drawn_table(schedule, eta, prediction_type, "variance", factor)
    resolved = table.resolved.numpy()
    assert resolved.any()
    std, target = table.std.numpy()[resolved], table.target_weight
    c1, b0 = c1[resolved], b0[resolved]
    achieved = (c1 - np.sqrt(np.maximum(b0**2 - std**2, 0))) / std
    bound = residual_bound(c1, b0, std, target)
    assert (np.abs(achieved - target) <= bound).all()
    # the table's own coefficients achieve it as well, whatever the model predicts
    assert (np.abs(table.epsilon_weight.numpy()[resolved] - target) <= 2 * bound).all()
    native = eta * eta_one_std(at, ap)[resolved]
    for row in range(len(std)):
        nearest = closest_valid_root(c1[row], b0[row], target, native[row])
        # near the double root the two differ by the square root of rounding
        if nearest is not None:
            assert abs(std[row] - native[row]) <= abs(nearest - native[row]) + 1e-6 * b0[row]


@property_test
@given(schedules(), etas, prediction_types, st.sampled_from(["variance", "proportionate"]), target_factors)
def test_steps_without_a_root_have_the_std_of_eta_one(schedule, eta, prediction_type, credit, factor):
    table, at, ap, c1, b0 = drawn_table(schedule, eta, prediction_type, credit, factor)
    full = eta_one_std(at, ap)
    unresolved = ~table.resolved.numpy()
    np.testing.assert_allclose(table.std.numpy()[unresolved], full[unresolved], rtol=1e-12)
    discriminant = b0**2 * (1 + table.target_weight**2) - c1**2
    assert (discriminant[unresolved & (full > 0)] < 0).all()


@property_test
@given(schedules(), etas, prediction_types, st.sampled_from(CREDITS), target_factors)
def test_variances_never_exceed_what_the_mean_needs(schedule, eta, prediction_type, credit, factor):
    table, _, ap, _, _ = drawn_table(schedule, eta, prediction_type, credit, factor)
    # s^2 rounds twice, 1 - ap once
    assert (table.std.numpy() ** 2 <= (1 - ap) * (1 + 4 * EPS)).all()
    assert (table.std.numpy() >= 0).all()
    for name in ("sample_coef", "output_coef", "std", "native_weight", "weight"):
        assert bool(torch.isfinite(getattr(table, name)).all())


def test_a_std_on_its_bound_survives_rounding():
    """All of x' is noise, d = 0, at the plus root for w* = c1 / b0 and at eta = 1 with zero terminal SNR."""
    for ap in np.linspace(0.01, 0.99, 200):
        at = 0.7 * ap
        target = math.sqrt((1 - at) * ap / at) / math.sqrt(1 - ap)
        table = ddim_table(
            torch.tensor([at], dtype=torch.float64),
            torch.tensor([0]),
            final_alpha_cumprod=ap,
            credit="published",
            target_weight=target,
        )
        terminal = ddim_table(
            torch.tensor([ap, 0.0], dtype=torch.float64), torch.tensor([1, 0]), prediction_type="v_prediction"
        )
        for first in (table, terminal):
            assert bool(torch.isfinite(first.rows).all())
            assert float(first.std[0]) == pytest.approx(math.sqrt(1 - ap), rel=1e-7)


@property_test
@given(schedules(), etas, prediction_types, st.sampled_from(CREDITS), target_factors)
def test_a_perfect_denoiser_reaches_the_right_marginals(schedule, eta, prediction_type, credit, factor):
    """x = sqrt(at) x0 + sqrt(1 - at) epsilon with x0 known must go to mean sqrt(ap) x0 and variance 1 - ap."""
    table, at, ap, _, _ = drawn_table(schedule, eta, prediction_type, credit, factor)
    # the perfect output as (factor of x0, factor of epsilon)
    of_sample, of_noise = {
        "epsilon": (0.0, 1.0),
        "v_prediction": (-np.sqrt(1 - at), np.sqrt(at)),
        "sample": (1.0, 0.0),
    }[prediction_type]
    a, b, std = (getattr(table, name).numpy() for name in ("sample_coef", "output_coef", "std"))
    mean = a * np.sqrt(at) + b * of_sample
    noise = a * np.sqrt(1 - at) + b * of_noise
    # a and b may be large and cancel
    size = 20 * EPS * (np.abs(a) + np.abs(b) + 1)
    assert (np.abs(mean - np.sqrt(ap)) <= size).all()
    # the square root in d turns a roundoff r of d^2 into at most sqrt(r), whose square is r again
    assert (np.abs(noise**2 + std**2 - (1 - ap)) <= size * (1 + np.abs(noise)) + size**2).all()


@property_test
@given(schedules(), st.floats(0.0, 1.0), prediction_types)
def test_random_rows_are_ddim_s_equation(schedule, eta, prediction_type):
    alphas, steps, final = schedule
    at, ap = alpha_pairs(alphas, steps, final)
    table = ddim_table(alphas, steps, eta=eta, prediction_type=prediction_type, final_alpha_cumprod=final)
    std = eta * eta_one_std(at, ap)
    np.testing.assert_allclose(table.std.numpy() ** 2, std**2, rtol=1e-9, atol=4 * EPS)
    for x, m, coef in ((1.0, 0.0, table.sample_coef), (0.0, 1.0, table.output_coef)):
        wanted = ddim_mean(x, m, at, ap, table.std.numpy(), prediction_type)
        size = np.sqrt(ap / at) + np.sqrt(at / (1 - at)) + 1
        assert (np.abs(coef.numpy() - wanted) <= 50 * EPS * size).all()


@property_test
@given(schedules(), st.floats(0.05, 0.99))
def test_the_smallest_feasible_weights_that_an_error_names_are_feasible(schedule, below):
    alphas, steps, final = schedule
    at, ap = alpha_pairs(alphas, steps, final)
    c1, b0 = credit_symbols(at, ap)
    stochastic = eta_one_std(at, ap) > 0
    smallest = np.sqrt((c1[stochastic] / b0[stochastic]) ** 2 - 1)
    # a step between alphas a few roundoffs apart has any small weight, to within rounding
    assume(smallest.min() > 1e-3)
    asked = {"final_alpha_cumprod": final, "credit": "proportionate"}
    with pytest.raises(ValueError, match="smallest that some step reaches") as caught:
        ddim_table(alphas, steps, target_weight=float(smallest.min() * below), **asked)
    some, every = (float(number) for number in re.findall(r"reaches is (\S+?)(?:,|$)", str(caught.value)))
    # the message has six digits
    assert some == pytest.approx(smallest.min(), rel=1e-5) and every == pytest.approx(smallest.max(), rel=1e-5)
    assert bool(ddim_table(alphas, steps, target_weight=some * (1 + 1e-5), **asked).resolved.any())
    table = ddim_table(alphas, steps, target_weight=every * (1 + 1e-5), **asked)
    assert torch.equal(table.resolved, table.trainable)


def test_rows_have_the_layout_that_the_kernels_read():
    # uniform credit on v-prediction: all columns differ
    table = sd_table(20, credit="uniform", prediction_type="v_prediction")
    assert table.rows.dtype == torch.float32 and table.rows.shape == (20, 8) and table.rows.is_contiguous()
    columns = ("sample_coef", "output_coef", "std", "weight", "native_weight", "interval")
    columns += ("log_prob_scale", "log_prob_offset")
    for index, name in enumerate(columns):
        value = getattr(table, name)
        assert value.dtype == torch.float64 and value.shape == (20,)
        assert torch.equal(table.rows[:, index], value.float())
    assert torch.unique(table.rows[3]).numel() == 8


def test_intervals_share_the_trajectory():
    table = sd_table(50)
    assert bool((table.interval == 1 / 50).all())


def test_length_and_immutability():
    table = sd_table(20)
    assert len(table) == 20
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.std = table.std * 2  # pyright: ignore[reportAttributeAccessIssue]


def test_to_moves_every_tensor():
    table = sd_table(20, credit="proportionate")
    moved = table.to("meta")
    tensors = [f.name for f in dataclasses.fields(table) if isinstance(getattr(table, f.name), torch.Tensor)]
    assert "rows" in tensors and len(tensors) == 13
    for name in tensors:
        value = getattr(moved, name)
        assert value.device.type == "meta" and value.dtype == getattr(table, name).dtype
    assert (moved.credit, moved.target_weight, len(moved)) == (table.credit, table.target_weight, 20)
    same = table.to("cpu")
    assert all(torch.equal(getattr(same, name), getattr(table, name)) for name in tensors)


def test_a_deterministic_sampler_is_sampled_and_never_trained():
    table = sd_table(20, eta=0.0)
    assert not bool(table.trainable.any())
    assert bool((table.std == 0).all() and (table.weight == 0).all() and (table.native_weight == 0).all())
    at, ap = alpha_pairs(sd_alphas(), sd_steps(20))
    np.testing.assert_allclose(table.output_coef, np.sqrt(1 - ap) - np.sqrt(ap / at - ap), atol=1e-13)


@pytest.mark.parametrize("credit", CREDITS)
def test_a_last_step_without_noise_is_not_trained(credit):
    table = sd_table(20, credit=credit, final_alpha_cumprod=1.0)
    assert table.trainable.tolist() == [True] * 19 + [False]
    assert float(table.weight[-1]) == 0 and not bool(table.resolved[-1]) and not bool(table.reweighted[-1])
    if credit not in ("native", "published"):
        # the mean is over the steps that have a credit
        expected = float(sd_table(20).native_weight[:-1].mean())
        assert table.target_weight == pytest.approx(expected, rel=1e-12)


def test_final_alpha_defaults_to_the_first():
    alphas, steps = sd_alphas(), sd_steps(20)
    explicit = ddim_table(alphas, steps, final_alpha_cumprod=float(alphas[0]))
    assert torch.equal(sd_table(20).rows, explicit.rows)
    assert not torch.equal(sd_table(20).rows, ddim_table(alphas, steps, final_alpha_cumprod=1.0).rows)


def test_schedules_of_any_dtype_are_computed_in_float64():
    rounded = sd_alphas().float()
    table = ddim_table(rounded, sd_steps(20).int())
    assert torch.equal(table.std, ddim_table(rounded.double(), sd_steps(20)).std)


def build_scheduler(name: str, **settings):
    diffusers = pytest.importorskip("diffusers")
    defaults: dict = dict(SD)
    if name in ("DDIMScheduler", "DDPMScheduler"):
        defaults["clip_sample"] = False
    if name == "PNDMScheduler":
        defaults["skip_prk_steps"] = True
    if name in ("DDIMScheduler", "PNDMScheduler"):
        defaults["set_alpha_to_one"] = False
    return getattr(diffusers, name)(**{**defaults, **settings})


SCHEDULERS = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler")

# what the scheduler itself uses after its last timestep, in its own terms
FINAL_ALPHA = {
    "DDIMScheduler": lambda scheduler: scheduler.final_alpha_cumprod,
    "DDPMScheduler": lambda scheduler: scheduler.one,
    "PNDMScheduler": lambda scheduler: scheduler.final_alpha_cumprod,
    "EulerDiscreteScheduler": lambda scheduler: 1 / (1 + scheduler.sigmas[-1].double() ** 2),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("num_steps", [50, 30, 7])
@pytest.mark.parametrize(
    "spacing",
    [
        {},
        {"timestep_spacing": "leading", "steps_offset": 1},
        {"timestep_spacing": "trailing"},
        {"timestep_spacing": "linspace"},
    ],
    ids=lambda s: s.get("timestep_spacing", "default"),
)
def test_timesteps_are_the_scheduler_s_own(name, num_steps, spacing):
    scheduler = build_scheduler(name, **spacing)
    table = ddim_table.from_scheduler(scheduler, num_steps)
    scheduler.set_timesteps(num_steps)
    # PLMS evaluates one timestep twice; Euler's linspace lies between training timesteps
    own = list(dict.fromkeys(scheduler.timesteps.tolist()))
    assert len(table) == len(own) == num_steps
    if name == "EulerDiscreteScheduler":
        assert max(abs(a - b) for a, b in zip(table.timesteps.tolist(), own, strict=True)) <= 0.5
    else:
        assert table.timesteps.tolist() == own
    # and its alphas
    final = float(FINAL_ALPHA[name](scheduler))
    direct = ddim_table(scheduler.alphas_cumprod, table.timesteps, final_alpha_cumprod=final)
    assert torch.equal(table.rows, direct.rows)


@pytest.mark.parametrize(
    ("name", "settings", "first_alpha"),
    [
        ("DDIMScheduler", {"set_alpha_to_one": False}, True),
        ("DDIMScheduler", {"set_alpha_to_one": True}, False),
        ("PNDMScheduler", {"set_alpha_to_one": False}, True),
        ("PNDMScheduler", {"set_alpha_to_one": True}, False),
        ("DDPMScheduler", {}, False),
        ("EulerDiscreteScheduler", {}, False),
        ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}, True),
    ],
)
def test_final_alpha_is_the_scheduler_s_own(name, settings, first_alpha):
    scheduler = build_scheduler(name, steps_offset=1, timestep_spacing="leading", **settings)
    table = ddim_table.from_scheduler(scheduler, 20)
    scheduler.set_timesteps(20)
    own = float(FINAL_ALPHA[name](scheduler))
    assert own == pytest.approx(float(scheduler.alphas_cumprod[0]) if first_alpha else 1.0, rel=1e-6)
    # with epsilon-prediction a = sqrt(ap / at)
    at = scheduler.alphas_cumprod[table.timesteps].double()
    assert float((table.sample_coef**2 * at)[-1]) == pytest.approx(own, rel=1e-6)
    assert bool(table.trainable[-1]) == first_alpha


@pytest.mark.parametrize("name", SCHEDULERS)
def test_stable_diffusion_s_configuration_gives_its_table(name):
    scheduler = build_scheduler(name, steps_offset=1, timestep_spacing="leading")
    scheduler.set_timesteps(50)
    table = ddim_table.from_scheduler(scheduler, 50)
    assert torch.equal(table.timesteps, sd_steps(50))
    # 1 - alpha is 1e-3 at the last steps, where the scheduler's float32 leaves 6e-5 of it
    torch.testing.assert_close(table.std[:-1], sd_table(50).std[:-1], rtol=1e-3, atol=0)
    # the other arguments reach the table
    settings = {"credit": "proportionate", "target_weight": 0.6, "eta": 0.9}
    passed_on = ddim_table.from_scheduler(scheduler, 50, **settings)
    final = float(FINAL_ALPHA[name](scheduler))
    direct = ddim_table(scheduler.alphas_cumprod, sd_steps(50), final_alpha_cumprod=final, **settings)
    assert torch.equal(passed_on.rows, direct.rows)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_prediction_type_is_the_scheduler_s_own(name, prediction_type):
    if name == "EulerDiscreteScheduler" and prediction_type == "sample":
        pytest.skip("Euler-discrete knows no sample-prediction")
    scheduler = build_scheduler(name, prediction_type=prediction_type, timestep_spacing="trailing")
    table = ddim_table.from_scheduler(scheduler, 10)
    direct = ddim_table(
        scheduler.alphas_cumprod,
        table.timesteps,
        prediction_type=prediction_type,
        final_alpha_cumprod=float(FINAL_ALPHA[name](scheduler)),
    )
    assert torch.equal(table.rows, direct.rows)


def zero_terminal_snr(prediction_type: str):
    return build_scheduler(
        "DDIMScheduler",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        prediction_type=prediction_type,
    )


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_zero_terminal_snr_works_with_native_credit(prediction_type):
    scheduler = zero_terminal_snr(prediction_type)
    assert float(scheduler.alphas_cumprod[-1]) == 0
    # at eta = 1 the first step forgets x; diffusers' own step may round into the root of a negative number there
    table = ddim_table.from_scheduler(scheduler, 20)
    assert bool(torch.isfinite(table.rows).all())
    assert float(table.std[0] ** 2) == pytest.approx(1 - float(scheduler.alphas_cumprod[949]), rel=4 * EPS)
    assert float(table.sample_coef[0]) == pytest.approx(0, abs=1e-7)
    table = ddim_table.from_scheduler(scheduler, 20, eta=0.9)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(20)
    x, m, z = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for row, timestep in enumerate(scheduler.timesteps):
        theirs = scheduler.step(m, timestep, x, eta=0.9, variance_noise=z, return_dict=False)[0]
        ours = table.sample_coef[row] * x + table.output_coef[row] * m + table.std[row] * z
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("credit", [credit for credit in CREDITS if credit != "native"])
def test_zero_terminal_snr_has_no_other_credit(credit):
    with pytest.raises(ValueError, match=rf"credit='{credit}'.*zero terminal SNR.*use credit='native'"):
        ddim_table.from_scheduler(zero_terminal_snr("v_prediction"), 20, credit=credit)


def test_zero_terminal_snr_has_no_epsilon():
    with pytest.raises(ValueError, match=r"zero terminal SNR.*v-prediction.*rescale_betas_zero_snr=False"):
        ddim_table.from_scheduler(zero_terminal_snr("epsilon"), 20)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("DDIMScheduler", {"clip_sample": True}, "clip_sample=True.*clip_sample=False"),
        ("DDPMScheduler", {"clip_sample": True}, "clip_sample=True.*clip_sample=False"),
        ("DDIMScheduler", {"thresholding": True}, "thresholding=True.*thresholding=False"),
        (
            "DDPMScheduler",
            {"variance_type": "learned_range"},
            "variance_type='learned_range'.*variance_type='fixed_small'",
        ),
        ("DDPMScheduler", {"variance_type": "learned"}, "variance_type='learned'.*variance_type='fixed_small'"),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, "use_karras_sigmas=True.*use_karras_sigmas=False"),
        ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}, "use_exponential_sigmas=True.*_sigmas=False"),
        ("EulerDiscreteScheduler", {"use_beta_sigmas": True}, "use_beta_sigmas=True.*use_beta_sigmas=False"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "timestep_type='continuous'.*='discrete'"),
    ],
)
def test_schedulers_that_are_not_affine_are_refused(name, settings, message):
    if "use_beta_sigmas" in settings:
        pytest.importorskip("scipy")
    with pytest.raises(ValueError, match=rf"{name} has {message}"):
        ddim_table.from_scheduler(build_scheduler(name, **settings), 20)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"])
def test_fixed_variances_are_accepted(variance_type):
    assert len(ddim_table.from_scheduler(build_scheduler("DDPMScheduler", variance_type=variance_type), 20)) == 20


def test_other_scheduler_classes_are_refused():
    diffusers = pytest.importorskip("diffusers")
    message = r"LMSDiscreteScheduler is not .*accepted are DDIMScheduler, .*DDIMScheduler.from_config"
    with pytest.raises(ValueError, match=message):
        ddim_table.from_scheduler(diffusers.LMSDiscreteScheduler(**SD), 20)


@pytest.mark.parametrize("num_steps", [0, -3, 1001])
def test_step_counts_out_of_range_are_refused(num_steps):
    with pytest.raises(ValueError, match=rf"num_inference_steps={num_steps} must lie between 1 and .*1000 training"):
        ddim_table.from_scheduler(build_scheduler("DDIMScheduler"), num_steps)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"credit": "fair"}, "credit='fair' is not known; choose one of native, .*proportionate"),
        (
            {"prediction_type": "velocity"},
            "prediction_type='velocity' is not known; choose one of epsilon, v_prediction",
        ),
        ({"eta": -0.5}, "eta=-0.5 is not a noise level; give a finite number >= 0"),
        ({"eta": math.nan}, "eta=nan is not a noise level"),
        ({"eta": math.inf}, "eta=inf is not a noise level"),
        (
            {"target_weight": 1.0},
            "target_weight=1.0 has no meaning with credit='native'; leave it out or choose another",
        ),
        ({"final_alpha_cumprod": 0.5}, "final_alpha_cumprod=0.5 must lie between the last timestep's 0.99.* and 1"),
        ({"final_alpha_cumprod": 1.001}, "final_alpha_cumprod=1.001 must lie between"),
        ({"final_alpha_cumprod": math.nan}, "final_alpha_cumprod=nan must lie between"),
        ({"credit": "variance", "target_weight": 0.0}, "target_weight=0.0 is not a credit; give a finite number > 0"),
        ({"credit": "uniform", "target_weight": -1.0}, "target_weight=-1.0 is not a credit"),
        ({"credit": "published", "target_weight": math.inf}, "target_weight=inf is not a credit"),
        ({"credit": "proportionate", "target_weight": math.nan}, "target_weight=nan is not a credit"),
        ({"credit": "variance", "target_weight": 0.3}, "target_weight=0.3 is below .*is 0.374.*step reaches is 3.27"),
        ({"credit": "published", "target_weight": 0.3}, "target_weight=0.3 is below what any step can have"),
        ({"credit": "uniform", "eta": 0.0}, "credit='uniform' needs a stochastic sampler, .*use eta > 0"),
        ({"credit": "proportionate", "eta": 0.0}, "credit='proportionate' needs a stochastic sampler, .*use eta > 0"),
    ],
)
def test_senseless_requests_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        sd_table(50, **kwargs)


def test_too_much_noise_names_the_largest_eta():
    with pytest.raises(ValueError, match=r"eta=2.0 asks for more variance") as caught:
        sd_table(50, eta=2.0)
    largest = float(re.search(r"at most (\S+)", str(caught.value)).group(1))
    assert largest > 1
    sd_table(50, eta=largest * (1 - 1e-5))
    with pytest.raises(ValueError, match="asks for more variance"):
        sd_table(50, eta=largest * (1 + 1e-5))


@pytest.mark.parametrize(
    ("alphas", "message"),
    [
        ([0.9, 0.9, 0.5], "must decrease strictly .*given 0.9 ... 0.5"),
        ([0.5, 0.7, 0.9], "must decrease strictly"),
        ([1.0, 0.5, 0.2], r"lie in \[0, 1\); given 1 ... 0.2"),
        ([0.9, 0.5, -0.1], "lie in .*given 0.9 ... -0.1"),
        ([0.9, math.nan, 0.1], "must decrease strictly"),
        ([[0.9, 0.5, 0.1]], r"1-D and not empty; given shapes \(1, 3\)"),
        ([], r"1-D and not empty; given shapes \(0,\)"),
    ],
)
def test_alphas_must_fall_from_below_one(alphas, message):
    with pytest.raises(ValueError, match=message):
        ddim_table(torch.tensor(alphas, dtype=torch.float64), torch.tensor([2, 1, 0]))


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([1, 2], r"decrease strictly and lie in 0..2; given \[1, 2\]"),
        ([2, 2], "decrease strictly"),
        ([3, 1], r"lie in 0..2; given \[3, 1\]"),
        ([1, -1], "lie in 0..2"),
        ([1.5, 0.0], r"whole numbers \(indices into alphas_cumprod\); given \[1.5, 0.0\]"),
        ([], r"1-D and not empty; given shapes \(3,\) and \(0,\)"),
        ([[2, 1]], r"1-D and not empty; given shapes \(3,\) and \(1, 2\)"),
    ],
)
def test_timesteps_must_fall_within_the_schedule(steps, message):
    with pytest.raises(ValueError, match=message):
        ddim_table(torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64), torch.tensor(steps))


def test_the_documented_example_is_ddpm_s_sampler():
    """docs/samplers.md builds a table by hand: the mean of DDIM at eta = 1, the variance beta."""
    page = Path(__file__).parents[1] / "docs" / "samplers.md"
    (example,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    names: dict = {}
    exec(example, names)
    table, betas = names["table"], names["betas"]
    ddim = ddim_table(torch.cumprod(1 - betas, 0), table.timesteps, final_alpha_cumprod=1.0)
    torch.testing.assert_close(table.sample_coef, ddim.sample_coef, rtol=1e-12, atol=0)
    torch.testing.assert_close(table.output_coef, ddim.output_coef, rtol=1e-9, atol=1e-12)
    assert bool((table.std[:-1] > ddim.std[:-1]).all()) and float(table.std[-1]) == 0
    assert bool(torch.isfinite(names["x"]).all()) and names["x"].shape == (2, 4, 8, 8)

    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(beta_schedule="linear", clip_sample=False, variance_type="fixed_large")
    scheduler.set_timesteps(50)
    assert torch.equal(scheduler.timesteps, table.timesteps)
    scheduler.alphas_cumprod = torch.cumprod(1 - betas, 0)
    scheduler.one = scheduler.one.double()
    x, m = torch.randn(2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for row, timestep in enumerate(scheduler.timesteps):
        z = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(row))
        own = torch.Generator().manual_seed(row)
        theirs = scheduler.step(m, timestep, x, generator=own, return_dict=False)[0]
        ours = table.sample_coef[row] * x + table.output_coef[row] * m + table.std[row] * z
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)
