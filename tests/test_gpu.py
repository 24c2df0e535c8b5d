"""What only a GPU can show: launches, waits, captured graphs, streams, devices and sizes beyond 32 bits."""

import pytest
import torch

from pcpo_fast import ops

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
    key = {"seed": torch.tensor(5, device="cuda"), "sample_index": torch.arange(6, device="cuda") + 2**40}
    return cond, uncond, x, new.requires_grad_(), step, key, torch.randn(6, generator=generator, device="cuda")


def run_all(inputs, table):
    """One of every op with a gradient where it has one; everything they return."""
    cond, uncond, x, new, step, key, advantages = inputs
    out = ops.sampler_step(cond, x, table, step, uncond_output=uncond, guidance_scale=5.0, **key)
    m_old, z = out.model_output, out.noise
    results = [*out, ops.sample_noise(SHAPE, table, step, **key)]
    for objective in ("pcpo", "ppo", "guard"):
        policy = ops.policy_loss(new, m_old, z, table, step, advantages, objective=objective, clip_range=0.1)
        results += [*policy, *torch.autograd.grad(policy.loss, new)]
    kl = {"ref_model_output": cond, "kl_weight": 0.1}
    policy = ops.policy_loss(new, m_old, None, table, step, advantages, clip_range=0.1, **key, **kl)
    results += [*policy, *torch.autograd.grad(policy.loss, new)]
    for per_row in (
        ops.step_log_prob(new, x, out.prev_sample, table, step),
        ops.step_log_ratio(new, m_old, None, table, step, sample=x, prev_sample=out.prev_sample),
    ):
        results += [per_row, *torch.autograd.grad(per_row.sum(), new)]
    return [t.detach() for t in results]


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

    assert len(launches(lambda: ops.sampler_step(cond, x, table, step, uncond_output=uncond, **key))) == 1
    assert len(launches(lambda: ops.policy_loss(new, cond, x, table, step, advantages))) == 1
    loss = ops.policy_loss(new, cond, x, table, step, advantages).loss
    # the incoming gradient, a scalar 1, is a fill
    names = launches(lambda: torch.autograd.grad(loss, new, retain_graph=True))
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
            key["seed"].add_(1)
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
        once = ops.step_log_prob(many, many, many, table, 3)
        assert torch.equal(once, ops.step_log_prob(many, many, many, table, 3))
    assert _tickets and not any(counters.any() for counters in _tickets.values())


def test_compiled_into_graphs(inputs, table):
    """torch.compile's own CUDA graphs: two functions that share the counters, over several calls."""
    cond, uncond, x, _, step, key, advantages = inputs

    def sample(m):
        return ops.sampler_step(m, x, table, step, uncond_output=uncond, guidance_scale=5.0, **key).log_prob

    def loss(m):
        return ops.policy_loss(m, cond, x, table, step, advantages).loss

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
    settings = {"seed": torch.tensor(3, device="cuda"), "reduction": "mean", "clip_range": 1e9}
    out = ops.policy_loss(new, old, None, table, step, advantages, sample_index=index, **settings)
    (gradient,) = torch.autograd.grad(out.loss * rows, new)
    for row in (0, rows - 1):
        part = slice(row, row + 1)
        m = new[part].detach().requires_grad_()
        alone = ops.policy_loss(
            m, old[part], None, table, step[part], advantages[part], sample_index=index[part], **settings
        )
        assert torch.equal(alone.log_ratio, out.log_ratio[part])
        torch.testing.assert_close(torch.autograd.grad(alone.loss, m)[0], gradient[part], rtol=2**-7, atol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_device_than_the_current_one(inputs, table):
    import types

    want = run_all(inputs, table)
    there = [t.to("cuda:1") if torch.is_tensor(t) else {k: v.to("cuda:1") for k, v in t.items()} for t in inputs]
    there[3] = there[3].detach().requires_grad_()
    got = run_all(there, types.SimpleNamespace(rows=table.rows.to("cuda:1")))
    assert all(torch.equal(a, b.to(a.device)) for a, b in zip(want, got, strict=True))
