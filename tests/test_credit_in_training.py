"""The credit that the settings ask for is the one that training gives each step of the embedded models.

On the policy that sampled, both losses of a row, objectives "pcpo" and "ppo", have the gradient

    dL / dm = A w~ z / N,    z = (x' - a x - b m) / s

at the model output m, with A the row's advantage, w~ the credit of its step and N the elements of a latent. Here it is
made of the states that sampling stored, in float64, with the credit as it is defined.
"""

import dataclasses

import pytest
import torch
from pipelines import make_preset_trainer

from pcpo_fast import samplers
from pcpo_fast.presets import PRESETS

pytest_plugins = "pipelines"
pytestmark = pytest.mark.usefixtures("one_thread")

EPS = torch.finfo(torch.float32).eps
STEPS = 5
# no two are equal, and neither are those of two steps one apart, or of a step and its mirror image
LIST = (0.3, 1.1, 0.7, 2.3, 1.7)


def native_sampler(trainer):
    """All steps of the run's sampler, without a window: a, b, s and -b / s are taken from here."""
    settings = dataclasses.replace(trainer.config.sampler, credit="native", target_weight=None)
    return samplers.build(settings, trainer.policy.schedule())


def defined_credit(sampler, credit):
    """The credit of every step that draws noise, as docs/maths.md defines it; both models compare steps as they are."""
    drawn = sampler.std > 0
    native = torch.where(drawn, -sampler.output_coef / sampler.std, 0.0)
    if credit == "native":
        return native
    if credit == "constant":
        return torch.where(drawn, native.sum() / drawn.sum(), 0.0)
    return torch.where(drawn, torch.tensor(credit, dtype=torch.float64), 0.0)


def gradients_of(trainer, batch, monkeypatch):
    """One epoch's update: the gradient of every row's loss at its model output, by (sample, step), and the metrics."""
    loss, seen = trainer.loss, []

    def watched(batch, sample, step):
        output, result = loss(batch, sample, step)
        seen.append((sample, step, output))
        return output, result

    monkeypatch.setattr(trainer, "loss", watched)
    record = trainer.update(batch)
    monkeypatch.undo()
    # the loss is the mean over all rows of the one optimizer step
    rows = sum(len(sample) for sample, *_ in seen)
    found = {}
    for sample, step, output in seen:
        for n, k, m, gradient in zip(sample.tolist(), step.tolist(), output, output.grad, strict=True):
            assert (n, k) not in found
            assert torch.equal(m.detach(), batch.trajectory.model_outputs[n, k])
            found[n, k] = gradient.double() * rows
    return found, record


@pytest.mark.parametrize("preset", ["digits", "digits-flow"])
@pytest.mark.parametrize(
    ("settings", "windows"),
    [
        ({}, [range(STEPS)]),
        ({"objective": "ppo"}, [range(STEPS)]),
        ({"credit": "native"}, [range(STEPS)]),
        ({"credit": LIST}, [range(STEPS)]),
        ({"window_size": 2, "window_range": (1, 4), "window": "sliding"}, [(1, 2), (2, 3), (1, 2)]),
        ({"credit": LIST, "window_size": 2, "window_range": (1, 4), "window": "sliding"}, [(1, 2), (2, 3), (1, 2)]),
    ],
    ids=["default", "ppo", "native", "list", "window", "list and window"],
)
def test_every_row_has_the_gradient_of_its_credit(tmp_path, monkeypatch, preset, settings, windows):
    trainer = make_preset_trainer(preset, tmp_path, num_inference_steps=STEPS, **settings)
    sampler = native_sampler(trainer)
    credit = defined_credit(sampler, settings.get("credit", "constant"))
    a, b, s = sampler.sample_coef, sampler.output_coef, sampler.std
    for window in windows:
        batch = trainer.collect()
        found, record = gradients_of(trainer, batch, monkeypatch)
        advantages, states = batch.advantages.double(), batch.trajectory.states.double()
        outputs = batch.trajectory.model_outputs.double()
        # the flow's last step draws no noise
        trained = [k for k in window if preset == "digits" or k < STEPS - 1]
        assert sorted(found) == [(n, k) for n in range(len(advantages)) for k in trained]
        norms = torch.zeros(len(advantages), STEPS, dtype=torch.float64)
        for (n, k), gradient in found.items():
            terms = states[n, k + 1], -a[k] * states[n, k], -b[k] * outputs[n, k]
            scale = advantages[n] * credit[k] / outputs[n, k].numel()
            expected = scale * sum(terms) / s[k]
            # z is computed in float32: a, b, s and each term of x' - a x - b m, itself and its sum, have a rounding
            size = sum(term.abs() for term in terms) / s[k]
            assert ((gradient - expected).abs() <= 8 * EPS * scale.abs() * size).all(), (n, k)
            norms[n, k] = expected.norm()
        # the metrics say the same, per step of the sampler and null where nothing is trained
        recorded = record["update/output_grad_norm_per_step"]
        mean = norms.mean(dim=0).tolist()
        assert recorded == [pytest.approx(mean[k], rel=1e-4) if k in trained else None for k in range(STEPS)]


@pytest.mark.parametrize("preset", ["digits", "digits-flow"])
def test_the_credits_can_be_told_apart(tmp_path, preset):
    """The test above could not see what it looks for if two of them were nearly equal."""
    assert PRESETS[preset].sampler.credit == "constant"
    sampler = native_sampler(make_preset_trainer(preset, tmp_path, num_inference_steps=STEPS))
    native, constant, given = (defined_credit(sampler, credit) for credit in ("native", "constant", LIST))
    drawn = sampler.std > 0
    for one, other in ((constant, native), *((given, x) for x in (given.roll(1), given.roll(-1), given.flip(0)))):
        assert ((one - other).abs() > 0.05 * one)[drawn].sum() >= drawn.sum() - 1
