import pytest
import torch
from pipelines import SMALL, make_trainer

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


def states(trajectory):
    """(N, T + 1, C, H, W): the latents before the first step and after every one."""
    return torch.cat([trajectory.samples, trajectory.latents[:, None]], dim=1)


def test_steps_are_affine_in_what_was_stored(policy, table):
    """x' = a x + b m + s z holds for the stored tensors to the rounding of its own float32 terms."""
    trajectory = run(policy, table)
    before, after = states(trajectory)[:, :-1].double(), states(trajectory)[:, 1:].double()
    terms = [
        coef.view(STEPS, 1, 1, 1) * tensor
        for coef, tensor in (
            (table.sample_coef, before),
            (table.output_coef, trajectory.model_outputs.double()),
            (table.std, trajectory.noise.double()),
        )
    ]
    # each of the three coefficients, products and sums, and each of the operations that give z, rounds once
    bound = 8 * EPS * sum(term.abs() for term in terms)
    assert ((after - sum(terms)).abs() <= bound).all()
    assert trajectory.samples.dtype == trajectory.noise.dtype == trajectory.latents.dtype == torch.float32
    assert trajectory.noise.std().item() == pytest.approx(1, abs=0.05)


def test_noise_depends_on_the_sample_and_not_on_the_batch(policy, table):
    """In batches of 2 and all at once: the first latents are equal, what follows is as close as the denoiser is."""
    whole, chunked = run(policy, table), run(policy, table, batch_size=2)
    assert torch.equal(whole.samples[:, 0], chunked.samples[:, 0])
    tail = run(policy, table, PROMPTS[2:], first_index=FIRST + 2)
    assert torch.equal(whole.samples[2:, 0], tail.samples[:, 0])
    # a denoiser may sum in another order for another batch; latents are of order 1
    for name in ("samples", "model_outputs", "noise", "latents"):
        torch.testing.assert_close(getattr(chunked, name), getattr(whole, name), rtol=0, atol=1e-4)
        torch.testing.assert_close(getattr(tail, name), getattr(whole, name)[2:], rtol=0, atol=1e-4)


def test_noise_differs_between_samples_steps_and_seeds(policy, table):
    first = run(policy, table)
    drawn = torch.cat([first.samples[:, :1], first.noise], dim=1).flatten(0, 1).flatten(1)
    correlation = torch.corrcoef(drawn)
    # 256 numbers each: independent ones correlate with a standard deviation of 1/16
    assert (correlation - torch.eye(len(drawn))).abs().max() < 6 / 16
    other = rollout(policy, table, policy.encode(["cat"]), seed=SEED + 1, first_index=FIRST, batch_size=1)
    assert not torch.equal(other.samples[0, 0], first.samples[0, 0])


def test_first_latents_are_the_noise_of_their_own_stream(policy, table):
    index = torch.arange(FIRST, FIRST + len(PROMPTS))
    shape = (len(PROMPTS), *policy.latent_shape)
    expected = sample_noise(shape, table, 0, seed=SEED, sample_index=index, stream=INITIAL_LATENTS)
    assert torch.equal(run(policy, table).samples[:, 0], expected)


def test_without_record_the_latents_are_the_same(policy, table):
    recorded, bare = run(policy, table, batch_size=2), run(policy, table, batch_size=2, record=False)
    assert torch.equal(recorded.latents, bare.latents)
    assert bare.samples.numel() == bare.noise.numel() == bare.model_outputs.numel() == 0


def test_after_step_is_called_after_every_step_and_may_end_the_rollout(policy, table):
    calls = []
    run(policy, table, batch_size=2, after_step=lambda: calls.append(1))
    assert len(calls) == 3 * STEPS

    def stop():
        raise Interrupted

    with pytest.raises(Interrupted):
        run(policy, table, after_step=stop)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_images_are_those_of_the_diffusers_pipeline(model, tmp_path, guidance_scale):
    """The pipeline's own call, with its scheduler, its guidance and our noise, ends at the same latents and images."""
    trainer = make_trainer(model, tmp_path, guidance_scale=guidance_scale, num_inference_steps=STEPS)
    policy, table = trainer.policy, trainer.eval_table
    trajectory = run(policy, table, batch_size=SMALL["micro_batch_size"])
    pipeline, scheduler = policy.pipeline, policy.pipeline.scheduler
    step, noise = type(scheduler).step, iter(trajectory.noise.unbind(1))

    def step_with_our_noise(*arguments, eta, generator, **others):
        return step(scheduler, *arguments, eta=eta, variance_noise=next(noise), **others)

    scheduler.step = step_with_our_noise
    settings = {
        "prompt": PROMPTS,
        "num_inference_steps": STEPS,
        "guidance_scale": guidance_scale,
        "eta": 1.0,
        "latents": trajectory.samples[:, 0].clone(),
    }
    latents = pipeline(**settings, output_type="latent").images
    # float32 latents of order 1 (10 with guidance on random weights) after 5 steps
    torch.testing.assert_close(trajectory.latents, latents, rtol=1e-4, atol=1e-4)
    noise = iter(trajectory.noise.unbind(1))
    images = pipeline(**settings, output_type="pt").images
    torch.testing.assert_close(policy.decode(trajectory.latents), images, rtol=0, atol=1e-4)
    # the prompts matter, so the comparison saw them
    assert (trajectory.latents - run(policy, table, PROMPTS[::-1]).latents).abs().max() > 1e-3
