import itertools

import pytest
import torch
from pipelines import FAMILIES, SMALL, make_trainer

from pcpo_fast.ops import sample_noise
from pcpo_fast.rollout import INITIAL_LATENTS, Interrupted, rollout
from pcpo_fast.tables import ddim_table

pytest_plugins = "pipelines"
pytestmark = pytest.mark.usefixtures("one_thread")

EPS = torch.finfo(torch.float32).eps
SEED, FIRST, STEPS = 3, 40, 5
PROMPTS = ["cat", "dog", "cat", "horse", "dog"]


@pytest.fixture(scope="module")
def policy(model, tmp_path_factory):
    return make_trainer(model, tmp_path_factory.mktemp("run")).policy


@pytest.fixture(scope="module")
def table(policy):
    return ddim_table.from_scheduler(policy.pipeline.scheduler, STEPS)


def run(policy, table, prompts=PROMPTS, first_index=FIRST, batch_size=5, **settings):
    conditioning = policy.encode(prompts)
    return rollout(policy, table, conditioning, seed=SEED, first_index=first_index, batch_size=batch_size, **settings)


def noise_of(trajectory, table):
    """float64 (N, T, C, H, W): the z of every stored state but the first."""
    a, b, std = (column.view(-1, 1, 1, 1) for column in (table.sample_coef, table.output_coef, table.std))
    before, after = trajectory.states[:, :-1].double(), trajectory.states[:, 1:].double()
    return (after - a * before - b * trajectory.model_outputs.double()) / std


def test_steps_draw_the_noise_of_their_key(policy, table):
    """x' = a x + b m + s z holds for what was stored and for the noise of the sample's key, to float32's rounding."""
    trajectory = run(policy, table)
    index = torch.arange(FIRST, FIRST + len(PROMPTS))
    shape = (len(PROMPTS), *policy.latent_shape)
    drawn = [sample_noise(shape, table, step, seed=SEED, sample_index=index) for step in range(STEPS)]
    found = noise_of(trajectory, table)
    # each of the three coefficients, products and sums rounds once, magnified by 1/s
    terms = trajectory.states.abs().max() * table.sample_coef.max() + trajectory.model_outputs.abs().max()
    bound = 8 * EPS * terms / table.std.view(-1, 1, 1, 1)
    assert ((found - torch.stack(drawn, dim=1)).abs() <= bound).all()
    assert trajectory.states.dtype == torch.float32
    assert found.std().item() == pytest.approx(1, abs=0.05)


def test_noise_depends_on_the_sample_and_not_on_the_batch(policy, table):
    """In batches of 2 and all at once: the first latents are equal, what follows is as close as the denoiser is."""
    whole, chunked = run(policy, table), run(policy, table, batch_size=2)
    assert torch.equal(whole.states[:, 0], chunked.states[:, 0])
    tail = run(policy, table, PROMPTS[2:], first_index=FIRST + 2)
    assert torch.equal(whole.states[2:, 0], tail.states[:, 0])
    # a denoiser may sum in another order for another batch; latents are of order 1
    for name in ("states", "model_outputs"):
        torch.testing.assert_close(getattr(chunked, name), getattr(whole, name), rtol=0, atol=1e-4)
        torch.testing.assert_close(getattr(tail, name), getattr(whole, name)[2:], rtol=0, atol=1e-4)


def test_noise_differs_between_samples_steps_and_seeds(policy, table):
    first = run(policy, table)
    drawn = torch.cat([first.states[:, :1], noise_of(first, table)], dim=1).flatten(0, 1).flatten(1)
    correlation = torch.corrcoef(drawn)
    # 256 numbers each: independent ones correlate with a standard deviation of 1/16
    assert (correlation - torch.eye(len(drawn))).abs().max() < 6 / 16
    other = rollout(policy, table, policy.encode(["cat"]), seed=SEED + 1, first_index=FIRST, batch_size=1)
    assert not torch.equal(other.states[0, 0], first.states[0, 0])


def test_first_latents_are_the_noise_of_their_own_stream(policy, table):
    index = torch.arange(FIRST, FIRST + len(PROMPTS))
    shape = (len(PROMPTS), *policy.latent_shape)
    expected = sample_noise(shape, table, 0, seed=SEED, sample_index=index, stream=INITIAL_LATENTS)
    assert torch.equal(run(policy, table).states[:, 0], expected)


def test_without_record_the_latents_are_the_same(policy, table):
    recorded, bare = run(policy, table, batch_size=2), run(policy, table, batch_size=2, record=False)
    assert torch.equal(recorded.latents, bare.latents)
    assert bare.states.shape[1] == 1 and bare.model_outputs.numel() == 0


def test_after_step_is_called_after_every_step_and_may_end_the_rollout(policy, table):
    calls = []
    run(policy, table, batch_size=2, after_step=lambda: calls.append(1))
    assert len(calls) == 3 * STEPS

    def stop():
        raise Interrupted

    with pytest.raises(Interrupted):
        run(policy, table, after_step=stop)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_those_of_the_diffusers_pipeline(models, tmp_path, family, guidance_scale):
    """The pipeline's own call, with its scheduler, its guidance and our noise, ends at the same latents and images."""
    settings = {"guidance_scale": guidance_scale, "num_inference_steps": STEPS, "resolution": 64, "credit": "native"}
    trainer = make_trainer(models[family], tmp_path, **settings, max_sequence_length=None)
    policy, table = trainer.policy, trainer.eval_table
    trajectory = run(policy, table, batch_size=SMALL["micro_batch_size"])
    pipeline, scheduler = policy.pipeline, policy.pipeline.scheduler
    call = {
        "prompt": PROMPTS,
        "num_inference_steps": STEPS,
        "guidance_scale": guidance_scale,
        "height": 64,
        "width": 64,
        "latents": trajectory.states[:, 0].clone(),
    }
    if family in ("sd15", "sdxl"):
        call["eta"] = 1.0
        step, noise = type(scheduler).step, itertools.cycle(noise_of(trajectory, table).float().unbind(1))

        def step_with_our_noise(*arguments, eta, generator, **others):
            return step(scheduler, *arguments, eta=eta, variance_noise=next(noise), **others)

        scheduler.step = step_with_our_noise
    else:
        # the samplers of flow models are evaluated as the ODE that their pipelines follow
        assert not table.trainable.any()
    latents = pipeline(**call, output_type="latent").images
    # float32 latents of order 1 (10 with guidance on random weights) after 5 steps
    torch.testing.assert_close(trajectory.latents, latents, rtol=1e-4, atol=1e-4)
    images = pipeline(**call, output_type="pt").images
    torch.testing.assert_close(policy.decode(trajectory.latents), images, rtol=0, atol=1e-4)
    # the prompts matter, so the comparison saw them
    assert (trajectory.latents - run(policy, table, PROMPTS[::-1]).latents).abs().max() > 1e-4
