"""Samplers as step tables. A stand-in until the package is there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pcpo_fast.errors import SettingError
from pcpo_fast.tables import StepTable, ddim_table, flow_table, shifted_sigmas

NOISE_LEVELS = {"flow": 0.7, "dance": 0.3, "cps": 0.8}


class Schedule(NamedTuple):
    scheduler: Any
    sigmas: Callable[[int], Sequence[float]] | None = None
    image_seq_len: int | None = None


def build(settings: Any, schedule: Schedule, *, window: tuple[int, int] | None = None) -> StepTable:
    scheduler, steps = schedule.scheduler, settings.num_inference_steps
    credit = {"credit": settings.credit, "target_weight": settings.target_weight, "window": window}
    if hasattr(scheduler, "alphas_cumprod"):
        if settings.sampler not in (None, "ddim"):
            raise SettingError("sampler", f"{settings.sampler} is one of flow models; leave it out, or use ddim")
        flow_settings = {"noise_level": None, "shift": None, "normalized_log_prob": True}
        for name, default in flow_settings.items():
            if getattr(settings, name) != default:
                raise SettingError(name, "is a setting of flow models; leave it out")
        eta = 1.0 if settings.eta is None else settings.eta
        return ddim_table.from_scheduler(scheduler, steps, eta=eta, **credit)
    sampler = settings.sampler or "flow"
    if sampler == "ddim":
        raise SettingError("sampler", "ddim is not one for flow models; choose flow, dance, cps")
    if settings.eta is not None:
        raise SettingError("eta", "is DDIM's; the samplers of flow models take noise_level")
    noise_level = NOISE_LEVELS[sampler] if settings.noise_level is None else settings.noise_level
    options = {"sde": sampler, "noise_level": noise_level, "normalized": settings.normalized_log_prob, **credit}
    if settings.shift is not None:
        sigmas = shifted_sigmas(steps, settings.shift)
        return flow_table(sigmas, num_train_timesteps=scheduler.config.num_train_timesteps, **options)
    sigmas = None if schedule.sigmas is None else schedule.sigmas(steps)
    return flow_table.from_scheduler(scheduler, steps, sigmas=sigmas, image_seq_len=schedule.image_seq_len, **options)


def build_for_evaluation(settings: Any, schedule: Schedule) -> StepTable:
    plain: dict[str, Any] = {"credit": "native", "target_weight": None}
    if not hasattr(schedule.scheduler, "alphas_cumprod"):
        plain["noise_level"] = 0.0
    return build(dataclasses.replace(settings, **plain), schedule)
