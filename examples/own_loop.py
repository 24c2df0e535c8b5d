"""The fused ops in a training loop of your own: no trainer, no policy class, plain diffusers and PyTorch.

Aligns the embedded digits model with a reward that asks for bright pictures, by PCPO: several batches per epoch,
classifier-free guidance inside the ops, noise by key, constant credit. Run it with `python examples/own_loop.py`.
"""

import torch
from diffusers import DiffusionPipeline

from pcpo_fast import Guidance, NoiseKey, StepTable, StoredStates, policy_loss, sample_noise, sampler_step
from pcpo_fast.policies import EMBEDDED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPOCHS, BATCHES, BATCH, STEPS, GUIDANCE, SEED = 4, 4, 32, 10, 1.5, 0


def main(epochs: int = EPOCHS) -> list[float]:
    """Returns the mean reward of each epoch."""
    pipeline = DiffusionPipeline.from_pretrained(EMBEDDED["digits"]).to(DEVICE)
    unet = pipeline.unet.requires_grad_(True).eval()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
    table = StepTable.from_scheduler(pipeline.scheduler, STEPS, credit="constant").to(DEVICE)
    prompts = ["a seven", "a photo of the digit three", "two", "a handwritten nine"]
    text = torch.cat(list(pipeline.encode_prompt(prompts, DEVICE, BATCH // len(prompts), True))[::-1]).detach()
    shape = (BATCH, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    rewards_by_epoch = []

    def predict(x: torch.Tensor, step: int | torch.Tensor) -> tuple[torch.Tensor, Guidance]:
        """The conditional output, and what combines it with the unconditional one inside the ops."""
        timestep = table.timesteps[torch.as_tensor(step, device=DEVICE).expand(len(x))]
        uncond, cond = unet(torch.cat([x, x]), torch.cat([timestep, timestep]), text).sample.chunk(2)
        return cond, Guidance(uncond, GUIDANCE)

    for epoch in range(epochs):
        # rollout: a batch is the states x_0 ... x_T and the model outputs m_0 ... m_(T-1)
        batches, rewards = [], []
        for batch in range(BATCHES):
            # counts on from batch to batch: no two samples of a run share an index, so none share noise
            first = (epoch * BATCHES + batch) * BATCH
            key = NoiseKey(SEED, torch.arange(first, first + BATCH, device=DEVICE))
            states, outputs = [sample_noise(shape, table, 0, key, stream=1)], []
            for step in range(STEPS):
                with torch.no_grad():
                    cond, guidance = predict(states[-1], step)
                stepped = sampler_step(cond, states[-1], table, step, key, guidance=guidance, return_noise=False)
                states.append(stepped.prev_sample)
                outputs.append(stepped.model_output)
            with torch.no_grad():
                images = pipeline.vae.decode(states[-1] / pipeline.vae.config.scaling_factor).sample
            batches.append((states, outputs))
            rewards.append(images.mean(dim=(1, 2, 3)))
        rewards = torch.stack(rewards)
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        rewards_by_epoch.append(rewards.mean().item())
        print(f"epoch {epoch}: mean reward {rewards_by_epoch[-1]:.4f}")

        # update: one optimiser step per batch, all timesteps of it accumulated
        for (states, outputs), advantage in zip(batches, advantages, strict=True):
            for step in range(STEPS):
                cond, guidance = predict(states[step], step)
                noise = StoredStates(states[step], states[step + 1])
                result = policy_loss(
                    cond, outputs[step], noise, table, step, advantage, clip_range=1e-3, guidance=guidance
                )
                (result.loss / STEPS).backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return rewards_by_epoch


if __name__ == "__main__":
    main()
