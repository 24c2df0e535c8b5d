"""Tables and figures of a study, finished or not."""

import copy
import json
import warnings

import numpy as np
import pytest
from PIL import Image
from synthetic_study import NATIVE, VARIANCE, study

from pcpo_fast.reward_axis import RewardAxis
from pcpo_fast.study.diagnostics import measured_shares
from pcpo_fast.study.figures import BASELINE, OTHERS, all_figures, reward_epochs
from pcpo_fast.study.frames import Study
from pcpo_fast.study.report import write_report
from pcpo_fast.study.tables import TABLES, all_tables


@pytest.fixture(scope="module")
def synthetic():
    return study(seeds=5)


@pytest.fixture(scope="module")
def tables(synthetic):
    return all_tables(synthetic)


def without(synthetic, keep):
    return {**synthetic, "runs": [run for run in synthetic["runs"] if keep(run)]}


def test_the_report_is_written_twice_with_the_same_tables(synthetic, tables, tmp_path):
    read = json.loads(json.dumps(synthetic))
    paths = write_report(read, tmp_path / "report")
    assert {path.name for path in paths} == {
        *(f"{name}.md" for name in TABLES),
        *("gain.png", "reward_epochs.png", "reward_seconds.png", "quality_reward.png", "learning_rates.png"),
        *("steps.png", "gradients.png", "map_digits.png", "map_flow.png"),
    }
    for path in paths:
        if path.suffix == ".md":
            assert path.read_bytes() == tables[path.name].encode()
        else:
            with Image.open(path) as image:
                assert image.width == 8.3 * 160 and np.asarray(image.convert("L")).std() > 5


@pytest.mark.parametrize("name", TABLES)
def test_a_table_says_what_it_shows_and_its_rows_are_of_one_length(tables, name):
    blocks = tables[f"{name}.md"].split("\n\n")
    assert blocks[0].startswith("# ") and blocks[1].endswith(".") and len(blocks[1]) > 60
    for block in blocks:
        if block.startswith("|"):
            # a bar within a cell is escaped
            lengths = {line.replace("\\|", "").count("|") for line in block.strip().splitlines()}
            assert len(lengths) == 1
    assert "nan" not in tables[f"{name}.md"]


def test_verdicts(tables):
    rows = [line for line in tables["gain.md"].splitlines() if line.startswith("| ")]
    assert all("faster" in row for row in rows if row.startswith("| constant credit | 2e-4"))
    hinge = [row for row in rows if row.startswith("| log-hinge alone | 2e-4")]
    assert any("not significant" in row for row in hinge) and not any("faster" in row for row in hinge)
    assert any("n = 2: too few to tell" in row for row in rows) and any("≥" in row for row in rows)
    assert "n.s." in tables["quality.md"] and "not significant" in tables["mixed_model.md"]


def test_claims_and_what_was_found(synthetic, tables):
    rows = [line.split(" | ") for line in tables["claims.md"].splitlines() if line.startswith("| ")][2:]
    claims = [row[0].removeprefix("| ") for row in rows]
    # named once, on the first of its rows
    assert [claim for claim in claims if claim] == [claim["claim"] for claim in synthetic["file"]["claims"]]
    digits = {name: row for name, row in zip(claims, rows, strict=True) if name}
    assert digits["fewer epochs"][1:4] == [
        "25%",
        "digits, 10 DDIM steps, digit alignment",
        "constant credit (2e-4) against DDPO (2e-4), at -0.2",
    ]
    found = {name: row[-1].removesuffix(" |") for name, row in digits.items()}
    assert found == {
        "fewer epochs": "faster",
        "at any rate": "slower",
        "fewer seconds": "faster",
        "better images": "better",
        "than the paper's": "faster",
        "no worse diversity": "not significant",
        "rho - 1 serves": "-",
    }
    assert digits["rho - 1 serves"][-2] == "4.0% [4.0, 4.0]" and "images" in digits["than the paper's"][-2]
    # seeds of the sweep have no interval, so their rates are not among the equal ones
    assert {row[3].split("(")[1][:4] for row in rows[2:6]} == {"1e-4", "2e-4"}
    # the gain is that of the table of gains
    [row] = [
        row
        for row in tables["gain.md"].split("At equal learning rates:")[0].splitlines()
        if row.startswith("| constant credit | 2e-4 | -0.2")
    ]
    assert digits["fewer epochs"][-2].removesuffix(" epochs") in row


def test_the_map_has_native_and_constant_credit_with_its_own_seeds(tables):
    text = tables["map.md"]
    assert "| 0 | 0 | constant credit | 3 |" in text
    assert "| **p = 1** |" in text and "| reward | q = -1 | q = 0 | q = 1 |" in text


def test_native_credit_on_the_map_differs_from_it_in_credit_only(synthetic):
    """DDPO has another objective, so the log-hinge with native credit stands for native credit."""
    runs = [run for run in synthetic["runs"] if run["algorithm"] != "map 1 -1"]
    text = all_tables({**synthetic, "runs": runs})["map.md"]
    assert "| 1 | -1 | log-hinge alone | 3 |" in text


def test_points_of_the_map_are_in_no_other_comparison(tables):
    assert "map 1 0" not in tables["gain.md"] and "map 1 0" in tables["runs.md"]


def test_the_share_that_follows_from_measured_gradients(synthetic, tables):
    """Of orthogonal gradients it is signal^2 x native / variance: equal for all but the last step here."""
    found = measured_shares(Study.of(synthetic), "digits")
    assert found.share == pytest.approx([20 / 9] * 9 + [0])
    weight, along, noise = np.array(NATIVE), 4e-8 * np.array([1.0, *[2.0] * 8, 0]), np.array(VARIANCE)
    along[-1] = -1e-9 * 3
    assert [interval.estimate for interval in found.along] == pytest.approx(along.tolist())
    credit = {"native": weight, "constant": np.ones(10), "measured": found.share}
    gains = {name: w @ along / np.sqrt(w**2 @ noise) for name, w in credit.items()}
    assert {name: interval.estimate for name, interval in found.gains.items()} == pytest.approx(gains)
    assert gains["native"] < gains["constant"] < gains["measured"]
    value = f"{gains['measured']:.3g}"
    assert f"| measured | {value} [{value}, {value}] | 5 |" in tables["gradients.md"]


def test_a_seed_is_not_judged_by_the_share_that_it_picked(synthetic):
    """In pure noise the best share of a measurement looks good on that measurement alone."""
    rng, noise = np.random.default_rng(0), copy.deepcopy(synthetic)
    for run in noise["runs"]:
        for row in run["gradients"]:
            row["gram"] = np.diag(rng.normal(size=10)).tolist()
    found = measured_shares(Study.of(noise), "digits")
    gain = found.gains["measured"]
    picked = found.share @ [interval.estimate for interval in found.along] / np.sqrt(found.share**2 @ found.variance)
    assert gain.low < 0 < gain.high and picked > gain.estimate


CUTS = {
    "nothing ran": lambda run: False,
    "only the sweep": lambda run: run["part"] == "sweep",
    "half of the sweep": lambda run: run["part"] == "sweep" and run["seed"] == 100 and run["learning_rate"] < 2e-4,
    "no baseline": lambda run: run["algorithm"] != "ddpo",
    "only the baseline": lambda run: run["algorithm"] == "ddpo",
    "an algorithm did not run": lambda run: run["algorithm"] != "constant",
    "one seed": lambda run: run["seed"] in (0, 100),
    "two seeds": lambda run: run["seed"] in (0, 1, 100),
    "different seeds": lambda run: run["part"] == "sweep" or (run["seed"] < 2) == (run["algorithm"] == "ddpo"),
    "one task": lambda run: run["task"] == "digits",
    "only the map": lambda run: run["part"] == "map",
    "no map": lambda run: run["part"] != "map",
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_part_of_a_study_is_reported(synthetic, cut, capfd):
    partial = without(synthetic, CUTS[cut])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = all_tables(partial)
        all_figures(partial)
    assert capfd.readouterr() == ("", "")
    assert found.keys() == {f"{name}.md" for name in TABLES}
    whole = cut in ("no map", "only the map", "one task", "different seeds")
    assert whole or "no finished runs" in found["claims.md"]
    assert not any("nan" in text for text in found.values())
    if cut == "nothing ran":
        assert (
            "No finished runs." in found["runs.md"]
            and "nothing to show yet" in found["map.md"]
            and not all_figures(partial)
        )
    if cut in ("no baseline", "only the map", "nothing ran", "only the sweep"):
        assert "no finished runs of the baseline, DDPO" in found["gain.md"]
    if cut == "only the baseline":
        assert "no finished runs of the other algorithms" in found["gain.md"]
    if cut == "an algorithm did not run":
        assert "No finished runs at the best learning rate yet: constant credit." in found["gain.md"]
        assert "No finished runs yet of: constant credit." in found["runs.md"]
    if cut == "two seeds":
        assert "n = 2: too few to tell" in found["gain.md"] and "(n = 2)" in found["quality.md"]
        assert "3 of 7" in found["runs.md"]


def mangled(synthetic, change):
    changed = copy.deepcopy(without(synthetic, lambda run: run["task"] == "digits"))
    for index, run in enumerate(changed["runs"]):
        change(index, run)
    return changed


def no_diagnostics(index, run):
    run.update(steps=[], gradients=[], training={})


def nulls(index, run):
    run["evaluations"][index % 11]["reward"] = None
    run["evaluations"][index % 7]["frechet_distance"] = None
    run["steps"][0]["gradient_norm_mean"] = [None] * 10
    run["gradients"][1]["signal"][0] = None


def no_evaluations(index, run):
    if index % 3 == 0:
        run["evaluations"] = []


def one_evaluation(index, run):
    del run["evaluations"][1:]


def always_the_same(index, run):
    for row in run["evaluations"]:
        row.update({key: 0.0 for key in row if key not in ("epoch", "images", "seconds")})


def unfinished(index, run):
    run["finished"] = index % 2 == 0


@pytest.mark.parametrize("change", [no_diagnostics, nulls, no_evaluations, one_evaluation, always_the_same, unfinished])
def test_odd_results_are_reported(synthetic, change, capfd):
    odd = mangled(synthetic, change)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = all_tables(odd)
        all_figures(odd)
    assert not any("nan" in text for text in found.values())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("file", [{}, {"tasks": {"digits": {}}}, {"tasks": None, "algorithms": None, "parts": None}])
def test_a_file_without_content_is_reported(file):
    assert all_tables({"file": file, "runs": []}).keys() == {f"{name}.md" for name in TABLES}


def test_no_band_exceeds_a_rewards_bound(synthetic):
    figure = reward_epochs(Study.of(synthetic))
    assert figure is not None
    # an axis of -reward, on which the bound 0 is never reached; and one of rewards up to 1
    digits, flow = figure.axes
    assert digits.get_yscale() == "log" and digits.yaxis_inverted()
    for axes, inside in ((digits, lambda y: y > 0), (flow, lambda y: y <= 1)):
        assert axes.collections
        for band in axes.collections:
            assert inside(band.get_paths()[0].vertices[:, 1]).all()


def test_the_baseline_has_its_own_colour(synthetic):
    figure = reward_epochs(Study.of(synthetic))
    assert figure is not None and BASELINE not in OTHERS
    for axes in figure.axes:
        colours = {line.get_label().split(",")[0]: line.get_color() for line in axes.lines if "," in line.get_label()}
        assert colours["DDPO"] == BASELINE and len(set(colours.values())) == len(colours)


def test_the_axis_of_a_reward_shows_the_gain():
    axis = RewardAxis([-0.5, -0.1, -0.01])
    assert axis.logarithmic
    np.testing.assert_allclose(axis.between(-0.4, -0.1, 3), [-0.4, -0.2, -0.1])
    assert axis.to_axis(np.array([0.0])).tolist() == [0.01]
    # little to show, or rewards of both signs
    assert not RewardAxis([-0.5, -0.4]).logarithmic and not RewardAxis([-0.5, -0.01, 0.2]).logarithmic
    assert not RewardAxis([]).logarithmic
