import gc
import weakref

import pytest
import torch
from pipelines import make_trainer

from pcpo_fast.ops import NoiseKey, sample_noise, sampler_step
from pcpo_fast.rollout import INITIAL_LATENTS, Interrupted, RolloutEngine
from pcpo_fast.samplers import StepTable, shifted_sigmas

pytest_plugins = "pipelines"
pytestmark = pytest.mark.usefixtures("one_thread")

EPS = torch.finfo(torch.float32).eps
SEED, FIRST, STEPS = 3, 40, 5
# each sample's prompt, of these
DISTINCT = ["cat", "dog", "horse"]
PROMPT = [0, 1, 0, 2, 1]


@pytest.fixture(scope="module")
def policy(model, tmp_path_factory):
    return make_trainer(model, tmp_path_factory.mktemp("run")).policy


@pytest.fixture(scope="module")
def flow_policy(models, tmp_path_factory):
    settings = {"resolution": 64, "guidance_scale": 3.0}
    return make_trainer(models["sd35"], tmp_path_factory.mktemp("run"), **settings).policy


@pytest.fixture(scope="module")
def table(policy):
    return StepTable.from_scheduler(policy.pipeline.scheduler, STEPS)


def run(policy, table, prompt=PROMPT, first_index=FIRST, batch_size=5, engine=None, **settings):
    engine = engine or RolloutEngine(policy, batch_size)
    settings = {"seed": SEED, "first_index": first_index} | settings
    return engine(table, policy.encode(DISTINCT), torch.tensor(prompt), **settings)


def plain_loop(policy, table, prompt, batch_size):
    """The states and outputs as anybody would write the loop down; whole batches only."""
    conditioning, states, outputs = policy.encode([DISTINCT[index] for index in prompt]), [], []
    for start in range(0, len(prompt), batch_size):
        rows = torch.arange(start, start + batch_size)
        key = NoiseKey(SEED, rows + FIRST)
        x = sample_noise((batch_size, *policy.latent_shape), table, 0, key, stream=INITIAL_LATENTS)
        states.append([x])
        outputs.append([])
        for step, timestep in enumerate(table.timesteps):
            with torch.no_grad():
                m = policy.predict(x, timestep.expand(batch_size), conditioning[rows])
            x = sampler_step(m, x, table, step, key).prev_sample
            states[-1].append(x)
            outputs[-1].append(m)
    return (torch.cat([torch.stack(batch, dim=1) for batch in batches]) for batches in (states, outputs))


SIGMAS = shifted_sigmas(STEPS, 3.0)
TABLES = {
    "ddim": lambda scheduler: StepTable.from_scheduler(scheduler, STEPS),
    "ddim-proportionate": lambda scheduler: StepTable.from_scheduler(scheduler, STEPS, credit="proportionate"),
    "ddim-window": lambda scheduler: StepTable.from_scheduler(scheduler, STEPS, window=(1, 3)),
    "flow": lambda _: StepTable.flow(SIGMAS, sde="flow", noise_level=0.7),
    "dance": lambda _: StepTable.flow(SIGMAS, sde="dance", noise_level=0.3),
    "cps": lambda _: StepTable.flow(SIGMAS, sde="cps", noise_level=0.8),
    "flow-window": lambda _: StepTable.flow(SIGMAS, sde="flow", noise_level=0.7, window=(1, 3)),
    "ode": lambda _: StepTable.flow(SIGMAS, sde="flow", noise_level=0.0),
}


@pytest.mark.parametrize("sampler", TABLES)
def test_trajectories_are_a_plain_loops(policy, flow_policy, sampler):
    """Bit for bit."""
    used = policy if sampler.startswith("ddim") else flow_policy
    table, prompt = TABLES[sampler](used.pipeline.scheduler), [0, 1, 0, 2, 1, 2]
    trajectory = run(used, table, prompt, batch_size=3)
    states, outputs = plain_loop(used, table, prompt, 3)
    assert torch.equal(trajectory.states, states)
    assert torch.equal(trajectory.model_outputs, outputs)
    assert torch.equal(trajectory.latents, states[:, -1])
    assert torch.equal(trajectory.conditioning[trajectory.prompt].embeddings, used.encode(DISTINCT)[prompt].embeddings)


def test_one_engine_serves_every_table(policy, flow_policy):
    """Tables of one length and of others in turn, recorded or not: each rollout is as a new engine's."""
    engine = RolloutEngine(flow_policy, 3)
    for sampler in ("flow", "ode", "dance", "flow"):
        table = TABLES[sampler](None)
        for record in (True, False):
            used, new = (run(flow_policy, table, batch_size=3, engine=e, record=record) for e in (engine, None))
            assert torch.equal(used.states, new.states) and torch.equal(used.model_outputs, new.model_outputs)
    short = StepTable.flow(shifted_sigmas(2, 3.0), sde="flow", noise_level=0.7)
    assert run(flow_policy, short, engine=engine).states.shape[1] == 3


def tensors_alive():
    gc.collect()
    # not the fake ones of torch.compile, and none that is sparse
    alive = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    alive = [thing for thing in alive if thing.layout is torch.strided]
    storages = {thing.untyped_storage().data_ptr(): thing.untyped_storage().nbytes() for thing in alive}
    return len(alive), sum(storages.values())


def test_buffers_are_reused(policy, table):
    """Over 50 rollouts nothing grows: as many tensors and bytes live after the last as after the first."""
    engine = RolloutEngine(policy, 2)
    short = StepTable.from_scheduler(policy.pipeline.scheduler, 2)

    def rollouts(seed):
        run(policy, short, seed=seed, engine=engine)
        run(policy, short, seed=seed, engine=engine, record=False)

    rollouts(0)
    first = tensors_alive()
    for seed in range(1, 25):
        rollouts(seed)
    assert tensors_alive() == first
    # a trajectory is the caller's alone
    trajectory = weakref.ref(run(policy, short, engine=engine).states)
    gc.collect()
    assert trajectory() is None


def test_a_trajectory_is_not_written_to_again(policy, table):
    engine = RolloutEngine(policy, 5)
    first = run(policy, table, engine=engine)
    states, outputs = first.states.clone(), first.model_outputs.clone()
    run(policy, table, engine=engine, seed=SEED + 1)
    assert torch.equal(first.states, states) and torch.equal(first.model_outputs, outputs)


def test_weights_that_change_are_seen(policy, table):
    engine = RolloutEngine(policy, 5)
    before = run(policy, table, engine=engine)
    weight = next(w for name, w in policy.denoiser.named_parameters() if w.requires_grad and "lora_B" in name)
    with torch.no_grad():
        weight.add_(0.5)
    try:
        after = run(policy, table, engine=engine)
        assert torch.equal(after.states, run(policy, table).states)
        assert not torch.equal(after.latents, before.latents)
    finally:
        with torch.no_grad():
            weight.sub_(0.5)
    assert torch.equal(run(policy, table, engine=engine).latents, before.latents)


def test_capture_key(policy):
    """Changes with what a captured graph would not follow, and not with what it would."""
    key = policy.capture_key()
    weight = next(w for w in policy.denoiser.parameters() if w.requires_grad)
    with torch.no_grad():
        weight.add_(1).sub_(1)
    assert policy.capture_key() == key
    policy.denoiser.disable_adapters()
    assert policy.capture_key() != key
    policy.denoiser.enable_adapters()
    assert policy.capture_key() == key
    data = weight.data
    weight.data = data.clone()
    assert policy.capture_key() != key
    weight.data = data
    policy.guidance_scale += 1
    assert policy.capture_key() != key
    policy.guidance_scale -= 1
    assert policy.capture_key() == key


def test_graphs_need_a_gpu(policy):
    with pytest.raises(ValueError, match="graphs=True needs a CUDA device and the policy is on cpu"):
        RolloutEngine(policy, 2, graphs=True)


def noise_of(trajectory, table):
    """float64 (N, T, C, H, W): the z of every stored state but the first."""
    a, b, std = (column.view(-1, 1, 1, 1) for column in (table.sample_coef, table.output_coef, table.std))
    before, after = trajectory.states[:, :-1].double(), trajectory.states[:, 1:].double()
    return (after - a * before - b * trajectory.model_outputs.double()) / std


def test_steps_draw_the_noise_of_their_key(policy, table):
    """x' = a x + b m + s z holds for what was stored and for the noise of the sample's key, to float32's rounding."""
    trajectory = run(policy, table)
    index = torch.arange(FIRST, FIRST + len(PROMPT))
    shape = (len(PROMPT), *policy.latent_shape)
    drawn = [sample_noise(shape, table, step, NoiseKey(SEED, index)) for step in range(STEPS)]
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
    tail = run(policy, table, PROMPT[2:], first_index=FIRST + 2)
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
    other = run(policy, table, [0], seed=SEED + 1, batch_size=1)
    assert not torch.equal(other.states[0, 0], first.states[0, 0])


def test_first_latents_are_the_noise_of_their_own_stream(policy, table):
    index = torch.arange(FIRST, FIRST + len(PROMPT))
    shape = (len(PROMPT), *policy.latent_shape)
    expected = sample_noise(shape, table, 0, NoiseKey(SEED, index), stream=INITIAL_LATENTS)
    assert torch.equal(run(policy, table).states[:, 0], expected)


def test_without_record_the_latents_are_the_same(policy, table):
    recorded, bare = run(policy, table, batch_size=2), run(policy, table, batch_size=2, record=False)
    assert torch.equal(recorded.latents, bare.latents)
    assert bare.states.shape[1] == 1 and bare.model_outputs.numel() == 0


def test_after_step_is_called_after_every_step_and_stop_ends_the_rollout(policy, table):
    calls = []
    run(policy, table, batch_size=2, after_step=lambda: calls.append(1))
    assert len(calls) == 3 * STEPS
    engine, calls = RolloutEngine(policy, 2), []
    with pytest.raises(Interrupted):
        run(policy, table, engine=engine, after_step=lambda: calls.append(1), stop=lambda: len(calls) == STEPS + 2)
    assert len(calls) == STEPS + 2
    # and leaves nothing behind
    assert torch.equal(run(policy, table, engine=engine).states, run(policy, table, batch_size=2).states)


def test_a_trajectory_knows_its_table(policy, table):
    other = StepTable.from_scheduler(policy.pipeline.scheduler, STEPS, eta=0.5)
    engine = RolloutEngine(policy, 5)
    assert [run(policy, used, engine=engine).table for used in (table, other)] == [table, other]
    assert run(policy, table, engine=engine, record=False).table is table


def test_spans_name_what_a_profile_shows(policy, table):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        policy.decode(run(policy, table).latents)
    spans = {event.name: event for event in profile.events() if event.name in ("sample", "decode")}
    assert spans.keys() == {"sample", "decode"}
    # the denoiser's attention is inside of the one, the autoencoder's convolutions are inside of the other
    for name, inner in (("sample", "aten::scaled_dot_product_attention"), ("decode", "aten::conv2d")):
        span = spans[name].time_range
        inside = [e for e in profile.events() if e.name == inner and span.start <= e.time_range.start <= span.end]
        assert inside
