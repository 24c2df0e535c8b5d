"""The credit schemes of both families, and their measured facts."""

import re

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from sampler_cases import (
    EPS,
    FLOW_SDES,
    PREDICTION_TYPES,
    SD,
    alpha_pairs,
    credit_symbols,
    drawn_table,
    equal,
    eta_one_std,
    etas,
    flow_rows,
    flow_table,
    levels,
    prediction_types,
    property_test,
    schedules,
    sd_alphas,
    sd_steps,
    sd_table,
    target_factors,
)

from pcpo_fast.samplers import NOISE_LEVELS, StepTable, shifted_sigmas


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


def resolvable(table, at, ap):
    """The stochastic steps that some s gives the table's level; rounding may decide where the root is a double one."""
    c1, b0 = credit_symbols(at, ap)
    return (eta_one_std(at, ap) > 0) & (b0**2 * (1 + table.target_weight**2) - c1**2 >= -1e-14 * c1**2)


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
    native, table = sd_table(num_steps), sd_table(num_steps, credit="proportionate")
    assert table.target_weight == pytest.approx(float(native.native_weight.mean()), rel=1e-12)
    assert table.timesteps[table.std == native.std].tolist() == infeasible


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
            table = sd_table(50, credit="proportionate", target_weight=float(target))
            # the table's root is one of the crossings, and with eta = 1 the nearer one
            nearest = std[crossings][np.abs(std[crossings] - float(sd_table(50).std[row])).argmin()]
            assert float(table.std[row]) == pytest.approx(nearest, abs=2 * b0[row] / 200_000)


@pytest.mark.parametrize(("num_steps", "mean"), [(50, 5.00), (40, 4.56), (20, 3.62)])
def test_published_target_is_the_mean_with_the_sign_flipped(num_steps, mean):
    at, ap = alpha_pairs(sd_alphas(), sd_steps(num_steps))
    c1, b0 = credit_symbols(at, ap)
    std = eta_one_std(at, ap)
    flipped = (c1 + np.sqrt(b0**2 - std**2)) / std
    assert flipped.mean() == pytest.approx(mean, abs=5e-3)
    table = sd_table(num_steps, credit="published")
    given = sd_table(num_steps, credit="published", target_weight=float(flipped.mean()))
    torch.testing.assert_close(table.std, given.std, rtol=1e-12, atol=0)


def test_published_root_achieves_almost_native_weights():
    at, ap = alpha_pairs(sd_alphas(), sd_steps(50))
    c1, b0 = credit_symbols(at, ap)
    table = sd_table(50, credit="published", target_weight=4.5)
    std = table.std.numpy()
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


@pytest.mark.parametrize("target_weight", [None, 0.1, 2.0])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_constant_credit_reweights_and_leaves_the_sampler_alone(eta, prediction_type, target_weight):
    settings = {"eta": eta, "prediction_type": prediction_type}
    native = sd_table(50, **settings)
    table = sd_table(50, credit="constant", target_weight=target_weight, **settings)
    assert equal(table, native, leave_out=("weight", "slope", "curvature"))
    wanted = float(native.epsilon_weight.mean()) if target_weight is None else target_weight
    np.testing.assert_allclose(table.epsilon_weight.numpy(), wanted, rtol=1e-12)
    assert (table.credit, table.target_weight) == ("constant", pytest.approx(wanted, rel=1e-12))


def test_constant_credit_is_the_default_of_every_door():
    diffusers = pytest.importorskip("diffusers")
    sd = diffusers.DDIMScheduler(**SD, clip_sample=False)
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    doors = [
        lambda **k: StepTable.ddim(sd_alphas(), sd_steps(50), **k),
        lambda **k: StepTable.flow(shifted_sigmas(10, 3.0), **k),
        lambda **k: StepTable.from_scheduler(sd, 50, **k),
        lambda **k: StepTable.from_scheduler(flow, 50, **k),
    ]
    for door in doors:
        table = door()
        assert table.credit == "constant" and equal(table, door(credit="constant"))
        native = door(credit="native").native_weight
        weight = table.weight[table.trainable]
        np.testing.assert_allclose(weight, float(native[table.trainable].mean()), rtol=1e-12)
        assert torch.equal(table.std, door(credit="native").std)


@property_test
@given(schedules(), etas, prediction_types, target_factors)
def test_constant_credit_is_constant_on_random_schedules(schedule, eta, prediction_type, factor):
    table, *_ = drawn_table(schedule, eta, prediction_type, "constant", factor)
    native, *_ = drawn_table(schedule, eta, prediction_type, "native", None)
    assert equal(table, native, leave_out=("weight", "slope", "curvature"))
    credit = table.epsilon_weight[table.trainable]
    assert bool(((credit / table.target_weight - 1).abs() <= 4 * EPS).all())
    if factor is None:
        assert table.target_weight == pytest.approx(float(native.epsilon_weight[table.trainable].mean()), rel=1e-12)


def test_proportionate_credit_changes_the_sampler_and_reweights_the_rest():
    native, table = sd_table(50), sd_table(50, credit="proportionate")
    resolved = table.std != native.std
    np.testing.assert_allclose(table.native_weight[resolved].numpy(), table.target_weight, rtol=1e-9)
    assert int((~resolved).sum()) == 7 and bool((table.native_weight[~resolved] > table.target_weight).all())
    assert bool((table.epsilon_weight == table.target_weight).all())
    # afterwards the level is a constant one
    assert table.credit == "constant"


def test_target_weight_above_every_step_resolves_all():
    table = sd_table(50, credit="proportionate", target_weight=3.3)
    np.testing.assert_allclose(table.native_weight.numpy(), 3.3, rtol=1e-9)


def test_one_step_keeps_its_own_credit():
    """The default target is then the double root itself, and rounding must not make it infeasible."""
    for timestep in range(1, 1000, 7):
        table = StepTable.ddim(
            sd_alphas(),
            torch.tensor([timestep]),
            credit="proportionate",
            prediction_type="epsilon",
            final_alpha_cumprod=0.9995,
        )
        assert float(table.native_weight) == pytest.approx(table.target_weight, rel=1e-6)


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


@property_test
@given(schedules(), etas, prediction_types, target_factors)
def test_resolved_variances_satisfy_the_equation(schedule, eta, prediction_type, factor):
    table, at, ap, c1, b0 = drawn_table(schedule, eta, prediction_type, "proportionate", factor)
    resolved = resolvable(table, at, ap)
    assert resolved.any()
    std, target = table.std.numpy()[resolved], table.target_weight
    c1, b0 = c1[resolved], b0[resolved]
    achieved = (c1 - np.sqrt(np.maximum(b0**2 - std**2, 0))) / std
    bound = residual_bound(c1, b0, std, target)
    assert (np.abs(achieved - target) <= bound).all()
    # the table's own coefficients achieve it as well, whatever the model predicts
    own = (table.native_weight / table.epsilon_scale).numpy()[resolved]
    assert (np.abs(own - target) <= 2 * bound).all()
    native = eta * eta_one_std(at, ap)[resolved]
    for row in range(len(std)):
        nearest = closest_valid_root(c1[row], b0[row], target, native[row])
        # near the double root the two differ by the square root of rounding
        if nearest is not None:
            assert abs(std[row] - native[row]) <= abs(nearest - native[row]) + 1e-6 * b0[row]


@property_test
@given(schedules(), etas, prediction_types, target_factors)
def test_steps_without_a_root_have_the_std_of_eta_one(schedule, eta, prediction_type, factor):
    table, at, ap, *_ = drawn_table(schedule, eta, prediction_type, "proportionate", factor)
    unresolved = ~resolvable(table, at, ap)
    np.testing.assert_allclose(table.std.numpy()[unresolved], eta_one_std(at, ap)[unresolved], rtol=1e-12)


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
        StepTable.ddim(alphas, steps, target_weight=float(smallest.min() * below), **asked)
    some, every = (float(number) for number in re.findall(r"reaches is (\S+?)(?:,|$)", str(caught.value)))
    # the message has six digits
    assert some == pytest.approx(smallest.min(), rel=1e-5) and every == pytest.approx(smallest.max(), rel=1e-5)
    table = StepTable.ddim(alphas, steps, target_weight=some * (1 + 1e-5), **asked)
    assert (table.std.numpy() != eta_one_std(at, ap)).any()
    target = every * (1 + 1e-5)
    table = StepTable.ddim(alphas, steps, target_weight=target, **asked)
    bound = residual_bound(c1[stochastic], b0[stochastic], table.std.numpy()[stochastic], target)
    assert (np.abs(table.native_weight.numpy()[stochastic] - target) <= 2 * bound).all()


def test_zeta_of_the_published_samplers():
    dance = flow_table("dance", 16, 3.0, credit="proportionate", noise_level=0.3)
    assert dance.target_weight == pytest.approx(13.34319, abs=5e-6)
    flow = flow_table("flow", 10, 3.0, credit="proportionate", noise_level=0.7)
    assert flow.target_weight == pytest.approx(4.2967, abs=5e-5)
    # their first step is another one
    assert flow.target_weight == pytest.approx(4.315, rel=5e-3)


@pytest.mark.parametrize("sde", FLOW_SDES)
@pytest.mark.parametrize(("num_steps", "shift"), [(2, 1.0), (10, 3.0), (16, 3.0), (50, 1.0)])
@pytest.mark.parametrize("last_step", ["ode", "noise"])
def test_proportionate_credit_keeps_the_sampler_and_its_total(last_step, num_steps, shift, sde):
    native, table = (
        flow_table(sde, num_steps, shift, credit=credit, last_step=last_step) for credit in ("native", "proportionate")
    )
    assert equal(table, native, leave_out=("weight", "slope", "curvature"))
    # zeta is a total of 1 in t, or of what is left of it without the last row, which has no noise in CPS
    _, b, std = flow_rows(shifted_sigmas(num_steps, shift).numpy(), sde, NOISE_LEVELS[sde])
    counted = slice(0, num_steps - 1 if sde == "cps" else num_steps)
    h = table.interval.numpy()
    zeta = (-b[counted] / std[counted]).sum() / h[counted].sum()
    assert table.target_weight == pytest.approx(zeta, rel=1e-12)
    trained = table.trainable.numpy()
    assert trained[:-1].all() and trained[-1] == (last_step == "noise" and sde != "cps")
    np.testing.assert_allclose(table.weight, np.where(trained, zeta * h, 0), rtol=1e-12)
    if sde == "cps" or last_step == "noise":
        assert float(table.weight.sum()) == pytest.approx(float(native.weight.sum()), rel=1e-12)
    assert native.target_weight is None and (native.credit, table.credit) == ("native", "proportionate")
    assert torch.equal(native.weight, native.native_weight)
    assert equal(flow_table(sde, num_steps, shift, credit="published", last_step=last_step), table)


@property_test
@given(levels([(1.0, 0.0), (0.999999, 0.0), (0.7, 0.0), (0.9, 0.2)]), st.sampled_from(FLOW_SDES))
def test_flow_credit_of_random_schedules(sigmas, sde):
    assume(len(sigmas) > 2)
    native, constant, proportionate = (
        StepTable.flow(sigmas, sde=sde, credit=credit, last_step="noise")
        for credit in ("native", "constant", "proportionate")
    )
    trained = native.trainable
    for table in (constant, proportionate):
        assert equal(table, native, leave_out=("weight", "slope", "curvature"))
    weight = native.native_weight[trained]
    np.testing.assert_allclose(constant.weight[trained], float(weight.mean()), rtol=1e-12)
    zeta = float(weight.sum() / native.interval[trained].sum())
    np.testing.assert_allclose(proportionate.weight[trained], zeta * native.interval[trained], rtol=1e-12)


def test_a_given_target_replaces_zeta():
    table = flow_table("flow", credit="proportionate", target_weight=4.315)
    assert table.target_weight == 4.315
    np.testing.assert_allclose(table.weight[:-1], 4.315 * table.interval[:-1], rtol=1e-15)


def test_native_weights_of_the_published_samplers():
    """Smallest and largest, at the first step and the last trained one."""
    flow, dance = flow_table("flow", 10).native_weight[:-1], flow_table("dance", 16).native_weight[:-1]
    for weight, smallest, largest in ((flow, 0.0510, 0.8679), (dance, 0.4915, 1.3450)):
        assert float(weight[0]) == float(weight.min()) == pytest.approx(smallest, abs=5e-5)
        assert float(weight[-1]) == float(weight.max()) == pytest.approx(largest, abs=5e-5)
