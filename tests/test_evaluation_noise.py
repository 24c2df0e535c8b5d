"""Evaluations draw noise that training never draws, and the same noise every time."""

import pytest
import torch
from pipelines import make_preset_trainer

pytest_plugins = "pipelines"
pytestmark = pytest.mark.usefixtures("one_thread")

EPOCHS = 3
# correlations of two draws of 256 normals have a standard deviation of 1/16: eight of them
UNRELATED = 0.5


def drawn(trajectory):
    """The initial latent and the noise z of every step that draws some: (N, draws, elements), each of length 1."""
    x, table = trajectory.states.double(), trajectory.table
    a, b, s = (column.view(-1, *[1] * (x.dim() - 2)) for column in (table.sample_coef, table.output_coef, table.std))
    rest = x[:, 1:] - a * x[:, :-1] - b * trajectory.model_outputs
    noise = (rest / s)[:, table.trainable]
    return torch.nn.functional.normalize(torch.cat([x[:, :1], noise], dim=1).flatten(2), dim=2)


@pytest.mark.parametrize("preset", ["digits", "digits-flow"])
@pytest.mark.parametrize("seed", [0, 2**62 - 1])
def test_evaluations_share_no_noise_with_training(tmp_path, monkeypatch, preset, seed):
    """Several epochs with an evaluation before them and after each; all prompts are the same two."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the digit 3\nthe digit 7\n")
    # as many images in an evaluation as in training, so that neither has places that the other lacks
    settings = {"prompts": str(prompts), "eval_samples": 8, "seed": seed}
    trainer = make_preset_trainer(preset, tmp_path / "run", **settings)
    engine, training, evaluations = trainer.engine, [], []

    def watched(*arguments, record, **settings):
        # evaluations keep their last latents only
        trajectory = engine(*arguments, record=True, **settings)
        (training if record else evaluations).append(trajectory)
        return trajectory

    monkeypatch.setattr(trainer, "engine", watched)
    trainer.evaluate("before")
    for _ in range(EPOCHS):
        trainer.update(trainer.collect())
        trainer.evaluate("after")
    first = drawn(evaluations[0])
    trained = torch.cat([drawn(trajectory) for trajectory in training])
    # training draws its noise at every step, a flow's evaluation none
    assert (trained.shape[1] > 1, first.shape[1] > 1) == (True, preset == "digits")

    # no draw of anything twice, of training and of an evaluation together
    everything = torch.cat([trained.flatten(0, 1), first.flatten(0, 1)])
    alike = (everything @ everything.T).abs().fill_diagonal_(0)
    assert alike.max() < UNRELATED

    # the same noise in every evaluation, though the policy is another one
    for later in evaluations[1:]:
        assert torch.equal(later.states[:, 0], evaluations[0].states[:, 0])
        assert not torch.equal(later.latents, evaluations[0].latents)
        assert (drawn(later) * first).sum(dim=2).min() > 0.999
