"""The loop: prompts -> rollout -> rewards -> advantages -> update.

Each epoch samples `prompts_per_epoch * group_size` images with the current policy, scores them, turns the scores into
advantages, and takes the (image, step) pairs of all trained steps as rows: shuffled together, cut into micro-batches of
one fixed shape, each row pushed towards or away from the step it took (`policy_loss`). With objective "pcpo" and credit
"proportionate" this is PCPO (Lee and Ye, arXiv 2509.25774); with "ppo" and "native" it is DDPO (Black et al., arXiv
2305.13301, the importance-sampled estimator) on a diffusion model, and DanceGRPO (Xue et al., arXiv 2505.07818) or
Flow-GRPO (Liu et al., arXiv 2505.05470) on a flow model. There is no value function, no reward model inside, and one
process.

All randomness of the loop is a function of the seed and of where in the run it is drawn (Philox for noise, a generator
keyed by the epoch for prompts and row order), so a run that was cut off continues as if it had not been: bit for bit
where the policy's own arithmetic repeats itself, as it does on the CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pcpo_fast import samplers
from pcpo_fast.advantages import Advantages
from pcpo_fast.checkpoint import Checkpoints, averaged, get_random_state, set_random_state, write_atomically
from pcpo_fast.config import Config, load_prompts, to_json
from pcpo_fast.metrics import Metrics, Record, save_curves, save_grid
from pcpo_fast.ops import PolicyLoss, Reference, StoredStates, policy_loss
from pcpo_fast.policies import Conditioning, Policy
from pcpo_fast.rewards import RewardError, RewardSet
from pcpo_fast.rollout import Interrupted, RolloutEngine, Trajectory
from pcpo_fast.samplers import StepTable

# evaluation draws its noise from global sample indices that no training run reaches
EVAL_FIRST_INDEX = 2**36
GRID_COLUMNS, GRID_ROWS = 10, 4


class Trainer:
    """A run: the policy, its sampler, its rewards and the state that checkpoints hold.

    Args:
        config: resolved settings.
        policy: the model to align.
        folder: the run folder.

    Raises:
        ValueError, FileNotFoundError: for anything that would fail later: prompts, rewards, scheduler, credit, resume.
    """

    def __init__(self, config: Config, policy: Policy, folder: Path) -> None:
        self.config, self.policy, self.folder = config, policy, folder
        self.prompts = load_prompts(config.prompts)
        self.rewards = RewardSet(config.rewards)
        self.eval_rewards = RewardSet(
            [name for name in config.eval_rewards if name not in self.rewards.rewards], setting="eval_rewards"
        )
        self.windows = Windows(config, policy)
        self.table = self.windows.tables[0]
        self.eval_table = samplers.build_for_evaluation(config, policy.schedule()).to(policy.device)
        if config.release_text_encoders:
            policy.release_text_encoders(self.prompts)
        self.engine = RolloutEngine(policy, config.micro_batch_size)
        self.optimizer = torch.optim.AdamW(
            policy.trainable_parameters(),
            lr=config.learning_rate or 0.0,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            # it can be told on the device to leave a step out
            fused=True,
        )
        self.ema = _make_ema(policy.trainable_parameters(), config.ema_decay) if config.ema_decay else None
        self.scaler = torch.amp.GradScaler(policy.device.type, enabled=policy.dtype == torch.float16)
        self.advantages = Advantages(
            config.advantage, config.advantage_clip, config.prompt_buffer_size, config.prompt_buffer_min
        )
        self.checkpoints = Checkpoints(folder / "checkpoints", config.keep_checkpoints)
        # the state is that after `epoch` epochs, unless an update has begun; noise is drawn from `next_sample` on
        self.epoch, self.next_sample, self.updating = 0, 0, False
        latest = self.checkpoints.latest() if config.resume else None
        if latest is not None:
            state = self.checkpoints.load(latest, policy, self.optimizer, self.ema)
            self.epoch, self.next_sample = state["epoch"], state["next_sample"]
            self.advantages.load_state_dict(state["advantages"])
            # a run in another dtype had none
            if state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
        folder.mkdir(parents=True, exist_ok=True)
        # before all else, as there is no resuming without it; and another run, which does not resume, may start from it
        write_atomically(folder / "config.json", to_json(dataclasses.replace(config, resume=False)).encode())
        self.metrics = Metrics(folder, resume_epoch=None if latest is None else self.epoch)

    def train(self) -> int | None:
        """Runs the epochs that are left. Returns the signal that ended the run early, or None.

        An error is raised again when the epochs before it are saved; one in the midst of an update leaves the last
        checkpoint as it is.
        """
        config = self.config
        with Signals() as signals, tqdm(total=config.epochs, initial=self.epoch, desc="epochs", unit="epoch") as bar:
            # what a resumed run finds, which begins an interrupted epoch or evaluation anew
            random_state = get_random_state()
            try:
                while True:
                    if self._evaluation_is_due():
                        scores = self.evaluate("after" if self.epoch else "before", signals)
                        self.metrics.write({"epoch": self.epoch, **scores})
                        # how often a run is evaluated changes nothing else
                        set_random_state(random_state)
                    self._draw_curves()
                    if self.epoch >= config.epochs or signals.received:
                        break
                    record = self.run_epoch(signals)
                    random_state = get_random_state()
                    self.metrics.write(record)
                    # after its record: what a checkpoint says is done is never done again
                    if self.epoch % config.checkpoint_every == 0:
                        self._save(random_state)
                    bar.update()
                    bar.set_postfix(
                        reward=f"{record['reward/mean']:.3f}", clipped=f"{record['update/clip_fraction']:.2f}"
                    )
            except Interrupted:
                pass
            except Exception:
                if not self.updating:
                    self._save(random_state)
                raise
            self._save(random_state)
        self.metrics.close()
        return signals.received

    def run_epoch(self, signals: Signals) -> Record:
        """One epoch; raises Interrupted if a signal arrives before its update has begun.

        Raises:
            RewardError: if no image has a finite reward.
        """
        config, number, started = self.config, self.epoch + 1, time.perf_counter()
        # distinct for every (seed, epoch) that a run can have
        generator = torch.Generator().manual_seed((config.seed * 0x9E3779B97F4A7C15 + number) % 2**63)
        prompts = self._draw_prompts(generator)
        self.table = self.windows.table(number, generator)
        trajectory = self._rollout(prompts, self.table, self.next_sample, signals)
        # waits for the GPU, as the rewards would
        whole = trajectory.replace_nonfinite()
        sampled = time.perf_counter()

        rewards, scores = self.rewards(self.policy.decode(trajectory.latents), prompts)
        # what is left out gets advantage 0, which makes nothing of a finite row and NaN of another
        rewards[~whole] = math.nan
        finite = rewards.isfinite()
        if not finite.any():
            raise RewardError(
                f"every reward of epoch {number} is NaN or infinite ({', '.join(self.rewards.rewards)}); look at the "
                f"reward, or at the images: the policy may have diverged (--learning-rate {config.learning_rate})"
            )
        self.updating = True
        advantages = self.advantages(rewards, prompts, config.group_size).to(self.policy.device)
        scored = time.perf_counter()

        update = self.update(trajectory, advantages, generator)
        self.epoch, self.next_sample, self.updating = number, self.next_sample + len(prompts), False
        done = time.perf_counter()
        return {
            "epoch": number,
            "reward/mean": rewards[finite].mean().item(),
            "reward/std": rewards[finite].std(correction=0).item(),
            "reward/not_finite": int((~finite).sum()),
            **{f"reward/{name}": _finite_mean(score) for name, score in scores.items()},
            **update,
            "time/rollout": sampled - started,
            "time/reward": scored - sampled,
            "time/update": done - scored,
            "time/images_per_second": len(prompts) / (done - started),
        }

    def update(self, trajectory: Trajectory, advantages: Tensor, generator: torch.Generator) -> Record:
        """Passes over the rows of a trajectory, with an optimiser step per group of micro-batches.

        What is measured stays on the device until the end, so that nothing in between waits for a GPU.
        """
        config = self.config
        passes = [list(self.micro_batches(len(advantages), generator)) for _ in range(config.inner_epochs)]
        if config.old_outputs == "recompute":
            # a pass has every row, or others than the next one
            for micro_batches in passes if config.timestep_fraction < 1 else passes[:1]:
                self._recompute_old_outputs(trajectory, micro_batches)
        seen: list[tuple[Tensor, PolicyLoss]] = []
        norms: list[Tensor] = []
        # micro-batches before the first optimiser step: there the policy is still the one that sampled
        on_policy = 0
        for micro_batches in passes:
            starts = range(0, len(micro_batches), config.gradient_accumulation_steps)
            for start in tqdm(starts, desc="update", leave=False, disable=None):
                group = micro_batches[start : start + config.gradient_accumulation_steps]
                for sample, step in group:
                    result = self.loss(trajectory, advantages, sample, step)
                    self.scaler.scale(result.loss / len(group)).backward()
                    seen.append((step, result._replace(loss=result.loss.detach())))
                on_policy = on_policy or len(group)
                norms.append(self._optimizer_step())
        record = self._summary(seen, on_policy)
        norm = torch.stack(norms).cpu()
        record["update/grad_norm"] = _finite_mean(norm)
        record["update/skipped_steps"] = int((~norm.isfinite()).sum())
        return record

    def _recompute_old_outputs(self, trajectory: Trajectory, micro_batches: list[tuple[Tensor, Tensor]]) -> None:
        """Puts what the policy predicts in training in the place of what it predicted in the rollout."""
        for rows in micro_batches:
            # with a gradient that nobody asks for: without, a compiled denoiser would be another one
            trajectory.model_outputs[rows] = self.policy.predict(*self._inputs(trajectory, *rows)).detach()

    def _inputs(self, trajectory: Trajectory, sample: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Conditioning]:
        """Of the denoiser, for rows (sample, step)."""
        conditioning = trajectory.conditioning[trajectory.prompt[sample]]
        return trajectory.states[sample, step], self.table.timesteps[step], conditioning

    def _optimizer_step(self) -> Tensor:
        """One step along the gradients that have gathered; none if they are not finite. Returns their norm, 0-d."""
        parameters = self.policy.trainable_parameters()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        # fused AdamW leaves weights and moments as they are where this is 1
        found_inf = (~norm.isfinite()).float()
        self.optimizer.found_inf = found_inf  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.step(parameters)
        return norm

    def micro_batches(self, samples: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """The rows of one pass, shuffled across samples and steps, as (sample index, step index) per micro-batch."""
        trained = self.table.trainable.nonzero().squeeze(1).cpu()
        count = max(1, round(self.config.timestep_fraction * len(trained)))
        chosen = torch.rand(samples, len(trained), generator=generator).argsort(dim=1)[:, :count]
        step = trained[chosen].flatten()
        sample = torch.arange(samples).repeat_interleave(count)
        order = torch.randperm(samples * count, generator=generator)
        sample, step = (
            index[order].to(self.policy.device).split(self.config.micro_batch_size) for index in (sample, step)
        )
        yield from zip(sample, step, strict=True)

    def loss(self, trajectory: Trajectory, advantages: Tensor, sample: Tensor, step: Tensor) -> PolicyLoss:
        """The policy loss of rows (sample, step), both int64 (rows,), differentiable in the trained weights."""
        config, table = self.config, self.table
        inputs = self._inputs(trajectory, sample, step)
        output = self.policy.predict(*inputs)
        return policy_loss(
            output,
            trajectory.model_outputs[sample, step],
            StoredStates(inputs[0], trajectory.states[sample, step + 1]),
            table.guarded() if config.objective == "guard" else table,
            step,
            advantages[sample],
            objective="pcpo" if config.objective == "pcpo" else "ppo",
            clip_range=config.clip_range,
            kl=Reference(self.policy.predict_reference(*inputs), config.kl_weight) if config.kl_weight else None,
        )

    def evaluate(self, name: str, signals: Signals | None = None) -> Record:
        """Scores images of the prompts in turn, with the same seeds every time, and saves some as samples_<name>.png;
        with a moving average of the weights, if there is one.

        Not to be interrupted without `signals`.
        """
        prompts = [self.prompts[index % len(self.prompts)] for index in range(self.config.eval_samples)]
        with contextlib.nullcontext() if self.ema is None else averaged(self.policy, self.ema):
            latents = self._rollout(prompts, self.eval_table, EVAL_FIRST_INDEX, signals, record=False).latents
        images = self.policy.decode(latents)
        total, scores = self.rewards(images, prompts)
        _, eval_scores = self.eval_rewards(images, prompts)
        shown = _grid(min(len(images), len(self.prompts)))
        save_grid(images[shown], self.folder / f"samples_{name}.png", GRID_COLUMNS)
        means = {f"eval/{key}": _finite_mean(score) for key, score in (scores | eval_scores).items()}
        return {"eval/reward": _finite_mean(total), **means}

    def _draw_prompts(self, generator: torch.Generator) -> list[str]:
        """This epoch's prompts, each `group_size` times in a row: distinct ones while there are enough."""
        indices: list[int] = []
        while len(indices) < self.config.prompts_per_epoch:
            indices += torch.randperm(len(self.prompts), generator=generator).tolist()
        chosen = indices[: self.config.prompts_per_epoch]
        return [self.prompts[index] for index in chosen for _ in range(self.config.group_size)]

    def _rollout(
        self, prompts: list[str], table: StepTable, first_index: int, signals: Signals | None, record: bool = True
    ) -> Trajectory:
        distinct = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
        batches = math.ceil(len(prompts) / self.config.micro_batch_size)
        with tqdm(total=batches * len(table), desc="rollout", leave=False, disable=None) as bar:
            return self.engine(
                table,
                self.policy.encode(list(distinct)),
                torch.tensor([distinct[prompt] for prompt in prompts], device=self.policy.device),
                seed=self.config.seed,
                first_index=first_index,
                record=record,
                stop=lambda: signals is not None and signals.received is not None,
                after_step=bar.update,
            )

    def _summary(self, seen: list[tuple[Tensor, PolicyLoss]], on_policy: int) -> Record:
        """Means over all rows and per step of what the updates saw; warns if the first ratio was not exactly 1."""
        step = torch.cat([step for step, _ in seen]).cpu()
        log_ratio, clipped = (
            torch.cat([getattr(result, name) for _, result in seen]).float().cpu() for name in ("log_ratio", "clipped")
        )
        first = sum(len(rows) for rows, _ in seen[:on_policy])

        def per_step(values: Tensor, reduce: str) -> list[float | None]:
            start = torch.full((len(self.table),), math.nan)
            result = start.scatter_reduce(0, step[: len(values)], values, reduce, include_self=False)
            return [None if math.isnan(value) else value for value in result.tolist()]

        first_ratio = log_ratio[:first].abs()
        first_per_step = per_step(first_ratio, "amax")
        if first_ratio.max() != 0:
            listing = ", ".join(
                f"{timestep:.0f}: {value:.1e}"
                for timestep, value in zip(self.table.timesteps.tolist(), first_per_step, strict=True)
                if value
            )
            tqdm.write(
                "warning: before the first update the policy must equal the one that sampled, and its log-ratio be 0; "
                "if training's forward pass is another one, as with --compile, use --old-outputs recompute. "
                f"Largest |log-ratio| per timestep: {listing}"
            )
        return {
            "update/loss": torch.stack([result.loss for _, result in seen]).mean().item(),
            "update/clip_fraction": clipped.mean().item(),
            "update/clip_fraction_per_step": per_step(clipped, "mean"),
            "update/abs_log_ratio": log_ratio.abs().mean().item(),
            "update/first_abs_log_ratio": first_ratio.max().item(),
            "update/first_abs_log_ratio_per_step": first_per_step,
        }

    def _evaluation_is_due(self) -> bool:
        """Whether the state after `self.epoch` epochs is one to be evaluated, and has not been."""
        config, epoch = self.config, self.epoch
        wanted = epoch == 0 or epoch >= config.epochs or (config.eval_every > 0 and epoch % config.eval_every == 0)
        return wanted and all(
            "eval/reward" not in record for record in self.metrics.records if record["epoch"] == epoch
        )

    def _draw_curves(self) -> None:
        held_out = [f"eval/{name}" for name in self.eval_rewards.rewards]
        save_curves(self.metrics, self.table.timesteps.tolist(), held_out, self.folder / "curves.png")

    def _save(self, random_state: dict[str, Any]) -> None:
        """Saves the state after `self.epoch` epochs, unless it is on the disk already."""
        latest = self.checkpoints.latest()
        if latest is None or self.checkpoints.epoch_of(latest) != self.epoch:
            state = {
                "next_sample": self.next_sample,
                "advantages": self.advantages.state_dict(),
                "scaler": self.scaler.state_dict(),
            }
            self.checkpoints.save(self.epoch, self.policy, self.optimizer, state, random_state, self.ema)


class Windows:
    """The sampler of each epoch: one table, or one per place of the window of steps that are stochastic and trained
    (Li et al., arXiv 2507.21802).

    Raises:
        ValueError: if the sampler has nothing to train, or no room for the window.
    """

    def __init__(self, config: Config, policy: Policy) -> None:
        self.config = config
        # the sampler's own credit exists for every sampler
        native = dataclasses.replace(config, credit="native", target_weight=None)
        trainable = samplers.build(native, policy.schedule()).trainable.nonzero().squeeze(1).tolist()
        if not trainable:
            raise ValueError(
                "every step of the sampler is deterministic, so there is nothing to train: raise --eta (diffusion) or "
                "--noise-level (flow), or --num-inference-steps"
            )
        if config.window_size is None:
            self.tables = [samplers.build(config, policy.schedule()).to(policy.device)]
            return
        first, end = trainable[0], trainable[-1] + 1
        start, stop = config.window_range or (first, end)
        if not first <= start < stop <= end:
            raise ValueError(
                f"--window-range {start} {stop} does not lie in {first} {end}: the steps that draw noise, the second "
                "number not included"
            )
        if config.window_size > stop - start:
            raise ValueError(
                f"--window-size {config.window_size} is more than the {stop - start} steps from {start} to {stop} "
                "(not included) that its window may lie in; lower it, or widen --window-range"
            )
        starts = range(start, stop - config.window_size + 1)
        windows = [(start, start + config.window_size) for start in starts]
        if config.window == "fixed":
            windows = windows[:1]
        self.tables = [samplers.build(config, policy.schedule(), window=window).to(policy.device) for window in windows]

    def table(self, epoch: int, generator: torch.Generator) -> StepTable:
        """Of an epoch, the first being 1."""
        if self.config.window == "random":
            return self.tables[int(torch.randint(len(self.tables), (), generator=generator))]
        return self.tables[(epoch - 1) % len(self.tables)]


class Signals:
    """Notes the first Ctrl-C or SIGTERM, for the loop to leave at a point that it can resume from; a second one acts
    at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        # handlers can be set in the main thread alone; elsewhere the caller has its own ways to stop
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()
        tqdm.write(f"{signal.Signals(number).name}: saving, then leaving; once more leaves at once, without saving")

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _make_ema(parameters: list[torch.nn.Parameter], decay: float) -> Any:
    from diffusers.training_utils import EMAModel

    return EMAModel(parameters, decay=decay, foreach=True)


def _finite_mean(scores: Tensor) -> float | None:
    finite = scores[scores.isfinite()]
    return finite.mean().item() if len(finite) else None


def _grid(count: int) -> Sequence[int]:
    """Indices for a grid, evenly spaced over `count` images and running down its columns."""
    columns = min(GRID_COLUMNS, count)
    rows = min(GRID_ROWS, count // columns)
    return [(column * rows + row) * count // (rows * columns) for row in range(rows) for column in range(columns)]
