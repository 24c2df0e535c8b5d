"""What a study file holds: its structure and its names are checked, and its defaults filled in."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Len, Lt
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from pcpo_fast.errors import SettingError
from pcpo_fast.presets import PRESETS
from pcpo_fast.study.measures import MEASURES, TAYLOR


def _distinct(values: list[Any]) -> list[Any]:
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise ValueError(f"names {twice!r} twice; name it once")
    return values


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError(f"is {text!r}; give one line of text")
    return text


def _listed(value: Any) -> Any:
    if isinstance(value, str) and value != "best":
        raise ValueError(f"is {value!r}; give a list of numbers, or best")
    return value


Line = Annotated[str, AfterValidator(_one_line)]
Names = Annotated[list[str], Len(1), AfterValidator(_distinct)]
Seeds = Annotated[list[Annotated[int, Ge(0), Lt(2**62)]], Len(1), AfterValidator(_distinct)]
Rates = Annotated[list[Annotated[float, Gt(0)]], Len(1), AfterValidator(_distinct)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Task(Section):
    """A preset, and what its runs are judged by."""

    title: Line | None = None
    preset: str
    settings: dict[str, Any] = {}
    baseline: str
    targets: Annotated[list[float], Len(1), AfterValidator(_distinct)]
    frechet_limit: Annotated[float, Gt(0)]


class Part(Section):
    """Tasks x algorithms x learning rates x seeds; all tasks and algorithms where none are named."""

    tasks: Names | None = None
    algorithms: Names | None = None
    learning_rates: Annotated[Rates | Literal["best"], BeforeValidator(_listed)]
    seeds: Seeds
    gradients: bool = False
    """Whether its runs also measure the gradient of every step, before the first epoch and after the last."""


class Claim(Section):
    """A sentence, and the comparison that it is held against."""

    claim: Line
    stated: Line | None = None
    """The figure that comes with the claim where it was made."""
    tasks: Names | None = None
    algorithm: str
    against: str | None = None
    """The algorithm to compare with; a task's baseline where none is named."""
    measure: str
    rates: Literal["best", "equal"] = "best"


class StudyFile(Section):
    """What a study file holds."""

    settings: dict[str, Any] = {}
    tasks: Annotated[dict[Line, Task], Len(1)]
    algorithms: Annotated[dict[Line, dict[str, Any]], Len(1)]
    parts: Annotated[dict[Line, Part], Len(1)]
    claims: list[Claim] = []


def as_json(values: Any) -> Any:
    """The same values as they are read back from JSON: a list in the place of each tuple."""
    return json.loads(json.dumps(values))


def cells(file: Mapping[str, Any]) -> Iterable[tuple[str, str, str, Any, int]]:
    """(part, task, algorithm, learning rate, seed) of every run; seeds first, so that a study cut short is balanced."""
    for name, part in file["parts"].items():
        rates = [part["learning_rates"]] if part["learning_rates"] == "best" else part["learning_rates"]
        for seed in part["seeds"]:
            for task in part["tasks"]:
                for algorithm in part["algorithms"]:
                    yield from ((name, task, algorithm, rate, seed) for rate in rates)


def checked_file(content: Any) -> dict[str, Any]:
    """The content of a study file with its structure and its names checked and its defaults filled in.

    Raises:
        SettingError: for every mistake; its name is the place of the mistake, such as "parts.best.seeds.0".
    """
    try:
        # YAML also has dates, keys that are lists, and anchors that contain themselves
        json.dumps(content)
    except (TypeError, ValueError, RecursionError) as error:
        reason = f"holds what JSON cannot ({error}); write texts, numbers, lists and mappings, none within itself"
        raise SettingError("study", reason) from error
    try:
        file = TypeAdapter(StudyFile).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        # a place inside a key that takes two kinds also names the kind
        place = [
            str(part) for part in first["loc"] if not re.match(r"\[key\]$|(list|literal|function-\S+)\[", str(part))
        ]
        raise SettingError(".".join(place) or "study", _reason(first)) from None
    for section in file.parts.values():
        section.tasks = section.tasks or list(file.tasks)
        section.algorithms = section.algorithms or list(file.algorithms)
    for claim in file.claims:
        claim.tasks = claim.tasks or list(file.tasks)
    for name, task in file.tasks.items():
        task.title = task.title or name
    filled = file.model_dump()
    filled["algorithms"] = {name: {"title": name} | given for name, given in filled["algorithms"].items()}
    for name, given in filled["algorithms"].items():
        if not (isinstance(given["title"], str) and given["title"].isprintable()):
            raise SettingError(f"algorithms.{name}.title", f"{given['title']!r} was given; give one line of text")
    filled = as_json(filled)
    _check_names(filled)
    return filled


def _reason(error: Mapping[str, Any]) -> str:
    """A finding of pydantic in the words of this package."""
    if error["type"] == "missing":
        return "is missing; give it"
    if error["type"] == "extra_forbidden":
        return "nothing has this name here; docs/study.md lists what a study file holds"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] == "too_short":
        return "is empty; give at least one"
    rule = re.sub(r"dictionary or instance of \w+|dictionary", "mapping", error["msg"].replace("Input should", "must"))
    return f"{error['input']!r} was given; it {rule}"


def _check_names(file: Mapping[str, Any]) -> None:
    """Checks that everything that is named exists."""
    for task, given in file["tasks"].items():
        _check_choice(f"tasks.{task}.preset", given["preset"], PRESETS)
        _check_choice(f"tasks.{task}.baseline", given["baseline"], file["algorithms"])
    for part, given in file["parts"].items():
        for kind in ("tasks", "algorithms"):
            for index, one in enumerate(given[kind]):
                _check_choice(f"parts.{part}.{kind}.{index}", one, file[kind])
    for index, given in enumerate(file["claims"]):
        for one in given["tasks"]:
            _check_choice(f"claims.{index}.tasks", one, file["tasks"])
        _check_choice(f"claims.{index}.measure", given["measure"], MEASURES)
        for kind in ("algorithm", "against"):
            if given[kind] is not None:
                _check_choice(f"claims.{index}.{kind}", given[kind], file["algorithms"])
        theirs = [given["against"] or file["tasks"][task]["baseline"] for task in given["tasks"]]
        if given["measure"] != TAYLOR and given["algorithm"] in theirs:
            raise SettingError(
                f"claims.{index}.algorithm",
                f"{given['algorithm']!r} is compared with itself; give another one, or `against`",
            )


def _check_choice(place: str, given: str, choices: Iterable[str]) -> None:
    if given not in choices:
        raise SettingError(place, f"{given!r} does not exist; choose one of {', '.join(choices)}")
