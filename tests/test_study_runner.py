"""The processes of a study: what runs, what is written, and how a study that was stopped or broken goes on.

The runs are `fake_study_run.py`, but for the last test.
"""

import importlib.util
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
from filelock import FileLock

from pcpo_fast.__main__ import main as pcpo
from pcpo_fast.errors import SettingError
from pcpo_fast.study import __main__ as command_line
from pcpo_fast.study import runner
from pcpo_fast.study.measures import best_learning_rate
from pcpo_fast.study.plan import make_plan
from pcpo_fast.study.results import Results, prepare
from pcpo_fast.study.runner import Study

FAKE = (sys.executable, str(Path(__file__).with_name("fake_study_run.py")))
CONTENT = {
    "settings": {"epochs": 3},
    "tasks": {"flow": {"preset": "digits-flow", "baseline": "grpo", "targets": [-0.4], "frechet_limit": 0.08}},
    "algorithms": {"grpo": {"objective": "ppo", "credit": "native"}, "constant": {}},
    "parts": {
        "sweep": {"learning_rates": [1e-4, 2e-4], "seeds": [100, 101]},
        "best": {"learning_rates": "best", "seeds": [0, 1]},
        "equal": {"learning_rates": [1e-4], "seeds": [0, 1]},
    },
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(runner, "PAUSE", 0.01)


@pytest.fixture(scope="module")
def plan():
    return make_plan("name", CONTENT)


def with_settings(**settings):
    return make_plan("name", CONTENT | {"settings": {"epochs": 3, **settings}})


def start(plan, folder, *, processes=4, more=None):
    folder.mkdir(exist_ok=True)
    study = Study(plan, Results(plan, folder, more), processes=processes, command=FAKE)
    return study, study.run()


def saved(folder):
    """study.json without its seconds."""

    def strip(value):
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if key != "seconds"}
        return [strip(item) for item in value] if isinstance(value, list) else value

    return strip(json.loads((folder / "study.json").read_text()))


def names(study):
    return [(run["part"], run["algorithm"], run["learning_rate"], run["seed"]) for run in study["runs"]]


def logs(folder):
    """How many processes each run has had."""
    return {path.parent.name: path.read_text().count("started") for path in folder.glob("runs/*/log.txt")}


@pytest.fixture(scope="module")
def whole(plan, tmp_path_factory):
    """A study that ran through."""
    folder = tmp_path_factory.mktemp("whole")
    assert start(plan, folder)[1] == 0
    return folder


def test_a_study(plan, whole):
    study = saved(whole)
    assert (study["study"], study["file"]) == ("name", plan.file)
    best = {}
    for algorithm in ("grpo", "constant"):
        swept = [run for run in study["runs"] if (run["part"], run["algorithm"]) == ("sweep", algorithm)]
        assert len(swept) == 4
        best[algorithm] = best_learning_rate(swept, 0.08)
        ran = {run["learning_rate"] for run in study["runs"] if (run["part"], run["algorithm"]) == ("best", algorithm)}
        assert ran == {best[algorithm]}
    # an equal run in two parts is one run of the first
    assert len(set(names(study))) == len(study["runs"]) == 12 + 2 * sum(rate != 1e-4 for rate in best.values())
    order = [
        (["sweep", "best", "equal"].index(part), algorithm != "grpo", *rest) for part, algorithm, *rest in names(study)
    ]
    assert order == sorted(order)
    assert all(run["finished"] and run["evaluations"][0]["frechet_distance"] == 0.05 for run in study["runs"])
    grpo = next(run for run in study["runs"] if (run["algorithm"], run["learning_rate"]) == ("grpo", 2e-4))
    assert grpo["settings"] == {
        "epochs": 3, "objective": "ppo", "credit": "native", "learning_rate": 2e-4, "seed": 100
    }  # fmt: skip
    assert set(logs(whole).values()) == {1}
    assert not list(whole.glob("runs/*/checkpoints"))


def test_a_finished_study_repeats_nothing(plan, whole, capsys):
    before = (whole / "study.json").read_bytes()
    study, status = start(plan, whole)
    assert (status, study.results.changed) == (0, [])
    assert (whole / "study.json").read_bytes() == before
    assert set(logs(whole).values()) == {1}


def test_results_of_another_folder_are_taken(plan, whole, tmp_path):
    study, status = start(plan, tmp_path / "new", more=whole / "study.json")
    assert (status, len(study.finished)) == (0, study.total)
    assert logs(tmp_path / "new") == {}
    assert (tmp_path / "new" / "study.json").read_bytes() == (whole / "study.json").read_bytes()


def test_a_result_that_did_not_reach_study_json_is_taken(plan, whole, tmp_path):
    start(plan, tmp_path)
    (tmp_path / "study.json").unlink()
    start(plan, tmp_path)
    assert saved(tmp_path) == saved(whole)
    assert set(logs(tmp_path).values()) == {1}


def test_runs_with_other_settings_are_repeated(plan, whole, tmp_path):
    start(plan, tmp_path)
    old = (tmp_path / "study.json").read_bytes()
    again = with_settings(clip_range=5e-3)
    study, status = start(again, tmp_path)
    assert status == 0 and len(study.results.changed) == study.total
    assert (tmp_path / "study.old.json").read_bytes() == old
    assert {run["settings"]["clip_range"] for run in saved(tmp_path)["runs"]} == {5e-3}
    # their folders began anew
    assert set(logs(tmp_path).values()) == {1}
    # others than the study's own algorithm's stay
    content = json.loads(json.dumps(CONTENT)) | {"settings": {"epochs": 3, "clip_range": 5e-3}}
    content["algorithms"]["constant"]["kl_weight"] = 0.1
    study = Study(make_plan("name", content), Results(make_plan("name", content), tmp_path))
    assert {name.split("-")[1] for name in study.results.changed} == {"constant"}
    assert {run.algorithm for run in study.finished} == {"grpo"}


def test_settings_are_compared_as_they_were_when_a_preset_has_changed(plan, whole, tmp_path, monkeypatch):
    """study.json has the settings that differ from the preset, and the preset beside them."""
    study = json.loads((whole / "study.json").read_text())
    study["presets"]["digits-flow"]["max_grad_norm"] = 0.5
    # a setting that came later has its default
    del study["presets"]["digits-flow"]["ema_decay"]
    (tmp_path / "study.json").write_text(json.dumps(study))
    results = Results(plan, tmp_path)
    results.take(plan.runs()[0])
    assert results.finished == {} and len(results.changed) == len(plan.runs()[0])
    study["presets"]["digits-flow"]["max_grad_norm"] = 1.0
    (tmp_path / "study.json").write_text(json.dumps(study))
    results = Results(plan, tmp_path)
    results.take(plan.runs()[0])
    assert len(results.finished) == len(plan.runs()[0])


def test_a_failed_run_does_not_stop_the_others(plan, whole, tmp_path, capsys):
    (tmp_path / "fail").touch()
    study, status = start(plan, tmp_path)
    assert status == 1
    assert study.failed and all(name.endswith("-1") for name in study.failed)
    assert len(study.finished) == study.total - len(study.failed)
    error = capsys.readouterr().err
    for name in study.failed:
        assert f"{name} failed: status 3; its log {tmp_path}/runs/{name}/log.txt ends with" in error
    assert "    ValueError: it is broken" in error
    (tmp_path / "fail").unlink()
    assert start(plan, tmp_path)[1] == 0
    assert saved(tmp_path) == saved(whole)


def test_a_sweep_that_failed_leaves_its_best_rate_open(tmp_path):
    content = CONTENT | {"parts": CONTENT["parts"] | {"sweep": {"learning_rates": [1e-4], "seeds": [1, 100]}}}
    content["parts"] = {"sweep": content["parts"]["sweep"], "best": content["parts"]["best"] | {"seeds": [2, 3]}}
    (tmp_path / "fail").touch()
    study, status = start(make_plan("name", content), tmp_path)
    assert status == 1 and len(study.waiting) == 4 and len(study.failed) == 2


def test_no_result_is_lost_by_a_second_start(plan, tmp_path):
    """Runs that are repeated are missing from study.json until they have finished again."""
    assert start(plan, tmp_path)[1] == 0
    old = (tmp_path / "study.json").read_bytes()
    for _ in range(2):
        changed = Results(with_settings(clip_range=0.5), tmp_path)
        study = Study(with_settings(clip_range=0.5), changed, command=FAKE)
        changed.keep_replaced()
        changed.save(study.runs)
    assert (tmp_path / "study.old.json").read_bytes() == old and not (tmp_path / "study.old-2.json").exists()
    # a part that is left out takes its results with it
    assert start(plan, tmp_path)[1] == 0
    fewer = make_plan("name", CONTENT | {"parts": {"equal": CONTENT["parts"]["equal"]}})
    assert start(fewer, tmp_path)[1] == 0
    assert len(json.loads((tmp_path / "study.old-2.json").read_text())["runs"]) == len(json.loads(old)["runs"])


def test_a_folder_without_the_settings_of_its_run_is_emptied(plan, tmp_path):
    """Its checkpoint may be of other settings."""
    run = plan.runs()[0][0]
    folder = tmp_path / "runs" / run.id
    (folder / "checkpoints").mkdir(parents=True)
    prepare(folder, run)
    assert not (folder / "checkpoints").exists()
    (folder / "checkpoints").mkdir()
    prepare(folder, run)
    assert (folder / "checkpoints").exists()


@pytest.mark.parametrize("result", ["{}", '{"evaluations": 3}', '{"evaluations": [{}]}'])
def test_what_is_no_result_is_not_taken(plan, tmp_path, result):
    run = plan.runs()[0][0]
    folder = tmp_path / "runs" / run.id
    prepare(folder, run)
    (folder / "result.json").write_text(result)
    results = Results(plan, tmp_path)
    results.take([run])
    assert results.finished == {}


@pytest.mark.parametrize("runs", [None, [{}], [{"task": "x"}], 3])
def test_a_study_json_of_another_kind_is_refused(plan, tmp_path, runs):
    (tmp_path / "study.json").write_text(json.dumps({"study": "name", "file": {}, "presets": {}, "runs": runs}))
    with pytest.raises(SettingError, match="not as `pcpo study` writes it"):
        Results(plan, tmp_path)


def test_runs_without_the_gradients_that_are_asked_for_are_repeated(plan, tmp_path):
    assert start(plan, tmp_path)[1] == 0
    part = {"algorithms": ["constant"], "learning_rates": "best", "seeds": [0], "gradients": True}
    more = make_plan("name", CONTENT | {"parts": CONTENT["parts"] | {"gradients": part}})
    best = next(run for run in more.runs({("flow", "constant"): 1e-4, ("flow", "grpo"): 1e-4})[0] if run.gradients)
    study = Study(more, Results(more, tmp_path), command=FAKE)
    # its rate is known by now, and equal to that of a run without gradients
    [repeated] = set(study.runs) - set(study.finished)
    assert repeated.gradients and repeated.seed == best.seed
    assert study.run() == 0
    measured = [run for run in saved(tmp_path)["runs"] if run.get("gradients")]
    assert [(run["algorithm"], run["seed"]) for run in measured] == [("constant", 0)]
    again = Study(more, Results(more, tmp_path), command=FAKE)
    assert len(again.finished) == again.total and again.results.changed == []


@pytest.mark.parametrize("content", [None, "{", '{"evaluations": [{"reward": NaN}]}', "[]"])
def test_a_run_that_leaves_no_result_has_failed(tmp_path, capsys, content):
    (tmp_path / "empty").touch()
    content_of_one = CONTENT | {"parts": {"only": {"algorithms": ["grpo"], "learning_rates": [1e-4], "seeds": [0]}}}
    plan = make_plan("name", content_of_one)
    if content is not None:
        script = f"import pathlib, sys; pathlib.Path(sys.argv[1], 'result.json').write_text({content!r})"
        study = Study(plan, Results(plan, tmp_path), processes=1, command=(sys.executable, "-c", script))
    else:
        study = Study(plan, Results(plan, tmp_path), processes=1, command=FAKE)
    assert (study.run(), study.failed) == (1, ["flow-grpo-0.0001-0"])
    assert "result" in capsys.readouterr().err
    assert saved(tmp_path)["runs"] == []


def test_a_run_that_was_killed_has_failed(plan, tmp_path, capsys):
    command = (sys.executable, "-c", "import os; os.kill(os.getpid(), 9)")
    study = Study(plan, Results(plan, tmp_path), processes=4, command=command)
    assert study.run() == 1
    assert "flow-grpo-0.0001-100 failed: ended by SIGKILL" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_runs_and_the_study_goes_on(plan, whole, tmp_path, monkeypatch, number):
    monkeypatch.setenv("FAKE_SECONDS", "0.2")
    threading.Timer(1.0, os.kill, (os.getpid(), number)).start()
    study, status = start(plan, tmp_path, processes=2)
    assert status == 128 + number
    assert not study.failed and len(study.finished) < study.total
    # nobody is left who holds a folder
    for lock in tmp_path.glob("runs/*/.lock"):
        with FileLock(lock).acquire(timeout=0):
            pass
    monkeypatch.setenv("FAKE_SECONDS", "0.01")
    assert start(plan, tmp_path)[1] == 0
    assert saved(tmp_path) == saved(whole)


def test_a_study_that_is_killed_at_any_moment_ends_with_the_same_numbers(plan, whole, tmp_path, monkeypatch):
    """Alone, which leaves its runs alive, or with them."""
    monkeypatch.setenv("FAKE_SECONDS", "0.1")
    generator = random.Random(0)
    context = multiprocessing.get_context("fork")
    for attempt in range(6):
        process = context.Process(target=start, args=(plan, tmp_path), kwargs={"processes": 3})
        process.start()
        time.sleep(generator.uniform(0.1, 0.7))
        process.kill()
        process.join()
        for path in tmp_path.glob("runs/*/pid") if attempt % 2 else ():
            try:
                os.kill(int(path.read_text()), signal.SIGKILL)
            except (ProcessLookupError, ValueError):
                continue
    study, status = start(plan, tmp_path)
    assert (status, study.failed) == (0, [])
    assert saved(tmp_path) == saved(whole)
    # it was cut off at all
    assert max(logs(tmp_path).values()) > 1


def test_a_folder_that_stays_locked_is_a_failure_and_the_others_run(plan, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "PATIENCE", 0.5)
    folder = tmp_path / "runs" / "flow-grpo-0.0001-0"
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock").acquire():
        study, status = start(plan, tmp_path)
    assert (status, study.failed) == (1, ["flow-grpo-0.0001-0"])
    assert "is in use by another process" in capsys.readouterr().err


def test_progress_counts_epochs(plan, tmp_path):
    study = Study(plan, Results(plan, tmp_path))
    folder = tmp_path / "runs" / study.runs[0].id
    folder.mkdir(parents=True)
    assert study._done() == 0
    study = Study(plan, Results(plan, tmp_path))
    # an evaluation is a line of its own, and the last line is not complete
    (folder / "metrics.jsonl").write_text('{"epoch": 0}\n{"epoch": 1}\n{"epoch": 2}\n{"epoch": 2}\n{"epo')
    assert study._done() == 2


def test_saved_files_that_are_no_study(plan, tmp_path):
    with pytest.raises(SettingError, match=r"^results: cannot read"):
        Results(plan, tmp_path, tmp_path / "none.json")
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(SettingError, match=r"^output_dir: .* is no study\.json"):
        Results(plan, tmp_path)
    other = {"study": "other", "file": {}, "presets": {}, "runs": []}
    (tmp_path / "study.json").write_text(json.dumps(other))
    with pytest.raises(SettingError, match="holds the study 'other', not 'name'"):
        Results(plan, tmp_path)


@pytest.fixture
def study_file(tmp_path, monkeypatch):
    """A file of a single run, and the command line with the fake run and a fake report."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Study.__init__, "__kwdefaults__", {"processes": 2, "command": FAKE})
    report = types.ModuleType("pcpo_fast.study.report")
    report.write_report = lambda study, folder: [folder / f"tables_of_{len(study['runs'])}.md"]
    monkeypatch.setitem(sys.modules, "pcpo_fast.study.report", report)
    only = {"algorithms": ["grpo"], "learning_rates": [1e-4], "seeds": [0, 1]}
    (tmp_path / "mine.yaml").write_text(json.dumps(CONTENT | {"parts": {"only": only}}))
    return tmp_path / "mine.yaml"


def test_command_line(study_file, capsys):
    assert pcpo(["study", "mine.yaml", "--report-only"]) == 1
    assert "no run of mine has finished" in capsys.readouterr().err
    assert pcpo(["study", "mine.yaml", "--list"]) == 0
    assert capsys.readouterr().out.endswith("0 of 2 runs have finished\n")
    assert not Path("studies").exists()
    assert pcpo(["study", "mine.yaml"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("mine: 2 runs, none of them finished; ")
    assert output.endswith("studies/mine/tables_of_2.md\n")
    assert pcpo(["study", "mine.yaml", "--list"]) == 0
    assert capsys.readouterr().out.endswith("2 of 2 runs have finished\n")
    assert pcpo(["study", "mine.yaml", "--report-only", "--output-dir", "other"]) == 1
    arguments = ["--report-only", "--output-dir", "other", "--results", "studies/mine/study.json"]
    capsys.readouterr()
    assert pcpo(["study", "mine.yaml", *arguments]) == 0
    assert capsys.readouterr().out == "other/tables_of_2.md\n"


def test_command_line_goes_on_and_says_so(study_file, capsys):
    Path("studies/mine").mkdir(parents=True)
    Path("studies/mine/fail").touch()
    assert pcpo(["study", "mine.yaml"]) == 1
    captured = capsys.readouterr()
    assert captured.out.endswith("studies/mine/tables_of_1.md\n")
    assert "1 runs failed: flow-grpo-0.0001-1\nThe same command tries them again.\n" in captured.err
    Path("studies/mine/fail").unlink()
    assert pcpo(["study", "mine.yaml"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("mine: 2 runs, 1 of them finished; ") and "The study goes on" in output
    content = json.loads(study_file.read_text())
    content["settings"]["clip_range"] = 5e-3
    study_file.write_text(json.dumps(content))
    assert pcpo(["study", "mine.yaml", "--report-only"]) == 1
    assert pcpo(["study", "mine.yaml"]) == 0
    repeated = (
        "made with other settings, or without gradients, and are repeated: flow-grpo-0.0001-0, flow-grpo-0.0001-1\n"
    )
    assert repeated in capsys.readouterr().out


def test_command_line_stopped_by_a_signal(study_file, capsys, monkeypatch):
    monkeypatch.setenv("FAKE_SECONDS", "0.5")
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    assert pcpo(["study", "mine.yaml", "--output-dir", "here"]) == 130
    assert "finished; go on with: pcpo study mine.yaml --output-dir here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mine.yaml", "--processes", "0"], "error: --processes: 0 was given; give at least 1\n"),
        (["mine.yaml", "--results", "none.json"], "error: --results: cannot read none.json: "),
        (["none.yaml"], "error: none.yaml: cannot read none.yaml: "),
        (["none"], "error: none: 'none' does not exist; choose "),
        (["bad.yaml"], "error: bad.yaml: tasks: is missing; give it\n"),
    ],
)
def test_command_line_mistakes(study_file, capsys, arguments, message):
    study_file.with_name("bad.yaml").write_text("settings: {}")
    assert pcpo(["study", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1
    assert not Path("studies/mine").exists()


def test_one_study_at_a_time_in_a_folder(study_file, capsys):
    Path("studies/mine").mkdir(parents=True)
    with FileLock("studies/mine/.lock").acquire():
        Path("studies/mine/.lock").write_text("17\n")
        assert pcpo(["study", "mine.yaml"]) == 2
    owner = f"process {os.getpid()}, whose lock names process 17;"
    assert f"error: --output-dir: studies/mine is in use by {owner}" in capsys.readouterr().err


def test_missing_packages(study_file, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    assert command_line.main(["mine.yaml"]) == 2
    assert capsys.readouterr().err == "error: a study needs torchmetrics; pip install 'pcpo-fast[study]'\n"
    code = "import sys; sys.modules['pydantic'] = None; from pcpo_fast.__main__ import main; exit(main(['study']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: a study needs pydantic; pip install 'pcpo-fast[study]'\n")


@pytest.mark.skipif(
    any(importlib.util.find_spec(f"pcpo_fast.study.{name}") is None for name in ("run", "report")),
    reason="needs the run and the report of a study",
)
def test_a_real_study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = {"epochs": 1, "prompts_per_epoch": 2, "group_size": 4, "micro_batch_size": 8, "eval_samples": 20}
    small |= {"num_inference_steps": 3, "gradient_accumulation_steps": 1}
    only = {"learning_rates": [1e-4], "seeds": [0]}
    Path("tiny.yaml").write_text(json.dumps(CONTENT | {"settings": small, "parts": {"only": only}}))
    assert pcpo(["study", "tiny.yaml"]) == 0
    runs = saved(Path("studies/tiny"))["runs"]
    assert [run["algorithm"] for run in runs] == ["grpo", "constant"]
    assert [evaluation["epoch"] for evaluation in runs[0]["evaluations"]] == [0, 1]
    assert list(Path("studies/tiny").glob("*.md")) and list(Path("studies/tiny").glob("*.png"))
