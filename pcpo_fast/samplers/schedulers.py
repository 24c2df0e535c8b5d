"""Step tables of diffusers schedulers: the schedule is the scheduler's own, exactly as its pipelines use it.

diffusers is imported only where a scheduler needs it. A scheduler is known by the names of its class and of the
classes that it derives from.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .checks import Credit, abbreviate, check_flag, checked_count, checked_numbers, shown, whole_number
from .ddim import ddim_table
from .flow import FlowSDE, LastStep, flow_table, is_sigma_schedule

if TYPE_CHECKING:
    from .table import StepTable

FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"

# the cumulative alpha that each scheduler itself uses after its last timestep
_FINAL_ALPHA = {
    "DDIMScheduler": lambda scheduler: scheduler.final_alpha_cumprod,
    "PNDMScheduler": lambda scheduler: scheduler.final_alpha_cumprod,
    "DDPMScheduler": lambda scheduler: 1.0,
    "EulerDiscreteScheduler": lambda scheduler: (
        1.0 if scheduler.config.get("final_sigmas_type", "zero") == "zero" else scheduler.alphas_cumprod[0]
    ),
}

# settings that must stand as given here for a step to be affine on the training timesteps
_AFFINE_SETTINGS = {
    "clip_sample": False,
    "thresholding": False,
    "variance_type": "fixed_small",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "timestep_type": "discrete",
}

# dynamic shifting beyond this mu leaves noise levels that are 1 to float64's precision
LARGEST_MU = 30.0


def from_scheduler(
    scheduler: Any,
    num_inference_steps: int | None = None,
    *,
    use_current: bool = False,
    credit: Credit = "constant",
    target_weight: float | None = None,
    window: tuple[int, int] | None = None,
    steps: Iterable[int] | None = None,
    normalized: bool = True,
    eta: float | None = None,
    sde: FlowSDE | None = None,
    noise_level: float | Tensor | Sequence[float] | None = None,
    last_step: LastStep | None = None,
    sigmas: Tensor | Sequence[float] | None = None,
    image_seq_len: int | None = None,
) -> StepTable:
    """Table of the sampler on a diffusers scheduler's schedule: DDIM for a diffusion scheduler, an SDE for a flow one.

    DDIM, DDPM, PNDM and Euler-discrete schedulers share the alphas; the timesteps follow the scheduler's own
    `timestep_spacing` and `steps_offset`, and the last step its own final alpha. Of a flow scheduler the table takes
    sigmas and timesteps exactly as they are: the shift, static or by image size, and Karras, exponential or beta sigmas
    are its own. The scheduler is left as it was given, and its own way of taking a step is not used.

    Args:
        scheduler: a diffusers DDIMScheduler, DDPMScheduler, PNDMScheduler, EulerDiscreteScheduler or
            FlowMatchEulerDiscreteScheduler, or one of a class that derives from them.
        num_inference_steps: T. May be left out with `use_current`.
        use_current: takes the timesteps and sigmas that the scheduler is set to now, as its `set_timesteps` left them.
        credit, target_weight, window, steps, normalized: as in `StepTable.ddim` and `StepTable.flow`.
        eta: for diffusion schedulers, as in `StepTable.ddim`; None means 1.
        sde: for flow schedulers, as in `StepTable.flow`; None means "flow".
        noise_level, last_step: for flow schedulers, as in `StepTable.flow`.
        sigmas: for flow schedulers: (T,) the list that the pipeline hands to `set_timesteps`, before the shift and
            without the final 0: linspace(1, 1/T, T) for FLUX. None is the scheduler's own, as in
            StableDiffusion3Pipeline.
        image_seq_len: for flow schedulers: tokens of an image, (height/16) (width/16) for FLUX. The shift is computed
            from it where the scheduler has `use_dynamic_shifting`, as the pipelines' `calculate_shift` does; else it is
            not used.

    Raises:
        ValueError: for another scheduler class, for options of the other family, for whatever `StepTable.ddim` and
            `StepTable.flow` refuse, and for settings of the scheduler under which a step is not affine in the model
            output (clip_sample, thresholding), learned variances, sigmas that leave the training timesteps, and flow
            sigmas that do not fall. Each message names the setting to change.
    """
    family = family_of(scheduler)
    check_flag("use_current", use_current)
    name = type(scheduler).__name__
    common: dict[str, Any] = {
        "credit": credit,
        "target_weight": target_weight,
        "window": window,
        "steps": steps,
        "normalized": normalized,
    }
    for_flow: dict[str, Any] = {
        "noise_level": noise_level,
        "sde": sde,
        "last_step": last_step,
        "sigmas": sigmas,
        "image_seq_len": image_seq_len,
    }
    if family == "diffusion":
        for option, given in for_flow.items():
            if given is not None:
                raise ValueError(
                    f"{option} is an option of flow samplers and {name} is a diffusion scheduler; leave it out (DDIM "
                    "takes eta)"
                )
        schedule = _diffusion_schedule(scheduler, num_inference_steps, use_current)
        return ddim_table(**schedule, eta=1.0 if eta is None else eta, **common)
    if eta is not None:
        raise ValueError(f"eta is DDIM's and {name} is a flow scheduler; leave it out and use noise_level")
    levels, timesteps = _flow_schedule(scheduler, num_inference_steps, use_current, sigmas, image_seq_len)
    common["noise_level"] = noise_level
    named = {name: given for name, given in (("sde", sde), ("last_step", last_step)) if given is not None}
    table = flow_table(levels, **named, **common)
    return dataclasses.replace(table, timesteps=timesteps)


def family_of(scheduler: Any) -> Literal["diffusion", "flow"]:
    """The family of models that a diffusers scheduler samples.

    Raises:
        ValueError: for a scheduler whose steps no table here describes; it names the one to convert it to.
    """
    name = type(scheduler).__name__
    config = getattr(scheduler, "config", None)
    if config is None or not hasattr(scheduler, "set_timesteps"):
        raise ValueError(f"scheduler is a {name}; give a diffusers scheduler, such as pipeline.scheduler")
    if _known_class(scheduler) == FLOW_SCHEDULER:
        return "flow"
    if _known_class(scheduler):
        return "diffusion"
    if "flow" in name.lower() or config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        raise ValueError(
            f"{name} is a flow scheduler without a table of its own; accepted is {FLOW_SCHEDULER}. Convert it with "
            f"{FLOW_SCHEDULER}.from_config(scheduler.config), or give its sigmas to StepTable.flow"
        )
    raise ValueError(
        f"{name} has no table; accepted are {', '.join(_FINAL_ALPHA)} and {FLOW_SCHEDULER}. If it shares Stable "
        "Diffusion's alphas, convert it with DDIMScheduler.from_config(scheduler.config)"
    )


def convert(scheduler: Any, family: Literal["ddim", "flow"]) -> Any:
    """The schedule that a diffusers scheduler's configuration describes, as a scheduler that tables are made of.

    Args:
        scheduler: one whose own steps may be of any order, or stochastic.
        family: "ddim" for a DDIMScheduler on its alphas, timestep spacing and final alpha; "flow" for a
            FlowMatchEulerDiscreteScheduler with its shift.

    Raises:
        ValueError: if its model was trained for the other family, or distilled to its own few steps.
    """
    import diffusers

    name, config = type(scheduler).__name__, scheduler.config
    classes = {cls.__name__ for cls in type(scheduler).__mro__}
    # diffusers' own list of schedulers that share a configuration; a distilled model's is not in it
    related = {cls.__name__ for cls in diffusers.DDIMScheduler().compatibles}
    shares = bool(classes & related) and "beta_schedule" in config
    flows = bool(classes & {FLOW_SCHEDULER, "FlowMatchHeunDiscreteScheduler"})
    flows = flows or (shares and (config.get("use_flow_sigmas") or config.prediction_type == "flow_prediction"))
    if not (shares or flows):
        raise ValueError(
            f"{family!r} was given, and the configuration of {name} does not tell its schedule; use scheduler model, "
            f"or one of {', '.join(sorted(related))} in the model's folder"
        )
    if (family == "flow") != bool(flows):
        trained = "flow" if flows else "ddim"
        raise ValueError(f"{family!r} was given, and {name} is of a {trained} model; use scheduler {trained} or model")
    if _known_class(scheduler) == FLOW_SCHEDULER:
        return scheduler
    if family == "flow":
        names = ("num_train_timesteps", "use_dynamic_shifting", "base_shift", "max_shift")
        names = (*names, "base_image_seq_len", "max_image_seq_len", "shift_terminal", "time_shift_type")
        shift = config.get("shift", config.get("flow_shift", 1.0))
        return diffusers.FlowMatchEulerDiscreteScheduler(
            shift=shift, **{entry: config[entry] for entry in names if entry in config}
        )
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
    names = (*names, "timestep_spacing", "steps_offset", "rescale_betas_zero_snr")
    to_one = config.get("set_alpha_to_one", config.get("final_sigmas_type", "zero") == "zero")
    return diffusers.DDIMScheduler(
        clip_sample=False, set_alpha_to_one=to_one, **{entry: config[entry] for entry in names if entry in config}
    )


def _known_class(scheduler: Any) -> str | None:
    names = (cls.__name__ for cls in type(scheduler).__mro__)
    return next((name for name in names if name in _FINAL_ALPHA or name == FLOW_SCHEDULER), None)


def _check_number_of_steps(scheduler: Any, num_inference_steps: int | None, use_current: bool) -> None:
    if use_current:
        # a DDPM scheduler with custom timesteps does not count them
        if not (getattr(scheduler, "num_inference_steps", None) or getattr(scheduler, "custom_timesteps", False)):
            raise ValueError(
                f"use_current=True and this {type(scheduler).__name__} was not set to any timesteps; call its "
                "set_timesteps first, or give num_inference_steps alone"
            )
    elif num_inference_steps is None:
        raise ValueError("num_inference_steps is missing; give the number of steps, or use_current=True")


def _check_current(timesteps: Tensor, num_inference_steps: int | None) -> None:
    if num_inference_steps not in (None, len(timesteps)):
        raise ValueError(
            f"num_inference_steps={shown(num_inference_steps)} and the scheduler is set to {len(timesteps)} steps; "
            "leave it out beside use_current=True"
        )


def _diffusion_schedule(scheduler: Any, num_inference_steps: int | None, use_current: bool) -> dict[str, Any]:
    """Alphas, timesteps, the last alpha and the prediction type, as `ddim_table` takes them."""
    config, name = scheduler.config, type(scheduler).__name__
    for setting, wanted in _AFFINE_SETTINGS.items():
        given = config.get(setting, wanted)
        if given != wanted and not str(given).startswith("fixed"):
            raise ValueError(
                f"{name} has {setting}={given!r}, under which a sampler step is not an affine Gaussian of the model "
                f"output at a training timestep; build it with {name}.from_config(scheduler.config, "
                f"{setting}={wanted!r})"
            )
    _check_number_of_steps(scheduler, num_inference_steps, use_current)
    known = str(_known_class(scheduler))
    if use_current:
        timesteps = scheduler.timesteps
        if known == "PNDMScheduler":
            # PLMS evaluates one timestep twice
            timesteps = timesteps.unique_consecutive()
        _check_current(timesteps, num_inference_steps)
    else:
        count = checked_count("num_inference_steps", num_inference_steps)
        if count > config.num_train_timesteps:
            raise ValueError(
                f"num_inference_steps={count} must lie between 1 and the schedule's "
                f"{config.num_train_timesteps} training steps"
            )
        from diffusers import DDIMScheduler

        # spelled out: from_config replaces a spacing that was left at Euler's default by DDIM's default
        ddim: Any = DDIMScheduler(
            num_train_timesteps=config.num_train_timesteps,
            timestep_spacing=config.timestep_spacing,
            steps_offset=config.steps_offset,
        )
        ddim.set_timesteps(count)
        timesteps = ddim.timesteps
        if int(timesteps.max()) >= config.num_train_timesteps:
            raise ValueError(
                f"{name} has steps_offset={config.steps_offset}, with which {num_inference_steps} steps reach timestep "
                f"{int(timesteps.max())} of {config.num_train_timesteps}; lower num_inference_steps, or build it with "
                "steps_offset=0"
            )
    return {
        "alphas_cumprod": scheduler.alphas_cumprod,
        "timesteps": timesteps,
        "final_alpha_cumprod": _FINAL_ALPHA[known](scheduler),
        "prediction_type": config.prediction_type,
    }


def _flow_schedule(
    scheduler: Any,
    num_inference_steps: int | None,
    use_current: bool,
    sigmas: Tensor | Sequence[float] | None,
    image_seq_len: int | None,
) -> tuple[Tensor, Tensor]:
    """Sigmas (T + 1,) and timesteps (T,)."""
    config, name = scheduler.config, type(scheduler).__name__
    if config.get("invert_sigmas", False):
        raise ValueError(
            f"{name} has invert_sigmas=True, under which the sigmas rise from 0 to 1; build it with "
            f"{name}.from_config(scheduler.config, invert_sigmas=False)"
        )
    _check_number_of_steps(scheduler, num_inference_steps, use_current)
    if use_current:
        if sigmas is not None:
            raise ValueError("sigmas and use_current=True were both given; leave out one of the two")
        _check_current(scheduler.timesteps, num_inference_steps)
        own = scheduler
    else:
        count = checked_count("num_inference_steps", num_inference_steps)
        given = None if sigmas is None else checked_numbers("sigmas", sigmas, "one per step, (T,)")
        if given is not None and given.shape != (count,):
            raise ValueError(
                f"sigmas has shape {tuple(given.shape)} and num_inference_steps is {count}; give one "
                "per step, without the final 0, such as linspace(1, 1 / T, T)"
            )
        shift = {}
        if config.get("use_dynamic_shifting", False):
            if image_seq_len is None:
                raise ValueError(
                    f"{name} has use_dynamic_shifting=True, and its shift depends on the size of the image; give "
                    "image_seq_len, or build it with use_dynamic_shifting=False"
                )
            shift["mu"] = _dynamic_shift(config, image_seq_len)
        own = copy.deepcopy(scheduler)
        own.set_timesteps(count, sigmas=None if given is None else given.tolist(), **shift)
    if not is_sigma_schedule(own.sigmas):
        raise ValueError(
            f"{name} with these settings has sigmas {abbreviate(own.sigmas)}, and they must decrease strictly within "
            "[0, 1]; change num_inference_steps or sigmas, or shift, shift_terminal or use_..._sigmas in its config"
        )
    return own.sigmas, own.timesteps.detach().to("cpu", torch.float32)


def _dynamic_shift(config: Any, image_seq_len: int) -> float:
    """mu for an image of this many tokens: `calculate_shift` of the diffusers pipelines."""
    shortest, longest = config.base_image_seq_len, config.max_image_seq_len
    if shortest == longest:
        raise ValueError(
            f"base_image_seq_len and max_image_seq_len are both {longest}, and the shift is a line between them; build "
            "the scheduler with two numbers, or with use_dynamic_shifting=False"
        )
    tokens = whole_number(image_seq_len) or 0
    slope = (config.max_shift - config.base_shift) / (longest - shortest)
    mu = tokens * slope + config.base_shift - slope * shortest if 0 < tokens < 2**31 else math.inf
    # the schedulers take its exponential
    if mu > LARGEST_MU:
        raise ValueError(
            f"image_seq_len={shown(image_seq_len)} is no size of an image; give the number of its patches, such as 4096"
        )
    return mu
