"""A study file as a list of runs: it is read, filled in and checked before any run starts.

A run is known by its task, algorithm, learning rate and seed. Its settings are those of the task's preset, then the
study's, the task's and the algorithm's, each of which overrides those before. docs/study.md shows a file.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pcpo_fast import samplers
from pcpo_fast.config import Config, checked_settings
from pcpo_fast.documents import read_text, read_yaml
from pcpo_fast.errors import SettingError
from pcpo_fast.policies import EMBEDDED, find_model
from pcpo_fast.presets import PRESETS
from pcpo_fast.study.file import as_json, cells, checked_file
from pcpo_fast.study.measures import SWEEP, file_name, is_sweep
from pcpo_fast.train import check, check_trust

# the files that come with the package, by name
SHIPPED = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}
# a setting of an algorithm beside those of training: the exponents of its credit
POWERS = "credit_powers"
# letters of a run's name, which is that of its folder
LONGEST = 200
# settings that differ between the runs of one algorithm
OF_THE_STUDY = {
    "learning_rate": "learning_rates of a part give it",
    "seed": "seeds of a part give it",
    "output_dir": "every run has a folder of its own inside the study's",
    "resume": "a study always resumes",
}


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
        for part, task, algorithm, rate, seed in cells(self.file):
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
        swept = [cell[1:] for cell in cells(self.file) if is_sweep(cell[0]) and cell[1:3] == (task, algorithm)]
        return {run_id(*cell): cell[2] for cell in swept}

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
    file = checked_file(content)
    _check_best(file)
    _check_seeds(file)
    _check_ids(file)
    pairs = dict.fromkeys((task, algorithm) for _, task, algorithm, *_ in cells(file))
    # an algorithm of no part is checked as well
    used, task = {algorithm for _, algorithm in pairs}, next(iter(file["tasks"]))
    pairs |= {(task, algorithm): None for algorithm in file["algorithms"] if algorithm not in used}
    return Plan(name, file, {pair: _config(file, *pair, trusted=trusted) for pair in pairs})


def run_id(task: str, algorithm: str, learning_rate: float, seed: int) -> str:
    """The name of a run, which is that of its folder, too."""
    return file_name(f"{task}-{algorithm}-{learning_rate:g}-{seed}")


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


def _check_seeds(file: Mapping[str, Any]) -> None:
    """Checks that no seed of a sweep is compared: its runs have chosen the rate, and would flatter it."""
    seeds: dict[tuple[bool, str, str], set[int]] = {}
    for part, task, algorithm, _, seed in cells(file):
        seeds.setdefault((is_sweep(part), task, algorithm), set()).add(seed)
        both = seeds.get((True, task, algorithm), set()) & seeds.get((False, task, algorithm), set())
        if both:
            raise SettingError(
                f"parts.{part}.seeds",
                f"{min(both)} is a seed of both a sweep and a comparison of {algorithm!r} on {task!r}; give the sweep "
                "seeds of its own",
            )


def _check_ids(file: Mapping[str, Any]) -> None:
    """Checks that runs with different learning rates, tasks or algorithms have different names."""
    sweeps = [part["learning_rates"] for name, part in file["parts"].items() if is_sweep(name)]
    swept = [rate for rates in sweeps for rate in rates]
    seen: dict[str, tuple[Any, ...]] = {}
    for part, task, algorithm, rate, seed in cells(file):
        for number in swept if rate == "best" else [rate]:
            key = (task, algorithm, number, seed)
            name = run_id(*key)
            if len(name) > LONGEST:
                raise SettingError(
                    f"parts.{part}", f"the run {name} has a name of {len(name)} letters; shorten it to {LONGEST}"
                )
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
        numbers = isinstance(powers, list) and all(type(power) in (int, float) for power in powers)
        if not numbers or len(powers) != 2 or not all(map(math.isfinite, powers)):
            raise SettingError(place, f"{powers!r} was given; give two numbers, p and q of |output_coef|^p std^q")
    try:
        if not trusted:
            check_trust(config)
        if powers is not None:
            config = config.resolved()
            credit = credit_weights(config, powers)
            if not all(map(math.isfinite, credit)):
                raise SettingError("credit", f"the weights of {powers} are not finite: {credit}; give smaller powers")
            config = config.replace(credit=credit)
        config = config.resolved()
        if config.model.model not in EMBEDDED:
            raise SettingError(
                "model",
                f"{config.model.model!r} was given; a study measures quality with a classifier of digits, so "
                f"give one of {', '.join(EMBEDDED)}",
            )
        if config.run.eval_samples < 2:
            raise SettingError("eval_samples", "one image has no Frechet distance; give at least 2")
        if config.sampler.window_size is not None and any(
            part["gradients"] and task in part["tasks"] and algorithm in part["algorithms"]
            for part in file["parts"].values()
        ):
            raise SettingError("window_size", "gradients are measured at all steps; leave the window or gradients out")
        check(config)
    except SettingError as error:
        raise SettingError(f"tasks.{task} with algorithms.{algorithm}: {error.name}", error.reason) from error
    return config
