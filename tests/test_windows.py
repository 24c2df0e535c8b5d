"""Windows and lists of stochastic steps, in both families."""

import pytest
import torch
from sampler_cases import CREDITS, FLOW_SDES, equal, flow_table, sd_table

# (table of any window and credit, its deterministic twin)
FAMILIES = {
    **{sde: (lambda sde=sde, **k: flow_table(sde, 20, **k), {"noise_level": 0.0}) for sde in FLOW_SDES},
    "flow, noise at the end": (lambda **k: flow_table("flow", 20, last_step="noise", **k), {"noise_level": 0.0}),
    "ddim": (lambda **k: sd_table(20, **k), {"eta": 0.0}),
    "ddim, v, one": (
        lambda **k: sd_table(20, prediction_type="v_prediction", final_alpha_cumprod=1.0, **k),
        {"eta": 0.0},
    ),
}


def is_deterministic(table, ode, rows):
    return equal(table, ode, rows) and not bool(table.trainable[rows].any() or table.weight[rows].any())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("window", [(0, 20), (0, 0), (20, 20), (7, 7), (0, 1), (3, 9), (19, 20), (1, 20)], ids=str)
def test_only_the_steps_of_the_window_are_stochastic_and_trained(window, family):
    make, without_noise = FAMILIES[family]
    start, stop = window
    for credit in CREDITS:
        full, table = make(credit=credit), make(credit=credit, window=window)
        ode = make(**without_noise)
        assert equal(table, full, slice(start, stop))
        for outside in (slice(0, start), slice(stop, None)):
            assert is_deterministic(table, ode, outside)
        assert (table.credit, table.target_weight, table.normalized) == (full.credit, full.target_weight, True)
        assert equal(table, full) == (window == (0, 20))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps", [[], [0], [4, 2, 11], range(3, 17, 4), [5, 5], torch.tensor([7, 1])], ids=str)
def test_any_steps_may_be_the_stochastic_ones(steps, family):
    make, without_noise = FAMILIES[family]
    chosen = {int(step) for step in steps}
    for credit in CREDITS:
        full, table, ode = make(credit=credit), make(credit=credit, steps=steps), make(**without_noise)
        for step in range(20):
            row = slice(step, step + 1)
            assert equal(table, full, row) if step in chosen else is_deterministic(table, ode, row)
        assert (table.credit, table.target_weight) == (full.credit, full.target_weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_is_a_range_of_steps(family):
    make, _ = FAMILIES[family]
    window = make(credit="constant", window=(3, 9))
    assert equal(window, make(credit="constant", steps=range(3, 9)))
    assert equal(window, make(credit="constant", steps=(step for step in range(3, 9))))
    assert equal(window, make(credit="constant", window=[3, 9]))
    with pytest.raises(ValueError, match=r"window and steps were both given; .*give one of the two"):
        make(window=(3, 9), steps=range(3, 9))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps", [[-1], [20], [1.5], ["1"], [True], torch.tensor([True, False]), [None]], ids=str)
def test_steps_that_are_not_in_the_table_are_refused(steps, family):
    with pytest.raises(ValueError, match=r"steps has .*; choose whole numbers from 0 to 19"):
        FAMILIES[family][0](steps=steps)


@pytest.mark.parametrize("steps", [3, "135"])
def test_steps_that_are_no_list_are_refused(steps):
    with pytest.raises(ValueError, match=f"steps={steps!r} is not a list of step indices; give one, such as"):
        flow_table("flow", 20, steps=steps)


def test_a_window_keeps_the_timesteps():
    full, table = (flow_table("flow", 10, num_train_timesteps=500, window=window) for window in (None, (2, 5)))
    assert torch.equal(table.timesteps, full.timesteps) and table.timesteps[0] == 500


def test_a_window_keeps_the_unnormalized_form():
    full, table = (flow_table("cps", 10, normalized=False, window=window) for window in (None, (2, 5)))
    assert not table.normalized and equal(table, full, slice(2, 5))
    assert not bool(table.log_prob_scale[:2].any() or table.log_prob_scale[5:].any())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("window", [5, (1, 2, 3), (1.5, 2.5), "12", (True, 2), range(3, 5)], ids=str)
def test_windows_that_are_no_pair_are_refused(window, family):
    with pytest.raises(ValueError, match=r"window=.* is not a pair of whole numbers; give \(start, stop\)"):
        FAMILIES[family][0](window=window)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("window", [(-1, 2), (3, 2), (0, 21), (21, 21)], ids=str)
def test_windows_outside_the_table_are_refused(window, family):
    with pytest.raises(ValueError, match=r"window=\(.*does not lie in the table; .*start <= stop <= 20"):
        FAMILIES[family][0](window=window)
