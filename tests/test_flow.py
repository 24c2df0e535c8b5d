"""Tables of flow models: the coefficients against the papers' own formulas, looser schedules, the errors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sampler_cases import EPS, FLOW_SDES, equal, flow_rows, flow_table, levels, property_test

from pcpo_fast.samplers import NOISE_LEVELS, StepTable, shifted_sigmas


@pytest.mark.parametrize("sde", FLOW_SDES)
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [2, 10, 50])
def test_rows_are_the_papers_steps(num_steps, shift, sde):
    table = flow_table(sde, num_steps, shift)
    a, b, std = flow_rows(shifted_sigmas(num_steps, shift).numpy(), sde, NOISE_LEVELS[sde])
    np.testing.assert_allclose(table.sample_coef[:-1], a[:-1], rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(table.output_coef[:-1], b[:-1], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(table.std[:-1], std[:-1], rtol=1e-13)
    np.testing.assert_allclose(table.native_weight[:-1], -b[:-1] / std[:-1], rtol=1e-12)


@property_test
@given(levels(), st.sampled_from(FLOW_SDES), st.floats(0.01, 0.95))
def test_random_rows_are_the_papers_steps(sigmas, sde, noise_level):
    table = StepTable.flow(sigmas.tolist(), sde=sde, noise_level=noise_level)
    a, b, std = (column[:-1] for column in flow_rows(sigmas, sde, noise_level))
    # the papers' forms divide by t and 1 - t, which are at least 1e-3 here
    size = 1e3 * EPS * (1 + np.abs(a) + np.abs(b))
    assert (np.abs(table.sample_coef.numpy()[:-1] - a) <= size).all()
    assert (np.abs(table.output_coef.numpy()[:-1] - b) <= size).all()
    np.testing.assert_allclose(table.std[:-1], std, rtol=1e-12)


@property_test
@given(levels(), st.just(0.0) | st.floats(1e-6, 1.0))
def test_cps_keeps_the_marginals_of_the_flow(sigmas, noise_level):
    """x = (1 - t) x0 + t epsilon with v = epsilon - x0 goes to 1 - t' of x0 and variance t'^2."""
    table = StepTable.flow(sigmas.tolist(), sde="cps", noise_level=noise_level)
    t, t_next = sigmas[:-1], sigmas[1:]
    a, b, std = (getattr(table, name).numpy() for name in ("sample_coef", "output_coef", "std"))
    np.testing.assert_allclose(a * (1 - t) - b, 1 - t_next, atol=8 * EPS)
    np.testing.assert_allclose((a * t + b) ** 2 + std**2, t_next**2, atol=8 * EPS)


@property_test
@given(levels(), st.sampled_from(FLOW_SDES))
def test_without_noise_every_sampler_is_the_ode(sigmas, sde):
    table = StepTable.flow(sigmas.tolist(), sde=sde, noise_level=0.0)
    assert bool((table.sample_coef == 1).all() and (table.std == 0).all() and (table.weight == 0).all())
    np.testing.assert_array_equal(table.output_coef, np.diff(sigmas))
    assert not bool(table.trainable.any())


@pytest.mark.parametrize("sde", FLOW_SDES)
@pytest.mark.parametrize(
    ("num_steps", "credit"), [(1, "native"), (2, "native"), (10, "native"), (2, "proportionate"), (10, "proportionate")]
)
def test_the_last_step_is_the_ode_s(num_steps, credit, sde):
    table = flow_table(sde, num_steps, credit=credit)
    last = float(table.interval[-1])
    assert (float(table.sample_coef[-1]), float(table.output_coef[-1]), float(table.std[-1])) == (1.0, -last, 0.0)
    assert table.trainable.tolist() == [True] * (num_steps - 1) + [False]
    assert float(table.weight[-1]) == float(table.native_weight[-1]) == 0


def test_the_first_step_of_flow_takes_the_next_t_in_the_denominator():
    table = flow_table("flow", 10, 1.0, noise_level=0.7)
    # g^2 h = 0.49 / (1 - 0.9) 0.1
    assert float(table.sample_coef[0]) == pytest.approx(1 - 0.49 / 2, rel=1e-14)
    assert float(table.std[0]) == pytest.approx(0.7, rel=1e-14)
    assert float(table.output_coef[0]) == float(-table.interval[0])


def test_columns():
    for sde in FLOW_SDES:
        table = flow_table(sde, 10)
        sigmas = shifted_sigmas(10, 3.0)
        assert table.timesteps.dtype == torch.float32
        assert torch.equal(table.timesteps, (1000 * sigmas[:-1]).float())
        assert torch.equal(table.interval, sigmas[:-1] - sigmas[1:])
        assert float(table.interval.sum()) == pytest.approx(1, abs=4 * EPS)
        assert bool((table.epsilon_scale == 1).all())
        assert table.rows.shape == (10, 8) and len(table) == 10 and bool(torch.isfinite(table.rows).all())
    assert torch.equal(flow_table("flow", 10, num_train_timesteps=500).timesteps, (500 * sigmas[:-1]).float())


def test_any_list_of_numbers_is_taken_in_float64():
    wanted = flow_table("flow", 7)
    sigmas = shifted_sigmas(7, 3.0)
    for same in (sigmas.tolist(), tuple(sigmas.tolist()), sigmas.numpy(), sigmas.clone().requires_grad_()):
        assert equal(StepTable.flow(same, noise_level=0.7, credit="native"), wanted)
    rounded = StepTable.flow(sigmas.float(), noise_level=0.7)
    assert torch.equal(rounded.interval, -sigmas.float().double().diff())


@pytest.mark.parametrize("shift", [0.5, 1.0, 1.7, 3.0, 12.0])
@pytest.mark.parametrize("num_steps", [1, 10, 16])
def test_shifted_sigmas(num_steps, shift):
    sigmas = shifted_sigmas(num_steps, shift)
    assert sigmas.dtype == torch.float64 and sigmas.shape == (num_steps + 1,)
    assert sigmas[0] == 1 and sigmas[-1] == 0 and bool((sigmas.diff() < 0).all())
    # the odds of noise to signal are `shift` times what they were
    s = np.linspace(1, 0, num_steps + 1)[1:]
    odds = sigmas.numpy()[1:] / (1 - sigmas.numpy()[1:])
    np.testing.assert_allclose(odds, shift * s / (1 - s), rtol=1e-12)


def test_shifted_sigmas_start_at_exactly_one():
    for shift in np.random.default_rng(0).uniform(0.01, 20, 2000):
        assert float(shifted_sigmas(2, float(shift))[0]) == 1


@pytest.mark.parametrize("number", [math.inf, math.nan, 0, -1])
def test_impossible_numbers_of_training_steps_are_refused(number):
    with pytest.raises(ValueError, match=r"num_train_timesteps=.* must be positive"):
        flow_table("flow", 10, num_train_timesteps=number)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sde": "ode"}, "sde='ode' is not known; choose one of flow, dance, cps"),
        ({"credit": "fair"}, "credit='fair' is not known; choose one of native, constant, proportionate, published"),
        ({"last_step": "none"}, "last_step='none' is not known; choose one of ode, noise"),
        ({"noise_level": -0.1}, "noise_level=-0.1 is not a noise level; give finite numbers >= 0"),
        ({"noise_level": math.nan}, "noise_level=nan is not a noise level"),
        ({"noise_level": math.inf}, "noise_level=inf is not a noise level"),
        (
            {"noise_level": [0.7] * 9},
            r"noise_level has shape \(9,\) and the table 10 steps; give one number, or",
        ),
        ({"noise_level": [[0.7]]}, r"noise_level has shape \(1, 1\)"),
        ({"noise_level": [0.7] * 9 + [-1.0]}, "noise_level=-1.0 is not a noise level"),
        ({"noise_level": "much"}, "noise_level is a str, not real numbers; give a number or"),
        ({"sde": "cps", "noise_level": 2.0}, "noise_level=2.0 is too much for sde='cps', .*give less than 2"),
        ({"target_weight": 4.0}, "target_weight=4.0 has no meaning with credit='native'; leave it out or choose"),
        ({"credit": "proportionate", "target_weight": 0.0}, "target_weight=0.0 is not a credit; give .* > 0"),
        ({"credit": "proportionate", "target_weight": math.nan}, "target_weight=nan is not a credit"),
        ({"credit": "proportionate", "noise_level": 0.0}, "needs a stochastic sampler, .*noise_level > 0"),
        ({"credit": "published", "noise_level": 0.0}, "credit='published' needs a stochastic sampler"),
        ({"credit": "proportionate", "num_steps": 1}, "needs a stochastic sampler, .*at least 2 steps"),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0 must be positive"),
        ({"num_steps": 0}, "num_inference_steps=0 must be a whole number of at least 1"),
        ({"num_steps": 2.5}, "num_inference_steps=2.5 must be a whole number of at least 1"),
        ({"shift": 0.0}, "shift=0.0 is not a shift; give a finite number > 0"),
        ({"shift": math.inf}, "shift=inf is not a shift"),
    ],
)
def test_senseless_requests_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        flow_table(**kwargs)


# looser schedules


@property_test
@given(
    levels([(0.999999, 0.0), (0.6, 0.0), (1.0, 0.1), (0.8, 0.3)]),
    st.sampled_from(FLOW_SDES),
    st.sampled_from(["ode", "noise"]),
)
def test_schedules_may_lie_anywhere_between_one_and_zero(sigmas, sde, last_step):
    table = StepTable.flow(sigmas, sde=sde, last_step=last_step, num_train_timesteps=500)
    # 0.999999 counts as 1
    second = np.where(sigmas[:-1] > 1 - 1e-5, sigmas[1:], sigmas[:-1])
    t, t_next, nu = sigmas[:-1], sigmas[1:], NOISE_LEVELS[sde]
    g = nu * np.sqrt(t / (1 - second)) if sde == "flow" else nu
    if sde == "cps":
        c = t_next * math.cos(nu * math.pi / 2)
        a, b, std = 1 - t_next + c, c * (1 - t) - (1 - t_next) * t, t_next * math.sin(nu * math.pi / 2)
    else:
        half = g**2 * (t - t_next) / (2 * t)
        a, b, std = 1 - half, -(t - t_next) - half * (1 - t), g * np.sqrt(t - t_next)
    if sigmas[-1] == 0 and last_step == "ode":
        a[-1], b[-1], std[-1] = 1, -t[-1], 0
    np.testing.assert_allclose(table.sample_coef, a, rtol=0, atol=1e-12 * (1 + np.abs(a).max()))
    np.testing.assert_allclose(table.output_coef, b, rtol=0, atol=1e-12)
    np.testing.assert_allclose(table.std, std, rtol=1e-12)
    np.testing.assert_allclose(table.interval, t - t_next, rtol=1e-15)
    np.testing.assert_allclose(table.timesteps, 500 * t, rtol=1e-6)
    assert bool(table.trainable[:-1].all())


def test_a_start_just_below_one_gives_the_noise_of_a_start_at_one():
    sigmas = shifted_sigmas(20, 5.0)
    for first in (0.999999, float(np.float32(0.999999))):
        near = sigmas.clone()
        near[0] = first
        torch.testing.assert_close(StepTable.flow(near).std, StepTable.flow(sigmas).std, rtol=1e-4, atol=0)
    # a level that a long schedule has is not taken for 1
    long = StepTable.flow(shifted_sigmas(1000, 12.0), noise_level=0.7, credit="native")
    t = shifted_sigmas(1000, 12.0)[1]
    assert float(long.std[1]) == pytest.approx(0.7 * math.sqrt(t / (1 - t) * long.interval[1]), rel=1e-12)


@pytest.mark.parametrize("sde", FLOW_SDES)
def test_the_last_step_may_draw_noise(sde):
    ode, noise = (flow_table(sde, 10, last_step=last_step) for last_step in ("ode", "noise"))
    assert equal(noise, ode, rows=slice(0, 9))
    a, b, std = flow_rows(shifted_sigmas(10, 3.0).numpy(), sde, NOISE_LEVELS[sde])
    assert float(noise.std[-1]) == pytest.approx(std[-1], rel=1e-13)
    assert float(noise.sample_coef[-1]) == pytest.approx(a[-1], rel=1e-13)
    assert float(noise.output_coef[-1]) == pytest.approx(b[-1], rel=1e-13)
    assert bool(noise.trainable[-1]) == (sde != "cps") and equal(noise, ode) == (sde == "cps")


@pytest.mark.parametrize("last_step", ["ode", "noise"])
@pytest.mark.parametrize("sde", FLOW_SDES)
def test_a_schedule_that_ends_above_zero_is_trained_to_its_end(sde, last_step):
    sigmas = shifted_sigmas(10, 3.0)
    table = StepTable.flow(sigmas[:-1], sde=sde, credit="native", last_step=last_step)
    assert bool(table.trainable.all())
    assert equal(table, flow_table(sde, 10), rows=slice(0, 9))
    torch.testing.assert_close(table.std, flow_table(sde, 10).std[:-1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("sde", FLOW_SDES)
def test_a_noise_level_per_step(sde):
    noise = [0.5, 0.0, 0.8, 0.2, 0.0, 0.9, 0.4, 0.1, 0.3, 0.6]
    table = flow_table(sde, 10, noise_level=noise)
    for step, level in enumerate(noise):
        assert equal(table, flow_table(sde, 10, noise_level=level), rows=slice(step, step + 1))
    assert table.trainable[:-1].tolist() == [level > 0 for level in noise[:-1]]
    for same in (torch.tensor(noise), np.array(noise), tuple(noise)):
        given = flow_table(sde, 10, noise_level=same)
        torch.testing.assert_close(given.std, table.std, rtol=1e-6, atol=0)
    # a step without noise has no credit
    for credit in ("constant", "proportionate"):
        weight = flow_table(sde, 10, noise_level=noise, credit=credit).weight
        assert torch.equal(weight > 0, table.trainable)


def test_the_noise_levels_of_the_authors_are_the_default():
    for sde, level in {"flow": 0.7, "dance": 0.3, "cps": 0.8}.items():
        sigmas = shifted_sigmas(10, 3.0)
        assert equal(StepTable.flow(sigmas, sde=sde), StepTable.flow(sigmas, sde=sde, noise_level=level))
    assert equal(StepTable.flow(sigmas), StepTable.flow(sigmas, sde="flow"))


def test_cps_takes_all_its_noise_anew_at_one():
    table = flow_table("cps", 10, noise_level=1.0)
    torch.testing.assert_close(table.std[:-1], shifted_sigmas(10, 3.0)[1:-1], rtol=1e-15, atol=0)


@pytest.mark.parametrize("noise_level", [1.01, 1.5, 1.99])
def test_cps_beyond_one_turns_the_predicted_noise_around(noise_level):
    table = flow_table("cps", 10, noise_level=noise_level)
    a, b, std = flow_rows(shifted_sigmas(10, 3.0).numpy(), "cps", noise_level)
    np.testing.assert_allclose(table.sample_coef, a, atol=1e-14)
    np.testing.assert_allclose(table.output_coef, b, atol=1e-14)
    np.testing.assert_allclose(table.std, std, atol=1e-14)


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([1.0], r"shape \(T \+ 1,\) with T >= 1; given shape \(1,\)"),
        ([], r"given shape \(0,\)"),
        (0.5, r"given shape \(\)"),
        ([[1.0, 0.0]], r"given shape \(1, 2\)"),
        ([1.0, 0.5, 0.5, 0.0], r"decrease strictly and lie in \[0, 1\]; given \[1, 0.5, 0.5, 0\]. shifted_s"),
        ([0.0, 0.5, 1.0], "decrease strictly"),
        ([1.01, 0.5, 0.0], r"lie in \[0, 1\]; given \[1.01, 0.5, 0\]"),
        ([1.0, 0.5, -0.01], "decrease strictly"),
        ([1.0, math.nan, 0.0], "given .*nan"),
        (np.linspace(1.8, 0, 9), r"given \[1.8, 1.575, 1.35, ..., 0.45, 0.225, 0\]"),
        ("shifted", "sigmas is a str, not real numbers; give"),
    ],
)
def test_sigmas_must_fall_within_zero_and_one(sigmas, message):
    with pytest.raises(ValueError, match=message):
        StepTable.flow(sigmas, noise_level=0.7)
