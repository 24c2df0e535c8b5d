import math

import pytest
import torch
import triton
import triton.language as tl

from pcpo_fast import NoiseKey, sample_noise
from pcpo_fast.reference.philox import first_counters, noise_tile, philox4x32

# the published vectors of Random123 for philox4x32 with 10 rounds: counter, key, answer
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
EPS = torch.finfo(torch.float32).eps
INDEX_DTYPES = (torch.int64, torch.int32)


def words(text):
    return tuple(torch.tensor(int(word, 16)) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter, key, answer):
    assert philox4x32(words(counter), words(key)) == words(answer)


@triton.jit
def _randint_kernel(seed_ptr, offset_ptr, out_ptr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    bits = tl.randint4x(tl.load(seed_ptr), tl.load(offset_ptr + lane))
    for i in tl.static_range(4):
        tl.store(out_ptr + i * BLOCK + lane, bits[i].to(tl.uint32, bitcast=True).to(tl.int64))


def test_triton_draws_the_same_bits():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seed = torch.tensor(0x1234_5678_9ABC_DEF0, device=device)
    offset = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 7, 2**62 + 3, 5], device=device)
    out = torch.empty((4, 8), dtype=torch.int64, device=device)
    _randint_kernel[(1,)](seed, offset, out, BLOCK=8)
    low, zero = offset & 0xFFFFFFFF, torch.zeros_like(offset)
    expected = philox4x32((low, offset >> 32, zero, zero), (seed & 0xFFFFFFFF, seed >> 32))
    assert torch.equal(out, torch.stack(expected))


@pytest.mark.parametrize("numel", [4096, 5003])
def test_normals_match_float64(numel, table, impl):
    """Box-Muller in float64, of the bits at the documented counters."""
    index = torch.tensor([5], device=table.rows.device)
    noise = sample_noise((1, numel), table, 3, NoiseKey(9, index), impl=impl)
    quads = -(-numel // 4)
    offset = (5 * len(table.rows) + 3) * quads + torch.arange(quads)
    zero = torch.zeros_like(offset)
    bits = torch.stack(philox4x32((offset, zero, zero, zero), (torch.tensor(9), torch.tensor(0))))
    signed = torch.where(bits >= 2**31, bits - 2**32, bits)
    folded = torch.where(signed < 0, -signed - 1, signed)
    # the uniforms are defined in float32, the angles exactly
    u = folded[0::2].float() * 4.6566127342e-10
    radius = (-2 * u.clamp(min=1e-7).double().log()).sqrt()
    angle = folded[1::2].double() * (2 * math.pi / 2**31)
    pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    expected = pairs.flatten(0, 1).T.flatten()[:numel]
    # a float32 logarithm, root, cosine and product are each good to a few units in the last place
    torch.testing.assert_close(noise[0].double().cpu(), expected, rtol=8 * EPS, atol=4e-7)


def test_moments(table, impl):
    rows, numel = 8, 16384
    index = torch.arange(rows, device=table.rows.device)
    noise = sample_noise((rows, numel), table, 0, NoiseKey(1, index), impl=impl).double().flatten()
    count = rows * numel
    # five standard errors of the first four moments of N(0, 1)
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(noise.pow(power).mean() - expected) < 5 * math.sqrt(variance / count)


def test_every_coordinate_draws_its_own(table, impl):
    """Seed, step, sample and stream each give noise that is uncorrelated with the rest."""
    numel = 4096

    def draw(step=0, seed=1, index=0, stream=0):
        index = torch.tensor([index], device=table.rows.device)
        return sample_noise((1, numel), table, step, NoiseKey(seed, index), stream=stream, impl=impl)[0]

    draws = torch.stack([draw(), draw(step=1), draw(seed=2), draw(index=1), draw(index=2**40), draw(stream=1)])
    correlation = torch.corrcoef(draws) - torch.eye(len(draws), device=draws.device)
    assert correlation.abs().max() < 5 / math.sqrt(numel)


@pytest.mark.parametrize("numel", [1, 6, 1001, 5000])
def test_does_not_depend_on_the_batch(table, impl, numel):
    index = torch.tensor([7, 0, 3], device=table.rows.device)
    step = torch.tensor([2, 2, 11], device=table.rows.device)
    together = sample_noise((3, numel), table, step, NoiseKey(4, index), impl=impl)
    alone = [
        sample_noise((1, numel), table, int(step[i]), NoiseKey(4, index[i : i + 1]), impl=impl)[0] for i in range(3)
    ]
    assert torch.equal(together, torch.stack(alone))


def test_tiles_are_parts_of_the_row():
    seed, index, step = torch.tensor(3), torch.arange(3), torch.tensor([4, 0, 1])
    counters = first_counters(index, step, 20, 1003)
    whole = noise_tile(seed, counters, slice(0, 1003))
    tile = noise_tile(seed, counters[1:], slice(400, 1003))
    assert torch.equal(tile, whole[1:, 400:])


def test_seed_may_be_a_tensor_and_indices_small_integers(table, impl):
    device = table.rows.device
    index, seed = torch.arange(2, device=device) + 5, torch.tensor(123, device=device)
    want = sample_noise((2, 3, 5), table, 1, NoiseKey(123, index), impl=impl)
    assert want.shape == (2, 3, 5) and want.dtype == torch.float32
    steps = [torch.full(shape, 1, dtype=dtype, device=device) for shape in ((), (2,)) for dtype in INDEX_DTYPES]
    for step in (1, *steps):
        for key in (NoiseKey(123, index), NoiseKey(seed, index), NoiseKey(seed, index.int())):
            assert torch.equal(want, sample_noise((2, 3, 5), table, step, key, impl=impl))


def test_small_integers_do_not_wrap_around(table, impl, device):
    """A counter has 64 bits, whatever the indices have."""
    index, step = torch.tensor([2**31 - 1, 2**28], device=device), torch.tensor([3, 4], device=device)
    want = sample_noise((2, 40), table, step, NoiseKey(1, index), impl=impl)
    for few, small in ((step, index.int()), (step.int(), index), (step.int(), index.int())):
        assert torch.equal(want, sample_noise((2, 40), table, few, NoiseKey(1, small), impl=impl))


def test_one_sample_keeps_its_noise_in_another_batch(table, impl):
    """Nothing counts rows: the second batch of a seed has its own noise because its samples have other indices."""
    first, second = (torch.arange(2, device=table.rows.device) + start for start in (0, 1))
    noise = [sample_noise((2, 6), table, 0, NoiseKey(1, index), impl=impl) for index in (first, second)]
    assert torch.equal(noise[0][1], noise[1][0]) and not torch.equal(noise[0][0], noise[1][0])


@pytest.mark.parametrize("outside", [-1, 20, 2**40])
def test_steps_outside_the_table(outside, table, impl):
    index = torch.arange(3, device=table.rows.device)
    step = torch.tensor([0, outside, 19], device=table.rows.device)
    if impl == "torch":
        with pytest.raises(ValueError, match=rf"^step holds .*{outside}.*; give indices from 0 to 19"):
            sample_noise((3, 5), table, step, NoiseKey(1, index), impl=impl)
        return
    noise = sample_noise((3, 5), table, step, NoiseKey(1, index), impl=impl)
    assert noise.isnan().all(dim=1).tolist() == [False, True, False] and noise[[0, 2]].isfinite().all()
