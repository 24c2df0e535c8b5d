"""The results of a study: study.json, and the folders of the runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from pcpo_fast.config import Config
from pcpo_fast.errors import SettingError
from pcpo_fast.files import write_atomically
from pcpo_fast.presets import PRESETS

from .plan import Plan, Run, as_json, run_id

# in the folder of a study
STUDY, REPLACED, RUNS = "study.json", "study.old.json", "runs"
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
        self._looked: set[tuple[str, bool]] = set()
        if more is not None:
            self._add(_read(more, "results"))
        if (folder / STUDY).is_file():
            study = _read(folder / STUDY, "output_dir")
            if study["study"] != plan.name:
                raise SettingError(
                    "output_dir", f"{folder} holds the study {study['study']!r}, not {plan.name!r}; give another folder"
                )
            self._add(study)

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
        # NaN is no JSON and would make all of study.json unreadable
        if not isinstance(result, dict) or not isinstance(result.get("evaluations"), list):
            return f"{path} is no result" if path.exists() else f"it has not written {path}"
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
        """Keeps a study.json as it is where some of its runs are about to be replaced by others."""
        if self.changed and (self.folder / STUDY).is_file():
            write_atomically(self.folder / REPLACED, (self.folder / STUDY).read_bytes())

    def _take(self, run: Run) -> None:
        settings = run.settings()
        saved = list(self._saved.get(run.id, []))
        given = _json(self.run_folder(run) / SETTINGS)
        result = _json(self.run_folder(run) / RESULT)
        if isinstance(given, dict) and isinstance(result, dict):
            saved.append(Found(given.get("settings", {}), result))
        # before the best learning rates are known, a run may not know yet that it measures gradients
        self.finished.pop(run.id, None)
        equal = [found.result for found in saved if found.settings == settings]
        whole = [result for result in equal if result.get("gradients") or not run.gradients]
        if whole:
            self.finished[run.id] = whole[-1]
        elif equal:
            return
        elif saved or (isinstance(given, dict) and given.get("settings") != settings):
            self.changed.append(run.id)

    def _add(self, study: dict[str, Any]) -> None:
        """Notes the finished runs of a study.json with all of their settings."""
        default = as_json(Config().flat())
        for entry in study["runs"]:
            if not entry.get("finished"):
                continue
            preset = study["presets"][study["file"]["tasks"][entry["task"]]["preset"]]
            # a setting that did not exist then has its default
            settings = default | preset | entry["settings"]
            name = run_id(entry["task"], entry["algorithm"], entry["learning_rate"], entry["seed"])
            result = {key: value for key, value in entry.items() if key not in ENTRY}
            self._saved.setdefault(name, []).append(Found(settings, result))


def prepare(folder: Path, run: Run) -> None:
    """Makes the folder of a run, and empties one that holds a run with other settings."""
    plan = {"settings": run.settings(), "gradients": run.gradients}
    if folder.exists() and _json(folder / SETTINGS) not in (None, plan):
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


def _json(path: Path) -> Any:
    """The content of a JSON file, or None where there is none, or it is not one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (OSError, ValueError):
        return None


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
