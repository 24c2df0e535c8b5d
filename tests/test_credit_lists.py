"""A weight for each step: how it is given, what is refused, and that nothing is made before it is."""

import json
import re

import pytest
import torch
from pipelines import command, make_trainer

from pcpo_fast import train
from pcpo_fast.config import Config, checked_settings
from pcpo_fast.errors import SettingError
from pcpo_fast.policies import find_model
from pcpo_fast.samplers import build
from pcpo_fast.train import check, main, parse

pytest_plugins = "pipelines"
pytestmark = pytest.mark.usefixtures("one_thread")

MODULE = """
import torch
from pcpo_fast import StepTable

def noisy(settings, schedule, **credit):
    steps = torch.arange(settings.num_inference_steps, 0, -1)
    # it puts out the sample, which enters the step with the other sign; the last step has no noise
    return StepTable(steps, torch.ones(len(steps)), 0.1 * steps, torch.tensor([0.5, 0.4, 0.0]), **credit)

def by_hand(settings, schedule):
    return noisy(settings, schedule, credit=torch.tensor([-3.0, -2.0, 0.0]))
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "list_samplers.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)


def settings(model="digits", **given):
    return Config().replace(model=model, num_inference_steps=3, credit=(1.0, 2.5, 4.0), **given)


def table_of(config, window=None):
    return build(config.sampler, find_model(config.model).schedule(), window=window)


def test_the_ways_to_give_a_list(tmp_path):
    (tmp_path / "credit.yaml").write_text("credit: [1, 2.5, 4e0]\n")
    (tmp_path / "credit.json").write_text('{"credit": [1, 2.5, 4]}')
    steps = ["digits", "--num-inference-steps", "3"]
    ways = [
        ["--credit", "1", "2.5", "4.0"],
        *(["--config", str(tmp_path / f"credit.{end}")] for end in ("yaml", "json")),
    ]
    for way in ways:
        config = parse([*steps, *way])[1]
        assert config.sampler.credit == (1.0, 2.5, 4.0)
        assert table_of(config).weight.tolist() == [1.0, 2.5, 4.0]
        assert Config().replace(**checked_settings(json.loads(config.to_json()))) == config
        # and a scheme on the command line takes its place
        assert parse([*steps, *way, "--credit", "native"])[1].sampler.credit == "native"


def test_the_sampler_stays_as_it_is_and_the_first_number_is_that_of_the_noisiest_step():
    for model in ("digits", "digits-flow"):
        config = settings(model)
        table, native = table_of(config), table_of(config.replace(credit="native"))
        for column in ("timesteps", "sample_coef", "output_coef", "std"):
            assert torch.equal(getattr(table, column), getattr(native, column))
        assert table.timesteps.tolist() == sorted(table.timesteps.tolist(), reverse=True)
        # the flow's last step draws no noise
        assert table.weight.tolist() == [1.0, 2.5, 4.0 if model == "digits" else 0.0]
        windowed = table_of(config, window=(1, 2))
        assert windowed.weight.tolist() == [0.0, 2.5, 0.0]


def test_a_sampler_of_ones_own_gets_the_sign_that_it_needs(own):
    config = settings(sampler="list_samplers:noisy")
    check(config)
    assert table_of(config).weight.tolist() == [-1.0, -2.5, 0.0]
    unnormalized = config.replace(normalized_log_prob=False)
    assert not table_of(unnormalized).normalized and table_of(unnormalized).weight.tolist() == [-1.0, -2.5, 0.0]
    assert table_of(settings(sampler="list_samplers:by_hand").replace(credit="native")).weight.tolist() == [-3, -2, 0]


@pytest.mark.parametrize(
    ("given", "name", "message"),
    [
        ({"credit": (1.0, 2.0)}, "credit", r"2 weights were given for 3 steps \(num_inference_steps\); give one for"),
        ({"credit": (1.0,) * 4}, "credit", "4 weights were given for 3 steps"),
        ({"credit": ()}, "credit", "0 weights were given for 3 steps"),
        ({"credit": (1.0, 2.0), "window_size": 2}, "credit", "2 weights were given for 3 steps"),
        ({"num_inference_steps": 4}, "credit", "3 weights were given for 4 steps"),
        (
            {"credit": (1.0, -2.0, 1.0)},
            "credit",
            r"\[1.0, -2.0, 1.0\] was given; -2.0 must be greater than or equal to 0",
        ),
        ({"credit": (1.0, float("nan"), 1.0)}, "credit", "nan must be a finite number"),
        ({"credit": (1.0, float("inf"), 1.0)}, "credit", "inf must be a finite number"),
        ({"credit": (1.0, "2", 1.0)}, "credit", "'2' must be a valid number"),
        ({"credit": (True, 1.0, 1.0)}, "credit", "true must be a valid number"),
        (
            {"credit": "1,2,3"},
            "credit",
            "'1,2,3' was given; it must be 'native', .* or 'published', or it must be a list",
        ),
        ({"credit": 1.0}, "credit", "1.0 was given; it must be 'native', .* or it must be a list"),
        ({"credit": (1.0, 1e39, 1.0)}, "credit", r"float32 at step 1 .*weight 1e\+39\); give .* weights of usual size"),
        (
            {"credit": (0.0, 0.0, 0.0)},
            "credit",
            r"gives every trained step \(0, 1, 2\) the weight 0; give at least one",
        ),
        ({"credit": (1e-50,) * 3}, "credit", r"gives every trained step \(0, 1, 2\) the weight 0"),
        ({"model": "digits-flow", "credit": (0.0, 0.0, 1.0)}, "credit", r"every trained step \(0, 1\) the weight 0"),
        ({"credit": (0.0, 1.0, 1.0), "window_size": 1}, "credit", r"every trained step \(0\) the weight 0"),
        (
            {"credit": (1.0, 0.0, 0.0), "window_size": 2, "window": "sliding"},
            "credit",
            r"every trained step \(1, 2\) the weight 0",
        ),
        (
            {"target_weight": 1.0},
            "target_weight",
            "has no meaning beside a credit of one weight per step; leave it out",
        ),
        ({"sampler": "list_samplers:noisy", "credit": (1.0,)}, "credit", "1 weights were given for 3 steps"),
        (
            {"sampler": "list_samplers:noisy", "credit": (0.0, 0.0, 1.0)},
            "credit",
            r"trained step \(0, 1\) the weight 0",
        ),
        ({"sampler": "list_samplers:noisy", "target_weight": 1.0}, "target_weight", "has no meaning beside a credit"),
        (
            {"sampler": "list_samplers:by_hand"},
            "credit",
            "list_samplers:by_hand gives the weights itself; leave it out",
        ),
    ],
    ids=str,
)
def test_lists_that_do_not_fit_are_refused_before_weights_are_read(own, given, name, message):
    with pytest.raises(SettingError, match=message) as caught:
        check(settings().replace(**given).resolved())
    assert caught.value.name == name and len(str(caught.value)) < 250


def test_the_command_line_says_so_before_anything_is_made(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "make_trainer", lambda *_, **__: pytest.fail("the model was loaded"))
    assert main([*command(model, tmp_path / "run"), "--credit", "1", "2"]) == 2
    expected = "error: --credit: 2 weights were given for 3 steps (num_inference_steps); give one for each step\n"
    assert capsys.readouterr().err == expected
    assert not (tmp_path / "run").exists()


def test_a_step_of_weight_0_is_sampled_and_moves_nothing(model, tmp_path):
    trainer = make_trainer(model, tmp_path, credit=(0.0, 2.0, 0.0))
    batch = trainer.collect()
    assert bool((batch.trajectory.table.std > 0).all())
    record = trainer.update(batch)
    norms = record["update/output_grad_norm_per_step"]
    assert norms[0] == norms[2] == 0 < norms[1]
    assert record["update/first_abs_log_ratio"] == 0 < record["update/grad_norm"]


def test_a_resumed_run_keeps_its_list(model, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = command(model, run, epochs=1, credit=(0.5, 2.0, 1.5))
    assert main(arguments) == 0
    assert parse(["--output-dir", str(run), "--resume"])[1].sampler.credit == (0.5, 2.0, 1.5)
    longer = ["--output-dir", str(run), "--resume", "--epochs", "2"]
    assert main([*longer, "--num-inference-steps", "4"]) == 2
    assert "--credit: 3 weights were given for 4 steps" in capsys.readouterr().err
    assert main(longer) == 0
    assert re.search(r"credit \(0\.5, 2\.0, 1\.5\)", capsys.readouterr().out)
    assert json.loads((run / "config.json").read_text())["credit"] == [0.5, 2.0, 1.5]
