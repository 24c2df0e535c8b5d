"""What a file may make the trainer do: functions that it names, and characters that it holds."""

import json
import re
import sys

import pytest
from pipelines import command, records

from pcpo_fast.config import Config
from pcpo_fast.errors import SettingError
from pcpo_fast.run_folder import LOCK
from pcpo_fast.study import runner
from pcpo_fast.study.__main__ import main as study_main
from pcpo_fast.terminal import printable, say
from pcpo_fast.train import main, parse

pytest_plugins = "pipelines"
pytestmark = pytest.mark.usefixtures("one_thread")

ESCAPES = "\x1b[31mred\x1b]0;title\x07\x9b2J\r\x00"
RAW = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """A module that leaves a file when it is imported; the path of that file."""
    marker = tmp_path / "imported"
    (tmp_path / "theirs.py").write_text(
        f"open({str(marker)!r}, 'w')\n"
        "def score(images, prompts): return images[:, 0].mean(dim=(1, 2))\n"
        "def sampler(settings, schedule): raise AssertionError\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield marker
    sys.modules.pop("theirs", None)


OWN = [
    ("rewards", ["jpeg_compressibility", "theirs:score=0.5"], "theirs:score"),
    ("eval_rewards", ["theirs:score"], "theirs:score"),
    ("sampler", "theirs:sampler", "theirs:sampler"),
]


def saved(tmp_path, kind, name, value):
    """Arguments that take the setting from a file."""
    text = json.dumps(
        Config().flat() | {name: value} | ({"output_dir": str(tmp_path / "run")} if kind == "run" else {})
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(text)
    if kind == "resumes itself":
        (tmp_path / "resumes.json").write_text(json.dumps({"output_dir": str(tmp_path / "run"), "resume": True}))
        return ["--config", str(tmp_path / "resumes.json")]
    if kind == "config":
        return ["--config", str(tmp_path / "run" / "config.json")]
    return ["--output-dir", str(tmp_path / "run"), "--resume"]


@pytest.mark.parametrize("kind", ["config", "run", "resumes itself"])
@pytest.mark.parametrize(("name", "value", "function"), OWN, ids=lambda case: str(case))
def test_functions_that_a_file_names_are_not_imported(tmp_path, theirs, capsys, kind, name, value, function):
    arguments = saved(tmp_path, kind, name, value)
    assert main(arguments) == 2
    flag, given = name.replace("_", "-"), value if isinstance(value, str) else " ".join(value)
    error = capsys.readouterr().err
    assert error.startswith(
        f"error: --{flag}: {function!r} comes from a file, and to import it is to run that program;"
    )
    assert f"name it on the command line (--{flag} {given}), or add --trust-rewards" in error
    assert not theirs.exists()


@pytest.mark.parametrize("kind", ["config", "run"])
@pytest.mark.parametrize(("name", "value", "function"), OWN, ids=lambda case: str(case))
def test_they_are_if_the_command_line_names_them_or_trusts(tmp_path, theirs, kind, name, value, function):
    arguments = saved(tmp_path, kind, name, value)
    flag = "--" + name.replace("_", "-")
    for more in (["--trust-rewards"], ["--trust_rewards"], [flag, function], [f"{flag}={function}"]):
        config = parse([*arguments, *more])[1]
        given = config.flat()[name]
        assert function in str(given)
    # wherever it is named
    if name == "eval_rewards":
        parse([*arguments, "--rewards", "digit_alignment", "theirs:score=3"])
    with pytest.raises(SettingError, match="comes from a file"):
        parse([*arguments, "--prompts", function])


def test_a_file_cannot_trust_itself(tmp_path, theirs, capsys):
    (tmp_path / "config.json").write_text('{"rewards": ["theirs:score"], "trust_rewards": true}')
    assert main(["--config", str(tmp_path / "config.json")]) == 2
    assert "trust_rewards: no setting has this name" in capsys.readouterr().err
    assert not theirs.exists()


@pytest.mark.parametrize("place", ["settings", "task", "algorithm"])
@pytest.mark.parametrize(("name", "value", "function"), OWN, ids=lambda case: str(case))
def test_a_study_imports_them_only_if_it_is_trusted(tmp_path, theirs, capsys, place, name, value, function):
    task = {"preset": "digits", "baseline": "a", "targets": [-0.5], "frechet_limit": 1.0}
    study = {
        "settings": {name: value} if place == "settings" else {},
        "tasks": {"digits": task | ({"settings": {name: value}} if place == "task" else {})},
        # its credit asks for the sampler's table
        "algorithms": {"a": {"credit_powers": [1, 0]} | ({name: value} if place == "algorithm" else {})},
        "parts": {"equal": {"learning_rates": [1e-4], "seeds": [0]}},
    }
    (tmp_path / "theirs.yaml").write_text(json.dumps(study))
    arguments = [str(tmp_path / "theirs.yaml"), "--list", "--output-dir", str(tmp_path / "study")]
    assert study_main(arguments) == 2
    error = capsys.readouterr().err
    assert f": {name}: {function!r} comes from a file, and to import it is to run that program;" in error
    assert error.endswith("if you trust it, add --trust-rewards\n") and not theirs.exists()
    # the sampler of the test fails when it is called
    assert study_main([*arguments, "--trust-rewards"]) == (2 if name == "sampler" else 0)
    assert theirs.exists() and "comes from a file" not in capsys.readouterr().err


def test_what_is_to_be_typed_is_quoted(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"rewards": ["a:b", "$(touch x);"]}')
    assert main(["--config", str(tmp_path / "config.json")]) == 2
    assert "--rewards a:b '$(touch x);')" in capsys.readouterr().err


def test_names_of_the_package_are_free(tmp_path):
    (tmp_path / "config.json").write_text('{"rewards": ["jpeg_compressibility=2"], "sampler": "ddim"}')
    assert parse(["--config", str(tmp_path / "config.json")])[1].data.rewards == ("jpeg_compressibility=2",)


def test_a_run_with_functions_of_ones_own_is_resumed(model, tmp_path, theirs, capsys):
    run = tmp_path / "run"
    assert main(command(model, run, rewards=("theirs:score=2",), epochs=1)) == 0
    assert main(["--output-dir", str(run), "--resume", "--epochs", "2"]) == 2
    assert "or add --trust-rewards" in capsys.readouterr().err
    assert main(["--output-dir", str(run), "--resume", "--epochs", "2", "--trust-rewards"]) == 0
    assert [record["epoch"] for record in records(run)] == [0, 1, 1, 2, 2]


# prompts of one's own


@pytest.mark.parametrize(
    ("arguments", "measured"),
    [
        ("", ("digit_accuracy",)),
        ("--prompts animals", ()),
        ("--prompts animals --eval-rewards digit_accuracy", ("digit_accuracy",)),
        ("--prompts animals --eval_rewards=jpeg_compressibility", ("jpeg_compressibility",)),
        ("digits-flow --prompts animals", ()),
        ("sd15 --prompts mine.txt --eval-rewards jpeg_compressibility", ("jpeg_compressibility",)),
        ("--config own.json", ()),
        ("--config both.json", ("digit_accuracy",)),
    ],
)
def test_prompts_of_ones_own_drop_the_accuracy_of_the_presets(tmp_path, monkeypatch, arguments, measured):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.json").write_text('{"prompts": "animals"}')
    (tmp_path / "both.json").write_text('{"prompts": "animals", "eval_rewards": ["digit_accuracy"]}')
    assert parse(arguments.split())[1].data.eval_rewards == measured


def test_the_first_screen_says_what_is_measured(tmp_path, capsys):
    settings = "--epochs 1 --prompts-per-epoch 2 --group-size 4 --micro-batch-size 8 --num-inference-steps 2"
    run = [*settings.split(), "--eval-samples", "4", "--rewards", "jpeg_compressibility"]
    assert main([*run, "--prompts", "animals", "--output-dir", str(tmp_path / "own")]) == 0
    said = "with prompts of your own digit_accuracy is left out; --eval-rewards digit_accuracy measures it"
    output = capsys.readouterr().out
    assert said in output
    assert "rewards jpeg_compressibility; also measured: nothing" in output
    assert main([*run, "--output-dir", str(tmp_path / "digits")]) == 0
    output = capsys.readouterr().out
    assert said not in output
    assert "rewards jpeg_compressibility; also measured: digit_accuracy" in output


# characters


def test_control_characters_are_spelled_out(capfd):
    assert printable(ESCAPES) == r"\x1b[31mred\x1b]0;title\x07\x9b2J\r\x00"
    # text directions can hide what a line says, and a lone half of a pair cannot be encoded
    assert printable("a\nb\tc\u202e\u2028\ud800") == r"a\nb\tc\u202e\u2028\ud800"
    plain = "Zwölf Füchse, 狐, 🦊, 'quoted' and \\"
    assert printable(plain) == plain
    say("one", "two\x1b")
    say("three\n", error=True)
    assert capfd.readouterr() == ("one\ntwo\\x1b\n", "three\\n\n")


@pytest.mark.parametrize("arguments", [[], ["--help"]])
@pytest.mark.parametrize(
    "settings",
    [
        {"rewards": [ESCAPES]},
        {"rewards": [f"a:{ESCAPES}"]},
        {"prompts": ESCAPES},
        {"model": ESCAPES},
        {"sampler": ESCAPES},
        {"output_dir": ESCAPES},
        {"lora_target_modules": [ESCAPES]},
        {ESCAPES: 1},
    ],
    ids=str,
)
def test_escape_codes_of_a_config_do_not_reach_the_terminal(tmp_path, capfd, arguments, settings):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert main(["--config", str(tmp_path / "config.json"), *arguments]) == 2
    output = "".join(capfd.readouterr())
    assert output.startswith("error: --config: ") and not RAW.search(output)
    assert r"\x1b[31mred" in output or r"\u001b[31mred" in output


def test_escape_codes_of_files_do_not_reach_the_terminal(tmp_path, capfd):
    """A folder's name, a prompt, what a broken file holds, and the owner of a lock."""
    folder = tmp_path / "\x1b[31mred"
    folder.mkdir()
    (tmp_path / "prompts.txt").write_text("a \x1b[31mred cat\n")
    (folder / "config.yaml").write_text("epochs: [\x1b[31mred")
    (folder / "found\x1b[31m").touch()
    for arguments in (
        ["--rewards", "digit_alignment", "--prompts", str(tmp_path / "prompts.txt")],
        ["--config", str(folder / "config.yaml")],
        ["--output-dir", str(folder), "--resume"],
    ):
        assert main(arguments) == 2
        output = "".join(capfd.readouterr())
        assert r"\x1b[31mred" in output and not RAW.search(output), output
    assert not (folder / LOCK).exists()


def test_escape_codes_of_a_log_do_not_reach_the_terminal(tmp_path, capfd):
    (tmp_path / "log.txt").write_bytes(f"progress\n{ESCAPES}\n".encode())
    study = runner.Study.__new__(runner.Study)
    study.failed = []
    study._fail(type("Run", (), {"id": "run-1"}), "status 1", *runner._last_lines(tmp_path / "log.txt"))
    error = capfd.readouterr().err
    assert error.startswith("run-1 failed: status 1\nprogress\n\\x1b[31mred") and not RAW.search(error)
