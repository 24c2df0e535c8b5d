import pytest
import torch

from pcpo_fast import Guidance, NoiseKey, sample_noise, sampler_step, step_log_prob
from pcpo_fast.columns import COLUMNS
from pcpo_fast.reference.sampler_step import sampler_step_oracle
from pcpo_fast.reference.step_log_prob import step_log_prob_oracle

EPS = torch.finfo(torch.float32).eps
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# dtypes of the model's outputs and of the sample
DTYPES = {"fp32": (F32, F32), "bf16": (BF16, BF16), "fp16": (F16, F16), "mixed": (BF16, F32)}
SHAPES = [(5, 1), (1, 3, 5, 7), (6, 4, 8, 8), (3, 9001)]
INDEX_DTYPES = (torch.int64, torch.int32)
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
    """a, b and s at each row, with the dimensions of `like`, in float64."""
    names = ("sample_coef", "output_coef", "std")
    columns = (table.rows[step, COLUMNS.index(name)].double() for name in names)
    return (column.view(-1, *[1] * (like.dim() - 1)) for column in columns)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("guided", [False, True])
def test_matches_float64(guided, dtypes, shape, table, impl, poisoned):
    cond, uncond, x, z, step = make_inputs(shape, table, DTYPES[dtypes])
    guidance = Guidance(uncond, GUIDANCE) if guided else None
    out = sampler_step(cond, x, table, step, z, guidance=guidance, return_mean=True, impl=impl)
    assert (out.prev_sample.dtype, out.model_output.dtype) == (x.dtype, cond.dtype)
    assert out.noise.dtype == out.log_prob.dtype == out.mean.dtype == F32
    assert all(t.is_contiguous() and t.shape == x.shape for t in (out.prev_sample, out.noise, out.mean))
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
    # the mean is not rounded to the sample's dtype
    want_mean = a * x.double() + b * out.model_output.double()
    assert ((out.mean - want_mean).abs() <= 2 * EPS * mean_size).all()

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
    out = sampler_step(cond, x, table, step, z, guidance=Guidance(uncond, GUIDANCE), impl=impl)
    later = step_log_prob(out.model_output, x, out.prev_sample, table, step, impl=impl)
    assert torch.equal(out.log_prob, later)
    random = table.trainable[step]
    shift = (out.noise - z)[random].abs().max()
    assert shift > 1e-4 if x.dtype != F32 else shift < 1e-4


@pytest.mark.parametrize("dtypes", DTYPES)
def test_unnormalized_log_prob(dtypes, table, unnormalized_table, impl):
    """The same step, bit for bit, with -(x' - a x - b m)^2 of what is stored."""
    cond, uncond, x, z, step = make_inputs((6, 4, 16, 16), table, DTYPES[dtypes])
    settings = {"guidance": Guidance(uncond, GUIDANCE), "impl": impl}
    out = sampler_step(cond, x, unnormalized_table, step, z, **settings)
    assert all(map(torch.equal, out[:3], sampler_step(cond, x, table, step, z, **settings)[:3]))
    later = step_log_prob(out.model_output, x, out.prev_sample, unnormalized_table, step, impl=impl)
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


def same(*steps) -> bool:
    """The same bits in everything that was returned."""
    return all(
        (ours is None) == (theirs is None) and (ours is None or torch.equal(ours, theirs))
        for other in steps[1:]
        for ours, theirs in zip(steps[0], other, strict=True)
    )


def test_deterministic_rows(table, impl):
    cond, _, x, z, step = make_inputs((4, 3, 5), table)
    out = sampler_step(cond, x, table, step, z, return_mean=True, impl=impl)
    other = sampler_step(cond, x, table, step, z + 1, impl=impl)
    changed = (out.prev_sample != other.prev_sample).flatten(1).any(1)
    assert changed.tolist() == [True, False, True, True]
    assert out.log_prob[1] == 0 and not out.noise[1].any() and torch.equal(out.prev_sample[1], out.mean[1])


def test_credit_and_guard_leave_the_sampler_alone(table, native_table, impl):
    cond, _, x, z, step = make_inputs((4, 3, 5), table)
    assert same(*(sampler_step(cond, x, t, step, z, impl=impl) for t in (table, native_table, table.guarded())))


def test_draws_what_sample_noise_regenerates(table, impl):
    cond, _, x, _, step = make_inputs((4, 3, 5), table)
    key = NoiseKey(11, torch.tensor([9, 2, 2**33, 0], device=x.device))
    drawn = sampler_step(cond, x, table, step, key, impl=impl)
    noise = sample_noise(x.shape, table, step, key, impl=impl)
    assert same(drawn, sampler_step(cond, x, table, step, noise, impl=impl))


@pytest.mark.parametrize("shape", [(4, 1237), (3, 40001), (5, 1)], ids=str)
def test_a_row_alone_has_the_same_bits_on_every_run(shape, table, impl):
    cond, uncond, x, _, step = make_inputs(shape, table)
    index = torch.arange(shape[0], device=x.device) + 100

    def run(rows):
        guidance, key = Guidance(uncond[rows], 3.0), NoiseKey(1, index[rows])
        settings = {"guidance": guidance, "return_mean": True, "impl": impl}
        return sampler_step(cond[rows], x[rows], table, step[rows], key, **settings)

    together = run(slice(None))
    assert same(together, run(slice(None)))
    for i in range(shape[0]):
        row = slice(i, i + 1)
        assert same(run(row), [batch[row] for batch in together])


@pytest.mark.parametrize("return_noise", [True, False])
@pytest.mark.parametrize("return_mean", [True, False])
def test_what_is_not_asked_for_is_left_out(return_mean, return_noise, table, impl, poisoned):
    cond, _, x, _, step = make_inputs((4, 3, 5), table)
    key = NoiseKey(1, torch.arange(4, device=x.device))
    everything = sampler_step(cond, x, table, step, key, return_mean=True, impl=impl)
    out = sampler_step(cond, x, table, step, key, return_noise=return_noise, return_mean=return_mean, impl=impl)
    assert (out.noise is None, out.mean is None) == (not return_noise, not return_mean)
    wanted = everything._replace(
        noise=everything.noise if return_noise else None, mean=everything.mean if return_mean else None
    )
    assert same(out, wanted)


def test_the_output_is_handed_through_without_guidance(table, impl):
    cond, _, x, z, step = make_inputs((4, 3, 5), table)
    assert sampler_step(cond, x, table, step, z, impl=impl).model_output.data_ptr() == cond.data_ptr()


def test_not_contiguous(table, impl):
    cond, uncond, x, z, step = make_inputs((4, 6, 5, 3), table)
    plain = [cond, uncond, x, z]
    strided = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in plain]

    def run(tensors, step):
        cond, uncond, x, z = tensors
        return sampler_step(cond, x, table, step, z, guidance=Guidance(uncond, 3.0), return_mean=True, impl=impl)

    assert same(run(plain, step), run(strided, torch.stack([step, step], 1)[:, 0]))


def test_one_step_for_all_rows_and_small_integers(table, impl):
    """An int, a 0-d tensor, int32 and int64 say the same, of steps and of sample indices."""
    cond, _, x, z, _ = make_inputs((4, 6, 5), table)
    index = torch.arange(4, device=x.device)
    forms = [torch.full(shape, 5, dtype=dtype, device=x.device) for shape in ((), (4,)) for dtype in INDEX_DTYPES]
    for noise, other in ((z, z), (NoiseKey(3, index), NoiseKey(3, index.int()))):
        want = sampler_step(cond, x, table, 5, noise, impl=impl)
        assert same(want, *(sampler_step(cond, x, table, form, other, impl=impl) for form in forms))


@pytest.mark.parametrize("outside", [-1, 20, 2**40])
@pytest.mark.parametrize("drawn", [False, True])
def test_steps_outside_the_table(drawn, outside, table, impl):
    """ValueError that names them on the CPU; the kernels read no foreign memory, and the row is NaN."""
    cond, _, x, z, step = make_inputs((4, 6, 5), table)
    step[2] = outside
    noise = NoiseKey(3, torch.arange(4, device=x.device)) if drawn else z
    if impl == "torch":
        with pytest.raises(ValueError, match=rf"^step holds .*{outside}.*; give indices from 0 to 19"):
            sampler_step(cond, x, table, step, noise, impl=impl)
        return
    out = sampler_step(cond, x, table, step, noise, return_mean=True, impl=impl)
    for values in (out.prev_sample, out.noise, out.mean, out.log_prob):
        assert values.view(4, -1).isnan().all(dim=1).tolist() == [False, False, True, False]


def test_has_no_gradient(table, impl):
    cond, uncond, x, z, step = make_inputs((2, 3), table)
    cond.requires_grad_()
    for guidance in (None, Guidance(uncond, 3.0)):
        out = sampler_step(cond, x, table, step, z, guidance=guidance, return_mean=True, impl=impl)
        assert not any(t.requires_grad for t in out)
