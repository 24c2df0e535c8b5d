"""A study file as a list of runs: it is read, filled in and checked before any run starts.

A run is known by its task, algorithm, learning rate and seed. Its settings are those of the task's preset, then the
study's, the task's and the algorithm's, each of which overrides those before. docs/study.md shows a file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Len, Lt
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from pcpo_fast import samplers
from pcpo_fast.config import Config, checked_settings
from pcpo_fast.documents import read_text, read_yaml
from pcpo_fast.errors import SettingError
from pcpo_fast.policies import find_model
from pcpo_fast.presets import PRESETS
from pcpo_fast.study.measures import MEASURES, SWEEP, is_sweep
from pcpo_fast.train import check, check_trust

# the files that come with the package, by name
SHIPPED = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}
# a setting of an algorithm beside those of training: the exponents of its credit
POWERS = "credit_powers"
# settings that differ between the runs of one algorithm
OF_THE_STUDY = {
    "learning_rate": "learning_rates of a part give it",
    "seed": "seeds of a part give it",
    "output_dir": "every run has a folder of its own inside the study's",
    "resume": "a study always resumes",
}


def _distinct(values: list[Any]) -> list[Any]:
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise ValueError(f"names {twice!r} twice; name it once")
    return values


def _listed(value: Any) -> Any:
    if isinstance(value, str) and value != "best":
        raise ValueError(f"is {value!r}; give a list of numbers, or best")
    return value


Names = Annotated[list[str], Len(1), AfterValidator(_distinct)]
Seeds = Annotated[list[Annotated[int, Ge(0), Lt(2**62)]], Len(1), AfterValidator(_distinct)]
Rates = Annotated[list[Annotated[float, Gt(0)]], Len(1), AfterValidator(_distinct)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Task(Section):
    """A preset, and what its runs are judged by."""

    title: str | None = None
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

    claim: str
    stated: str | None = None
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
    tasks: Annotated[dict[str, Task], Len(1)]
    algorithms: Annotated[dict[str, dict[str, Any]], Len(1)]
    parts: Annotated[dict[str, Part], Len(1)]
    claims: list[Claim] = []


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of a study.

    Attributes:
        part: the first part that it belongs to.
        config: its settings, resolved.
        gradients: whether it measures the gradients of the steps, since one of its parts asks for them.
        id: its name, and that of its folder.
    """

    task: str
    algorithm: str
    learning_rate: float
    seed: int
    part: str
    config: Config
    gradients: bool
    id: str

    def settings(self) -> dict[str, Any]:
        """Every training setting by its name, as JSON has them."""
        return as_json(self.config.flat())


@dataclasses.dataclass(frozen=True)
class Plan:
    """A study that was checked.

    Attributes:
        name: of the study, the stem of its file.
        file: its content, with defaults filled in.
        configs: the resolved settings of each (task, algorithm), for any learning rate and seed.
    """

    name: str
    file: dict[str, Any]
    configs: Mapping[tuple[str, str], Config]

    def runs(self, best: Mapping[tuple[str, str], float] | None = None) -> tuple[list[Run], list[tuple[str, str, int]]]:
        """The runs in the order in which they start, and those whose learning rate is not known yet.

        Args:
            best: the best learning rate of each (task, algorithm) that has one by now.

        Returns:
            the runs, and (task, algorithm, seed) of each that waits for the sweep.
        """
        found: dict[str, Run] = {}
        waiting = []
        for part, task, algorithm, rate, seed in _cells(self.file):
            if rate == "best":
                rate = (best or {}).get((task, algorithm))
            if rate is None:
                waiting.append((task, algorithm, seed))
                continue
            name = run_id(task, algorithm, rate, seed)
            gradients = self.file["parts"][part]["gradients"]
            if name not in found:
                config = self.configs[task, algorithm].replace(learning_rate=rate, seed=seed)
                found[name] = Run(task, algorithm, rate, seed, part, config, gradients, name)
            elif gradients:
                found[name] = dataclasses.replace(found[name], gradients=True)
        return list(found.values()), waiting

    def sweep(self, task: str, algorithm: str) -> dict[str, float]:
        """The learning rates of the runs that choose the best one of an algorithm, by the id of the run."""
        cells = [cell[1:] for cell in _cells(self.file) if is_sweep(cell[0]) and cell[1:3] == (task, algorithm)]
        return {run_id(*cell): cell[2] for cell in cells}

    def frechet_limit(self, task: str) -> float:
        """The Frechet distance up to which an evaluation counts in the choice of a learning rate."""
        return self.file["tasks"][task]["frechet_limit"]


def read_plan(path: Path, *, trusted: bool = False) -> Plan:
    """Reads and checks a study file.

    Args:
        path: of the file.
        trusted: whether the rewards and samplers of the user's own that it names may be imported.

    Raises:
        SettingError: for a file that cannot be read, and for every mistake in it; its name is the place of the mistake,
            such as "tasks.digits.settings.epochs".
    """
    text = read_text(path, "study")
    try:
        content = read_yaml(text)
    except ValueError as error:
        raise SettingError("study", f"cannot read {path}: {error}") from error
    return make_plan(path.stem, content, trusted=trusted)


def make_plan(name: str, content: Any, *, trusted: bool = False) -> Plan:
    """Checks the content of a study file.

    Args:
        name: of the study.
        content: of the file.
        trusted: as for `read_plan`.

    Raises:
        SettingError: as `read_plan`.
    """
    file = _filled(content)
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
    _check_best(file)
    _check_ids(file)
    pairs = dict.fromkeys((task, algorithm) for _, task, algorithm, *_ in _cells(file))
    return Plan(name, file, {pair: _config(file, *pair, trusted=trusted) for pair in pairs})


def run_id(task: str, algorithm: str, learning_rate: float, seed: int) -> str:
    """The name of a run, which is that of its folder, too."""
    return re.sub(r"[^A-Za-z0-9.-]", "_", f"{task}-{algorithm}-{learning_rate:g}-{seed}")


def credit_weights(config: Config, powers: Sequence[float]) -> tuple[float, ...]:
    """Weights of the steps proportional to |b|^p s^q, with the sign and the sum of the sampler's own, -b / s.

    Args:
        config: the settings of the run; its sampler's a, b and s are used, and its credit is not.
        powers: p and q. (1, -1) are the sampler's own weights.

    Returns:
        T weights, 0 at steps without noise.
    """
    settings = dataclasses.replace(config.sampler, credit="native", target_weight=None)
    table = samplers.build(settings, find_model(config.model).schedule())
    native, (p, q) = table.native_weight, powers
    # a step without noise is not trained; its s^q may be infinite
    weight = torch.where(native != 0, native.sign() * table.output_coef.abs() ** p * table.std**q, 0.0)
    return tuple((weight * (native.abs().sum() / weight.abs().sum())).tolist())


def as_json(values: Any) -> Any:
    """The same values as they are read back from JSON: a list in the place of each tuple."""
    return json.loads(json.dumps(values))


def _cells(file: Mapping[str, Any]) -> Iterable[tuple[str, str, str, Any, int]]:
    """(part, task, algorithm, learning rate, seed) of every run; seeds first, so that a study cut short is balanced."""
    for name, part in file["parts"].items():
        rates = [part["learning_rates"]] if part["learning_rates"] == "best" else part["learning_rates"]
        for seed in part["seeds"]:
            for task in part["tasks"]:
                for algorithm in part["algorithms"]:
                    yield from ((name, task, algorithm, rate, seed) for rate in rates)


def _filled(content: Any) -> dict[str, Any]:
    """The content of a study file, with its structure checked and its defaults filled in."""
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
        if not isinstance(given["title"], str):
            raise SettingError(f"algorithms.{name}.title", f"{given['title']!r} was given; give a text")
    return as_json(filled)


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
    rule = error["msg"].replace("Input should", "must").replace("dictionary", "mapping")
    return f"{error['input']!r} was given; it {rule}"


def _check_choice(place: str, given: str, choices: Iterable[str]) -> None:
    if given not in choices:
        raise SettingError(place, f"{given!r} does not exist; choose one of {', '.join(choices)}")


def _check_best(file: Mapping[str, Any]) -> None:
    """Checks that a sweep covers what asks for the best learning rates, in a part before it."""
    swept: set[tuple[str, str]] = set()
    for name, part in file["parts"].items():
        pairs = {(task, algorithm) for task in part["tasks"] for algorithm in part["algorithms"]}
        if part["learning_rates"] != "best":
            swept |= pairs if is_sweep(name) else set()
            continue
        place = f"parts.{name}.learning_rates"
        if is_sweep(name):
            raise SettingError(place, f"a part whose name begins with {SWEEP} chooses the best; give it a list")
        for task, algorithm in sorted(pairs - swept):
            raise SettingError(
                place,
                f"best needs {algorithm!r} on {task!r} in a part before this one whose name begins with {SWEEP}; add "
                "it there, or give a list",
            )


def _check_ids(file: Mapping[str, Any]) -> None:
    """Checks that runs with different learning rates, tasks or algorithms have different names."""
    sweeps = [part["learning_rates"] for name, part in file["parts"].items() if is_sweep(name)]
    swept = [rate for rates in sweeps for rate in rates]
    seen: dict[str, tuple[Any, ...]] = {}
    for part, task, algorithm, rate, seed in _cells(file):
        for number in swept if rate == "best" else [rate]:
            key = (task, algorithm, number, seed)
            name = run_id(*key)
            if seen.setdefault(name, key) != key:
                other = seen[name]
                raise SettingError(
                    f"parts.{part}",
                    f"the runs {other} and {key} would both be called {name}; make their task, algorithm or learning "
                    "rate differ in letters or digits",
                )


def _config(file: Mapping[str, Any], task: str, algorithm: str, *, trusted: bool) -> Config:
    """The settings of a task with an algorithm, with all checks that need no weights."""
    given = file["tasks"][task]
    own = {name: value for name, value in file["algorithms"][algorithm].items() if name != "title"}
    powers = own.pop(POWERS, None)
    config = PRESETS[given["preset"]]
    layers = {"settings": file["settings"], f"tasks.{task}.settings": given["settings"], f"algorithms.{algorithm}": own}
    for place, values in layers.items():
        for name, reason in OF_THE_STUDY.items():
            if name in values:
                raise SettingError(f"{place}.{name}", f"{reason}; leave it out here")
        try:
            config = config.replace(**checked_settings(values))
        except SettingError as error:
            raise SettingError(f"{place}.{error.name}", error.reason) from error
    if powers is not None:
        place = f"algorithms.{algorithm}.{POWERS}"
        if "credit" in own:
            raise SettingError(place, "gives the credit, and so does credit; leave one of the two out")
        numbers = isinstance(powers, list) and all(isinstance(power, int | float) for power in powers)
        if not numbers or len(powers) != 2 or not all(map(math.isfinite, powers)):
            raise SettingError(place, f"{powers!r} was given; give two numbers, p and q of |output_coef|^p std^q")
    try:
        if not trusted:
            check_trust(config)
        if powers is not None:
            config = config.resolved()
            config = config.replace(credit=credit_weights(config, powers))
        config = config.resolved()
        check(config)
    except SettingError as error:
        raise SettingError(f"tasks.{task} with algorithms.{algorithm}: {error.name}", error.reason) from error
    return config
