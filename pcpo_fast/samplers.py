"""Temporary: the contract of the samplers package on today's tables, until that package lands."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from pcpo_fast.errors import SettingError
from pcpo_fast.tables import StepTable, ddim_table, flow_table, shifted_sigmas

Credit = Literal["native", "constant", "proportionate", "published"]
NOISE_LEVELS = {"flow": 0.7, "dance": 0.3, "cps": 0.8}


class Schedule(NamedTuple):
    scheduler: Any
    sigmas: Sequence[float] | None = None
    image_seq_len: int | None = None


def build(settings: Any, schedule: Schedule, *, window: tuple[int, int] | None = None) -> StepTable:
    flow = "Flow" in type(schedule.scheduler).__name__
    names = ("flow", "dance", "cps") if flow else ("ddim",)
    sampler = settings.sampler or names[0]
    if sampler not in names:
        raise SettingError("sampler", f"{sampler!r} was given; choose one of {', '.join(names)}")
    credit, target_weight = settings.credit, settings.target_weight
    try:
        if not flow:
            for name in ("noise_level", "shift"):
                if getattr(settings, name) is not None:
                    raise SettingError(name, "is a setting of flow models")
            if not settings.normalized_log_prob:
                raise SettingError("normalized_log_prob", "is a setting of flow models")
            return ddim_table.from_scheduler(
                schedule.scheduler,
                settings.num_inference_steps,
                eta=1.0 if settings.eta is None else settings.eta,
                credit="uniform" if credit == "constant" else credit,
                target_weight=target_weight,
                window=window,
            )
        if settings.eta is not None:
            raise SettingError("eta", "is a setting of DDIM")
        level = NOISE_LEVELS[sampler] if settings.noise_level is None else settings.noise_level
        common: Any = dict(
            sde=sampler,
            noise_level=level,
            credit="native" if credit == "constant" else credit,
            target_weight=target_weight,
            normalized=settings.normalized_log_prob,
            window=window,
        )
        if settings.shift is not None:
            sigmas = shifted_sigmas(settings.num_inference_steps, settings.shift)
            steps = schedule.scheduler.config.num_train_timesteps
            return flow_table(sigmas, num_train_timesteps=steps, **common)
        return flow_table.from_scheduler(
            schedule.scheduler,
            settings.num_inference_steps,
            sigmas=schedule.sigmas,
            image_seq_len=schedule.image_seq_len,
            **common,
        )
    except SettingError:
        raise
    except ValueError as error:
        raise SettingError("sampler", str(error)) from error


def build_for_evaluation(settings: Any, schedule: Schedule) -> StepTable:
    flow = "Flow" in type(schedule.scheduler).__name__
    plain: Any = {"credit": "native", "target_weight": None} | ({"noise_level": 0.0} if flow else {})
    return build(dataclasses.replace(settings, **plain), schedule)
