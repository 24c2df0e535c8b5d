"""Settings of a run, grouped by the component that reads them, and their JSON and YAML files.

On the command line and in files the settings are flat: `--group-size 8`, {"group_size": 8}. Each group holds the
ranges of its settings as annotations and the rules between them in `check`; `Config` holds the rules between groups.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from annotated_types import Ge, Gt, Interval, Le, Lt
from pydantic import ConfigDict, TypeAdapter, ValidationError

from pcpo_fast.advantages import Baseline
from pcpo_fast.documents import read_json, read_text, read_yaml
from pcpo_fast.errors import SettingError
from pcpo_fast.reward_settings import RewardSettings
from pcpo_fast.samplers import Credit

Attention = Literal["sdpa", "sdpa-flash", "sdpa-efficient", "sdpa-cudnn", "sdpa-math", "xformers", "flash"]

Count = Annotated[int, Gt(0)]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Decay = Annotated[float, Ge(0), Lt(1)]

# a float setting takes an int; nothing else is converted
STRICT = ConfigDict(strict=True, allow_inf_nan=False)
# settings are shown in --help, where an escape code would reach the terminal
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# a list has another length than it needs, by the type of the error
COUNTS = {"missing": "needs more values", "too_long": "needs fewer values"}


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    model: str = "digits"
    """Diffusers pipeline: a local folder, a hub name, or an embedded model, "digits" or "digits-flow".
    Stable Diffusion 1, 2, XL, 3 and 3.5, and FLUX.1 are supported."""
    variant: str | None = None
    """Variant of the weights' files that are read, such as fp16."""
    tuning: Literal["lora", "full"] = "lora"
    """Train LoRA adapters, or the whole denoiser."""
    lora_path: str | None = None
    """LoRA adapter to start from: a folder or .safetensors file that diffusers or PEFT saved.
    It keeps its own rank, scale and layers."""
    kl_reference: Literal["start", "base"] = "start"
    """Model that kl_weight pulls towards: the one that training starts from, or the base without lora_path."""
    lora_rank: Count = 4
    """Rank of the LoRA adapters."""
    lora_alpha: Count = 4
    """LoRA scale numerator; the adapter is multiplied by lora_alpha / lora_rank."""
    lora_target_modules: tuple[str, ...] | None = None
    """Layers of the denoiser that get an adapter; None selects the usual ones for the model."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the denoiser and of the stored model outputs; trained weights and latents stay in fp32."""
    attention: Attention = "sdpa"
    """Attention backend: PyTorch SDPA (sdpa, or one fixed kernel: sdpa-flash, ...), xformers, or flash-attn.
    The last is for FLUX only."""
    compile: bool = False
    """Compile the denoiser's transformer blocks with torch.compile."""
    channels_last: bool = False
    """Store convolution weights and activations channels last (models with a UNet)."""
    tf32: bool = False
    """Allow TF32 in fp32 matrix products and convolutions on a GPU."""
    device: str = "auto"
    """"auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N"."""
    max_sequence_length: Annotated[int, Interval(gt=0, le=512)] | None = None
    """Prompt tokens for the T5 encoder of SD3 and FLUX; None selects the pipeline's default."""
    t5: bool = True
    """Load the T5 encoder of SD3, the largest of its three text encoders; SD3 also runs without it."""
    release_text_encoders: bool = False
    """Encode all prompts at the start, then free the text encoders' memory."""
    gradient_checkpointing: bool = False
    """Recompute the denoiser's activations in the backward pass to save memory."""
    resolution: Count | None = None
    """Height and width of the images in pixels; None selects the model's default."""
    height: Count | None = None
    """Height of the images in pixels, where they are not squares; None means resolution."""
    width: Count | None = None
    """Width of the images in pixels, where they are not squares; None means resolution."""
    scheduler: Literal["model", "ddim", "flow"] = "model"
    """Noise schedule: that of the model's own scheduler; or its configuration as a DDIM or a flow-matching Euler
    scheduler, for a model that was trained for one and comes with another."""
    guidance_scale: Annotated[float, Ge(1)] = 5.0
    """Guidance scale in sampling and training: classifier-free guidance (1 turns it off), or FLUX's guidance input."""
    negative_prompt: str | None = None
    """What classifier-free guidance steers away from; None means what the pipeline does without one."""

    def check(self) -> None:
        if self.lora_target_modules is not None and self.tuning == "full":
            raise SettingError(
                "lora_target_modules", "applies to tuning lora, and tuning is full; leave it out, or use tuning lora"
            )
        if self.lora_path is not None and (self.tuning == "full" or self.lora_target_modules is not None):
            other = "tuning full trains no adapter" if self.tuning == "full" else "it has its own lora_target_modules"
            raise SettingError("lora_path", f"{self.lora_path!r} was given, and {other}; leave out one of the two")
        if self.negative_prompt is not None and self.guidance_scale == 1:
            raise SettingError(
                "negative_prompt", "has no effect with guidance_scale 1; leave it out, or raise guidance_scale"
            )


@dataclasses.dataclass(frozen=True)
class SamplerSettings:
    num_inference_steps: Count = 20
    """Sampler steps per image."""
    sampler: str | None = None
    """ddim for diffusion models; flow (the SDE of Flow-GRPO), dance (DanceGRPO) or cps (FlowCPS) for flow models.
    Or module:function, your own function (settings, schedule) -> StepTable. None selects ddim or flow."""
    eta: NotNegative | None = None
    """DDIM noise level; None means 1, the variance of DDPM."""
    noise_level: NotNegative | None = None
    """Noise level of a flow sampler; None means 0.7 for flow, 0.3 for dance, 0.8 for cps."""
    shift: Positive | None = None
    """Timestep shift of a flow model's schedule; None selects the schedule of the model's pipeline."""
    credit: Credit | tuple[NotNegative, ...] = "constant"
    """Weight of each step in the loss. native: the sampler's own, as in DDPO and Flow-GRPO. constant: their mean.
    proportionate: PCPO's, with a re-solved variance for diffusion. published: as in PCPO's released code.
    Or a weight for each step, first step first."""
    target_weight: Positive | None = None
    """Weight of every step (diffusion) or of the whole trajectory (flow); None keeps the sampler's own mean or sum."""
    normalized_log_prob: bool = True
    """Use the Gaussian log-probability; without it, -(x' - mean)^2 alone, as in FlowCPS."""
    window_size: Count | None = None
    """Number of steps that draw noise and are trained; the others follow the ODE. None means all steps."""
    window: Literal["fixed", "random", "sliding"] = "fixed"
    """Position of the window in its range. fixed: at the start. random: drawn every epoch.
    sliding: one step later every epoch, starting over at the end."""
    window_range: tuple[int, int] | None = None
    """First step of the window's range and the step after its last; None means all steps that draw noise."""

    def check(self) -> None:
        for name, given in (("window", self.window != "fixed"), ("window_range", self.window_range is not None)):
            if given and self.window_size is None:
                raise SettingError(name, "places a window of steps, and window_size is not set; set it too")


@dataclasses.dataclass(frozen=True)
class LossSettings:
    objective: Literal["pcpo", "ppo", "guard"] = "pcpo"
    """Policy loss: PCPO's log-hinge (pcpo), the clipped ratio of PPO, DDPO and GRPO (ppo), or GRPO-Guard's (guard)."""
    clip_range: Positive = 1e-4
    """Clip range of the ratio (ppo, guard) or the log-ratio (pcpo), which are means over the latent's elements."""
    kl_weight: NotNegative = 0.0
    """Weight of the KL divergence from the model before training."""
    advantage: Baseline = "group"
    """Baseline of the advantage: the group, the prompt's recent rewards, or the whole epoch (batch)."""
    advantage_clip: Positive = 5.0
    """Largest absolute advantage."""
    prompt_buffer_size: Count = 16
    """Recent rewards kept per prompt (advantage prompt)."""
    prompt_buffer_min: Count = 16
    """Rewards needed before a prompt's own statistics replace those of the epoch (advantage prompt)."""

    def check(self) -> None:
        if self.advantage == "prompt" and self.prompt_buffer_size < 2:
            raise SettingError(
                "prompt_buffer_size",
                f"{self.prompt_buffer_size} leaves advantage prompt nothing to compare with; set it to at least 2",
            )
        if self.prompt_buffer_min > self.prompt_buffer_size:
            raise SettingError(
                "prompt_buffer_min",
                f"{self.prompt_buffer_min} is never reached with prompt_buffer_size {self.prompt_buffer_size}; lower "
                "the one or raise the other",
            )


@dataclasses.dataclass(frozen=True)
class DataSettings(RewardSettings):
    prompts: str = "digits"
    """Training prompts: a text file with one per line, or a built-in list: "digits" or "animals".
    A .jsonl or .json file holds texts, or objects with a "prompt" whose other entries rewards get as metadata."""


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    learning_rate: Positive | None = None
    """AdamW learning rate; None means 3e-4 for LoRA and 1e-5 for full tuning."""
    adam_beta1: Decay = 0.9
    """AdamW beta1."""
    adam_beta2: Decay = 0.999
    """AdamW beta2."""
    adam_epsilon: Positive = 1e-8
    """AdamW epsilon."""
    weight_decay: NotNegative = 1e-4
    """AdamW weight decay."""
    max_grad_norm: Positive = 1.0
    """Maximum gradient norm; larger gradients are scaled down to it."""
    ema_decay: Decay = 0.0
    """Decay of the moving average of the weights that evaluations use; 0 evaluates the weights themselves."""

    def check(self) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class RunSettings:
    epochs: Count = 10
    """Epochs; each samples images, scores them and updates the policy."""
    prompts_per_epoch: Count = 8
    """Prompts per epoch."""
    group_size: Count = 16
    """Images per prompt and epoch."""
    inner_epochs: Count = 1
    """Passes over an epoch's images."""
    timestep_fraction: Annotated[float, Gt(0), Le(1)] = 1.0
    """Fraction of each image's steps that is trained, drawn anew for every image and pass."""
    micro_batch_size: Count = 32
    """Rows (one image at one step) per call of the denoiser, in sampling and in training."""
    old_outputs: Literal["rollout", "recompute"] = "rollout"
    """Old model outputs in the loss: those stored by the rollout, or recomputed before the update.
    Recompute them where the training forward pass differs from the rollout's, for example with --compile."""
    gradient_accumulation_steps: Count = 10
    """Micro-batches per optimizer step."""
    seed: Annotated[int, Ge(0), Lt(2**62)] = 0
    """Seed for noise, prompts, row order and adapter initialisation."""
    output_dir: str | None = None
    """Run folder; None means the first free one of runs/<preset>, runs/<preset>-2, ..."""
    resume: bool = False
    """Continue the run in output_dir from its last checkpoint, with its saved settings."""
    checkpoint_every: Count = 1
    """Epochs between checkpoints; the last epoch is always saved."""
    keep_checkpoints: Count = 2
    """Checkpoints to keep; older ones are deleted."""
    eval_every: Annotated[int, Ge(0)] = 5
    """Epochs between evaluations; the first and the last state are always evaluated, and with 0 only these."""
    eval_samples: Count = 200
    """Images per evaluation, with the same seeds each time."""

    @property
    def samples_per_epoch(self) -> int:
        return self.prompts_per_epoch * self.group_size

    def check(self) -> None:
        samples = self.samples_per_epoch
        if samples % self.micro_batch_size:
            raise SettingError(
                "micro_batch_size",
                f"{self.micro_batch_size} does not divide the {samples} images of an epoch (prompts_per_epoch "
                f"{self.prompts_per_epoch} x group_size {self.group_size}); sampling and training use one batch shape "
                f"so that the first ratio is exactly 1: choose a divisor of {samples}",
            )
        if self.resume and self.output_dir is None:
            raise SettingError("resume", "needs output_dir, the folder of the run to continue")


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a run, by component."""

    model: ModelSettings = ModelSettings()
    """The model and how it runs."""
    sampler: SamplerSettings = SamplerSettings()
    """How images are sampled, and how the steps share the credit."""
    loss: LossSettings = LossSettings()
    """The objective and the advantages."""
    data: DataSettings = DataSettings()
    """Prompts and rewards."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """AdamW and the moving average."""
    run: RunSettings = RunSettings()
    """Epochs and batches, seed, checkpoints and evaluations."""

    @property
    def learning_rate(self) -> float:
        """The given learning rate, or the default for the tuning."""
        if self.optimizer.learning_rate is not None:
            return self.optimizer.learning_rate
        return 3e-4 if self.model.tuning == "lora" else 1e-5

    def flat(self) -> dict[str, Any]:
        """Every setting by its name."""
        groups = (getattr(self, field.name) for field in dataclasses.fields(self))
        return {field.name: getattr(group, field.name) for group in groups for field in dataclasses.fields(group)}

    def replace(self, **settings: Any) -> Config:
        """A copy with other values of settings, given by their names; a list is as good as a tuple.

        Raises:
            SettingError: for a name that does not exist.
        """
        groups = {}
        for name, given in _grouped(_with_tuples(settings)).items():
            groups[name] = dataclasses.replace(getattr(self, name), **given)
        return dataclasses.replace(self, **groups)

    def resolved(self) -> Config:
        """A checked copy, with the learning rate filled in.

        Raises:
            SettingError: for a value that cannot be run.
        """
        for field in dataclasses.fields(self):
            group = getattr(self, field.name)
            _validate(type(group), {field.name: getattr(group, field.name) for field in dataclasses.fields(group)})
            group.check()
        run = self.run
        if self.loss.advantage == "group" and run.group_size < 2:
            raise SettingError(
                "group_size",
                f"{run.group_size} leaves advantage group nothing to compare with; set it to at least 2, or choose "
                "advantage prompt or batch",
            )
        if self.loss.advantage == "batch" and run.samples_per_epoch < 2:
            raise SettingError(
                "advantage",
                f"batch compares the images of one epoch, and prompts_per_epoch {run.prompts_per_epoch} x group_size "
                f"{run.group_size} is a single image; raise either",
            )
        return self.replace(learning_rate=self.learning_rate)

    def to_json(self) -> str:
        """Every setting as JSON, to be read back with `--config`."""
        return json.dumps(self.flat(), indent=2) + "\n"


def read_config(path: Path) -> dict[str, Any]:
    """Settings by name, from a JSON or YAML file such as a run's config.json; it may hold only some of them.

    Raises:
        SettingError: if the file cannot be read, names a setting that does not exist, or holds a value out of range.
    """
    text = read_text(path, "config")
    try:
        values = read_yaml(text) if path.suffix.lower() in (".yaml", ".yml") else read_json(text)
    except ValueError as error:
        raise SettingError("config", f"cannot read {path}: {error}") from error
    if not isinstance(values, dict):
        raise SettingError("config", f'{path} must hold settings by name, such as {{"epochs": 3}}')
    try:
        return checked_settings({str(name): value for name, value in values.items()})
    except SettingError as error:
        raise SettingError("config", f"{path}: {error}") from error


def checked_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Some settings by name, each checked on its own, with a tuple in the place of each list.

    Raises:
        SettingError: for a name that does not exist, or a value out of range.
    """
    values = _with_tuples(values)
    for name, given in _grouped(values).items():
        _validate(type(getattr(Config(), name)), given)
    return values


def _with_tuples(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with a tuple in the place of each list."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def _grouped(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings by the name of their group."""
    default = Config()
    groups = {group: [f.name for f in dataclasses.fields(getattr(default, group))] for group in vars(default)}
    known = [name for names in groups.values() for name in names]
    for name in settings:
        if name not in known:
            similar = difflib.get_close_matches(name, known, n=1)
            raise SettingError(name, "no setting has this name" + (f"; did you mean {similar[0]}?" if similar else ""))
    return {group: {name: settings[name] for name in names if name in settings} for group, names in groups.items()}


def _validate(group: type[Any], settings: dict[str, Any]) -> None:
    """Checks types and ranges of settings of one group."""
    types = get_type_hints(group, include_extras=True)
    for name, value in settings.items():
        if any(CONTROL.search(str(part)) for part in (value if isinstance(value, tuple) else [value])):
            raise SettingError(name, f"{_shown(value)} was given; it must not hold control characters")
        try:
            TypeAdapter(types[name], config=STRICT).validate_python(value)
        except ValidationError as error:
            raise SettingError(name, f"{_shown(value)} was given; {_rules(value, error)}") from None


def _rules(value: Any, error: ValidationError) -> str:
    """What a value, or an entry of a list, must be. Of several kinds of value, those that it is nearest to count."""
    errors = error.errors()
    depth = max(len(found["loc"]) for found in errors)
    rules = []
    for found in errors:
        if found["type"] in COUNTS:
            rules.append(f"it {COUNTS[found['type']]}")
        elif len(found["loc"]) == depth:
            entry = "it" if found["input"] is value else _shown(found["input"])
            rules.append(f"{entry} {found['msg'].replace('Input should', 'must').replace('valid tuple', 'list')}")
    return ", or ".join(dict.fromkeys(rules))


def _shown(value: Any) -> str:
    """A value as files write it."""
    return json.dumps(value) if isinstance(value, tuple | bool | None) else repr(value)
