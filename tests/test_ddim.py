"""Stochastic DDIM's tables: the coefficients, the marginals, zero terminal SNR, the errors."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sampler_cases import (
    CREDITS,
    EPS,
    PREDICTION_TYPES,
    SD,
    alpha_pairs,
    ddim_mean,
    drawn_table,
    equal,
    eta_one_std,
    etas,
    output_for,
    prediction_types,
    property_test,
    schedules,
    sd_alphas,
    sd_steps,
    sd_table,
    split,
    target_factors,
)

from pcpo_fast.samplers import StepTable


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


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("final", [None, 1.0])
def test_rows_are_ddim_s_equation(prediction_type, eta, final):
    alphas, steps = sd_alphas(), sd_steps(50)
    at, ap = alpha_pairs(alphas, steps, final)
    table = StepTable.ddim(alphas, steps, eta=eta, prediction_type=prediction_type, final_alpha_cumprod=final)
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
        table = StepTable.from_scheduler(scheduler, num_steps, eta=eta)
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


@property_test
@given(schedules(), st.just(0.0) | st.floats(1e-6, 1.0), prediction_types)
def test_random_rows_are_ddim_s_equation(schedule, eta, prediction_type):
    alphas, steps, final = schedule
    at, ap = alpha_pairs(alphas, steps, final)
    table = StepTable.ddim(alphas, steps, eta=eta, prediction_type=prediction_type, final_alpha_cumprod=final)
    std = eta * eta_one_std(at, ap)
    np.testing.assert_allclose(table.std.numpy() ** 2, std**2, rtol=1e-9, atol=4 * EPS)
    for x, m, coef in ((1.0, 0.0, table.sample_coef), (0.0, 1.0, table.output_coef)):
        wanted = ddim_mean(x, m, at, ap, table.std.numpy(), prediction_type)
        size = np.sqrt(ap / at) + np.sqrt(at / (1 - at)) + 1
        assert (np.abs(coef.numpy() - wanted) <= 50 * EPS * size).all()


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
        if credit in ("constant", "proportionate"):
            assert table.target_weight == pytest.approx(reference.target_weight, rel=1e-12)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_epsilon_scale_is_the_derivative_of_epsilon(prediction_type):
    at, _ = alpha_pairs(sd_alphas(), sd_steps(20))
    difference = split(0.3, 2.5, at, prediction_type)[1] - split(0.3, 1.5, at, prediction_type)[1]
    np.testing.assert_allclose(sd_table(20, prediction_type=prediction_type).epsilon_scale, difference, rtol=1e-12)


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
        table = StepTable.ddim(
            torch.tensor([at], dtype=torch.float64),
            torch.tensor([0]),
            final_alpha_cumprod=ap,
            credit="published",
            target_weight=target,
        )
        terminal = StepTable.ddim(
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


def test_intervals_share_the_trajectory():
    table = sd_table(50)
    assert bool((table.interval == 1 / 50).all())


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
    assert float(table.weight[-1]) == 0
    if credit not in ("native", "published"):
        # the mean is over the steps that have a credit
        expected = float(sd_table(20).native_weight[:-1].mean())
        assert table.target_weight == pytest.approx(expected, rel=1e-12)


def test_final_alpha_defaults_to_the_first():
    alphas = sd_alphas()
    explicit = sd_table(20, final_alpha_cumprod=float(alphas[0]))
    assert torch.equal(sd_table(20).rows, explicit.rows)
    assert not torch.equal(sd_table(20).rows, sd_table(20, final_alpha_cumprod=1.0).rows)


def test_schedules_of_any_dtype_are_computed_in_float64():
    rounded = sd_alphas().float()
    table = StepTable.ddim(rounded, sd_steps(20).int())
    assert torch.equal(table.std, StepTable.ddim(rounded.double(), sd_steps(20)).std)
    # plain lists, too, are not rounded on the way
    listed = StepTable.ddim(sd_alphas().tolist(), sd_steps(20).tolist(), credit="native")
    assert equal(listed, sd_table(20))


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
            {"credit": "native", "target_weight": 1.0},
            "target_weight=1.0 has no meaning with credit='native'; leave it out or choose another",
        ),
        ({"final_alpha_cumprod": 0.5}, "final_alpha_cumprod=0.5 must lie between the last timestep's 0.99.* and 1"),
        ({"final_alpha_cumprod": 1.001}, "final_alpha_cumprod=1.001 must lie between"),
        ({"final_alpha_cumprod": math.nan}, "final_alpha_cumprod=nan must lie between"),
        (
            {"credit": "proportionate", "target_weight": 0.0},
            "target_weight=0.0 is not a credit; give a finite number > 0",
        ),
        ({"credit": "constant", "target_weight": -1.0}, "target_weight=-1.0 is not a credit"),
        ({"credit": "published", "target_weight": math.inf}, "target_weight=inf is not a credit"),
        ({"credit": "proportionate", "target_weight": math.nan}, "target_weight=nan is not a credit"),
        (
            {"credit": "proportionate", "target_weight": 0.3},
            "target_weight=0.3 is below .*is 0.374.*step reaches is 3.27",
        ),
        ({"credit": "published", "target_weight": 0.3}, "target_weight=0.3 is below what any step can have"),
        ({"credit": "proportionate", "eta": 0.0}, "credit='proportionate' needs a stochastic sampler, .*use eta > 0"),
        ({"credit": "published", "eta": 0.0}, "credit='published' needs a stochastic sampler, .*use eta > 0"),
        ({"credit": "uniform"}, "credit='uniform' is not known; choose one of native, constant, .*published"),
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
        ([0.9, 0.9, 0.5], r"must decrease strictly .*given \[0.9, 0.9, 0.5\]"),
        ([0.5, 0.7, 0.9], "must decrease strictly"),
        ([1.0, 0.5, 0.2], r"lie in \[0, 1\); given \[1, 0.5, 0.2\]"),
        ([0.9, 0.5, -0.1], r"lie in .*given \[0.9, 0.5, -0.1\]"),
        ([0.9, math.nan, 0.1], "must decrease strictly"),
        ([[0.9, 0.5, 0.1]], r"1-D and not empty; given shapes \(1, 3\)"),
        ([], r"1-D and not empty; given shapes \(0,\)"),
    ],
)
def test_alphas_must_fall_from_below_one(alphas, message):
    with pytest.raises(ValueError, match=message):
        StepTable.ddim(torch.tensor(alphas, dtype=torch.float64), torch.tensor([2, 1, 0]))


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([1, 2], r"decrease strictly and lie in 0..2; given \[1, 2\]"),
        ([2, 2], "decrease strictly"),
        ([3, 1], r"lie in 0..2; given \[3, 1\]"),
        ([1, -1], "lie in 0..2"),
        ([1.5, 0.0], r"whole numbers \(indices into alphas_cumprod\); given \[1.5, 0\]"),
        ([], r"1-D and not empty; given shapes \(3,\) and \(0,\)"),
        ([[2, 1]], r"1-D and not empty; given shapes \(3,\) and \(1, 2\)"),
    ],
)
def test_timesteps_must_fall_within_the_schedule(steps, message):
    with pytest.raises(ValueError, match=message):
        StepTable.ddim(torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64), torch.tensor(steps))


def test_what_is_no_schedule_is_sent_to_the_right_door():
    diffusers = pytest.importorskip("diffusers")
    for scheduler in (diffusers.DDIMScheduler(), diffusers.FlowMatchEulerDiscreteScheduler()):
        name = type(scheduler).__name__
        with pytest.raises(ValueError, match=f"alphas_cumprod is a {name}; .*with StepTable.from_scheduler"):
            StepTable.ddim(scheduler, sd_steps(20))
        with pytest.raises(ValueError, match=f"sigmas is a {name}; .*with StepTable.from_scheduler"):
            StepTable.flow(scheduler)
    with pytest.raises(ValueError, match="alphas_cumprod is a str, not real numbers; give"):
        StepTable.ddim("scaled_linear", sd_steps(20))


def test_errors_about_long_schedules_are_short():
    upwards = torch.arange(1000)
    for alphas, steps in (
        (sd_alphas(), upwards),
        (sd_alphas(), upwards + 0.5),
        (sd_alphas(), -upwards),
        (sd_alphas().flip(0), upwards),
    ):
        with pytest.raises(ValueError) as caught:
            StepTable.ddim(alphas, steps)
        assert len(str(caught.value)) < 400 and "..." in str(caught.value)


# zero terminal SNR


def without_signal(alpha: float, **kwargs) -> StepTable:
    """Twenty steps, the first of them from a timestep with hardly any alpha or none."""
    alphas = torch.cat([sd_alphas(), torch.tensor([alpha], dtype=torch.float64)])
    return StepTable.ddim(alphas, torch.cat([torch.tensor([1000]), sd_steps(20)[1:]]), **kwargs)


@pytest.mark.parametrize("alpha", [0.0, 2.0**-24, 9e-7])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_a_step_without_signal_keeps_its_own_credit_and_counts_in_no_mean(prediction_type, alpha):
    native = without_signal(alpha, credit="native", prediction_type=prediction_type)
    rest = StepTable.ddim(sd_alphas(), sd_steps(20)[1:], credit="native", prediction_type=prediction_type)
    assert float(native.epsilon_scale[0]) == 0 and math.isnan(float(native.epsilon_weight[0]))
    for credit in ("constant", "proportionate", "published"):
        table = without_signal(alpha, credit=credit, prediction_type=prediction_type)
        assert float(table.weight[0]) == float(native.weight[0]) and float(table.std[0]) == float(native.std[0])
        assert bool(table.trainable.all()) and bool(table.rows.isfinite().all())
        if credit != "published":
            assert table.target_weight == pytest.approx(float(rest.epsilon_weight.mean()), rel=1e-12)
            assert bool(((table.epsilon_weight[1:] / table.target_weight - 1).abs() < 1e-12).all())


def test_a_schedule_of_one_step_without_signal_keeps_its_credit():
    alphas = torch.tensor([0.5, 0.0], dtype=torch.float64)
    settings = {"prediction_type": "v_prediction", "final_alpha_cumprod": 0.5}
    native = StepTable.ddim(alphas, [1], credit="native", **settings)
    for credit in ("constant", "proportionate", "published"):
        assert equal(StepTable.ddim(alphas, [1], credit=credit, **settings), native)


@pytest.mark.parametrize("alpha", [0.0, 2.0**-24, 9e-7])
@pytest.mark.parametrize("credit", CREDITS)
def test_epsilon_prediction_needs_a_signal(credit, alpha):
    with pytest.raises(ValueError, match=r"at timestep 1000 \(zero terminal SNR\): epsilon says .*v-prediction"):
        without_signal(alpha, credit=credit)
    without_signal(1.1e-6, credit=credit)
