import pytest
import torch

from pcpo_fast import ops
from pcpo_fast.reference.sampler_step import sampler_step_oracle
from pcpo_fast.reference.step_log_prob import step_log_prob_oracle

EPS = torch.finfo(torch.float32).eps
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# of the model's outputs and of the sample
DTYPES = {"fp32": (F32, F32), "bf16": (BF16, BF16), "fp16": (F16, F16), "mixed": (BF16, F32)}
SHAPES = [(5, 1), (1, 3, 5, 7), (6, 4, 8, 8), (3, 9001)]
GUIDANCE = 5.0


def make_inputs(shape, table, dtypes=DTYPES["fp32"]):
    """Conditional and unconditional outputs, sample, noise and step; given three rows, the second is deterministic."""
    generator = torch.Generator().manual_seed(sum(shape))
    cond, uncond, x, z = (torch.randn(shape, generator=generator).to(table.rows.device) for _ in range(4))
    step = torch.randint(0, 19, shape[:1], generator=generator)
    if len(step) > 2:
        step[1] = 19
    model_dtype, sample_dtype = dtypes
    return cond.to(model_dtype), uncond.to(model_dtype), x.to(sample_dtype), z, step.to(x.device)


def per_row(table, step, like):
    """The table's first three columns at each row, with the dimensions of `like`, in float64."""
    return (column.view(-1, *[1] * (like.dim() - 1)) for column in table.rows[step].double().unbind(1)[:3])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("guided", [False, True])
def test_matches_float64(guided, dtypes, shape, table, impl, poisoned):
    cond, uncond, x, z, step = make_inputs(shape, table, DTYPES[dtypes])
    out = ops.sampler_step(
        cond, x, table, step, uncond_output=uncond if guided else None, guidance_scale=GUIDANCE, noise=z, impl=impl
    )
    assert (out.prev_sample.dtype, out.model_output.dtype) == (x.dtype, cond.dtype)
    assert out.noise.dtype == out.log_prob.dtype == F32
    # the guided output is rounded to its dtype, at worst towards 0 (as the interpreter does)
    _, want_output, _ = sampler_step_oracle(
        cond, x, table.rows, step, z, uncond_output=uncond if guided else None, guidance_scale=GUIDANCE
    )
    output_size = GUIDANCE * (cond.double().abs() + uncond.double().abs()) + uncond.double().abs()
    output_error = torch.finfo(cond.dtype).eps * want_output.abs() + 2 * EPS * output_size
    assert ((out.model_output - want_output).abs() <= (output_error if guided else 0 * output_error)).all()

    # from here on the stored values count: x' from the rounded output, the rest from the rounded x'
    want_sample, _, _ = sampler_step_oracle(out.model_output, x, table.rows, step, z)
    a, b, s = per_row(table, step, x)
    mean_size = (a * x).abs() + (b * out.model_output).abs()
    sample_error = torch.finfo(x.dtype).eps * want_sample.abs() + 2 * EPS * (mean_size + (s * z).abs())
    assert ((out.prev_sample - want_sample).abs() <= sample_error).all()

    inverse = torch.where(s > 0, 1 / s, 0)
    want_noise = (out.prev_sample.double() - a * x.double() - b * out.model_output.double()) * inverse
    noise_error = 2 * EPS * (mean_size + out.prev_sample.double().abs()) * inverse + 2 * EPS * want_noise.abs()
    assert ((out.noise - want_noise).abs() <= noise_error).all()

    want_log_prob = step_log_prob_oracle(out.model_output, x, out.prev_sample, table.rows, step)
    constant = torch.where(s > 0, s, 1.0).log().abs() + 0.92
    log_prob_error = want_noise.abs() * noise_error + 16 * EPS * (want_noise.square() + constant)
    assert ((out.log_prob - want_log_prob).abs() <= log_prob_error.flatten(1).mean(1)).all()


@pytest.mark.parametrize("dtypes", DTYPES)
def test_log_prob_is_that_of_the_stored_sample(dtypes, table, impl):
    """Bit for bit what `step_log_prob` finds later, and not what the noise that was drawn would give."""
    cond, uncond, x, z, step = make_inputs((6, 4, 16, 16), table, DTYPES[dtypes])
    out = ops.sampler_step(cond, x, table, step, uncond_output=uncond, guidance_scale=GUIDANCE, noise=z, impl=impl)
    later = ops.step_log_prob(out.model_output, x, out.prev_sample, table, step, impl=impl)
    assert torch.equal(out.log_prob, later)
    random = table.rows[step, 2] > 0
    shift = (out.noise - z)[random].abs().max()
    assert shift > 1e-4 if x.dtype != F32 else shift < 1e-4


@pytest.mark.parametrize("dtypes", DTYPES)
def test_unnormalized_log_prob(dtypes, table, unnormalized_table, impl):
    """The same step, bit for bit, with -(x' - a x - b m)^2 of what is stored."""
    cond, uncond, x, z, step = make_inputs((6, 4, 16, 16), table, DTYPES[dtypes])
    settings = {"uncond_output": uncond, "guidance_scale": GUIDANCE, "noise": z, "impl": impl}
    out = ops.sampler_step(cond, x, unnormalized_table, step, **settings)
    assert all(map(torch.equal, out[:3], ops.sampler_step(cond, x, table, step, **settings)[:3]))
    later = ops.step_log_prob(out.model_output, x, out.prev_sample, unnormalized_table, step, impl=impl)
    assert torch.equal(out.log_prob, later)
    a, b, s = per_row(table, step, x)
    stored = (out.model_output, out.prev_sample)
    m, prev_x = (t.double() for t in stored)
    distance = torch.where(s > 0, prev_x - a * x.double() - b * m, 0)
    size = (a * x.double()).abs() + (b * m).abs() + prev_x.abs() + 2 * distance.abs()
    error = (4 * EPS * distance.abs() * size + 16 * EPS * distance.square()).flatten(1).mean(1)
    assert ((out.log_prob + distance.square().flatten(1).mean(1)).abs() <= error).all()
    # the oracle takes the unrounded step, which is the stored one where nothing was rounded to less than float32
    if x.dtype == F32:
        want = sampler_step_oracle(out.model_output, x, table.rows, step, z, normalized=False)[2]
        torch.testing.assert_close(out.log_prob.double(), want, rtol=1e-4, atol=0)


def test_deterministic_rows(table, impl):
    cond, _, x, z, step = make_inputs((4, 3, 5), table)
    out = ops.sampler_step(cond, x, table, step, noise=z, impl=impl)
    other = ops.sampler_step(cond, x, table, step, noise=z + 1, impl=impl)
    changed = (out.prev_sample != other.prev_sample).flatten(1).any(1)
    assert changed.tolist() == [True, False, True, True]
    assert out.log_prob[1] == 0 and not out.noise[1].any()


def test_draws_what_sample_noise_regenerates(table, impl):
    cond, _, x, _, step = make_inputs((4, 3, 5), table)
    index = torch.tensor([9, 2, 2**33, 0], device=x.device)
    drawn = ops.sampler_step(cond, x, table, step, seed=11, sample_index=index, impl=impl)
    noise = ops.sample_noise(x.shape, table, step, seed=11, sample_index=index, impl=impl)
    given = ops.sampler_step(cond, x, table, step, noise=noise, impl=impl)
    assert all(map(torch.equal, drawn, given))


@pytest.mark.parametrize("shape", [(4, 1237), (3, 40001), (5, 1)], ids=str)
def test_a_row_alone_has_the_same_bits_on_every_run(shape, table, impl):
    cond, uncond, x, _, step = make_inputs(shape, table)
    index = torch.arange(shape[0], device=x.device) + 100

    def run(rows):
        return ops.sampler_step(
            cond[rows], x[rows], table, step[rows], uncond_output=uncond[rows], guidance_scale=3.0, seed=1,
            sample_index=index[rows], impl=impl,
        )  # fmt: skip

    together = run(slice(None))
    assert all(map(torch.equal, together, run(slice(None))))
    for i in range(shape[0]):
        row = slice(i, i + 1)
        assert all(torch.equal(alone, batch[row]) for alone, batch in zip(run(row), together, strict=True))


def test_noise_may_be_left_out(table, impl):
    cond, _, x, _, step = make_inputs((4, 3, 5), table)
    kept = ops.sampler_step(cond, x, table, step, seed=1, impl=impl)
    left_out = ops.sampler_step(cond, x, table, step, seed=1, return_noise=False, impl=impl)
    assert left_out.noise is None and left_out.model_output.shape == cond.shape
    assert torch.equal(kept.prev_sample, left_out.prev_sample) and torch.equal(kept.log_prob, left_out.log_prob)


def test_default_sample_index_counts_rows(table, impl):
    cond, _, x, _, step = make_inputs((4, 3, 5), table)
    index = torch.arange(4, device=x.device)
    default = ops.sampler_step(cond, x, table, step, seed=1, impl=impl)
    assert all(map(torch.equal, default, ops.sampler_step(cond, x, table, step, seed=1, sample_index=index, impl=impl)))


def test_not_contiguous_and_int_step(table, impl):
    cond, uncond, x, z, step = make_inputs((4, 6, 5, 3), table)
    plain = [cond, uncond, x, z]
    strided = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in plain]

    def run(tensors, step):
        cond, uncond, x, z = tensors
        return ops.sampler_step(cond, x, table, step, uncond_output=uncond, guidance_scale=3.0, noise=z, impl=impl)

    assert all(map(torch.equal, run(plain, torch.full_like(step, 5)), run(strided, 5)))


def test_has_no_gradient(table, impl):
    cond, uncond, x, z, step = make_inputs((2, 3), table)
    cond.requires_grad_()
    for uncond_output in (None, uncond):
        out = ops.sampler_step(cond, x, table, step, uncond_output=uncond_output, noise=z, impl=impl)
        assert not any(t.requires_grad for t in out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": None}, "neither of noise and seed"),
        ({"seed": 1}, "both of noise and seed"),
        ({"noise": None, "seed": -1}, "0 <= seed"),
        ({"noise": None, "seed": torch.tensor(1.0)}, "0-d int64"),
        ({"noise": None, "seed": 1, "sample_index": torch.arange(2)}, r"one per row, \(3,\)"),
        ({"step": 20}, "0, ..., 19"),
        ({"step": torch.zeros(3)}, r"\.long\(\)"),
        ({"sample": torch.zeros(3, 5)}, r"sample has shape \(3, 5\)"),
        ({"sample": torch.zeros(3, 4, dtype=torch.int32)}, "torch.int32"),
        ({"sample": torch.zeros(3, 4, device="meta")}, "sample is on meta"),
        ({"impl": "cuda"}, "'auto', 'torch', 'triton'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("impl", ["torch"])
def test_errors_say_what_to_change(change, message, table, impl):
    cond, _, x, z, step = make_inputs((3, 4), table)
    arguments = {"sample": x, "table": table, "step": step, "noise": z, "impl": impl} | change
    with pytest.raises(ValueError, match=message):
        ops.sampler_step(cond, **arguments)
