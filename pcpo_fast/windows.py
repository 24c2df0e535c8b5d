"""Which steps are stochastic and trained, epoch by epoch."""

from __future__ import annotations

import dataclasses

import torch

from pcpo_fast import samplers
from pcpo_fast.config import Config
from pcpo_fast.errors import SettingError
from pcpo_fast.samplers import Schedule, StepTable


class WindowSchedule:
    """The sampler of each epoch: one table, or one per position of the window of steps that draw noise and are trained
    (MixGRPO, Li et al., arXiv 2507.21802).

    Raises:
        SettingError: if the sampler has nothing to train, or no room for the window, or cannot be built.
    """

    def __init__(self, config: Config, schedule: Schedule, device: torch.device | str = "cpu") -> None:
        settings = config.sampler
        self.placement = settings.window
        # native credit exists for every sampler, so what is found here concerns the steps alone
        native = dataclasses.replace(settings, credit="native", target_weight=None)
        trainable = samplers.build(native, schedule).trainable.nonzero().squeeze(1).tolist()
        if not trainable:
            raise SettingError(
                "sampler",
                "every step is deterministic, so there is nothing to train; raise eta (diffusion) or noise_level "
                "(flow), or num_inference_steps",
            )
        windows: list[tuple[int, int] | None] = [None]
        if settings.window_size is not None:
            first, end = trainable[0], trainable[-1] + 1
            start, stop = settings.window_range or (first, end)
            if not first <= start < stop <= end:
                raise SettingError(
                    "window_range",
                    f"{start} {stop} was given; it must lie in {first} {end}, the steps that draw noise (the second "
                    "number is excluded)",
                )
            size = settings.window_size
            if size > stop - start:
                raise SettingError(
                    "window_size",
                    f"{size} is more than the {stop - start} steps from {start} to {stop} (excluded) in which the "
                    "window may lie; lower it, or widen window_range",
                )
            windows = [(place, place + size) for place in range(start, stop - size + 1)]
        if settings.window == "fixed":
            windows = windows[:1]
        tables = [samplers.build(settings, schedule, window=window) for window in windows]
        if config.loss.objective == "guard":
            tables = [table.guarded() for table in tables]
        self.tables = [table.to(device) for table in tables]

    def table(self, epoch: int, generator: torch.Generator) -> StepTable:
        """The table of an epoch, counted from 1."""
        if self.placement == "random":
            return self.tables[int(torch.randint(len(self.tables), (), generator=generator))]
        return self.tables[(epoch - 1) % len(self.tables)]
