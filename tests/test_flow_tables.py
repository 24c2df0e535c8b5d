"""Flow tables: the coefficients against the papers' own formulas, credit, windows, the schedulers, the errors.

Everything is float64 unless it says otherwise: a tolerance is a multiple of its roundoff (2.2e-16) times the size of
the terms that cancel.
"""

import dataclasses
import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pcpo_fast.tables import CREDITS, FLOW_CREDITS, FLOW_SDES, StepTable, ddim_table, flow_table, shifted_sigmas

EPS = float(np.finfo(np.float64).eps)
COLUMNS = [field.name for field in dataclasses.fields(StepTable)]
# what each paper's authors use
NOISE = {"flow": 0.7, "dance": 0.3, "cps": 0.8}

property_test = settings(max_examples=150, deadline=None, derandomize=True)


def flow_grpo_step(x, v, t, t_next, noise_level, second):
    """arXiv 2505.05470, equation 9 with the sign of its dt: the velocity, less half g^2 times the score."""
    g2 = noise_level**2 * t / (1 - np.where(t == 1, second, t))
    score = -(x + (1 - t) * v) / t
    return x - (t - t_next) * (v - g2 / 2 * score), np.sqrt(g2) * np.sqrt(t - t_next)


def dance_grpo_step(x, v, t, t_next, noise_level, second):
    """arXiv 2505.07818: the score from the predicted sample."""
    predicted = x - t * v
    score = -(x - (1 - t) * predicted) / t**2
    return x + (t_next - t) * (v - noise_level**2 / 2 * score), noise_level * np.sqrt(t - t_next)


def cps_step(x, v, t, t_next, noise_level, second):
    """arXiv 2509.05952: the predicted sample and noise, mixed again at t', with a part of the noise drawn anew."""
    sample, noise = x - t * v, x + (1 - t) * v
    std = t_next * math.sin(noise_level * math.pi / 2)
    return (1 - t_next) * sample + np.sqrt(np.maximum(t_next**2 - std**2, 0)) * noise, std


STEPS = {"flow": flow_grpo_step, "dance": dance_grpo_step, "cps": cps_step}


def paper_rows(sigmas, sde, noise_level):
    """a, b, s by the papers, every row with its noise. The step is linear: (1, 0) and (0, 1) give its coefficients."""
    t, t_next = np.asarray(sigmas)[:-1], np.asarray(sigmas)[1:]
    (a, std), (b, _) = (STEPS[sde](x, v, t, t_next, noise_level, sigmas[1]) for x, v in ((1.0, 0.0), (0.0, 1.0)))
    return a, b, std


def build(sde="flow", num_steps=10, shift=3.0, **kwargs) -> StepTable:
    return flow_table(shifted_sigmas(num_steps, shift), sde=sde, **{"noise_level": NOISE.get(sde, 0.5), **kwargs})


def equal(table: StepTable, other: StepTable, rows=slice(None), leave_out=()) -> bool:
    """Bit for bit, in every column."""
    return all(
        torch.equal(getattr(table, name)[rows], getattr(other, name)[rows])
        for name in COLUMNS
        if isinstance(getattr(table, name), torch.Tensor) and name not in leave_out
    )


@st.composite
def levels(draw):
    """Sigmas of a random schedule of 1 to 12 steps."""
    gaps = np.array(draw(st.lists(st.floats(0.02, 1.0), min_size=1, max_size=12)))
    inner = 1 - np.cumsum(gaps / gaps.sum())[:-1]
    return np.concatenate([[1.0], inner, [0.0]])


@pytest.mark.parametrize("sde", FLOW_SDES)
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [2, 10, 50])
def test_rows_are_the_papers_steps(num_steps, shift, sde):
    table = build(sde, num_steps, shift)
    a, b, std = paper_rows(shifted_sigmas(num_steps, shift).numpy(), sde, NOISE[sde])
    np.testing.assert_allclose(table.sample_coef[:-1], a[:-1], rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(table.output_coef[:-1], b[:-1], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(table.std[:-1], std[:-1], rtol=1e-13)
    np.testing.assert_allclose(table.native_weight[:-1], -b[:-1] / std[:-1], rtol=1e-12)


@property_test
@given(levels(), st.sampled_from(FLOW_SDES), st.floats(0.01, 0.95))
def test_random_rows_are_the_papers_steps(sigmas, sde, noise_level):
    table = flow_table(sigmas.tolist(), sde=sde, noise_level=noise_level)
    a, b, std = (column[:-1] for column in paper_rows(sigmas, sde, noise_level))
    # the papers' forms divide by t and 1 - t, which are at least 1e-3 here
    size = 1e3 * EPS * (1 + np.abs(a) + np.abs(b))
    assert (np.abs(table.sample_coef.numpy()[:-1] - a) <= size).all()
    assert (np.abs(table.output_coef.numpy()[:-1] - b) <= size).all()
    np.testing.assert_allclose(table.std[:-1], std, rtol=1e-12)


@property_test
@given(levels(), st.just(0.0) | st.floats(1e-6, 1.0))
def test_cps_keeps_the_marginals_of_the_flow(sigmas, noise_level):
    """x = (1 - t) x0 + t epsilon with v = epsilon - x0 goes to 1 - t' of x0 and variance t'^2."""
    table = flow_table(sigmas.tolist(), sde="cps", noise_level=noise_level)
    t, t_next = sigmas[:-1], sigmas[1:]
    a, b, std = (getattr(table, name).numpy() for name in ("sample_coef", "output_coef", "std"))
    np.testing.assert_allclose(a * (1 - t) - b, 1 - t_next, atol=8 * EPS)
    np.testing.assert_allclose((a * t + b) ** 2 + std**2, t_next**2, atol=8 * EPS)


@property_test
@given(levels(), st.sampled_from(FLOW_SDES))
def test_without_noise_every_sampler_is_the_ode(sigmas, sde):
    table = flow_table(sigmas.tolist(), sde=sde, noise_level=0.0)
    assert bool((table.sample_coef == 1).all() and (table.std == 0).all() and (table.weight == 0).all())
    np.testing.assert_array_equal(table.output_coef, np.diff(sigmas))
    assert not bool(table.trainable.any())


@pytest.mark.parametrize("sde", FLOW_SDES)
@pytest.mark.parametrize(
    ("num_steps", "credit"), [(1, "native"), (2, "native"), (10, "native"), (2, "proportionate"), (10, "proportionate")]
)
def test_the_last_step_is_the_ode_s(num_steps, credit, sde):
    table = build(sde, num_steps, credit=credit)
    last = float(table.interval[-1])
    assert (float(table.sample_coef[-1]), float(table.output_coef[-1]), float(table.std[-1])) == (1.0, -last, 0.0)
    assert table.trainable.tolist() == [True] * (num_steps - 1) + [False]
    assert float(table.weight[-1]) == float(table.native_weight[-1]) == 0 and not bool(table.reweighted[-1])


def test_the_first_step_of_flow_takes_the_next_t_in_the_denominator():
    table = build("flow", 10, 1.0, noise_level=0.7)
    # g^2 h = 0.49 / (1 - 0.9) 0.1
    assert float(table.sample_coef[0]) == pytest.approx(1 - 0.49 / 2, rel=1e-14)
    assert float(table.std[0]) == pytest.approx(0.7, rel=1e-14)
    assert float(table.output_coef[0]) == float(-table.interval[0])


def test_columns():
    for sde in FLOW_SDES:
        table = build(sde, 10)
        sigmas = shifted_sigmas(10, 3.0)
        assert table.timesteps.dtype == torch.float32
        assert torch.equal(table.timesteps, (1000 * sigmas[:-1]).float())
        assert torch.equal(table.interval, sigmas[:-1] - sigmas[1:])
        assert float(table.interval.sum()) == pytest.approx(1, abs=4 * EPS)
        assert bool((table.epsilon_scale == 1).all()) and not bool(table.resolved.any())
        assert table.rows.shape == (10, 8) and len(table) == 10 and bool(torch.isfinite(table.rows).all())
    assert torch.equal(build("flow", 10, num_train_timesteps=500).timesteps, (500 * sigmas[:-1]).float())


def test_any_list_of_numbers_is_taken_in_float64():
    wanted = build("flow", 7)
    sigmas = shifted_sigmas(7, 3.0)
    for same in (sigmas.tolist(), tuple(sigmas.tolist()), sigmas.numpy(), sigmas.clone().requires_grad_()):
        assert equal(flow_table(same, noise_level=0.7), wanted)
    rounded = flow_table(sigmas.float(), noise_level=0.7)
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


def test_zeta_of_the_published_samplers():
    dance = build("dance", 16, 3.0, credit="proportionate", noise_level=0.3)
    assert dance.target_weight == pytest.approx(13.34319, abs=5e-6)
    flow = build("flow", 10, 3.0, credit="proportionate", noise_level=0.7)
    assert flow.target_weight == pytest.approx(4.2967, abs=5e-5)
    # their first step is another one
    assert flow.target_weight == pytest.approx(4.315, rel=5e-3)


@pytest.mark.parametrize("sde", FLOW_SDES)
@pytest.mark.parametrize(("num_steps", "shift"), [(2, 1.0), (10, 3.0), (16, 3.0), (50, 1.0)])
def test_proportionate_credit_keeps_the_sampler_and_its_total(num_steps, shift, sde):
    native, table = (build(sde, num_steps, shift, credit=credit) for credit in ("native", "proportionate"))
    assert equal(table, native, leave_out=("weight", "reweighted", "rows"))
    assert torch.equal(table.rows[:, [0, 1, 2, 4, 5, 6, 7]], native.rows[:, [0, 1, 2, 4, 5, 6, 7]])
    assert torch.equal(table.reweighted, table.trainable) and not bool(native.reweighted.any())
    # zeta is a total of 1 in t, or of what is left of it without the last row, which has no noise in CPS
    _, b, std = paper_rows(shifted_sigmas(num_steps, shift).numpy(), sde, NOISE[sde])
    counted = slice(0, num_steps - 1 if sde == "cps" else num_steps)
    h = table.interval.numpy()
    zeta = (-b[counted] / std[counted]).sum() / h[counted].sum()
    assert table.target_weight == pytest.approx(zeta, rel=1e-12)
    np.testing.assert_allclose(table.weight[:-1], zeta * h[:-1], rtol=1e-12)
    if sde == "cps":
        assert float(table.weight.sum()) == pytest.approx(float(native.weight.sum()), rel=1e-12)
    assert native.target_weight is None and (native.credit, table.credit) == ("native", "proportionate")
    assert torch.equal(native.weight, native.native_weight)


def test_a_given_target_replaces_zeta():
    table = build("flow", credit="proportionate", target_weight=4.315)
    assert table.target_weight == 4.315
    np.testing.assert_allclose(table.weight[:-1], 4.315 * table.interval[:-1], rtol=1e-15)


def test_native_weights_of_the_published_samplers():
    """Smallest and largest, at the first step and the last trained one."""
    flow, dance = build("flow", 10).native_weight[:-1], build("dance", 16).native_weight[:-1]
    for weight, smallest, largest in ((flow, 0.0510, 0.8679), (dance, 0.4915, 1.3450)):
        assert float(weight[0]) == float(weight.min()) == pytest.approx(smallest, abs=5e-5)
        assert float(weight[-1]) == float(weight.max()) == pytest.approx(largest, abs=5e-5)


# windows


def sd_table(**kwargs) -> StepTable:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return ddim_table((1 - betas).cumprod(0), torch.arange(951, 0, -50), **kwargs)


# (table of any window and credit, its deterministic twin, its credits)
FAMILIES = {
    **{sde: (lambda sde=sde, **k: build(sde, 20, **k), {"noise_level": 0.0}, FLOW_CREDITS) for sde in FLOW_SDES},
    "ddim": (sd_table, {"eta": 0.0}, CREDITS),
    "ddim, v, one": (
        lambda **k: sd_table(prediction_type="v_prediction", final_alpha_cumprod=1.0, **k),
        {"eta": 0.0},
        CREDITS,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("window", [(0, 20), (0, 0), (20, 20), (7, 7), (0, 1), (3, 9), (19, 20), (1, 20)], ids=str)
def test_only_the_steps_of_the_window_are_stochastic_and_trained(window, family):
    make, without_noise, credits = FAMILIES[family]
    start, stop = window
    for credit in credits:
        full, table = make(credit=credit), make(credit=credit, window=window)
        ode = make(**without_noise)
        assert equal(table, full, slice(start, stop))
        for outside in (slice(0, start), slice(stop, None)):
            assert equal(table, ode, outside)
            assert not bool((table.trainable | table.resolved | table.reweighted)[outside].any())
            assert not bool(table.weight[outside].any())
        assert (table.credit, table.target_weight, table.normalized) == (credit, full.target_weight, True)
        assert equal(table, full) == (window == (0, 20))


def test_a_window_keeps_the_timesteps():
    full, table = (build("flow", 10, num_train_timesteps=500, window=window) for window in (None, (2, 5)))
    assert torch.equal(table.timesteps, full.timesteps) and table.timesteps[0] == 500


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("window", [5, (1, 2, 3), (1.5, 2.5), "12", (True, 2)], ids=str)
def test_windows_that_are_no_pair_are_refused(window, family):
    with pytest.raises(ValueError, match=r"window=.* is not a pair of whole numbers; give \(start, stop\)"):
        FAMILIES[family][0](window=window)


@pytest.mark.parametrize(
    "settings",
    [
        {"noise_level": 1e-40},
        {"noise_level": 1e25},
        {"credit": "proportionate", "target_weight": 1e300},
    ],
    ids=str,
)
def test_tables_beyond_float32_are_refused(settings):
    with pytest.raises(ValueError, match=r"does not fit into float32 at step \d+"):
        build("flow", 10, **settings)


@pytest.mark.parametrize("number", [math.inf, math.nan, 0, -1])
def test_impossible_numbers_of_training_steps_are_refused(number):
    with pytest.raises(ValueError, match=r"num_train_timesteps=.* must be positive"):
        build("flow", 10, num_train_timesteps=number)


@pytest.mark.parametrize("length", [0, -5, 10**7, 2.5])
def test_impossible_image_sizes_are_refused(length):
    scheduler = scheduler_of(use_dynamic_shifting=True)
    with pytest.raises(ValueError, match=f"image_seq_len={length} .* give the number of"):
        flow_table.from_scheduler(scheduler, 4, image_seq_len=length, noise_level=0.7)


def test_a_shift_without_a_range_is_refused():
    scheduler = scheduler_of(use_dynamic_shifting=True, base_image_seq_len=256, max_image_seq_len=256)
    with pytest.raises(ValueError, match="base_image_seq_len and max_image_seq_len are both 256"):
        flow_table.from_scheduler(scheduler, 4, image_seq_len=256, noise_level=0.7)


def test_a_window_keeps_the_unnormalized_form():
    full, table = (build("cps", 10, normalized=False, window=window) for window in (None, (2, 5)))
    assert not table.normalized and equal(table, full, slice(2, 5))
    assert not bool(table.log_prob_scale[:2].any() or table.log_prob_scale[5:].any())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("window", [(-1, 2), (3, 2), (0, 21), (21, 21)], ids=str)
def test_windows_outside_the_table_are_refused(window, family):
    with pytest.raises(ValueError, match=r"window=\(.*does not lie in the table; .*start <= stop <= 20"):
        FAMILIES[family][0](window=window)


# the form without normalisation


@pytest.mark.parametrize("sde", FLOW_SDES)
def test_the_columns_of_the_log_probability(sde):
    """k and the offset of an element's log-probability, offset - k z^2 / 2, against both densities at z = 0.7."""
    z = 0.7
    for normalized in (True, False):
        table = build(sde, normalized=normalized)
        std = table.std[:-1]
        density = torch.distributions.Normal(0.0, std).log_prob(std * z) if normalized else -((std * z) ** 2)
        found = table.log_prob_offset - table.log_prob_scale * z**2 / 2
        torch.testing.assert_close(found[:-1], density, rtol=1e-13, atol=1e-13)
        assert float(table.log_prob_offset[-1]) == 0
        assert float(table.log_prob_scale[-1]) == (1 if normalized else 0)
        for column, name in ((6, "log_prob_scale"), (7, "log_prob_offset")):
            assert torch.equal(table.rows[:, column], getattr(table, name).float())
        assert table.to("cpu").normalized == normalized
    assert equal(build(sde), table, leave_out=("rows", "log_prob_scale", "log_prob_offset"))


# diffusers


def scheduler_of(**settings):
    diffusers = pytest.importorskip("diffusers")
    return diffusers.FlowMatchEulerDiscreteScheduler(**settings)


def linear(num_steps: int) -> list[float]:
    """What FLUX's pipeline hands over."""
    return np.linspace(1.0, 1 / num_steps, num_steps).tolist()


VARIANTS = {
    "plain": ({}, {}, {}),
    "shift": ({"shift": 3.0}, {}, {}),
    "shift, a list": ({"shift": 3.0}, {"sigmas": linear(10)}, {"sigmas": linear(10)}),
    "dynamic": ({"use_dynamic_shifting": True}, {"image_seq_len": 1024}, {"mu": 0.63}),
    "dynamic, a list": (
        {"use_dynamic_shifting": True, "shift": 3.0},
        {"image_seq_len": 4096, "sigmas": linear(10)},
        {"mu": 1.15, "sigmas": linear(10)},
    ),
    "dynamic, linear": (
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        {"image_seq_len": 256},
        {"mu": 0.5},
    ),
    "dynamic, other ends": (
        {
            "use_dynamic_shifting": True,
            "base_shift": 0.2,
            "max_shift": 0.9,
            "base_image_seq_len": 100,
            "max_image_seq_len": 800,
        },
        {"image_seq_len": 300},
        {"mu": 0.4},
    ),
    "terminal": ({"shift_terminal": 0.02, "shift": 3.0}, {"sigmas": linear(10)}, {"sigmas": linear(10)}),
    "karras": ({"use_karras_sigmas": True, "shift": 3.0}, {}, {}),
    "exponential": ({"use_exponential_sigmas": True}, {}, {}),
    "beta": ({"use_beta_sigmas": True, "shift": 3.0}, {}, {}),
    "stochastic": ({"stochastic_sampling": True, "shift": 3.0}, {}, {}),
    "500 steps of training": ({"num_train_timesteps": 500, "shift": 2.0}, {}, {}),
    "no length needed": ({"shift": 3.0}, {"image_seq_len": 4096}, {}),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sde", FLOW_SDES)
def test_sigmas_and_timesteps_are_the_scheduler_s_own(sde, variant):
    config, given_to_us, given_to_it = VARIANTS[variant]
    if "use_beta_sigmas" in config:
        pytest.importorskip("scipy")
    scheduler = scheduler_of(**config)
    table = flow_table.from_scheduler(scheduler, 10, sde=sde, noise_level=NOISE[sde], **given_to_us)
    scheduler.set_timesteps(10, **given_to_it)
    assert torch.equal(table.timesteps, scheduler.timesteps) and table.timesteps.dtype == torch.float32
    assert torch.equal(table.interval, -scheduler.sigmas.double().diff())
    direct = flow_table(scheduler.sigmas, sde=sde, noise_level=NOISE[sde])
    assert equal(table, direct, leave_out=("timesteps",))


def test_sigmas_are_not_made_from_the_rounded_timesteps():
    scheduler = scheduler_of(shift=3.0)
    table = flow_table.from_scheduler(scheduler, 16, noise_level=0.7, sigmas=linear(16))
    t = [*(table.timesteps.double() / 1000).tolist(), 0.0]
    assert not torch.equal(table.interval, -torch.tensor(t, dtype=torch.float64).diff())


def test_dynamic_shifting_is_that_of_the_pipelines():
    pytest.importorskip("transformers")
    flux = pytest.importorskip("diffusers.pipelines.flux.pipeline_flux")
    for length in (16, 256, 1024, 3600, 4096, 9000):
        scheduler = scheduler_of(use_dynamic_shifting=True)
        table = flow_table.from_scheduler(scheduler, 8, sigmas=linear(8), image_seq_len=length, noise_level=0.7)
        scheduler.set_timesteps(8, sigmas=linear(8), mu=flux.calculate_shift(length))
        torch.testing.assert_close(table.timesteps, scheduler.timesteps, rtol=1e-6, atol=0)


def test_the_arguments_reach_the_table():
    scheduler = scheduler_of(shift=3.0)
    settings = {"sde": "dance", "noise_level": 0.4, "credit": "proportionate", "target_weight": 7.0}
    settings |= {"window": (1, 4), "normalized": False}
    table = flow_table.from_scheduler(scheduler, 8, **settings)
    scheduler.set_timesteps(8)
    direct = flow_table(scheduler.sigmas, **settings)
    assert equal(table, direct) and (table.target_weight, table.normalized) == (7.0, False)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_scheduler_is_left_as_it_was(variant):
    config, arguments, own = VARIANTS[variant]
    if "use_beta_sigmas" in config:
        pytest.importorskip("scipy")
    scheduler = scheduler_of(**config)
    scheduler.set_timesteps(3, **{name: value for name, value in own.items() if name != "sigmas"})
    before = {name: value.clone() if torch.is_tensor(value) else value for name, value in vars(scheduler).items()}
    flow_table.from_scheduler(scheduler, 10, noise_level=0.7, **arguments)
    for name, value in vars(scheduler).items():
        same = torch.equal(value, before[name]) if torch.is_tensor(value) else value == before[name]
        assert same, name


def test_a_shift_that_was_set_later_counts():
    scheduler = scheduler_of(shift=1.0)
    scheduler.set_shift(5.0)
    table = flow_table.from_scheduler(scheduler, 10, noise_level=0.7)
    scheduler.set_timesteps(10)
    assert torch.equal(table.timesteps, scheduler.timesteps)
    assert not torch.equal(table.timesteps, flow_table.from_scheduler(scheduler_of(), 10, noise_level=0.7).timesteps)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "stochastic"])
@pytest.mark.parametrize("sde", FLOW_SDES)
def test_rows_of_the_ode_are_the_step_of_diffusers(sde, variant):
    """In float32, in which diffusers rounds sigma' - sigma, its product with v and the sum: one half unit each."""
    config, given_to_us, given_to_it = VARIANTS[variant]
    if "use_beta_sigmas" in config:
        pytest.importorskip("scipy")
    scheduler = scheduler_of(**config)
    table = flow_table.from_scheduler(scheduler, 10, sde=sde, noise_level=0.0, **given_to_us)
    stochastic = flow_table.from_scheduler(scheduler, 10, sde=sde, noise_level=0.5, **given_to_us)
    scheduler.set_timesteps(10, **given_to_it)
    x, v = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    unit = float(np.finfo(np.float32).eps) / 2
    for row, timestep in enumerate(scheduler.timesteps):
        theirs = scheduler.step(v, timestep, x, return_dict=False)[0].double()
        last = row == len(table) - 1
        for rows in [table, stochastic] if last else [table]:
            move = rows.output_coef[row] * v.double()
            ours = rows.sample_coef[row] * x.double() + move
            assert bool(((ours - theirs).abs() <= unit * (2 * move.abs() + ours.abs()) * 1.001).all())


def test_loading_says_nothing(caplog):
    """No warning of diffusers about a setting that is not used."""
    logging.getLogger("diffusers").addHandler(caplog.handler)
    flow_table.from_scheduler(scheduler_of(shift=3.0), 4, noise_level=0.7, sigmas=linear(4))
    logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert not caplog.records


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({"invert_sigmas": True}, {}, "invert_sigmas=True, .*rise.*invert_sigmas=False"),
        ({"use_dynamic_shifting": True}, {}, "use_dynamic_shifting=True.*give image_seq_len, or .*shifting=False"),
        ({}, {"sigmas": linear(3)}, r"sigmas has shape \(3,\) and num_inference_steps is 4; .*linspace\(1, 1 / T, T\)"),
        ({}, {"sigmas": [1.0, 0.6, 0.3, 0.1, 0.0]}, r"shape \(5,\).*without the final 0"),
        ({}, {"sigmas": [[1.0, 0.6, 0.3, 0.1]]}, r"shape \(1, 4\)"),
        ({}, {"sigmas": [0.8, 0.6, 0.3, 0.1]}, r"sigmas \[0.8, 0.6, 0.3, 0.1, 0\].*from 1 to 0; change .*sigmas"),
        ({}, {"sigmas": [1.0, 0.6, 0.6, 0.1]}, "decrease strictly"),
        ({}, {"sigmas": [1.0, 0.6, 0.3, 0.0]}, "decrease strictly"),
        ({}, {"sigmas": [1.0, math.nan, 0.3, 0.1]}, "decrease strictly"),
        ({}, {"num_inference_steps": 0}, "num_inference_steps=0 must be at least 1"),
        ({"shift_terminal": 0.1}, {"num_inference_steps": 1}, r"\[nan, 0\].*shift_terminal"),
        ({}, {"sde": "euler"}, "sde='euler' is not known; choose one of flow, dance, cps"),
    ],
    ids=str,
)
def test_schedulers_without_a_list_from_one_to_zero_are_refused(config, arguments, message):
    with pytest.raises(ValueError, match=message):
        flow_table.from_scheduler(scheduler_of(**config), **{"num_inference_steps": 4, "noise_level": 0.7, **arguments})


@pytest.mark.parametrize("name", ["DDIMScheduler", "FlowMatchHeunDiscreteScheduler", "EulerDiscreteScheduler"])
def test_other_scheduler_classes_are_refused(name):
    diffusers = pytest.importorskip("diffusers")
    message = rf"{name} is not a flow .*FlowMatchEulerDiscreteScheduler.from_config"
    with pytest.raises(ValueError, match=message):
        flow_table.from_scheduler(getattr(diffusers, name)(), 10, noise_level=0.7)


# the errors


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sde": "ode"}, "sde='ode' is not known; choose one of flow, dance, cps"),
        ({"credit": "variance"}, "credit='variance' is not known for flow, .*one of native, proportionate"),
        ({"credit": "fair"}, "credit='fair' is not known"),
        ({"noise_level": -0.1}, "noise_level=-0.1 is not a noise level; give a finite number >= 0"),
        ({"noise_level": math.nan}, "noise_level=nan is not a noise level"),
        ({"noise_level": math.inf}, "noise_level=inf is not a noise level"),
        ({"sde": "cps", "noise_level": 1.01}, r"noise_level=1.01 is too much for sde='cps': .*in \[0, 1\]"),
        ({"target_weight": 4.0}, "target_weight=4.0 has no meaning with credit='native'; .*credit='proportionate'"),
        ({"credit": "proportionate", "target_weight": 0.0}, "target_weight=0.0 is not a credit; give .* > 0"),
        ({"credit": "proportionate", "target_weight": math.nan}, "target_weight=nan is not a credit"),
        ({"credit": "proportionate", "noise_level": 0.0}, "needs a stochastic sampler, .*noise_level > 0"),
        ({"credit": "proportionate", "num_steps": 1}, "needs a stochastic sampler, .*at least 2 steps"),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0 must be positive"),
        ({"num_steps": 0}, "num_inference_steps=0 must be at least 1"),
        ({"shift": 0.0}, "shift=0.0 is not a shift; give a finite number > 0"),
        ({"shift": math.inf}, "shift=inf is not a shift"),
    ],
)
def test_senseless_requests_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(**kwargs)


def test_cps_takes_all_its_noise_anew_at_one():
    table = build("cps", 10, noise_level=1.0)
    torch.testing.assert_close(table.std[:-1], shifted_sigmas(10, 3.0)[1:-1], rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([1.0], r"shape \(T \+ 1,\) with T >= 1; given shape \(1,\)"),
        ([], r"given shape \(0,\)"),
        (0.5, r"given shape \(\)"),
        ([[1.0, 0.0]], r"given shape \(1, 2\)"),
        ([1.0, 0.5, 0.5, 0.0], r"decrease strictly from exactly 1 to exactly 0; given \[1, 0.5, 0.5, 0\]. shifted_s"),
        ([0.0, 0.5, 1.0], "decrease strictly"),
        ([0.99, 0.5, 0.0], "exactly 1"),
        ([1.0, 0.5, 0.01], "exactly 0"),
        ([1.0, math.nan, 0.0], "given .*nan"),
        (np.linspace(0.9, 0, 9), r"given \[0.9, 0.7875, 0.675, ..., 0.225, 0.1125, 0\]"),
    ],
)
def test_sigmas_must_fall_from_one_to_zero(sigmas, message):
    with pytest.raises(ValueError, match=message):
        flow_table(sigmas, noise_level=0.7)
