"""Run folders: their lock, the settings a command line finds in them, and other first steps of a run."""

import os
import subprocess
import sys

import pytest

from pcpo_fast import train
from pcpo_fast.config import Config
from pcpo_fast.errors import SettingError
from pcpo_fast.run_folder import LOCK, run_folder, saved_settings
from pcpo_fast.train import main, parse


def lock_elsewhere(folder):
    """What another process is told that wants the folder."""
    code = (
        "import sys\n"
        "from pcpo_fast.run_folder import run_folder\n"
        "try:\n"
        "    with run_folder(sys.argv[1], 'name', resume=True):\n"
        "        print('locked')\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    return subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True).stdout


def test_a_run_that_failed_holds_no_lock(tmp_path):
    """Also where its traceback lives on, as in a notebook."""
    (tmp_path / "config.json").touch()
    with pytest.raises(RuntimeError), run_folder(str(tmp_path), "name", resume=True):
        assert f"in use by process {os.getpid()};" in lock_elsewhere(tmp_path)
        raise RuntimeError
    assert lock_elsewhere(tmp_path) == "locked\n"
    with pytest.raises(SettingError, match="already holds a run") as kept, run_folder(str(tmp_path), "x", resume=False):
        pass
    assert lock_elsewhere(tmp_path) == "locked\n"
    assert kept.value.name == "output_dir"


def test_a_run_that_was_killed_while_it_wrote_its_first_file_begins(tmp_path):
    for name in (LOCK, "config.json.partial"):
        (tmp_path / name).touch()
    assert saved_settings(tmp_path) == {}


@pytest.fixture
def run(tmp_path):
    """The folder of a run of the flow model."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(Config().replace(model="digits-flow", group_size=4).to_json())
    return folder


@pytest.mark.parametrize("in_file", [("resume", "output_dir"), ("output_dir",), ("resume",)])
def test_resuming_by_a_config_file_is_resuming(run, tmp_path, in_file):
    """Keeps the run's settings, and refuses those that its checkpoints depend on, as --resume does."""
    settings = {"resume": ("true", "--resume"), "output_dir": (f'"{run}"', f"--output-dir={run}")}
    file = tmp_path / "settings.yaml"
    file.write_text("epochs: 3\n" + "".join(f"{name}: {settings[name][0]}\n" for name in in_file))
    arguments = ["--config", str(file), *(flag for name, (_, flag) in settings.items() if name not in in_file)]
    _, config = parse(arguments)
    assert (config.model.model, config.run.group_size, config.run.epochs) == ("digits-flow", 4, 3)
    with pytest.raises(SettingError, match=r"^model: 'digits' was given"):
        parse([*arguments, "--model", "digits"])


def test_the_command_line_may_not_resume_what_the_file_would(run, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("resume: true\n")
    _, config = parse(["--config", str(file), "--no-resume", "--output-dir", str(run)])
    assert (config.model.model, config.run.resume) == ("digits", False)


def test_a_tilde_is_the_home_folder(run, monkeypatch):
    """The shell leaves it alone in --output-dir=~/run, and Python has no shell."""
    monkeypatch.setenv("HOME", str(run.parent))
    assert parse(["--resume", "--output-dir=~/run"])[1].model.model == "digits-flow"
    folders = []

    def note(config, policy, folder, rewards):
        folders.append(folder)

    class Source:
        side, device = 32, "cpu"

        def load(self, **settings):
            return None

    train.make_trainer(Config().replace(output_dir="~/run"), source=Source(), kind=note)
    assert folders == [run]


def test_an_error_is_one_line(tmp_path, capsys):
    (tmp_path / "settings.yaml").write_text("epochs: [")
    assert main(["--config", str(tmp_path / "settings.yaml")]) == 2
    output = capsys.readouterr().err
    assert output.startswith("error: --config: cannot read") and output.count("\n") == 1


def test_lists_are_as_good_as_tuples():
    config = Config().replace(rewards=["jpeg_compressibility"], window_range=[0, 3], window_size=2).resolved()
    assert (config.data.rewards, config.sampler.window_range) == (("jpeg_compressibility",), (0, 3))


def test_training_without_its_packages_says_what_to_install():
    code = (
        "import sys; sys.modules['annotated_types'] = None; from pcpo_fast.__main__ import main; exit(main(['train']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: training needs annotated_types; pip install 'pcpo-fast[train]'\n"
