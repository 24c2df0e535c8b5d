"""The loop that DDPO's, DanceGRPO's and Flow-GRPO's trainers share, for comparison, written from what they do.

Sampling goes through the pipeline's timesteps with a scheduler step that returns its log-probability; prompts are
encoded for every batch. Training takes small batches of samples, and of each one timestep after the other: two outputs
combined by guidance, the log-probability of the stored latents under the new mean, and PPO's clipped ratio. Losses and
norms are read after every step, for logging.

The denoiser, the autoencoder, rewards, advantages and the settings are the given trainer's, so that both do the same
work on the same model. The parts of an epoch have the same names for profilers as the trainer's.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.profiler import record_function

from bench.cases import ddim_step, gaussian_log_prob
from pcpo_fast.policies import Conditioning
from pcpo_fast.trainer import Trainer


@dataclasses.dataclass
class Samples:
    states: Tensor
    log_probs: Tensor
    conditioning: Conditioning


class BaselineLoop:
    """An epoch is `sample`, `score` and `update`.

    Args:
        trainer: its policy is trained; none of its own loop is used.
        sample_batch: images per call of the denoiser in sampling.
        train_batch: images per call in training, each at the same timestep.
    """

    def __init__(self, trainer: Trainer, sample_batch: int, train_batch: int) -> None:
        self.trainer, self.policy, self.config = trainer, trainer.policy, trainer.config
        self.sample_batch, self.train_batch = sample_batch, train_batch
        table, optimizer, run = trainer.windows.tables[0], self.config.optimizer, self.config.run
        self.optimizer = torch.optim.AdamW(
            self.policy.trainable_parameters(),
            lr=self.config.learning_rate,
            betas=(optimizer.adam_beta1, optimizer.adam_beta2),
            eps=optimizer.adam_epsilon,
            weight_decay=optimizer.weight_decay,
        )
        # an optimizer step takes as many rows as the trainer's
        self.accumulation = run.gradient_accumulation_steps * run.micro_batch_size // train_batch
        self.timesteps = table.timesteps
        self.trained = [step for step, trainable in enumerate(table.trainable.tolist()) if trainable]
        scheduler = self.policy.pipeline.scheduler
        if hasattr(scheduler, "alphas_cumprod"):
            alphas = scheduler.alphas_cumprod.to(self.policy.device)
            at = alphas[self.timesteps]
            self.schedule = torch.stack([at, torch.cat([at[1:], scheduler.final_alpha_cumprod.to(at)[None]])], dim=1)
        else:
            t = self.timesteps / scheduler.config.num_train_timesteps
            self.schedule = torch.stack([t, torch.cat([t[1:], t.new_zeros(1)])], dim=1)

    def predict(self, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Both outputs of guidance in one batch, combined in the model's dtype."""
        policy = self.policy
        if policy.uncond is None:
            return policy.run(policy.denoiser, sample, timestep, conditioning)
        both = Conditioning.cat([policy.uncond.expand(len(sample)), conditioning])
        output = policy.run(policy.denoiser, torch.cat([sample] * 2), torch.cat([timestep] * 2), both)
        uncond, cond = output.chunk(2)
        return uncond + policy.guidance_scale * (cond - uncond)

    def scheduler_step(
        self, output: Tensor, step: int, sample: Tensor, prev_sample: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The next latents, drawn unless they are given, and their log-probability."""
        steps = torch.full((len(sample),), step, device=sample.device)
        if hasattr(self.policy.pipeline.scheduler, "alphas_cumprod"):
            mean, std = ddim_step(output.float(), sample, self.schedule, steps)
        else:
            mean, std = self._flow_step(output.float(), sample, step)
        if prev_sample is None:
            prev_sample = mean + std * torch.randn_like(mean)
        if not bool((std > 0).all()):
            return prev_sample, sample.new_zeros(len(sample))
        return prev_sample, gaussian_log_prob(prev_sample, mean, std)

    def _flow_step(self, output: Tensor, sample: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Mean and std of Flow-SDE's step at a noise level of 0.7; the last one is the ODE's."""
        # the schedulers look up the step by its timestep and read the noise levels of it
        t, t_next = self.schedule[step].tolist()
        h = t - t_next
        if step == len(self.schedule) - 1:
            return sample - h * output, torch.zeros((), device=sample.device)
        sigma = torch.full((len(sample), *[1] * (sample.dim() - 1)), t, device=sample.device)
        bound = self.schedule[1, 0]
        g = torch.sqrt(sigma / (1 - torch.where(sigma == 1, bound, sigma))) * 0.7
        mean = sample * (1 - g**2 / (2 * sigma) * h) - output * (1 + g**2 * (1 - sigma) / (2 * sigma)) * h
        return mean, g * h**0.5

    @torch.no_grad()
    def sample(self, prompts: list[str]) -> Samples:
        policy, batches = self.policy, []
        for start in range(0, len(prompts), self.sample_batch):
            chosen = prompts[start : start + self.sample_batch]
            # no prompt's embedding is kept for the next batch
            conditioning = Conditioning.cat([policy.embed(prompt) for prompt in chosen]).to(policy.device)
            states, log_probs = [torch.randn((len(chosen), *policy.latent_shape), device=policy.device)], []
            with record_function("sample"):
                for step, timestep in enumerate(self.timesteps):
                    output = self.predict(states[-1], timestep.expand(len(chosen)), conditioning)
                    latents, log_prob = self.scheduler_step(output, step, states[-1])
                    states.append(latents)
                    log_probs.append(log_prob)
            batches.append((torch.stack(states, dim=1), torch.stack(log_probs, dim=1), conditioning))
        states, log_probs, conditioning = zip(*batches, strict=True)
        return Samples(torch.cat(states), torch.cat(log_probs), Conditioning.cat(conditioning))

    def score(self, samples: Samples, prompts: list[str]) -> Tensor:
        """Advantages, as the trainer has them."""
        images = self.policy.decode(samples.states[:, -1])
        with record_function("reward"):
            rewards, _ = self.trainer.rewards(images, prompts)
        return self.trainer.advantages(rewards, prompts, self.config.run.group_size).to(self.policy.device)

    def update(self, samples: Samples, advantages: Tensor) -> list[float]:
        losses, done = [], 0
        order = torch.randperm(len(advantages)).to(self.policy.device)
        for rows in order.split(self.train_batch):
            conditioning = samples.conditioning[rows]
            for step in self.trained:
                sample, prev_sample = samples.states[rows, step], samples.states[rows, step + 1]
                with record_function("forward"):
                    output = self.predict(sample, self.timesteps[step].expand(len(rows)), conditioning)
                    loss = self.loss(output, step, sample, prev_sample, samples.log_probs[rows, step], advantages[rows])
                with record_function("backward"):
                    (loss / self.accumulation).backward()
                losses.append(loss.item())
                done += 1
                if done % self.accumulation == 0:
                    with record_function("optimizer"):
                        self.optimizer_step()
        return losses

    def loss(
        self, output: Tensor, step: int, sample: Tensor, prev_sample: Tensor, old_log_prob: Tensor, advantages: Tensor
    ) -> Tensor:
        _, log_prob = self.scheduler_step(output, step, sample, prev_sample)
        ratio = torch.exp(log_prob - old_log_prob)
        clip_range = self.config.loss.clip_range
        bounded = torch.clamp(ratio, 1 - clip_range, 1 + clip_range)
        return torch.mean(torch.maximum(-advantages * ratio, -advantages * bounded))

    def optimizer_step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.policy.trainable_parameters(), self.config.optimizer.max_grad_norm).item()
        self.optimizer.step()
        self.optimizer.zero_grad()
