"""Run folders: their lock, the settings a command line finds in them, and other first steps of a run."""

import os
import re
import shutil
import socket
import subprocess
import sys

import pytest
from filelock import FileLock

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
        size, device = (32, 32), "cpu"

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


# who holds a lock


def test_a_killed_run_holds_no_lock(tmp_path):
    code = (
        "import os, sys, signal\n"
        "from pcpo_fast.run_folder import run_folder\n"
        "with run_folder(sys.argv[1], 'name', resume=True):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    assert (tmp_path / LOCK).read_text() != f"{os.getpid()} {socket.gethostname()}\n"
    with run_folder(str(tmp_path), "name", resume=True):
        assert (tmp_path / LOCK).read_text() == f"{os.getpid()} {socket.gethostname()}\n"


def test_a_worker_that_a_killed_run_left_behind_is_named(tmp_path):
    """A forked process has the lock of its parent, where the locks' library leaves it."""
    code = (
        "import fcntl, os, sys\n"
        "lock = open(sys.argv[1], 'w')\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "print(os.getpid(), 'here', file=lock, flush=True)\n"
        "child = os.fork()\n"
        "if child:\n"
        "    print(child, flush=True)\n"
        "else:\n"
        "    sys.stdin.read()\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / LOCK)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        process.wait()
        with pytest.raises(SettingError) as error, run_folder(str(tmp_path), "name", resume=True):
            pass
    assert error.value.reason == (
        f"{tmp_path} is in use by process {child}, whose lock names process {process.pid}; end {child} if a killed run "
        "left it behind, or wait until it has finished, or give another folder"
    )


@pytest.mark.parametrize(
    ("content", "owner"),
    [("", "process (unknown)"), ("77 host-b\n", "process 77 on host-b"), ("77\n", "process 77"), ("\0\xff", "process")],
)
def test_a_lock_of_another_machine_is_named_by_what_it_says(tmp_path, monkeypatch, content, owner):
    """On a shared disk, where this system does not see who has the file open."""
    monkeypatch.setattr(type(tmp_path), "samefile", lambda *paths: False)
    with FileLock(tmp_path / LOCK).acquire(timeout=0):
        (tmp_path / LOCK).write_bytes(content.encode("latin-1"))
        with pytest.raises(SettingError, match=re.escape(f"{tmp_path} is in use by {owner}")):
            run_folder(str(tmp_path), "name", resume=True).__enter__()
    # nobody holds it now
    with run_folder(str(tmp_path), "name", resume=True):
        pass


# broken and missing parts


@pytest.mark.parametrize(
    ("content", "reason"), [("{", "cannot read"), ('{"epoch": 3}', "epoch: no setting"), (None, "it is a folder")]
)
def test_broken_settings_of_a_run_are_named(run, capsys, content, reason):
    (run / "config.json").unlink()
    if content is None:
        (run / "config.json").mkdir()
    else:
        (run / "config.json").write_text(content)
    assert main(["--output-dir", str(run), "--resume"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --output-dir: {run} cannot be resumed without its settings: ")
    assert reason in error and f"{run}/config.json" in error and "mend config.json, or write it anew" in error


def test_the_preset_of_another_model_is_refused(run, capsys):
    assert main(["digits", "--output-dir", str(run), "--resume"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: preset: 'digits' was given, and the run in {run} trains 'digits-flow'; leave the")
    assert parse(["digits-flow", "--output-dir", str(run), "--resume"])[1].model.model == "digits-flow"
    # a preset with a model from a folder is the run's own
    (run / "config.json").write_text(Config().replace(model="./my-pipeline").to_json())
    assert parse(["sd15", "--output-dir", str(run), "--resume"])[1].model.model == "./my-pipeline"


def test_a_run_folder_that_is_removed_is_one_error(tmp_path, monkeypatch, capfd):
    """By its own command line, which made it."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "digits"
    monkeypatch.setattr(train, "_announce", lambda trainer: shutil.rmtree(folder))
    few = {"prompts_per_epoch": 1, "group_size": 2, "micro_batch_size": 2, "num_inference_steps": 2, "eval_samples": 2}
    settings = [text for name, value in few.items() for text in ("--" + name.replace("_", "-"), str(value))]
    assert main([*settings, "--epochs", "1"]) == 2
    (error,) = [line for line in capfd.readouterr().err.splitlines() if "error: " in line]
    assert error.startswith("error: --output-dir: runs/digits/") and "was removed or moved; put it back" in error
    assert not folder.exists()
