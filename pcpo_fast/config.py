"""Settings of a run: one flat dataclass, presets, and what is refused before any work starts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pcpo_fast.samplers import Credit

Attention = Literal["sdpa", "sdpa-flash", "sdpa-efficient", "sdpa-cudnn", "sdpa-math", "xformers", "flash"]

# what the pipelines of SD3 and FLUX allow
MAX_T5_TOKENS = 512
PACKAGE = Path(__file__).parent
PROMPTS = {"animals": PACKAGE / "animals.txt", "digits": PACKAGE / "digits" / "prompts.txt"}


@dataclasses.dataclass
class Config:
    """Align a text-to-image diffusion or flow pipeline with PCPO, or as DDPO, DanceGRPO and Flow-GRPO do by --objective
    ppo --credit native."""

    # model
    model: str = "digits"
    """Diffusers pipeline (Stable Diffusion 1, 2, XL, 3 and 3.5, FLUX.1): a local folder, a hub name, or an embedded
    one, "digits" or "digits-flow"."""
    tuning: Literal["lora", "full"] = "lora"
    """Train LoRA adapters, or all of the denoiser."""
    lora_rank: int = 4
    """Rank of the LoRA adapters."""
    lora_alpha: int = 4
    """LoRA scale numerator; the adapter is multiplied by lora_alpha / lora_rank."""
    lora_target_modules: tuple[str, ...] | None = None
    """Names of the denoiser's layers that get an adapter; none means those that are usual for the model."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the denoiser and of the stored model outputs; trained weights and latents stay in fp32."""
    attention: Attention = "sdpa"
    """Attention of the denoiser: PyTorch's, by the kernel that it picks (sdpa) or a given one of its kernels; xformers;
    or flash-attn, for FLUX."""
    compile: bool = False
    """torch.compile the denoiser's transformer blocks, each kind once."""
    channels_last: bool = False
    """Keep the weights and activations of convolutions channels last (models with a UNet)."""
    tf32: bool = False
    """Let a GPU round the inputs of fp32 matrix products and convolutions to TF32."""
    device: str = "auto"
    """"auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N"."""
    max_sequence_length: int | None = None
    """Tokens of a prompt for the T5 encoder of SD3 and FLUX; none means the pipeline's own default."""
    t5: bool = True
    """Load the T5 encoder of SD3, the largest of its three text encoders, which it does without too."""
    release_text_encoders: bool = False
    """Encode all prompts at the start and free the text encoders' memory."""

    # sampling
    resolution: int | None = None
    """Height and width of the images in pixels; none means the model's own."""
    num_inference_steps: int = 20
    """Sampler steps per image."""
    sampler: Literal["ddim", "flow", "dance", "cps"] | None = None
    """ddim for diffusion models; for flow models the SDE of Flow-GRPO (flow) or DanceGRPO (dance), or FlowCPS (cps).
    None means ddim or flow."""
    eta: float | None = None
    """DDIM noise level; 1, the default, has the DDPM variance."""
    noise_level: float | None = None
    """Noise level of a flow sampler; none means 0.7 for flow, 0.3 for dance, 0.8 for cps."""
    shift: float | None = None
    """Timestep shift of a flow model's schedule; none means the schedule of the model's own pipeline."""
    window_size: int | None = None
    """Steps of a rollout that draw noise and are trained, all others following the ODE; none means all."""
    window: Literal["fixed", "random", "sliding"] = "fixed"
    """Where the window lies in its range: at the start, drawn anew every epoch, or one step later every epoch, and at
    the start again after the end."""
    window_range: tuple[int, int] | None = None
    """First step of the window's range and the step after its last; none means all that draw noise."""
    guidance_scale: float = 5.0
    """Guidance at rollout and in training: classifier-free, which 1 turns off; for FLUX what the model is told."""

    # algorithm
    objective: Literal["pcpo", "ppo", "guard"] = "pcpo"
    """Policy loss: PCPO's log-hinge, the clipped ratio of PPO, DDPO and GRPO, or GRPO-Guard's."""
    credit: Credit = "proportionate"
    """How the steps share the credit: native is the sampler's own, as in DDPO; proportionate is PCPO's."""
    target_weight: float | None = None
    """Credit wanted at every step (diffusion), or of the whole trajectory (flow); none keeps the mean or sum that the
    sampler has."""
    clip_range: float = 1e-4
    """Clip range of the ratio (ppo, guard) or of the log-ratio (pcpo), on means over the latent's elements."""
    normalized_log_prob: bool = True
    """Log-probabilities of the Gaussian; without, -(x' - mean)^2 alone, as FlowCPS has them."""
    kl_weight: float = 0.0
    """Weight of the KL divergence from the model as it was before training."""
    advantage: Literal["group", "prompt", "batch"] = "group"
    """What a reward is compared with: its group's, its prompt's recent ones, or all of the epoch's."""
    advantage_clip: float = 5.0
    """Largest absolute advantage."""
    prompt_buffer_size: int = 16
    """Recent rewards kept per prompt (advantage prompt)."""
    prompt_buffer_min: int = 16
    """Rewards a prompt needs before its own statistics are used rather than the epoch's (advantage prompt)."""

    # data and rewards
    prompts: str = "digits"
    """Training prompts: a text file, one a line, or a built-in list: "digits" or "animals"."""
    rewards: tuple[str, ...] = ("digit_alignment",)
    """Rewards to train on, each a name or module:function, with =weight behind it where it is not 1."""
    eval_rewards: tuple[str, ...] = ("digit_accuracy",)
    """Scores that are only ever measured, never trained on."""

    # loop
    epochs: int = 10
    """Epochs; each samples images, scores them and updates the policy."""
    prompts_per_epoch: int = 8
    """Prompts drawn per epoch."""
    group_size: int = 16
    """Images per prompt and epoch."""
    inner_epochs: int = 1
    """Passes over an epoch's images."""
    timestep_fraction: float = 1.0
    """Share of each image's steps that is trained, drawn anew for every image and pass."""
    micro_batch_size: int = 32
    """Rows (one image at one step) per call of the denoiser, in sampling and in training alike."""
    gradient_checkpointing: bool = False
    """Compute the denoiser's activations again in the backward pass, to save their memory."""
    old_outputs: Literal["rollout", "recompute"] = "rollout"
    """Model outputs that an update starts from: as the rollout stored them; or computed again before the update, for
    settings whose forward pass in training differs from the rollout's, such as --compile."""
    gradient_accumulation_steps: int = 10
    """Micro-batches per optimiser step."""

    # optimiser
    learning_rate: float | None = None
    """AdamW learning rate; none means 3e-4 for LoRA and 1e-5 for full tuning."""
    adam_beta1: float = 0.9
    """AdamW's first decay."""
    adam_beta2: float = 0.999
    """AdamW's second decay."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 1e-4
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    ema_decay: float = 0.0
    """Decay of the moving average of the trained weights that evaluations use; 0 evaluates the weights themselves."""

    # run
    seed: int = 0
    """Seed of everything: noise, prompts, row order, adapter initialisation."""
    output_dir: str | None = None
    """Run folder; none means the first free one of runs/<preset>, runs/<preset>-2, ..."""
    resume: bool = False
    """Continue the run in output_dir from its last checkpoint, with its saved settings; there must be one."""
    checkpoint_every: int = 1
    """Epochs between checkpoints; the last epoch always has one."""
    keep_checkpoints: int = 2
    """Checkpoints kept; older ones are deleted."""
    eval_every: int = 5
    """Epochs between evaluations; the first and the last state are always evaluated, 0 means only these."""
    eval_samples: int = 200
    """Images per evaluation, with the same seeds each time."""

    def resolved(self) -> Config:
        """A copy with the defaults that depend on other settings filled in.

        Raises:
            ValueError: for values that cannot be run, saying what was given, what is accepted and what to change.
        """
        config = dataclasses.replace(self)
        if config.learning_rate is None:
            config.learning_rate = 3e-4 if config.tuning == "lora" else 1e-5
        config._check()
        return config

    def _check(self) -> None:
        positive = (
            "lora_rank lora_alpha num_inference_steps clip_range advantage_clip prompt_buffer_size prompt_buffer_min "
            "epochs prompts_per_epoch group_size inner_epochs micro_batch_size gradient_accumulation_steps "
            "learning_rate max_grad_norm checkpoint_every keep_checkpoints eval_samples adam_epsilon"
        )
        for name in positive.split():
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"{_flag(name)} {value} must be a finite number above 0")
        for name in ("eta", "noise_level", "kl_weight", "weight_decay", "eval_every", "seed"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{_flag(name)} {value} must be a finite number, 0 or above")
        for name in ("resolution", "max_sequence_length", "shift", "window_size"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{_flag(name)} {value} must be a finite number above 0; leave it out for the default")
        if (self.max_sequence_length or 0) > MAX_T5_TOKENS:
            raise ValueError(
                f"--max-sequence-length {self.max_sequence_length} must be at most {MAX_T5_TOKENS}, as SD3 and FLUX "
                "have it"
            )
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{_flag(name)} {getattr(self, name)} must lie in [0, 1)")
        if not 1 <= self.guidance_scale < float("inf"):
            raise ValueError(f"--guidance-scale {self.guidance_scale} must be at least 1")
        if not 0 < self.timestep_fraction <= 1:
            raise ValueError(f"--timestep-fraction {self.timestep_fraction} must lie in (0, 1]")
        if self.seed >= 2**62:
            raise ValueError(f"--seed {self.seed} must be below 2^62")
        if self.advantage == "group" and self.group_size < 2:
            raise ValueError(
                f"--advantage group compares the images of one prompt and --group-size is {self.group_size}: give a "
                "group size of at least 2, or choose --advantage prompt or batch"
            )
        if self.advantage == "batch" and self.samples_per_epoch < 2:
            raise ValueError(
                "--advantage batch compares the images of one epoch and --prompts-per-epoch "
                f"{self.prompts_per_epoch} x --group-size {self.group_size} is a single one: raise either"
            )
        if self.advantage == "prompt" and self.prompt_buffer_size < 2:
            raise ValueError(
                "--advantage prompt compares an image with a prompt's recent ones and --prompt-buffer-size is "
                f"{self.prompt_buffer_size}: give a buffer size of at least 2"
            )
        if self.prompt_buffer_min > self.prompt_buffer_size:
            raise ValueError(
                f"--prompt-buffer-min {self.prompt_buffer_min} is never reached with --prompt-buffer-size "
                f"{self.prompt_buffer_size}; lower the one or raise the other"
            )
        samples = self.prompts_per_epoch * self.group_size
        if samples % self.micro_batch_size:
            raise ValueError(
                f"--prompts-per-epoch {self.prompts_per_epoch} x --group-size {self.group_size} = {samples} images do "
                f"not divide into micro-batches of --micro-batch-size {self.micro_batch_size}; sampling and training "
                "use one shape so that the first ratio is exactly 1: choose a divisor of "
                f"{samples}, or other batch settings"
            )
        if not self.rewards:
            raise ValueError("--rewards is empty; name at least one reward")
        if self.window_size is None and (self.window != "fixed" or self.window_range is not None):
            raise ValueError("--window and --window-range place a window of steps; give its --window-size too")
        if self.lora_target_modules is not None and self.tuning == "full":
            raise ValueError(
                "--lora-target-modules is a setting of --tuning lora and the tuning is full; leave it out, or use lora"
            )
        if self.resume and self.output_dir is None:
            raise ValueError("--resume needs --output-dir, the folder of the run to continue")

    @property
    def samples_per_epoch(self) -> int:
        return self.prompts_per_epoch * self.group_size


# stand-ins for the settings by component
ModelSettings = SamplerSettings = Config

PRESETS: dict[str, Config] = {
    # latents of 256 elements, a 64th of Stable Diffusion's: the clip range is on means over them, so it is wider
    "digits": Config(
        tuning="full",
        learning_rate=1e-4,
        num_inference_steps=10,
        guidance_scale=1.5,
        clip_range=1e-3,
        epochs=28,
        prompts_per_epoch=8,
        group_size=32,
        micro_batch_size=32,
        gradient_accumulation_steps=20,
        eval_every=7,
        eval_samples=240,
    ),
    # the same on the embedded flow model, which does without guidance
    "digits-flow": Config(
        model="digits-flow",
        tuning="full",
        learning_rate=1e-4,
        max_sequence_length=16,
        num_inference_steps=10,
        guidance_scale=1.0,
        clip_range=1e-3,
        epochs=28,
        prompts_per_epoch=8,
        group_size=32,
        micro_batch_size=32,
        gradient_accumulation_steps=20,
        eval_every=7,
        eval_samples=240,
    ),
    "sd15": Config(
        model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        lora_rank=16,
        lora_alpha=16,
        dtype="bf16",
        num_inference_steps=50,
        guidance_scale=5.0,
        prompts="animals",
        rewards=("jpeg_compressibility",),
        eval_rewards=(),
        epochs=100,
        prompts_per_epoch=8,
        group_size=16,
        micro_batch_size=8,
        gradient_accumulation_steps=100,
        eval_every=10,
        eval_samples=32,
    ),
    "sdxl": Config(
        model="stabilityai/stable-diffusion-xl-base-1.0",
        release_text_encoders=True,
        learning_rate=1e-4,
        lora_rank=16,
        lora_alpha=16,
        dtype="bf16",
        num_inference_steps=50,
        guidance_scale=5.0,
        prompts="animals",
        rewards=("jpeg_compressibility",),
        eval_rewards=(),
        epochs=100,
        prompts_per_epoch=8,
        group_size=16,
        micro_batch_size=4,
        gradient_accumulation_steps=200,
        eval_every=10,
        eval_samples=32,
    ),
    "sd35": Config(
        model="stabilityai/stable-diffusion-3.5-medium",
        release_text_encoders=True,
        lora_rank=32,
        lora_alpha=64,
        dtype="bf16",
        num_inference_steps=10,
        sampler="flow",
        shift=3.0,
        guidance_scale=4.5,
        prompts="animals",
        rewards=("jpeg_compressibility",),
        eval_rewards=(),
        epochs=100,
        prompts_per_epoch=8,
        group_size=24,
        micro_batch_size=8,
        gradient_accumulation_steps=54,
        eval_every=10,
        eval_samples=32,
    ),
    "flux": Config(
        model="black-forest-labs/FLUX.1-dev",
        release_text_encoders=True,
        lora_rank=32,
        lora_alpha=64,
        dtype="bf16",
        num_inference_steps=16,
        sampler="dance",
        shift=3.0,
        guidance_scale=3.5,
        prompts="animals",
        rewards=("jpeg_compressibility",),
        eval_rewards=(),
        epochs=100,
        prompts_per_epoch=8,
        group_size=12,
        micro_batch_size=4,
        gradient_accumulation_steps=90,
        eval_every=10,
        eval_samples=32,
    ),
}


def load_prompts(prompts: str) -> list[str]:
    """The prompts of a built-in list ("digits", "animals") or of a text file, one a line; blank lines are skipped.

    Raises:
        FileNotFoundError: if there is no such list or file.
        ValueError: if it holds no prompt.
    """
    path = PROMPTS.get(prompts, Path(prompts))
    if not path.is_file():
        raise FileNotFoundError(
            f"--prompts {prompts!r} is no file and no built-in list; give a text file with one prompt a line, or one "
            f"of {', '.join(PROMPTS)}"
        )
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        raise ValueError(f"the prompt file {path} is empty; write one prompt a line")
    return lines


def read_config(path: Path) -> dict[str, Any]:
    """Settings from a JSON file as `to_json` writes it; it may name only some of them.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a JSON object, names a setting that does not exist, or gives one of a wrong type.
    """
    if not path.is_file():
        raise FileNotFoundError(f"the config file {path} does not exist")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"the config file {path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"the config file {path} must hold a JSON object of settings")
    types = get_type_hints(Config)
    unknown = sorted(set(values) - set(types))
    if unknown:
        raise ValueError(f"the config file {path} names unknown settings: {', '.join(unknown)}")
    for name, value in values.items():
        if not _is_a(value, types[name]):
            raise ValueError(f"the config file {path} gives {name} as {value!r}, which is no {_name(types[name])}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def to_json(config: Config) -> str:
    """Every setting as JSON, to be read back with `--config`."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def _is_a(value: Any, type_: Any) -> bool:
    """Whether a value read from JSON fits a field of that type."""
    if get_origin(type_) in (Union, UnionType):
        return any(_is_a(value, member) for member in get_args(type_))
    if get_origin(type_) is Literal:
        return value in get_args(type_)
    if get_origin(type_) is tuple:
        if not isinstance(value, list):
            return False
        members = get_args(type_)
        if members[-1] is Ellipsis:
            return all(_is_a(item, members[0]) for item in value)
        return len(value) == len(members) and all(map(_is_a, value, members))
    # JSON writes 1.0 as 1, and Python counts True as 1
    accepted = (int, float) if type_ is float else type_
    return isinstance(value, accepted) and (type_ is bool or not isinstance(value, bool))


def _name(type_: Any) -> str:
    return type_.__name__ if isinstance(type_, type) and not get_origin(type_) else str(type_).replace("typing.", "")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
