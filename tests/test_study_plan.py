"""Study files: what they mean, and that every mistake in one is found before any run starts."""

import copy
import datetime
import math

import pytest
import torch

from pcpo_fast import samplers
from pcpo_fast.config import Config, read_config
from pcpo_fast.documents import read_yaml
from pcpo_fast.errors import SettingError
from pcpo_fast.policies import find_model
from pcpo_fast.presets import PRESETS
from pcpo_fast.study.measures import best_learning_rate
from pcpo_fast.study.plan import SHIPPED, credit_weights, make_plan, read_plan

TASK = {"preset": "digits-flow", "baseline": "grpo", "targets": [-0.4], "frechet_limit": 0.08}
FILE = {
    "settings": {"epochs": 3},
    "tasks": {"flow": TASK, "dance": TASK | {"settings": {"sampler": "dance", "num_inference_steps": 4}}},
    "algorithms": {"grpo": {"title": "Flow-GRPO", "objective": "ppo", "credit": "native"}, "constant": {}},
    "parts": {
        "sweep": {"tasks": ["flow"], "learning_rates": [1e-4, 2e-4], "seeds": [100, 101]},
        "best": {"tasks": ["flow"], "learning_rates": "best", "seeds": [0, 1]},
        "equal": {"learning_rates": [1e-4], "seeds": [0]},
    },
}


def changed(place, value):
    """The file with another value at a place such as "tasks.flow.preset"; None removes it."""
    file = copy.deepcopy(FILE)
    *path, last = place.split(".")
    section = file
    for key in path:
        section = section[key]
    if value is None:
        del section[last]
    else:
        section[last] = value
    return file


def ids(runs):
    return [run.id for run in runs]


def test_runs_in_the_order_in_which_they_start():
    runs, waiting = make_plan("name", FILE).runs()
    swept = [
        f"flow-{algorithm}-{rate}-{seed}"
        for seed in (100, 101)
        for algorithm in ("grpo", "constant")
        for rate in ("0.0001", "0.0002")
    ]
    equal = [f"{task}-{algorithm}-0.0001-0" for task in ("flow", "dance") for algorithm in ("grpo", "constant")]
    assert ids(runs) == swept + equal
    assert waiting == [("flow", algorithm, seed) for seed in (0, 1) for algorithm in ("grpo", "constant")]


def test_layers_of_settings():
    """The preset, the study's settings, the task's, the algorithm's, and what names the run."""
    run = next(run for run in make_plan("name", FILE).runs()[0] if run.id == "dance-grpo-0.0001-0")
    assert run.config == PRESETS["digits-flow"].replace(
        epochs=3,
        sampler="dance",
        num_inference_steps=4,
        objective="ppo",
        credit="native",
        learning_rate=1e-4,
        seed=0,
    )
    file = changed("tasks.dance.settings", {"epochs": 5})
    file["algorithms"]["grpo"]["epochs"] = 7
    epochs = {run.id: run.config.run.epochs for run in make_plan("name", file).runs()[0] if run.part == "equal"}
    assert epochs == {
        "flow-grpo-0.0001-0": 7,
        "flow-constant-0.0001-0": 3,
        "dance-grpo-0.0001-0": 7,
        "dance-constant-0.0001-0": 5,
    }
    assert run.settings()["rewards"] == ["digit_alignment"]


def test_a_run_of_two_parts_is_one_run_of_the_first():
    plan = make_plan("name", FILE)
    best = {("flow", "grpo"): 1e-4, ("flow", "constant"): 2e-4}
    runs, waiting = plan.runs(best)
    assert waiting == [] and len(set(ids(runs))) == len(runs)
    parts = {run.id: run.part for run in runs if run.seed == 0}
    assert parts == {
        "flow-grpo-0.0001-0": "best",
        "flow-constant-0.0002-0": "best",
        "flow-constant-0.0001-0": "equal",
        "dance-grpo-0.0001-0": "equal",
        "dance-constant-0.0001-0": "equal",
    }
    swept = {f"flow-grpo-{rate}-{seed}": float(rate) for seed in (100, 101) for rate in ("0.0001", "0.0002")}
    assert plan.sweep("flow", "grpo") == swept
    assert plan.sweep("dance", "grpo") == {}


def test_several_parts_sweep():
    """Tasks may sweep algorithms and rates of their own; together they cover what asks for the best."""
    file = changed("parts.sweep.algorithms", ["grpo"])
    with pytest.raises(SettingError):
        make_plan("name", file)
    sweep = {"tasks": ["flow"], "algorithms": ["constant"], "learning_rates": [4e-4], "seeds": [100]}
    file["parts"] = {"sweep-constant": sweep, **file["parts"]}
    plan = make_plan("name", file)
    assert plan.sweep("flow", "constant") == {"flow-constant-0.0004-100": 4e-4}
    assert list(plan.sweep("flow", "grpo").values()) == [1e-4, 2e-4] * 2
    # after the parts that ask for them they are too late
    file["parts"] = {**{name: part for name, part in file["parts"].items() if name != "sweep"}, "sweep-grpo": sweep}
    with pytest.raises(SettingError, match="'grpo' on 'flow'"):
        make_plan("name", file)


def test_a_run_measures_gradients_if_one_of_its_parts_does():
    file = changed("parts.gradients", {"learning_rates": [1e-4, 2e-4], "seeds": [0], "gradients": True})
    measured = {run.id for run in make_plan("name", file).runs()[0] if run.gradients}
    pairs = [(task, algorithm) for task in ("flow", "dance") for algorithm in ("grpo", "constant")]
    assert measured == {f"{task}-{algorithm}-{rate}-0" for task, algorithm in pairs for rate in ("0.0001", "0.0002")}


def test_defaults_are_filled_in():
    file = make_plan("name", FILE).file
    assert file["parts"]["equal"] == {
        "tasks": ["flow", "dance"],
        "algorithms": ["grpo", "constant"],
        "learning_rates": [1e-4],
        "seeds": [0],
        "gradients": False,
    }
    assert file["tasks"]["flow"] == TASK | {"title": "flow", "settings": {}}
    assert file["algorithms"]["constant"] == {"title": "constant"}
    assert make_plan("name", file).file == file


@pytest.mark.parametrize(
    ("place", "value", "named", "reason"),
    [
        ("tasks.flow.preset", "digit", "tasks.flow.preset", "'digit' does not exist; choose one of digits, "),
        ("tasks.flow.preset", None, "tasks.flow.preset", "is missing"),
        ("tasks.flow.baseline", "ddpo", "tasks.flow.baseline", "'ddpo' does not exist; choose one of grpo, constant"),
        ("tasks.flow.targets", [], "tasks.flow.targets", "is empty"),
        ("tasks.flow.targets", ["high"], "tasks.flow.targets.0", "'high' was given"),
        ("tasks.flow.frechet_limit", 0, "tasks.flow.frechet_limit", "0 was given"),
        ("claims", [{"claim": "x", "algorithm": "x", "measure": "epochs"}], "claims.0.algorithm", "'x' does not exist"),
        ("claims", [{"claim": "x", "algorithm": "grpo", "measure": "x"}], "claims.0.measure", "choose one of epochs, "),
        ("claims", [{"claim": "x", "algorithm": "grpo"}], "claims.0.measure", "is missing"),
        (
            "claims",
            [{"claim": "x", "algorithm": "grpo", "measure": "epochs"}],
            "claims.0.algorithm",
            "'grpo' is compared with itself",
        ),
        (
            "claims",
            [{"claim": "x\ny", "algorithm": "constant", "measure": "epochs"}],
            "claims.0.claim",
            "give one line of text",
        ),
        ("tasks.flow.title", "a\x1b[0m", "tasks.flow.title", "give one line of text"),
        ("tasks.a\nb", TASK, "tasks.a\nb", "give one line of text"),
        ("algorithms.grpo.title", "a\nb", "algorithms.grpo.title", "give one line of text"),
        ("tasks.flow.colour", 1, "tasks.flow.colour", "nothing has this name here"),
        ("tasks.flow.settings", {"epoch": 3}, "tasks.flow.settings.epoch", "did you mean epochs"),
        ("tasks.flow.settings", {"epochs": 0}, "tasks.flow.settings.epochs", "0 was given"),
        ("settings", {"epochs": "3"}, "settings.epochs", "'3' was given"),
        ("settings", {"seed": 1}, "settings.seed", "seeds of a part give it"),
        ("settings", [], "settings", "must be a valid mapping"),
        ("algorithms", {}, "algorithms", "is empty"),
        ("algorithms.grpo.objective", "ppoo", "algorithms.grpo.objective", "'ppoo' was given"),
        ("algorithms.grpo.learning_rate", 1e-4, "algorithms.grpo.learning_rate", "learning_rates of a part"),
        ("algorithms.grpo.title", 3, "algorithms.grpo.title", "3 was given"),
        ("algorithms.constant.credit_powers", [1], "algorithms.constant.credit_powers", "give two numbers"),
        ("algorithms.constant.credit_powers", [True, 1], "algorithms.constant.credit_powers", "give two numbers"),
        (
            "algorithms.constant.credit_powers",
            [0, -1000],
            "tasks.flow with algorithms.constant: credit",
            "are not finite",
        ),
        ("algorithms.unused", {"epoch": 3}, "algorithms.unused.epoch", "did you mean epochs"),
        ("algorithms." + 200 * "a", {}, "parts.sweep", "has a name of 2"),
        ("parts.equal.seeds", [100], "parts.equal.seeds", "100 is a seed of both a sweep and a comparison of 'grpo'"),
        ("parts.best.seeds", [1, 101], "parts.best.seeds", "101 is a seed of both"),
        ("settings", {"eval_samples": 1}, "tasks.flow with algorithms.grpo: eval_samples", "give at least 2"),
        ("settings", {"colour": datetime.date(2026, 1, 1)}, "study", "holds what JSON cannot"),
        ("tasks.flow.preset", "sd15", "tasks.flow with algorithms.grpo: model", "with a classifier of digits"),
        ("algorithms.constant.credit_powers", [1, "x"], "algorithms.constant.credit_powers", "give two numbers"),
        ("algorithms.grpo.credit_powers", [1, 0], "algorithms.grpo.credit_powers", "gives the credit, and so does"),
        ("parts", {}, "parts", "is empty"),
        ("parts.equal.tasks", ["flows"], "parts.equal.tasks.0", "'flows' does not exist"),
        ("parts.equal.tasks", ["flow", "flow"], "parts.equal.tasks", "names 'flow' twice"),
        ("parts.equal.algorithms", [], "parts.equal.algorithms", "is empty"),
        ("parts.equal.algorithms", ["grpo", "ppo"], "parts.equal.algorithms.1", "'ppo' does not exist"),
        ("parts.equal.seeds", [], "parts.equal.seeds", "is empty"),
        ("parts.equal.seeds", [0, 1.5], "parts.equal.seeds.1", "1.5 was given"),
        ("parts.equal.seeds", [True], "parts.equal.seeds.0", "True was given"),
        ("parts.equal.seeds", [-1], "parts.equal.seeds.0", "-1 was given"),
        ("parts.equal.seeds", [0, 0], "parts.equal.seeds", "names 0 twice"),
        ("parts.equal.learning_rates", [], "parts.equal.learning_rates", "is empty"),
        ("parts.equal.learning_rates", [0.0], "parts.equal.learning_rates.0", "0.0 was given"),
        ("parts.equal.learning_rates", "good", "parts.equal.learning_rates", "is 'good'; give a list of numbers, or"),
        (
            "parts.equal.learning_rates",
            "best",
            "parts.equal.learning_rates",
            "best needs 'constant' on 'dance' in a part",
        ),
        ("parts.sweep.algorithms", ["grpo"], "parts.best.learning_rates", "best needs 'constant' on 'flow' in a part"),
        ("parts.sweep", None, "parts.best.learning_rates", "best needs 'constant' on 'flow' in a part before this one"),
        ("parts.sweep.learning_rates", "best", "parts.sweep.learning_rates", "chooses the best; give it a list"),
        ("parts.equal.learning_rates", [1e-4, 1.00000001e-4], "parts.equal", "would both be called"),
        ("parts.equal.steps", 3, "parts.equal.steps", "nothing has this name here"),
        (
            "settings",
            {"model": "nowhere"},
            "tasks.flow with algorithms.grpo: model",
            "'nowhere' was given; a study measures",
        ),
        ("settings", {"rewards": ["beauty"]}, "tasks.flow with algorithms.grpo: rewards", "no reward is named"),
        ("algorithms.constant.eta", 1.0, "tasks.flow with algorithms.constant: eta", "is DDIM's"),
        ("algorithms.constant.group_size", 1, "tasks.flow with algorithms.constant: micro_batch_size", "8 images"),
    ],
)
def test_mistakes(place, value, named, reason):
    with pytest.raises(SettingError) as error:
        make_plan("name", changed(place, value))
    assert (error.value.name, reason in error.value.reason) == (named, True), error.value


def test_gradients_are_those_of_all_steps():
    file = changed("settings", {"window_size": 2})
    assert make_plan("name", file).runs()[0]
    file["parts"]["equal"]["gradients"] = True
    with pytest.raises(SettingError, match=r"^tasks\.flow with algorithms\.grpo: window_size"):
        make_plan("name", file)


def test_content_that_contains_itself():
    file = read_yaml("tasks: &a {flow: *a}\nalgorithms: {}\nparts: {}\n")
    with pytest.raises(SettingError, match="none within itself"):
        make_plan("name", file)


def test_names_that_give_the_same_folder():
    file = changed("algorithms", {"grpo": {}, "a b": {}, "a_b": {}})
    file["parts"] = {"equal": FILE["parts"]["equal"]}
    with pytest.raises(SettingError, match=r"would both be called flow-a_b-0\.0001-0"):
        make_plan("name", file)


@pytest.mark.parametrize("content", [None, [], "text", {1: 2}])
def test_content_that_is_no_study(content):
    with pytest.raises(SettingError):
        make_plan("name", content)


def test_files(tmp_path):
    path = tmp_path / "mine.yaml"
    with pytest.raises(SettingError, match=r"^study: cannot read .*mine\.yaml"):
        read_plan(path)
    path.write_text("parts: [")
    with pytest.raises(SettingError, match=r"^study: cannot read"):
        read_plan(path)
    path.write_text(
        "tasks: {flow: {preset: digits-flow, baseline: a, targets: [-2e-1], frechet_limit: 8e-2}}\n"
        "algorithms: {a: {clip_range: 2e-3}}\n"
        "parts: {only: {learning_rates: [1e-4, 2e-4], seeds: [0]}}\n"
    )
    plan = read_plan(path)
    assert (plan.name, ids(plan.runs()[0])) == ("mine", ["flow-a-0.0001-0", "flow-a-0.0002-0"])
    assert plan.runs()[0][0].config.loss.clip_range == 2e-3


def test_a_key_that_is_written_twice(tmp_path):
    with pytest.raises(ValueError, match="line 3: 'a' is written twice"):
        read_yaml("a: 1\nb: 2\na: 3\n")
    merged = "x: &x {a: 1}\ny: &y {<<: *x, a: 2}\nz: {<<: *y, a: 3}\n"
    assert read_yaml(merged)["z"] == {"a": 3}
    (tmp_path / "settings.yaml").write_text("epochs: 1\nepochs: 2\n")
    with pytest.raises(SettingError, match="'epochs' is written twice"):
        read_config(tmp_path / "settings.yaml")


@pytest.mark.parametrize("name", SHIPPED)
def test_the_files_of_the_package_have_no_mistake(name):
    runs, _ = read_plan(SHIPPED[name]).runs()
    assert runs
    assert {run.config.model.model for run in runs} == {"digits", "digits-flow"}


def finished(rate, seed, *evaluations):
    return {
        "learning_rate": rate,
        "seed": seed,
        "evaluations": [{"reward": reward, "frechet_distance": distance} for reward, distance in evaluations],
    }


def test_the_best_learning_rate_is_that_of_the_best_mean_at_the_quality():
    low = [finished(1e-4, 0, (-0.5, 0.04), (-0.3, 0.05)), finished(1e-4, 1, (-0.5, 0.04), (-0.1, 0.05))]
    # its best rewards have lost quality, but for one
    high = [finished(4e-4, 0, (-0.5, 0.04), (-0.01, 0.09)), finished(4e-4, 1, (-0.15, 0.08), (-0.01, 0.09))]
    assert best_learning_rate(low + high, 0.08) == 1e-4
    assert best_learning_rate(low + high, 0.1) == 4e-4
    # the highest evaluation counts, not the last
    assert best_learning_rate([finished(2e-4, 0, (-0.1, 0.05), (-0.6, 0.05)), *low], 0.08) == 2e-4


def test_equal_learning_rates_give_the_lower_one_and_what_does_not_count_loses():
    runs = [finished(rate, 0, (-0.2, 0.04)) for rate in (4e-4, 1e-4, 2e-4)]
    assert best_learning_rate(runs, 0.08) == 1e-4
    none = finished(1e-5, 0, (None, 0.04), (-0.1, None), (-0.1, 0.5))
    assert best_learning_rate([none, *runs], 0.08) == 1e-4
    assert best_learning_rate([none], 0.08) == 1e-5
    with pytest.raises(ValueError):
        best_learning_rate([], 0.08)


@pytest.mark.parametrize("preset", ["digits", "digits-flow"])
def test_weights_of_powers_have_the_sum_of_the_native_ones(preset):
    config = PRESETS[preset].replace(target_weight=2.0)
    settings = Config().replace(**config.flat() | {"credit": "native", "target_weight": None}).sampler
    table = samplers.build(settings, find_model(config.model).schedule())
    native, trainable = table.native_weight, table.trainable
    assert credit_weights(config, [1, -1]) == pytest.approx(native.tolist())
    even = torch.tensor(credit_weights(config, [0, 0]), dtype=torch.float64)
    assert even[trainable].tolist() == pytest.approx([float(native.sum() / trainable.sum())] * int(trainable.sum()))
    for powers in ([1, 0], [0.5, 2], [-1, -2]):
        weights = torch.tensor(credit_weights(config, powers), dtype=torch.float64)
        assert math.isclose(weights.sum(), native.sum(), rel_tol=1e-9)
        assert (weights[trainable] > 0).all() and (weights[~trainable] == 0).all()
        shape = table.output_coef[trainable].abs() ** powers[0] * table.std[trainable] ** powers[1]
        assert (weights[trainable] / shape).std() < 1e-9 * (weights[trainable] / shape).mean()
    # the last step of the flow sampler draws no noise
    assert trainable.all() == (preset == "digits")


def test_powers_become_the_credit_of_a_run():
    try:
        Config().replace(credit=(1.0,) * 20).resolved()
    except SettingError:
        pytest.skip("credit takes no weights yet")
    plan = make_plan("name", changed("algorithms.constant.credit_powers", [1, 0]))
    for task in ("flow", "dance"):
        config = plan.configs[task, "constant"]
        assert config.sampler.credit == credit_weights(config.replace(credit="native"), [1, 0])
    assert len(plan.configs["dance", "constant"].sampler.credit) == 4
