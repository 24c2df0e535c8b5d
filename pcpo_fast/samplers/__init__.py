"""Samplers as step tables, and the one that the settings of a run ask for.

A sampler of one's own is a function (settings, schedule) -> StepTable, given as `module:function`; see
docs/samplers.md.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import torch

from pcpo_fast.errors import SettingError
from pcpo_fast.functions import import_function

from .checks import Credit, Scheme
from .ddim import PredictionType
from .flow import NOISE_LEVELS, FlowSDE, shifted_sigmas
from .schedulers import family_of
from .table import StepTable

__all__ = [
    "NOISE_LEVELS",
    "SAMPLERS",
    "Credit",
    "FlowSDE",
    "PredictionType",
    "Schedule",
    "StepTable",
    "build",
    "build_for_evaluation",
    "describe",
    "shifted_sigmas",
]

# the samplers that have a name, by the family of models that they sample
SAMPLERS: dict[str, tuple[str, ...]] = {"diffusion": ("ddim",), "flow": get_args(FlowSDE)}


class Schedule(NamedTuple):
    """The schedule of a model, as its policy knows it.

    Attributes:
        scheduler: the diffusers scheduler of the model's pipeline.
        sigmas: a function of T that returns the T noise levels which the pipeline hands to its scheduler, before the
            shift; None where it leaves them to the scheduler.
        image_seq_len: tokens of an image, where the shift depends on the size of the image.
    """

    scheduler: Any
    sigmas: Callable[[int], Sequence[float]] | None = None
    image_seq_len: int | None = None


def build(settings: Any, schedule: Schedule, *, window: tuple[int, int] | None = None) -> StepTable:
    """The table of the sampler that a run trains on.

    Args:
        settings: num_inference_steps, sampler, eta, noise_level, shift, credit, target_weight and
            normalized_log_prob. sampler None is "ddim" for diffusion models and "flow" for flow models.
        schedule: of the model.
        window: (start, stop): only these steps are stochastic and trained.

    Raises:
        SettingError: for settings that do not fit the model or the sampler; it names the setting.
    """
    if ":" in (settings.sampler or ""):
        if window is not None:
            raise SettingError(
                "window_size",
                f"a window needs the sampler's own step without noise, which {settings.sampler} does not give; leave "
                "it out, or let your function set std 0 at the steps that are not to be trained",
            )
        return _of_the_user(settings, schedule)
    credit = {"credit": settings.credit, "target_weight": settings.target_weight}
    if isinstance(settings.credit, str):
        return _of_the_scheduler(settings, schedule, noise_level=settings.noise_level, window=window, **credit)
    table = _of_the_scheduler(settings, schedule, noise_level=settings.noise_level, window=window, credit="native")
    return _weighted(table, settings)


def build_for_evaluation(settings: Any, schedule: Schedule) -> StepTable:
    """The sampler for evaluation, on the same schedule: without noise for flow models, with the sampler's own variance
    for diffusion models. A sampler of the user's own is evaluated as it is.

    Raises:
        SettingError: as `build`.
    """
    if ":" in (settings.sampler or ""):
        return build(settings, schedule)
    return _of_the_scheduler(settings, schedule, noise_level=0.0, credit="native")


def describe(settings: Any, schedule: Schedule) -> tuple[str, str]:
    """The samplers of `build` and of `build_for_evaluation`, in the names of the settings: sampler, steps and noise.

    The two are equal where both tables take the same steps.
    """
    steps = f"num_inference_steps {settings.num_inference_steps}"
    if ":" in (settings.sampler or ""):
        noise = {"eta": settings.eta, "noise_level": settings.noise_level}
        given = [f"{name} {value:g}" for name, value in noise.items() if value is not None]
        own = ", ".join([f"sampler {settings.sampler}", steps, *given])
        return own, own
    family = family_of(schedule.scheduler)
    name = settings.sampler or SAMPLERS[family][0]
    common = f"sampler {name}, {steps}"
    if family == "diffusion":
        common += f", eta {1.0 if settings.eta is None else settings.eta:g}"
        resolved = settings.credit in ("proportionate", "published")
        training, evaluation = f", its std re-solved for credit {settings.credit}" if resolved else "", ""
    else:
        level = NOISE_LEVELS[name] if settings.noise_level is None else settings.noise_level
        training, evaluation = f", noise_level {level:g}", ", noise_level 0"
    if settings.window_size is not None:
        training += f", window_size {settings.window_size}, window {settings.window}"
    return common + training, common + evaluation


def _of_the_scheduler(settings: Any, schedule: Schedule, *, noise_level: float | None, **wanted: Any) -> StepTable:
    scheduler = schedule.scheduler
    name = type(scheduler).__name__
    try:
        family = family_of(scheduler)
    except ValueError as error:
        raise SettingError("model", f"{error}. In a run, scheduler ddim or flow does that") from error
    sampler = SAMPLERS[family][0] if settings.sampler is None else settings.sampler
    if sampler not in SAMPLERS[family]:
        known = any(sampler in samplers for samplers in SAMPLERS.values())
        reason = f"does not fit {name}, a {family} scheduler" if known else "is not known"
        raise SettingError(
            "sampler",
            f"{sampler!r} {reason}; choose {', '.join(SAMPLERS[family])}, or give your own as module:function",
        )
    options = {"normalized": settings.normalized_log_prob, **wanted}
    try:
        if family == "diffusion":
            for setting in ("noise_level", "shift"):
                if getattr(settings, setting) is not None:
                    raise ValueError(f"{setting} is for flow models and {name} is a diffusion scheduler; leave it out")
            return StepTable.from_scheduler(scheduler, settings.num_inference_steps, eta=settings.eta, **options)
        if settings.eta is not None:
            raise ValueError(f"eta is DDIM's and {name} is a flow scheduler; leave it out and use noise_level")
        options |= {"sde": sampler, "noise_level": noise_level}
        if settings.shift is not None:
            sigmas = shifted_sigmas(settings.num_inference_steps, settings.shift)
            return StepTable.flow(sigmas, num_train_timesteps=scheduler.config.num_train_timesteps, **options)
        sigmas = None if schedule.sigmas is None else schedule.sigmas(settings.num_inference_steps)
        options |= {"sigmas": sigmas, "image_seq_len": schedule.image_seq_len}
        return StepTable.from_scheduler(scheduler, settings.num_inference_steps, **options)
    except ValueError as error:
        raise _named(error, scheduler_name=name) from error


def _named(error: ValueError, *, scheduler_name: str) -> SettingError:
    """A builder's error as one of the setting that its message begins with."""
    first = re.split(r"\W", str(error), maxsplit=1)[0]
    settings = ("num_inference_steps", "eta", "noise_level", "shift", "credit", "target_weight")
    if first == "window":
        setting = "window_size"
    elif first == scheduler_name:
        setting = "model"
    else:
        setting = first if first in settings else "sampler"
    # the name is the error's own
    return SettingError(setting, re.sub(f"^{setting}[= ]", "", str(error)))


def _weighted(table: StepTable, settings: Any) -> StepTable:
    """The table with the weights that the settings list."""
    weights = settings.credit
    if len(weights) != len(table):
        raise SettingError(
            "credit",
            f"{len(weights)} weights were given for {len(table)} steps (num_inference_steps); give one for each step",
        )
    if settings.target_weight is not None:
        raise SettingError("target_weight", "has no meaning beside a credit of one weight per step; leave it out")
    # the loss needs the sign of the sampler's own weight, which a model that puts out the sample turns around
    credit = torch.tensor(weights, dtype=torch.float64) * table.native_weight.sign()
    try:
        weighted = dataclasses.replace(table, credit=credit)
    except ValueError as error:
        raise SettingError("credit", str(error)) from error
    # the loss reads float32
    if not weighted.weight.float().any():
        steps = ", ".join(map(str, table.trainable.nonzero().flatten().tolist()))
        raise SettingError("credit", f"gives every trained step ({steps}) the weight 0; give at least one of them more")
    return weighted


def _of_the_user(settings: Any, schedule: Schedule) -> StepTable:
    """The table that the user's function makes, with the credit that the settings ask for."""
    function = import_function(settings.sampler, "sampler")
    try:
        table = function(settings, schedule)
    except SettingError:
        raise
    except (Exception, SystemExit) as error:
        raise SettingError("sampler", f"{settings.sampler} raised {type(error).__name__}: {error}") from error
    if not isinstance(table, StepTable):
        raise SettingError(
            "sampler", f"{settings.sampler} returned a {type(table).__name__}; it must return a pcpo_fast.StepTable"
        )
    if len(table) != settings.num_inference_steps:
        raise SettingError(
            "num_inference_steps",
            f"{settings.num_inference_steps} steps were asked for and {settings.sampler} returned a table of "
            f"{len(table)}; make the two equal",
        )
    normalized = table.normalized and settings.normalized_log_prob
    # weights that the function gave by hand are its own credit
    if not isinstance(table.credit, str):
        if settings.target_weight is not None:
            raise SettingError("target_weight", f"{settings.sampler} gives the weights itself; leave it out")
        if not isinstance(settings.credit, str):
            raise SettingError("credit", f"{settings.sampler} gives the weights itself; leave it out")
        return dataclasses.replace(table, normalized=normalized)
    if not isinstance(settings.credit, str):
        return dataclasses.replace(_weighted(table, settings), normalized=normalized)
    if settings.credit not in get_args(Scheme):
        raise SettingError(
            "credit",
            f"{settings.credit!r} is for the named samplers; choose {', '.join(get_args(Scheme))} for "
            f"{settings.sampler}",
        )
    try:
        credit = {"credit": settings.credit, "target_weight": settings.target_weight}
        return dataclasses.replace(table, **credit, normalized=normalized)
    except ValueError as error:
        raise _named(error, scheduler_name="") from error
