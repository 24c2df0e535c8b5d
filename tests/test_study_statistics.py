"""Statistics of a study, on curves whose effects are known."""

import math
import warnings

import numpy as np
import pytest
from scipy import stats
from synthetic_study import RATES, study

from pcpo_fast.study.frames import Cell, Study, curve_of, evaluation_frame, run_frame
from pcpo_fast.study.measures import QUALITY, best_learning_rate, reward_at_quality
from pcpo_fast.study.statistics import (
    NOT_SIGNIFICANT,
    Interval,
    Times,
    bootstrap,
    gain_frame,
    gain_of,
    horizon_of,
    matched_differences,
    mean_interval,
    mixed_model,
    paired_difference,
    position,
    quality_at,
    raised_level,
    restricted_mean,
)


@pytest.fixture(scope="module")
def synthetic():
    return study()


def cell(rewards_by_seed, algorithm="ours", every=2, **columns):
    """Runs with these rewards, evaluated every other epoch."""
    runs = {}
    for seed, rewards in enumerate(rewards_by_seed):
        rows = [
            {"epoch": every * i, "images": 256 * every * i, "seconds": 4.0 * every * i, "reward": reward}
            for i, reward in enumerate(rewards)
        ]
        for key, values in columns.items():
            for row, value in zip(rows, values[seed], strict=True):
                row[key] = value
        runs[seed] = {"evaluations": rows}
    return Cell(algorithm, 1e-4, runs)


def test_a_target_is_reached_between_evaluations_and_the_first_time_counts():
    reward = np.array([-1.0, -0.5, -0.1, -0.6, 0.0])
    assert position(reward, -0.3) == pytest.approx(1.5)
    assert position(reward, -1.0) == 0.0 and position(reward, -2.0) == 0.0
    assert position(reward, 0.1) is None
    times = Times.of(cell([reward]).curves, -0.3, "epoch")
    assert times.time[0] == pytest.approx(3.0) and times.reached[0]


def test_a_run_that_never_reaches_the_target_counts_with_its_last_epoch():
    times = Times.of(cell([[-1, -0.2], [-1, -0.5], [-1.0, -0.9]]).curves, -0.4, "epoch")
    assert times.reached == {0: True, 1: False, 2: False} and times.censored == 2
    assert times.time == {0: pytest.approx(1.5), 1: 2.0, 2: 2.0}
    assert horizon_of(times) == 2.0
    assert times.mean(2.0) == pytest.approx((1.5 + 2 + 2) / 3)


def test_the_restricted_mean_is_the_area_under_kaplan_meier():
    time, reached = np.array([1.0, 2.0, 2.0, 3.0, 5.0]), np.array([True, False, True, True, False])
    # it is 1 until 1; 4/5 until 2, where one of four at risk ends; 3/5 until 3, where one of two ends; then 3/10
    assert restricted_mean(time, reached, 5.0) == pytest.approx(1 + 0.8 + 0.6 + 2 * 0.3)
    assert restricted_mean(time, reached, 4.0) == pytest.approx(1 + 0.8 + 0.6 + 0.3)
    # up to the first censored time it is the plain mean
    assert restricted_mean(time, reached, 2.0) == pytest.approx(np.minimum(time, 2).mean())
    assert math.isnan(restricted_mean(np.array([]), np.array([], bool), 1.0))


def test_a_verdict_does_not_go_beyond_what_a_bound_shows():
    slow, fast = [[-1.0, -0.9, -0.3]] * 4, [[-1.0, -0.3, -0.2]] * 4
    found = gain_of((cell([*slow, [-1.0, -0.9, -0.8]]), cell([*fast, fast[0]])), -0.4, "epoch")
    assert (found.bound, found.verdict) == ("≥", "faster")
    found = gain_of((cell([*slow, slow[0]]), cell([*fast, [-1.0, -0.9, -0.8]])), -0.4, "epoch")
    assert found.bound == "≤" and "faster" not in found.verdict.removesuffix("faster up to the horizon")


def test_runs_that_end_at_different_times_have_no_bound():
    """The horizon is where the shorter run ended, so it cuts the time of the longer one, too."""
    ours, baseline = cell([[-1.0, -0.9, -0.8, -0.2]] * 4), cell([[-1.0, -0.9]] * 4)
    found = gain_of((baseline, ours), -0.4, "epoch")
    assert found.cut and found.bound == "~" and found.gain.estimate == 0


def test_intervals_are_the_same_every_time_and_degenerate_samples_do_no_harm():
    values = np.random.default_rng(3).normal(size=10)
    assert mean_interval(values) == mean_interval(values)
    assert mean_interval(np.full(10, 0.25)) == Interval(0.25, 0.25, 0.25, 10)
    assert paired_difference({0: 1.0, 1: 2.0, 2: 4.0}, {0: 1.0, 1: 2.0, 2: 4.0}).verdict("+", "-") == NOT_SIGNIFICANT
    assert not mean_interval(values[:2]).known and mean_interval(values[:2]).n == 2
    assert mean_interval(np.array([])).n == 0
    assert paired_difference({0: 1.0, 1: math.nan, 2: 3.0}, {0: 0.0, 1: 0.0, 3: 1.0}).n == 1


def test_the_raised_level_gives_students_width():
    """The half width of a percentile interval of a mean is about z times the plug-in standard error."""
    for count in (3, 10, 30):
        z = stats.norm.ppf((1 + raised_level(count)) / 2)
        assert z * math.sqrt((count - 1) / count) == pytest.approx(stats.t.ppf(0.975, count - 1))


def test_intervals_cover_the_mean():
    """As often as Student's on the same samples; a percentile interval of level 95% would miss in 4% more of them."""
    samples = np.random.default_rng(11).normal(size=(600, 10))
    found = [mean_interval(sample) for sample in samples]
    covered = np.mean([interval.low <= 0 <= interval.high for interval in found])
    students = np.mean(np.abs(stats.ttest_1samp(samples, 0, axis=1).statistic) <= stats.t.ppf(0.975, 9))
    assert students - 0.02 <= covered <= students + 0.01


def test_the_gain_is_recovered_and_a_null_effect_is_not_significant(synthetic):
    frame = gain_frame(synthetic)
    best = frame[(frame["task"] == "digits") & (frame["rates"] == "best")]
    for algorithm, true in (("constant", 0.5), ("slow", -0.2)):
        for row in best[best["algorithm"] == algorithm].itertuples():
            assert row.n == 10 and row.low <= true <= row.high and row.low * row.high > 0
    for row in best[best["algorithm"] == "hinge"].itertuples():
        assert row.low <= 0 <= row.high


def test_seeds_are_paired():
    """Differences between seeds are large here, those within seeds are not: only pairing shows them."""
    slopes = np.linspace(1, 4, 10)
    baseline = cell([[-1, *(slope * 0.1 * i - 1 for i in range(1, 11))] for slope in slopes])
    ours = cell([[-1, *(1.1 * slope * 0.1 * i - 1 for i in range(1, 11))] for slope in slopes])
    found = gain_of((baseline, ours), -0.5, "epoch").gain
    assert found.low > 0.05 and found.high < 0.15
    alone = [Times.of(item.curves, -0.5, "epoch").take(range(10))[0] for item in (baseline, ours)]
    assert stats.ttest_ind(*alone).pvalue > 0.5


@pytest.mark.parametrize(
    ("theirs", "mine", "bound", "verdict"),
    [
        (-0.2, -0.2, "", NOT_SIGNIFICANT),
        (-0.5, -0.2, "≥", "faster"),
        (-0.2, -0.5, "≤", "slower"),
        (-0.5, -0.5, "~", "never reached by either"),
    ],
)
def test_censoring_makes_a_gain_a_bound(theirs, mine, bound, verdict):
    pair = cell([[-1.0, theirs]] * 4), cell([[-1.0, mine]] * 4)
    found = gain_of(pair, -0.4, "epoch")
    assert (found.bound, found.verdict) == (bound, verdict)


def test_a_target_reached_at_the_start_is_no_gain():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = gain_of((cell([[-0.1, -0.05]] * 4), cell([[-0.1, -0.05]] * 4)), -0.5, "epoch")
    assert found.verdict == "reached at the start"


def test_units_differ(synthetic):
    whole = Study.of(synthetic)
    pair = next(pair for pair in whole.pairs_at_best("digits") if pair[1].algorithm == "constant")
    epochs, images = (gain_of(pair, -0.2, unit) for unit in ("epoch", "images"))
    assert images.mean == pytest.approx(256 * epochs.mean)
    assert images.gain.estimate == pytest.approx(epochs.gain.estimate)


def test_quality_is_read_where_the_target_is_first_reached():
    runs = cell([[-1.0, -0.5, -0.1], [-1.0, -0.8, -0.7]], frechet_distance=[[0.0, 0.1, 0.5], [0.0, 0.1, 0.2]])
    assert quality_at(runs.curves, -0.3, "frechet_distance") == {0: pytest.approx(0.3)}


def test_quality_at_matched_reward_recovers_the_effect(synthetic):
    pairs = {pair[1].algorithm: pair for pair in Study.of(synthetic).pairs_at_best("digits")}
    found = matched_differences(pairs["constant"], -0.2)
    assert found.keys() == QUALITY.keys()
    distance = found["frechet_distance"]
    assert distance.low <= -0.01 <= distance.high < 0 and distance.n == 10
    assert matched_differences(pairs["hinge"], -0.2)["frechet_distance"].verdict("more", "less") == NOT_SIGNIFICANT
    # a target that nobody reaches has no value
    assert matched_differences(pairs["constant"], 0.5)["frechet_distance"].n == 0


def test_the_mixed_model_recovers_the_effect(synthetic):
    cells = Study.of(synthetic).best_cells("flow")
    found = mixed_model(cells, "ddpo", "frechet_distance")
    effects = {effect.algorithm: effect for effect in found.effects}
    assert found.intercepts == "seed, run"
    assert effects["constant"].low <= -0.01 <= effects["constant"].high < 0 and effects["constant"].p < 0.001
    assert effects["hinge"].low <= 0 <= effects["hinge"].high and effects["hinge"].p > 0.05


def test_the_mixed_models_errors_are_not_those_of_independent_evaluations():
    """Without intercepts for runs, ten evaluations of a run would count as ten runs, and noise would look certain."""
    significant, generator = 0, np.random.default_rng(5)
    for _ in range(40):
        cells = []
        for name in ("base", "other"):
            rewards = [np.linspace(-1, -0.1, 11) + 0.01 * generator.normal(size=11) for _ in range(10)]
            levels = [generator.normal() + 0.1 * generator.normal(size=11) for _ in rewards]
            cells.append(cell(rewards, name, accuracy=levels))
        significant += mixed_model(cells, "base", "accuracy").effects[0].p < 0.05
    # two are expected
    assert significant <= 7


def test_a_mixed_model_that_cannot_be_fitted_says_so(capfd):
    constant = [[0.5] * 3] * 4
    cells = [cell([[-1, -0.5, -0.2]] * 4, name, accuracy=constant) for name in ("base", "other")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not mixed_model(cells, "base", "accuracy").effects
        assert not mixed_model(cells[1:], "base", "accuracy").effects
        assert not mixed_model([], "base", "accuracy").effects
        # the same rewards and an exact line: no noise is left to estimate
        lines = [[[0.0, 0.5, 0.8]] * 4, [[0.1, 0.6, 0.9]] * 4]
        exact = [
            cell([[-1, -0.5, -0.2]] * 4, name, accuracy=rows) for name, rows in zip(("base", "o"), lines, strict=True)
        ]
        mixed_model(exact, "base", "accuracy")
    assert capfd.readouterr() == ("", "")


def test_the_best_rate_is_the_one_with_most_reward_at_the_quality():
    rows = [
        {"reward": -0.5, "frechet_distance": 0.04},
        {"reward": -0.2, "frechet_distance": 0.09},
        {"reward": -0.3, "frechet_distance": 0.07},
        {"reward": None, "frechet_distance": 0.01},
        {"reward": -0.1, "frechet_distance": None},
    ]
    assert reward_at_quality(rows, 0.08) == -0.3
    assert reward_at_quality(rows, None) == -0.1
    assert reward_at_quality(rows, 0.01) is None


def test_the_sweep_names_its_best_and_whether_it_is_at_the_edge(synthetic):
    whole = Study.of(synthetic)
    rates = whole.sweep("digits", "constant")
    assert [rate.learning_rate for rate in rates] == list(RATES)
    assert [rate.place for rate in rates if rate.best] == ["inside the sweep"]
    shorter = {**synthetic, "runs": [run for run in synthetic["runs"] if run["learning_rate"] < 4e-4]}
    # a sweep that has not finished chooses nothing
    partial = Study.of(shorter)
    assert not any(rate.best for rate in partial.sweep("digits", "constant"))
    assert ("digits", "constant") not in partial.best and partial.best_cells("digits") == []
    parts = synthetic["file"]["parts"]
    shorter["file"] = {
        **synthetic["file"],
        "parts": parts | {"sweep": parts["sweep"] | {"learning_rates": [5e-5, 1e-4, 2e-4]}},
    }
    rates = Study.of(shorter).sweep("digits", "constant")
    assert [(rate.learning_rate, rate.place) for rate in rates if rate.best] == [(2e-4, "at the edge")]


def test_the_best_rate_is_the_plans(synthetic):
    whole = Study.of(synthetic)
    for limit in (0.08, 0.05, 0.0):
        limited = {**synthetic["file"]["tasks"]["digits"], "frechet_limit": limit}
        other = Study({**whole.file, "tasks": {"digits": limited}}, whole.runs)
        for name in ("ddpo", "constant"):
            runs = [
                run for run in whole.runs if (run["part"], run["task"], run["algorithm"]) == ("sweep", "digits", name)
            ]
            assert other.best["digits", name] == best_learning_rate(runs, limit)


def test_the_sweeps_runs_are_not_compared(synthetic):
    """Its rate was chosen on these seeds, so they would flatter it."""
    for pair in Study.of(synthetic).pairs_at_best("digits"):
        assert set(pair[0].curves) == set(pair[1].curves) == set(range(10))
    equal = Study.of(synthetic).pairs_at_equal_rates("digits")
    assert {pair[1].learning_rate for pair in equal if pair[1].swept} == {5e-5, 4e-4}


def test_several_parts_sweep(synthetic):
    """A part per task, each with a name that begins with sweep."""
    parts = dict(synthetic["file"]["parts"])
    sweep = parts.pop("sweep")
    split = {f"sweep-{task}": sweep | {"tasks": [task]} for task in sweep["tasks"]}
    runs = [run | ({"part": f"sweep-{run['task']}"} if run["part"] == "sweep" else {}) for run in synthetic["runs"]]
    several = Study.of({**synthetic, "file": {**synthetic["file"], "parts": split | parts}, "runs": runs})
    one = Study.of(synthetic)
    assert several.best == one.best and several.best
    for task in one.tasks:
        assert several.sweep(task, "constant") == one.sweep(task, "constant")
        pairs = several.pairs_at_best(task)
        assert pairs and all(set(cell.curves) == set(range(10)) for pair in pairs for cell in pair)


def test_a_run_of_two_parts_belongs_to_both(synthetic):
    """study.json names only the first part of a run."""
    shared = {**synthetic["file"]["parts"]["best"], "seeds": [100, 101, 0]}
    file = {**synthetic["file"], "parts": {**synthetic["file"]["parts"], "best": shared}}
    found = Study.of({**synthetic, "file": file}).cell("digits", "constant", 2e-4)
    assert {100, 101, 0} <= set(found.curves)


def test_frames(synthetic):
    runs, evaluations = run_frame(synthetic), evaluation_frame(synthetic)
    assert len(runs) == len(synthetic["runs"]) and len(evaluations) == 11 * len(runs)
    assert (runs["last_epoch"] == 20).all()
    assert len(run_frame({})) == len(evaluation_frame({})) == 0
    rows = [{"epoch": 2, "reward": -0.5}, {"epoch": 0, "reward": -0.6, "accuracy": None}, {"epoch": 4, "reward": None}]
    curve = curve_of({"evaluations": rows})
    assert curve["epoch"].tolist() == [0, 2] and np.isnan(curve["accuracy"]).all()


def test_an_infinite_resample_is_no_error():
    found = bootstrap(
        [np.ones(4), np.array([0.0, 0.0, 0.0, 1.0])], lambda a, b, axis: np.mean(a, axis) / np.mean(b, axis)
    )
    assert found.estimate == 4 and found.high == math.inf
