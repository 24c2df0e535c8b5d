"""The results of a study: study.json, and the folders of the runs."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from pcpo_fast.config import Config
from pcpo_fast.errors import SettingError
from pcpo_fast.files import write_atomically
from pcpo_fast.presets import PRESETS

from .plan import Plan, Run, as_json, run_id

# in the folder of a study
STUDY, REPLACED, RUNS = "study.json", "study.old{}.json", "runs"
# in the folder of a run: its settings and what it measures, written before it starts, and its result, at the end
SETTINGS, RESULT = "study_run.json", "result.json"
# keys of an entry in study.json that are not the result
ENTRY = {"task", "algorithm", "learning_rate", "seed", "part", "settings", "finished"}


class Found(NamedTuple):
    """A finished run as it was saved: every setting by its name, and its result."""

    settings: dict[str, Any]
    result: dict[str, Any]


class Results:
    """The finished runs of a study.

    Args:
        plan: the study.
        folder: of the study.
        more: another study.json whose runs count, too.

    Attributes:
        finished: results by the id of their run, of those runs that `take` was given.
        changed: ids of runs that were saved with other settings than they have now.

    Raises:
        SettingError: for a study.json that cannot be read, or that belongs to another study.
    """

    def __init__(self, plan: Plan, folder: Path, more: Path | None = None) -> None:
        self.plan, self.folder = plan, folder
        self.finished: dict[str, dict[str, Any]] = {}
        self.changed: list[str] = []
        self._saved: dict[str, list[Found]] = {}
        # the results in the study.json of the folder, by the id of their run
        self._before: dict[str, dict[str, Any]] = {}
        self._looked: set[tuple[str, bool]] = set()
        if more is not None:
            self._add(_read(more, "results"), "results")
        if (folder / STUDY).is_file():
            study = _read(folder / STUDY, "output_dir")
            if study["study"] != plan.name:
                raise SettingError(
                    "output_dir", f"{folder} holds the study {study['study']!r}, not {plan.name!r}; give another folder"
                )
            self._before = self._add(study, "output_dir")

    def run_folder(self, run: Run) -> Path:
        return self.folder / RUNS / run.id

    def take(self, runs: Iterable[Run]) -> None:
        """Finds saved results of runs with equal settings."""
        for run in runs:
            if (run.id, run.gradients) not in self._looked:
                self._looked.add((run.id, run.gradients))
                self._take(run)

    def read(self, run: Run) -> str | None:
        """Reads the result of a run that has just ended. Returns what is wrong with it, or None."""
        path = self.run_folder(run) / RESULT
        result = _json(path)
        if not _is_result(result):
            return f"{path} is no result" if path.exists() else f"it has not written {path}"
        # a run that had started before the plan asked for its gradients stays open
        if result.get("gradients") or not run.gradients:
            self.finished[run.id] = result
        return None

    def study(self, runs: Iterable[Run]) -> dict[str, Any]:
        """The content of study.json: those of the runs that have finished."""
        file, presets = self.plan.file, {task["preset"] for task in self.plan.file["tasks"].values()}
        flat = {preset: as_json(PRESETS[preset].flat()) for preset in sorted(presets)}
        order = {kind: list(file[kind]) for kind in ("parts", "tasks", "algorithms")}

        def place(run: Run) -> tuple[float, ...]:
            names = {"parts": run.part, "tasks": run.task, "algorithms": run.algorithm}
            return *(order[kind].index(name) for kind, name in names.items()), run.learning_rate, run.seed

        entries = []
        for run in sorted((run for run in runs if run.id in self.finished), key=place):
            preset = flat[file["tasks"][run.task]["preset"]]
            names = {name: getattr(run, name) for name in ("task", "algorithm", "learning_rate", "seed", "part")}
            settings = {name: value for name, value in run.settings().items() if value != preset[name]}
            entries.append({**names, "settings": settings, "finished": True, **self.finished[run.id]})
        return {"study": self.plan.name, "file": file, "presets": flat, "runs": entries}

    def save(self, runs: Iterable[Run]) -> None:
        """Writes study.json, a line per run, and deletes the checkpoints of finished runs, which nothing needs then."""
        runs = list(runs)
        study = self.study(runs)
        entries = [json.dumps(entry, allow_nan=False) for entry in study.pop("runs")]
        head = json.dumps(study, indent=1)[:-2]
        text = head + ',\n "runs": [' + ",".join("\n  " + entry for entry in entries) + "\n ]\n}\n"
        write_atomically(self.folder / STUDY, text.encode())
        for run in runs:
            if run.id in self.finished:
                shutil.rmtree(self.run_folder(run) / "checkpoints", ignore_errors=True)

    def keep_replaced(self) -> None:
        """Keeps a study.json as it is where some of its results are about to be replaced or left out."""
        if any(self.finished.get(name) != result for name, result in self._before.items()):
            names = (REPLACED.format("" if number == 1 else f"-{number}") for number in itertools.count(1))
            free = next(self.folder / name for name in names if not (self.folder / name).exists())
            write_atomically(free, (self.folder / STUDY).read_bytes())

    def _take(self, run: Run) -> None:
        settings = run.settings()
        saved = list(self._saved.get(run.id, []))
        given = _json(self.run_folder(run) / SETTINGS)
        result = _json(self.run_folder(run) / RESULT)
        if isinstance(given, dict) and _is_result(result):
            saved.append(Found(given.get("settings", {}), result))
        # before the best learning rates are known, a run may not know yet that it measures gradients
        self.finished.pop(run.id, None)
        equal = [found.result for found in saved if found.settings == settings]
        whole = [result for result in equal if result.get("gradients") or not run.gradients]
        if whole:
            self.finished[run.id] = whole[-1]
        elif saved or (isinstance(given, dict) and given.get("settings") != settings):
            self.changed.append(run.id)

    def _add(self, study: dict[str, Any], setting: str) -> dict[str, dict[str, Any]]:
        """Notes the finished runs of a study.json with all of their settings, and returns their results by id."""
        default, found = as_json(Config().flat()), {}
        try:
            for entry in study["runs"]:
                preset = study["presets"][study["file"]["tasks"][entry["task"]]["preset"]]
                # a setting that did not exist then has its default
                settings = default | preset | entry["settings"]
                name = run_id(entry["task"], entry["algorithm"], entry["learning_rate"], entry["seed"])
                found[name] = {key: value for key, value in entry.items() if key not in ENTRY}
                self._saved.setdefault(name, []).append(Found(settings, found[name]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SettingError(
                setting, f"a run in its study.json is not as `pcpo study` writes it: {error!r}"
            ) from error
        return found


def prepare(folder: Path, run: Run) -> None:
    """Makes the folder of a run, and empties one that holds a run with other settings."""
    plan = {"settings": run.settings(), "gradients": run.gradients}
    # without its settings a checkpoint may be of any run
    if folder.exists() and _json(folder / SETTINGS) != plan:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / SETTINGS, (json.dumps(plan, indent=1) + "\n").encode())
    # the one that is there is no result, or it would have been taken
    (folder / RESULT).unlink(missing_ok=True)


def _read(path: Path, setting: str) -> dict[str, Any]:
    try:
        study = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingError(setting, f"cannot read {path}: {error}") from error
    if not isinstance(study, dict) or not {"study", "file", "presets", "runs"} <= study.keys():
        raise SettingError(setting, f"{path} is no study.json of a study; give the one that `pcpo study` wrote")
    return study


def _is_result(value: Any) -> TypeGuard[dict[str, Any]]:
    """Whether a run wrote it. NaN is no JSON, and would make all of study.json unreadable."""
    evaluations = value.get("evaluations") if isinstance(value, dict) else None
    return isinstance(evaluations, list) and all(isinstance(row, dict) and "epoch" in row for row in evaluations)


def _json(path: Path) -> Any:
    """The content of a JSON file, or None where there is none, or it is not one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (OSError, ValueError):
        return None


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
