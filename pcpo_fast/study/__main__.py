"""The command line of a study: `pcpo study [FILE]`, or `python -m pcpo_fast.study`."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from pcpo_fast.errors import SettingError
from pcpo_fast.run_folder import run_folder
from pcpo_fast.terminal import one_line, say

from .plan import SHIPPED, Plan, read_plan
from .results import STUDY, Results
from .runner import Study, processors

DESCRIPTION = """Train with several algorithms, seeds and tasks in parallel processes of one thread each, measure
quality and diversity, and write study.json, tables (Markdown) and figures (PNG). A study that was stopped goes on where
it was when it is started again. docs/study.md says what a study file holds."""

# packages of the extra `study`, which are needed at the end of hours of work
PACKAGES = ("scipy", "statsmodels", "torchmetrics")
# options whose mistakes are not the study file's
OPTIONS = ("output_dir", "processes", "results")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command line.

    Raises:
        SystemExit: after --help, and for options that do not exist.
    """
    parser = argparse.ArgumentParser("pcpo study", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument(
        "file", nargs="?", default="small", help=f"a YAML file, or {' or '.join(SHIPPED)}, which come with the package"
    )
    parser.add_argument("--output-dir", type=Path, help="folder of the study; studies/<name of the file> by default")
    parser.add_argument(
        "--processes", type=int, default=processors(), help="runs at a time; %(default)s by default, one per processor"
    )
    parser.add_argument(
        "--results", type=Path, help="another study.json; its runs with equal settings are not repeated"
    )
    parser.add_argument("--report-only", action="store_true", help="write tables and figures of the finished runs")
    parser.add_argument(
        "--trust-rewards", action="store_true", help="import the rewards and samplers of your own that the file names"
    )
    parser.add_argument("--list", action="store_true", help="list the runs, and start none")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Returns:
        0; 1 if runs failed; 2 for input that cannot be run; 128 + n after signal n.
    """
    options = parse(sys.argv[1:] if arguments is None else arguments)
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        say(f"error: a study needs {', '.join(missing)}; pip install 'pcpo-fast[study]'", error=True)
        return 2
    path = Path(options.file).expanduser()
    try:
        if not path.suffix:
            if options.file not in SHIPPED:
                raise SettingError(
                    "study",
                    f"{options.file!r} does not exist; choose {' or '.join(SHIPPED)}, or give a file whose name ends "
                    "in .yaml",
                )
            path = SHIPPED[options.file]
        if options.processes < 1:
            raise SettingError("processes", f"{options.processes} was given; give at least 1")
        plan = read_plan(path, trusted=options.trust_rewards)
        folder = (options.output_dir or Path("studies") / plan.name).expanduser()
        if options.list or options.report_only:
            study = Study(plan, Results(plan, folder, options.results))
            return _list(study) if options.list else _report(study, folder)
        with run_folder(str(folder), plan.name, resume=True):
            resumed = (folder / STUDY).exists()
            study = Study(plan, Results(plan, folder, options.results), processes=options.processes)
            _announce(study, folder, resumed)
            status = study.run()
            if status > 128:
                trust = ["--trust-rewards"] if options.trust_rewards else []
                command = shlex.join(["pcpo", "study", options.file, "--output-dir", str(folder), *trust])
                say(f"Stopped with {len(study.finished)} of {study.total} runs finished; go on with: {command}")
                return status
            if study.failed or study.waiting:
                _lament(study)
            return _report(study, folder) or status
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except SettingError as error:
        place = f"--{error.name.replace('_', '-')}" if error.name in OPTIONS else f"{path}: {error.name}"
        place = str(options.file) if error.name == "study" else place
        say(f"error: {place}: {one_line(error.reason)}", error=True)
        return 2


def _announce(study: Study, folder: Path, resumed: bool) -> None:
    finished, changed = len(study.finished), study.results.changed
    plan: Plan = study.plan
    found = f"{finished} of them finished" if finished or resumed else "none of them finished"
    say(f"{plan.name}: {study.total} runs, {found}; {study.processes} at a time, one thread each; folder {folder}")
    if resumed and finished < study.total:
        say("The study goes on: finished runs are not repeated, the others go on from their last checkpoints.")
    if changed:
        why = "were made with other settings, or without gradients, and are repeated"
        say(f"These runs {why}: {', '.join(changed)}")


def _lament(study: Study) -> None:
    """Says what was not run."""
    if study.failed:
        say(f"{len(study.failed)} runs failed: {', '.join(study.failed)}", error=True)
    if study.waiting:
        pairs = dict.fromkeys(f"{algorithm} on {task}" for task, algorithm, _ in study.waiting)
        say(
            f"{len(study.waiting)} runs at the best learning rate were not started, since a sweep has failed: "
            f"{', '.join(pairs)}",
            error=True,
        )
    say("The same command tries them again.", error=True)


def _list(study: Study) -> int:
    for run in study.runs:
        state = "finished" if run.id in study.results.finished else "open"
        say(f"{run.id:<50} {run.part:<12} {state}")
    for task, algorithm, seed in study.waiting:
        say(f"{f'{task}, {algorithm}, best learning rate, seed {seed}':<63} waits for the sweep")
    say(f"{len(study.finished)} of {study.total} runs have finished")
    return 0


def _report(study: Study, folder: Path) -> int:
    """Writes tables and figures of the finished runs, and prints where they are."""
    from .report import write_report

    if not study.finished:
        say(f"error: no run of {study.plan.name} has finished in {folder}; there is nothing to report", error=True)
        return 1
    left_out = [name for name in study.results.changed if name not in study.results.finished]
    if left_out:
        say(f"Left out, since their settings have changed, or gradients are missing: {', '.join(left_out)}")
    for written in write_report(study.results.study(study.runs), folder):
        say(str(written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
