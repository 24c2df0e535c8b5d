"""What only a GPU can show: launches, waits, captured graphs, streams, devices and sizes beyond 32 bits."""

import pytest
import torch

from pcpo_fast import (
    Guidance,
    NoiseKey,
    Reference,
    StoredStates,
    policy_loss,
    reference,
    sample_noise,
    sampler_step,
    step_log_prob,
    step_log_ratio,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use")

SHAPE = (6, 4, 64, 64)


@pytest.fixture
def impl():
    return "triton"


@pytest.fixture
def inputs(table):
    """Static buffers, as a captured graph reads them: bfloat16 outputs, float32 latents, index and seed tensors."""
    generator = torch.Generator("cuda").manual_seed(0)
    x, *outputs = (torch.randn(SHAPE, generator=generator, device="cuda") for _ in range(4))
    cond, uncond, new = (t.bfloat16() for t in outputs)
    step = torch.arange(6, device="cuda")
    key = NoiseKey(torch.tensor(5, device="cuda"), torch.arange(6, device="cuda") + 2**40)
    return cond, uncond, x, new.requires_grad_(), step, key, torch.randn(6, generator=generator, device="cuda")


def run_all(inputs, table):
    """One of every op with a gradient where it has one, from every source of z and m_old; everything they return."""
    cond, uncond, x, new, step, key, advantages = inputs
    out = sampler_step(cond, x, table, step, key, guidance=Guidance(uncond, 5.0), return_mean=True)
    m_old, z, states = out.model_output, out.noise, StoredStates(x, out.prev_sample)
    results = [*out, sample_noise(SHAPE, table, step, key)]
    weights = advantages.abs()
    calls = [((m_old, z), {"objective": objective}) for objective in reference.OBJECTIVES]
    calls += [
        ((m_old, key), {"kl": Reference(cond, 0.1), "clip_range": (0.1, 0.2)}),
        ((m_old, states), {"row_reduction": "none", "kl": Reference(cond, weights), "row_weights": weights}),
        ((None, states._replace(noise=z)), {"row_reduction": "sum", "guidance": Guidance(uncond, 5.0)}),
        ((None, states._replace(noise=key)), {"row_reduction": "none"}),
    ]
    for source, settings in calls:
        policy = policy_loss(new, *source, table, step, advantages, **{"clip_range": 0.1, **settings})
        results += [*policy, *torch.autograd.grad(policy.loss.sum(), new)]
    for per_row in (
        step_log_prob(new, x, out.prev_sample, table, step),
        step_log_ratio(new, m_old, states, table, step),
        step_log_ratio(new, None, states._replace(noise=key), table, step),
    ):
        results += [per_row, *torch.autograd.grad(per_row.sum(), new)]
    return [t.detach() for t in results if t is not None]


def test_nothing_waits_for_the_gpu(inputs, table):
    run_all(inputs, table)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_all(inputs, table)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_one_launch_forward_and_one_backward(inputs, table):
    cond, uncond, x, new, step, key, advantages = inputs

    def launches(function):
        function()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            function()
            torch.cuda.synchronize()
        return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]

    guidance, ref = Guidance(uncond, 5.0), Reference(uncond, advantages.abs())
    assert len(launches(lambda: sampler_step(cond, x, table, step, key, guidance=guidance))) == 1
    states = StoredStates(x, x, key)
    for source, settings in (((cond, x), {}), ((None, states), {"kl": ref, "row_reduction": "none"})):
        arguments = (new, *source, table, step, advantages)
        assert len(launches(lambda: policy_loss(*arguments, **settings))) == 1  # noqa: B023
        loss = policy_loss(*arguments, **settings).loss
        incoming = torch.ones_like(loss)
        names = launches(lambda: torch.autograd.grad(loss, new, incoming, retain_graph=True))  # noqa: B023
        assert sum("gradient_kernel" in name for name in names) == 1 and len(names) <= 2


def test_a_captured_graph_follows_its_inputs(inputs, table):
    """Replays, after every input has changed, give the eager ops' bits; the step advances on the device."""
    cond, uncond, x, new, step, key, advantages = inputs
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run_all(inputs, table)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_all(inputs, table)
        step.add_(1)
    seen = []
    for _ in range(3):
        with torch.no_grad():
            for tensor in (cond, uncond, x, new, advantages):
                tensor.copy_(torch.randn_like(tensor))
            key.seed.add_(1)
        eager = run_all(inputs, table)
        graph.replay()
        assert all(map(torch.equal, eager, captured))
        seen.append(captured[0].clone())
    assert step[0] == 3 and not torch.equal(seen[0], seen[1])


def test_counters_are_left_at_zero(inputs, table):
    from pcpo_fast.kernels.launch import _tickets

    # more rows than the first counters are for, then few again
    many = torch.randn((5000, 8), device="cuda")
    for _ in range(2):
        run_all(inputs, table)
        once = step_log_prob(many, many, many, table, 3)
        assert torch.equal(once, step_log_prob(many, many, many, table, 3))
    assert _tickets and not any(counters.any() for counters in _tickets.values())


def test_compiled_into_graphs(inputs, table):
    """torch.compile's own CUDA graphs: two functions that share the counters, over several calls."""
    cond, uncond, x, _, step, key, advantages = inputs

    def sample(m):
        return sampler_step(m, x, table, step, key, guidance=Guidance(uncond, 5.0)).log_prob

    def loss(m):
        return policy_loss(m, cond, x, table, step, advantages).loss

    for function in (sample, loss):
        want = function(uncond)
        compiled = torch.compile(function, mode="reduce-overhead")
        for _ in range(4):
            assert torch.equal(compiled(uncond), want)


def test_streams_do_not_disturb_each_other(inputs, table):
    want = run_all(inputs, table)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(run_all(inputs, table))
    torch.cuda.synchronize()
    assert all(torch.equal(*pair) for result in results for pair in zip(want, result, strict=True))


def test_beyond_32_bits(table):
    """Rows behind the first 2^31 elements get the bits that they get alone."""
    numel = 262_144
    rows = 2**31 // numel + 2
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    new = torch.randn((rows, numel), device="cuda", dtype=torch.bfloat16).requires_grad_()
    old = new.detach().roll(1, 0)
    step, advantages = torch.arange(rows, device="cuda") % 19, torch.randn(rows, device="cuda")
    index = torch.arange(rows, device="cuda")
    seed = torch.tensor(3, device="cuda")
    out = policy_loss(new, old, NoiseKey(seed, index), table, step, advantages, clip_range=1e9)
    (gradient,) = torch.autograd.grad(out.loss * rows, new)
    for row in (0, rows - 1):
        part = slice(row, row + 1)
        m, key = new[part].detach().requires_grad_(), NoiseKey(seed, index[part])
        alone = policy_loss(m, old[part], key, table, step[part], advantages[part], clip_range=1e9)
        assert torch.equal(alone.log_ratio, out.log_ratio[part])
        torch.testing.assert_close(torch.autograd.grad(alone.loss, m)[0], gradient[part], rtol=2**-7, atol=0)


def test_steps_outside_the_table(inputs, table):
    """NaN in their rows, whatever lies in memory there; nothing is read outside of the table and nothing waits."""
    cond, _, x, new, step, key, advantages = inputs
    step = step.clone()
    step[1], step[4] = -1, 10**12
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = sampler_step(cond, x, table, step, key)
        policy = policy_loss(new, cond, x, table, step, advantages, row_reduction="none")
        log_prob = step_log_prob(new, x, x, table, step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for per_row in (out.log_prob, policy.loss, policy.log_ratio, policy.old_kl, log_prob):
        assert per_row.isnan().tolist() == [False, True, False, False, True, False]


def test_numbers_per_row_that_are_not_finite(inputs, table):
    cond, _, x, new, step, _, advantages = inputs
    advantages = advantages.clone()
    advantages[3] = float("nan")
    loss = policy_loss(new, cond, x, table, step, advantages, row_reduction="none").loss
    assert loss.isnan().tolist() == [False] * 3 + [True] + [False] * 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_device_than_the_current_one(inputs, table):
    want = run_all(inputs, table)
    *tensors, key, advantages = inputs
    there = [t.detach().to("cuda:1") for t in tensors]
    there[3].requires_grad_()
    key = NoiseKey(*(t.to("cuda:1") for t in key))
    got = run_all((*there, key, advantages.to("cuda:1")), table.to("cuda:1"))
    assert all(torch.equal(a, b.to(a.device)) for a, b in zip(want, got, strict=True))
