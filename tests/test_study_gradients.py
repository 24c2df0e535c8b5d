"""The gradient of each step, against gradients of single images by autograd and plain sums over pairs."""

import itertools
import json

import pytest
import torch
from pipelines import make_preset_trainer

pytest.importorskip("torchmetrics")

from pcpo_fast.checkpoint import get_random_state
from pcpo_fast.study import gradients
from pcpo_fast.study.gradients import step_gradients

pytest_plugins = "pipelines"
pytestmark = pytest.mark.usefixtures("one_thread")

BATCHES = 3
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(gradients, "BATCHES", BATCHES)


def trainer_of(preset, folder, **settings):
    # a batch has two micro-batches of images of two prompts each
    few = {"prompts_per_epoch": 3, "group_size": 2, "micro_batch_size": 3, "seed": 5}
    return make_preset_trainer(preset, folder, **few | settings)


def image_gradients(trainer, batch):
    """A grad <z, m> / N of every image and step: (images, T, P) in float64, 0 at steps without noise."""
    trajectory, table = batch.trajectory, batch.trajectory.table
    parameters, states = trainer.policy.trainable_parameters(), trajectory.states.double()
    found = torch.zeros(len(batch.advantages), len(table), sum(p.numel() for p in parameters), dtype=torch.float64)
    for image, step in itertools.product(range(len(batch.advantages)), range(len(table))):
        a, b, s = (float(column[step]) for column in (table.sample_coef, table.output_coef, table.std))
        if s == 0:
            continue
        m = trainer.policy.predict(*batch.inputs(torch.tensor([image]), torch.tensor([step])))
        old = trajectory.model_outputs[image, step].double()
        z = (states[image, step + 1] - a * states[image, step] - b * old) / s
        unit = batch.advantages[image].double() * (z * m[0].double()).mean()
        found[image, step] = torch.cat([g.flatten() for g in torch.autograd.grad(unit, parameters)]).double()
    return found


def brute_force(trainer):
    """gram and variance by sums over pairs of batches, from batches that are drawn like the epochs to come."""
    samples, steps = trainer.config.run.samples_per_epoch, trainer.config.sampler.num_inference_steps
    means, place = [], (trainer.epoch, trainer.next_sample)
    for batch in range(BATCHES):
        trainer.epoch, trainer.next_sample = place[0] + batch, place[1] + batch * samples
        means.append(image_gradients(trainer, trainer.collect()).mean(dim=0))
    trainer.epoch, trainer.next_sample = place
    gram, variance = torch.zeros(steps, steps, dtype=torch.float64), torch.zeros(steps, dtype=torch.float64)
    for first, second in itertools.permutations(range(BATCHES), 2):
        for row, column in itertools.product(range(steps), repeat=2):
            gram[row, column] += means[first][row] @ means[second][column] / (BATCHES * (BATCHES - 1))
    centre = sum(means) / BATCHES
    for mean in means:
        # the mean of N images has an N-th of their variance
        variance += samples * (mean - centre).square().sum(dim=1) / (BATCHES - 1)
    size = torch.stack(means).norm(dim=2).amax(dim=0)
    return gram, variance, size


@pytest.mark.parametrize(("preset", "credit"), [("digits", "constant"), ("digits-flow", "native")])
def test_against_gradients_of_single_images(tmp_path, preset, credit):
    trainer = trainer_of(preset, tmp_path, credit=credit)
    gram, variance, size = brute_force(trainer)
    found = {name: torch.tensor(values, dtype=torch.float64) for name, values in step_gradients(trainer).items()}
    # both are made of float32 passes of the denoiser in batches of other sizes, and of z, whose rounding is that of
    # terms of order 1 over s; a network passes roundings on about tenfold
    table = trainer.windows.tables[0]
    tolerance = 40 * EPS * (1 + 1 / table.std[table.trainable].min())
    scale = size[:, None] * size
    assert ((found["gram"] - gram).abs() <= tolerance * scale).all()
    # a deviation is as large as two means, and so is its rounding
    samples = trainer.config.run.samples_per_epoch
    assert ((found["variance"] - variance).abs() <= 4 * samples * tolerance * scale.diagonal()).all()
    assert torch.allclose(found["signal"], found["gram"].diagonal().clamp(min=0).sqrt(), rtol=1e-12)
    assert found["timesteps"].tolist() == table.timesteps.tolist()
    drawn = table.trainable
    assert drawn.tolist() == [True, True, preset == "digits"]
    assert bool((found["variance"][drawn] > 0).all()) and not bool(found["variance"][~drawn].any())
    # the numbers are far above what rounding could hide
    assert (gram.abs() > 10 * tolerance * scale)[drawn][:, drawn].all()


def test_the_credit_of_the_run_plays_no_part(tmp_path):
    """It weighs these gradients later; a list may even leave a step out."""
    results = [
        step_gradients(trainer_of("digits-flow", tmp_path / str(index), credit=credit))
        for index, credit in enumerate(("native", (1.0, 0.0, 3.0)))
    ]
    assert results[0] == results[1]


def test_a_signal_below_the_noise_is_0_and_the_gram_keeps_its_sign(tmp_path, monkeypatch):
    """Two batches with opposite gradients: the product of different batches is negative."""
    monkeypatch.setattr(gradients, "BATCHES", 2)
    signs = iter((1.0, -1.0))
    vector = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.5, 0.0]])
    monkeypatch.setattr(gradients, "_batch_gradients", lambda trainer, batch: vector * next(signs))
    found = step_gradients(trainer_of("digits", tmp_path))
    assert found["signal"] == [0, 0, 0]
    assert found["gram"] == [[-25, 0, -1.5], [0, 0, 0], [-1.5, 0, -0.25]]
    # (25 + 25) / (2 - 1) of a batch of 6 images
    assert found["variance"] == [300, 0, 3]


def state_of(trainer):
    optimizer = trainer.optimizer.adamw.state_dict()["state"]
    return {
        "counters": (trainer.epoch, trainer.next_sample, trainer.evaluated, len(trainer.metrics.records)),
        "advantages": trainer.advantages.state_dict(),
        "weights": [parameter.detach().clone() for parameter in trainer.policy.trainable_parameters()],
        "gradients": [parameter.grad for parameter in trainer.policy.trainable_parameters()],
        "moments": [value.clone() for values in optimizer.values() for value in values.values()],
        "random": get_random_state(),
    }


def assert_equal(one, other):
    assert one["counters"] == other["counters"] and one["advantages"] == other["advantages"]
    assert one["gradients"] == other["gradients"] == [None] * len(one["weights"])
    for name in ("weights", "moments"):
        assert all(torch.equal(a, b) for a, b in zip(one[name], other[name], strict=True))
    for name in ("python", "numpy"):
        assert json.dumps(one["random"][name]) == json.dumps(other["random"][name])
    assert torch.equal(one["random"]["torch"]["cpu"], other["random"]["torch"]["cpu"])


def test_a_run_goes_on_as_if_nothing_had_been_measured(tmp_path):
    """Also with rewards that are compared over epochs, and with random windows."""
    settings = {"advantage": "prompt", "prompt_buffer_min": 2, "window_size": 2, "window": "random"}
    settings |= {"gradient_accumulation_steps": 2, "num_inference_steps": 4}
    measured, other = (trainer_of("digits-flow", tmp_path / name, **settings) for name in ("measured", "other"))
    for _ in range(2):
        before = state_of(measured)
        step_gradients(measured)
        assert_equal(before, state_of(measured))
        records = [trainer.update(trainer.collect()) for trainer in (measured, other)]
        one, two = ({key: v for key, v in record.items() if "time/" not in key} for record in records)
        assert one == two
        assert_equal(state_of(measured), state_of(other))
