"""The policy gradient of every sampler step, taken apart: how strong its signal is and how noisy.

With A an image's advantage and m the model output of step k, the unit of step k is the gradient in the trained weights

    g_k = A grad <z, m> / N        (z the step's noise, N the elements of a latent)

so that weights w~ give the policy gradient sum_k w~_k g_k, and the sampler's own weights w the one of REINFORCE. `mu_k`
is its mean over images and `V_k` the trace of its covariance.

    signal    |mu_k|
    variance  V_k, of one image
    gram      <mu_k, mu_l>

The noise of one image is many times the signal, so all three are estimated over several epochs' worth of images of the
same policy. Products of means pair different epochs only; the noise adds nothing to them on average.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from pcpo_fast.batch import Batch
from pcpo_fast.ops import StoredStates, policy_loss
from pcpo_fast.trainer import Trainer

BATCHES = 16


def step_gradients(trainer: Trainer) -> dict[str, list]:
    """Measures the gradients on `BATCHES` times the images of an epoch; the run goes on as if it had not.

    Returns:
        timesteps, native_weight (the sampler's own weights), signal and variance, T numbers each, and gram, (T, T). A
        signal whose square comes out negative is 0: the noise of the estimate hides it. Steps without noise have 0.
    """
    epoch, first = trainer.epoch, trainer.next_sample
    samples = trainer.config.run.samples_per_epoch
    total, within = None, 0
    for batch in range(BATCHES):
        trainer.epoch, trainer.next_sample = epoch + batch, first + batch * samples
        gradients = _batch_gradients(trainer, trainer.collect())
        total = gradients if total is None else total + gradients
        within = within + _products(gradients)
    trainer.epoch, trainer.next_sample = epoch, first
    assert total is not None and isinstance(within, Tensor)
    gram = (_products(total) - within) / (BATCHES * (BATCHES - 1))
    spread = (within - _products(total) / BATCHES).diagonal() / (BATCHES - 1)
    return {
        "timesteps": trainer.windows.tables[0].timesteps.tolist(),
        "native_weight": trainer.windows.tables[0].native_weight.abs().tolist(),
        "signal": gram.diagonal().clamp(min=0).sqrt().tolist(),
        "variance": (spread * samples).tolist(),
        "gram": gram.tolist(),
    }


def _batch_gradients(trainer: Trainer, batch: Batch) -> Tensor:
    """The mean over a batch of each step's unit gradient, float32 (T, P) on the CPU."""
    trajectory, table = batch.trajectory, batch.trajectory.table
    # a weight of one, with the sampler's sign
    unit = dataclasses.replace(table, credit=table.native_weight.sign(), target_weight=None)
    parameters, size = trainer.policy.trainable_parameters(), trainer.config.run.micro_batch_size
    gradients = torch.zeros(len(table), sum(parameter.numel() for parameter in parameters))
    samples = torch.arange(len(batch.advantages), device=trajectory.states.device)
    for step in table.trainable.nonzero().flatten().tolist():
        for sample in samples.split(size):
            row = torch.full_like(sample, step)
            inputs = batch.inputs(sample, row)
            result = policy_loss(
                trainer.policy.predict(*inputs),
                trajectory.model_outputs[sample, row],
                StoredStates(inputs[0], trajectory.states[sample, row + 1]),
                unit,
                row,
                batch.advantages[sample],
                objective="ppo",
                clip_range=1.0,
            )
            found = torch.autograd.grad(-result.loss, parameters)
            gradients[step] += torch.cat([part.flatten() for part in found]).cpu() * (len(sample) / len(samples))
    return gradients


def _products(vectors: Tensor) -> Tensor:
    return (vectors @ vectors.T).double()
