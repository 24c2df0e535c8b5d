"""The training loop: prompts -> rollout -> rewards -> advantages -> update.

Each epoch samples images with the current policy, scores them and turns the scores into advantages. Its rows are the
(image, step) pairs of all trained steps, shuffled together and cut into micro-batches of one fixed shape; `policy_loss`
pushes each row towards the step it took, or away from it.

    PCPO (Lee and Ye, arXiv 2509.25774)               --objective pcpo
    DDPO (Black et al., arXiv 2305.13301)             --objective ppo --credit native, on a diffusion model
    DanceGRPO (Xue et al., arXiv 2505.07818)          --objective ppo --credit native --sampler dance, on a flow model
    Flow-GRPO (Liu et al., arXiv 2505.05470)          --objective ppo --credit native --sampler flow --kl-weight 0.04

Left out: a value function, a learned reward, a replay buffer, more than one process.

All randomness is a function of the seed and of the place in the run where it is drawn (Philox for noise, a generator
keyed by the epoch for prompts and row order). A run that was cut off continues as if it had not been, bit for bit where
the policy's arithmetic is deterministic, as on a CPU.

    pcpo train                                        the embedded digits model
    pcpo train sd15 --rewards my_module:my_reward     Stable Diffusion 1.5 and your own reward
    pcpo train --output-dir runs/digits --resume      continue a run
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import record_function
from tqdm import tqdm

from pcpo_fast.advantages import Advantages
from pcpo_fast.batch import Batch
from pcpo_fast.checkpoint import Checkpoints, get_random_state, kept_random_state
from pcpo_fast.config import Config
from pcpo_fast.metrics import Metrics, Record
from pcpo_fast.ops import PolicyLoss, Reference, StoredStates, policy_loss
from pcpo_fast.optimizer import Optimizer
from pcpo_fast.pictures import save_curves, save_samples
from pcpo_fast.policies import Policy
from pcpo_fast.prompts import draw_prompts, load_prompts
from pcpo_fast.rewards import Rewards, reward_sets
from pcpo_fast.rollout import Interrupted, RolloutEngine, Trajectory
from pcpo_fast.run_folder import save_settings, settings_of
from pcpo_fast.samplers import StepTable, build_for_evaluation
from pcpo_fast.signals import Signals, never
from pcpo_fast.summary import UpdateLog, finite_mean, reward_summary
from pcpo_fast.windows import WindowSchedule

# evaluation draws its noise from global sample indices that no training run reaches
EVAL_FIRST_INDEX = 2**36
BAR_METRICS = ("reward/mean", "update/clip_fraction", "time/reward")


class Trainer:
    """A run: the policy, its sampler, its rewards, and the state that checkpoints hold.

    Args:
        config: the settings.
        policy: the model to align.
        folder: the run folder.
        rewards: functions (images, prompts) -> scores by name, with weights or without, in the place of the settings'.

    Raises SettingError for a setting that cannot be run.
    """

    def __init__(self, config: Config, policy: Policy, folder: Path, rewards: Rewards | None = None) -> None:
        self.config = config = config.resolved()
        self.policy, self.folder = policy, folder
        self.prompts = load_prompts(config.data.prompts)
        self.rewards, self.eval_rewards = reward_sets(config.data, rewards, timeout=config.data.reward_timeout)
        self.windows = WindowSchedule(config, policy.schedule(), policy.device)
        self.eval_table = build_for_evaluation(config.sampler, policy.schedule()).to(policy.device)
        if config.model.release_text_encoders:
            policy.release_text_encoders(self.prompts)
        self.engine = RolloutEngine(policy, config.run.micro_batch_size)
        self.optimizer = Optimizer(policy.trainable_parameters(), config.optimizer, policy.dtype)
        self.advantages = Advantages(config.loss)
        self.checkpoints = Checkpoints(folder / "checkpoints", config.run.keep_checkpoints)
        # finished epochs, the sample index from which the next one draws noise, the epoch of the last evaluation
        state = {"epoch": 0, "next_sample": 0, "evaluated": -1, "records": 0, "advantages": {}}
        if latest := self.checkpoints.find(resume=config.run.resume):
            state = self.checkpoints.load(latest, policy, self.optimizer, expected=state)
        self.epoch, self.next_sample, self.evaluated = (state[key] for key in ("epoch", "next_sample", "evaluated"))
        # noise counters of an image; after other steps or another size a run goes on beyond all that it has drawn
        self.counters = len(self.windows.tables[0]) * math.ceil(math.prod(policy.latent_shape) / 4)
        self.next_sample = -(-self.next_sample * state.get("counters", self.counters) // self.counters)
        self.advantages.load_state_dict(state["advantages"])
        # the first file, since resuming needs it
        save_settings(folder, config, self.epoch, state.get("settings"))
        self.metrics = Metrics(folder, kept=state["records"], epoch=self.epoch)

    def train(self) -> int | None:
        """Runs the remaining epochs. Returns the signal that ended the run early, or None."""
        epochs = self.config.run.epochs
        with Signals() as signals, suppress(Interrupted), tqdm(total=epochs, initial=self.epoch, desc="epochs") as bar:
            with self._saved_on_error():
                self._finish_epoch(signals.stop)
            while self.epoch < epochs and not signals.stop():
                # sample, score, advantages: nothing has changed yet, so an error or a signal here loses nothing
                with self._saved_on_error():
                    batch = self.collect(signals.stop)
                # changes weights; only whole updates are saved
                record = self.update(batch)
                # the next rollout needs the memory
                del batch
                with self._saved_on_error():
                    self.metrics.write(record)
                    self._finish_epoch(signals.stop)
                bar.update()
                bar.set_postfix({key: f"{record[key]:.3f}" for key in BAR_METRICS})
            self._save(get_random_state())
        self.metrics.close()
        return signals.received

    def collect(self, stop: Callable[[], bool] = never) -> Batch:
        """Samples and scores the next epoch's images.

        Raises:
            Interrupted: as soon as `stop()` is true.
            RewardError: if a reward fails, or no image has a finite one.
        """
        config, epoch, started = self.config, self.epoch + 1, time.perf_counter()
        # different for every (seed, epoch)
        generator = torch.Generator().manual_seed((config.run.seed * 0x9E3779B97F4A7C15 + epoch) % 2**63)
        prompts = draw_prompts(self.prompts, config.run.prompts_per_epoch, config.run.group_size, generator)
        trajectory = self._sample(prompts, self.windows.table(epoch, generator), self.next_sample, stop)
        # waits for the GPU, as the rewards would
        complete = trajectory.replace_nonfinite()
        sampled = time.perf_counter()
        images = self.policy.decode(trajectory.latents)
        with record_function("reward"):
            rewards, scores = self.rewards(images, prompts, self.prompts.about(prompts), seed=generator.initial_seed())
        # excluded samples get advantage 0; non-finite rows were replaced, so no NaN
        rewards[~complete] = math.nan
        peers = config.run.group_size if config.loss.advantage == "group" else len(prompts)
        self.rewards.check(rewards, scores, epoch, peers)
        record = {"epoch": epoch, **reward_summary(rewards, scores, self.rewards.seconds, self.rewards.failed)}
        record |= {"time/rollout": sampled - started, "time/reward": time.perf_counter() - sampled}
        tracker = copy.deepcopy(self.advantages)
        advantages = tracker(rewards, prompts, config.run.group_size).to(self.policy.device)
        return Batch(trajectory, advantages, generator, record, tracker)

    def update(self, batch: Batch) -> Record:
        """Passes over the rows of a batch, with an optimizer step per group of micro-batches. Returns the metrics."""
        run, started, samples = self.config.run, time.perf_counter(), len(batch.advantages)
        size, fraction = run.micro_batch_size, run.timestep_fraction
        passes = [list(batch.micro_batches(size, fraction)) for _ in range(run.inner_epochs)]
        if run.old_outputs == "recompute":
            # all passes have the same rows, unless each trains a fraction of them
            for rows in itertools.chain(*(passes if fraction < 1 else passes[:1])):
                # with gradients enabled, as in training: without them a compiled denoiser is another one
                batch.trajectory.model_outputs[rows] = self.policy.predict(*batch.inputs(*rows)).detach()
        log = UpdateLog(batch.trajectory.table)
        for micro_batches in passes:
            starts = range(0, len(micro_batches), run.gradient_accumulation_steps)
            for start in tqdm(starts, desc="update", leave=False, disable=None):
                group = micro_batches[start : start + run.gradient_accumulation_steps]
                for sample, step in group:
                    with record_function("forward"):
                        output, result = self.loss(batch, sample, step)
                    with record_function("backward"):
                        scale = self.optimizer.backward(result.loss / len(group)) / len(group)
                    log.rows(step, result, output, scale)
                with record_function("optimizer"):
                    log.step(self.optimizer.step())
        record = batch.record | log.summary()
        self.epoch, self.next_sample = self.epoch + 1, self.next_sample + samples
        self.advantages = batch.tracker or self.advantages
        record["time/update"] = time.perf_counter() - started
        record["time/images_per_second"] = samples / sum(record[f"time/{p}"] for p in ("rollout", "reward", "update"))
        return record

    def loss(self, batch: Batch, sample: Tensor, step: Tensor) -> tuple[Tensor, PolicyLoss]:
        """The model output, which keeps its gradient, and the loss of rows (sample, step), both int64 (rows,)."""
        settings, trajectory, inputs = self.config.loss, batch.trajectory, batch.inputs(sample, step)
        weight, output = settings.kl_weight, self.policy.predict(*inputs)
        output.retain_grad()
        return output, policy_loss(
            output,
            trajectory.model_outputs[sample, step],
            StoredStates(inputs[0], trajectory.states[sample, step + 1]),
            trajectory.table,
            step,
            batch.advantages[sample],
            # guard is a change of the table, see WindowSchedule
            objective="pcpo" if settings.objective == "pcpo" else "ppo",
            clip_range=settings.clip_range,
            kl=Reference(self.policy.predict_reference(*inputs), weight) if weight else None,
        )

    def evaluate(self, name: str, stop: Callable[[], bool] = never) -> Record:
        """Scores images of the prompts in turn, with the same seeds every time and the moving average of the weights if
        there is one; saves some as samples_<name>.png. Leaves the random states as they are."""
        prompts = [self.prompts[index % len(self.prompts)] for index in range(self.config.run.eval_samples)]
        with kept_random_state():
            with self.optimizer.averaged():
                latents = self._sample(prompts, self.eval_table, EVAL_FIRST_INDEX, stop, record=False).latents
            images = self.policy.decode(latents)
            record = self.assess(images, prompts)
        save_samples(images[: len(self.prompts)], self.folder / f"samples_{name}.png")
        return record

    def assess(self, images: Tensor, prompts: list[str]) -> Record:
        """The numbers of an evaluation, for float images (N, 3, H, W) in [0, 1]; a subclass can add its own."""
        about = self.prompts.about(prompts)
        total, scores = self.rewards(images, prompts, about)
        scores |= self.eval_rewards(images, prompts, about)[1]
        record = {"eval/reward": finite_mean(total)} | {f"eval/{key}": finite_mean(scores[key]) for key in scores}
        return record | {f"time/eval/{key}": s for key, s in (self.rewards.seconds | self.eval_rewards.seconds).items()}

    def _sample(
        self, prompts: list[str], table: StepTable, first_index: int, stop: Callable[[], bool], record: bool = True
    ) -> Trajectory:
        distinct = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
        batches = math.ceil(len(prompts) / self.config.run.micro_batch_size)
        with tqdm(total=batches * len(table), desc="rollout", leave=False, disable=None) as bar:
            return self.engine(
                table,
                self.policy.encode(list(distinct)),
                torch.tensor([distinct[prompt] for prompt in prompts], device=self.policy.device),
                seed=self.config.run.seed,
                first_index=first_index,
                record=record,
                after_step=bar.update,
                stop=stop,
            )

    def _finish_epoch(self, stop: Callable[[], bool]) -> None:
        """Evaluates and saves a checkpoint if these are due, and draws the curves."""
        run, epoch = self.config.run, self.epoch
        due = epoch == 0 or epoch >= run.epochs or (run.eval_every > 0 and epoch % run.eval_every == 0)
        if due and self.evaluated != epoch:
            self.metrics.write({"epoch": epoch, **self.evaluate("after" if epoch else "before", stop)})
            self.evaluated = epoch
        save_curves(self.metrics, self.config, self.policy.schedule(), self.eval_table, self.rewards, self.eval_rewards)
        if epoch and epoch % run.checkpoint_every == 0:
            self._save(get_random_state())

    @contextmanager
    def _saved_on_error(self) -> Iterator[None]:
        """Saves the finished epochs if the work inside, which changes no weights, fails or is interrupted."""
        random_state = get_random_state()
        try:
            yield
        except Exception:
            self._save(random_state)
            raise

    def _save(self, random_state: dict) -> None:
        state = {"next_sample": self.next_sample, "evaluated": self.evaluated, "records": len(self.metrics.records)}
        state |= {"advantages": self.advantages.state_dict(), "settings": settings_of(self.config)}
        state |= {"counters": self.counters}
        self.checkpoints.save(self.epoch, self.policy, self.optimizer, state, random_state)
