"""The policy loss gives the same bits: on every run, for a row alone, and however its arguments are laid out."""

import pytest
import torch
from loss_cases import EPS, SOURCES, Result, Rows, make_rows, run, source

from pcpo_fast import step_log_ratio
from pcpo_fast.reference import affine

# everything that a pass can make
ALL = {"kl": "per row", "weighted": True, "guided": True, "clip_range": (1e-4, 2e-4)}


def row(result: Result, i: int) -> Result:
    """One row's part of a result without reduction."""
    part = slice(i, i + 1)
    outputs = (result.loss, result.log_ratio, result.clipped, result.old_kl)
    return Result(*(t[part] for t in outputs), tuple(t[part] for t in result.gradients), result.kl[part])


def assert_scaled(ours, theirs, factor: int) -> None:
    """The same bits for a power of two; else the roundings of the two terms of a gradient, which may cancel."""
    atol = 0.0 if factor & (factor - 1) == 0 else 4 * EPS * theirs.abs().max().item()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("shape", [(4, 1237), (3, 40001), (3, 4, 64, 64), (5, 1)], ids=str)
def test_a_row_alone_has_the_same_bits(shape, table, impl, device, monkeypatch):
    # tiles of one row's part and of several rows
    monkeypatch.setattr(affine, "TILE_CHUNKS_PER_THREAD", 1 if shape[-1] > 5000 else 4)
    rows = make_rows(shape, device, distance=1e-3)
    settings = {**ALL, "reduction": "sum", "row_reduction": "none"}
    together = run(rows, table, impl, **settings)
    for i in range(shape[0]):
        # the incoming gradient of row i is i + 1
        alone = run(rows[i : i + 1], table, impl, **settings)
        of_batch = row(together, i)
        gradients, of_batch.gradients = of_batch.gradients, alone.gradients
        assert alone == of_batch
        for ours, theirs in zip(alone.gradients, gradients, strict=True):
            assert_scaled(ours * (i + 1), theirs, i + 1)


@pytest.mark.parametrize("shape", [(4, 1237), (3, 4, 64, 64)], ids=str)
def test_a_gradient_alone_has_the_bits_of_the_batch_up_to_its_share(shape, table, impl, device):
    """1 / rows, exact for powers of two."""
    rows = make_rows(shape, device, distance=1e-3)
    together, count = run(rows, table, impl, kl="number").gradients[0], shape[0]
    for i in range(count):
        alone = run(rows[i : i + 1], table, impl, kl="number").gradients[0] / count
        assert_scaled(alone, together[i : i + 1], count)


@pytest.mark.parametrize("name", SOURCES)
def test_a_row_alone_has_the_same_bits_from_every_source(name, table, impl, device):
    rows = make_rows((3, 40, 30), device, distance=1e-3)
    settings = {"kl": "per row", "row_reduction": "none"}
    together = run(rows, table, impl, source(name, rows, table, impl), **settings)
    alone = run(rows[:1], table, impl, source(name, rows[:1], table, impl), **settings)
    assert alone == row(together, 0)


def test_the_same_bits_on_every_run_and_any_number_of_threads(table, impl, device):
    rows = make_rows((3, 4, 64, 64), device)
    first = run(rows, table, impl, **ALL)
    threads = torch.get_num_threads()
    try:
        for count in (threads, 1, 2, 3):
            torch.set_num_threads(count)
            assert first == run(rows, table, impl, **ALL)
    finally:
        torch.set_num_threads(threads)


def strided(tensor):
    if tensor.dim() == 4:
        return tensor.transpose(1, 3).contiguous().transpose(1, 3)
    return torch.stack([tensor, tensor], 1)[:, 0]


@pytest.mark.parametrize("name", SOURCES)
def test_not_contiguous(name, table, impl, device):
    rows = make_rows((4, 6, 5, 3), device)
    apart: Rows = rows.map(strided)
    assert not any(tensor.is_contiguous() for tensor in vars(apart).values())
    for row_reduction in ("mean", "none"):
        asked = {**ALL, "row_reduction": row_reduction}
        results = [run(r, table, impl, source(name, r, table, impl), **asked) for r in (rows, apart)]
        assert results[0] == results[1]


@pytest.mark.parametrize("name", SOURCES)
def test_one_step_for_all_rows_and_small_integers(name, table, impl, device):
    """An int, a 0-d tensor, int32 and int64 say the same."""
    rows = make_rows((3, 4, 5), device)
    rows = rows.replace(step=torch.full_like(rows.step, 4))
    given = source(name, rows, table, impl)
    want = run(rows, table, impl, given, **ALL)
    forms = [torch.full((), 4, dtype=dtype, device=device) for dtype in (torch.int64, torch.int32)]
    for step in (4, *forms, rows.step.int()):
        assert run(rows.replace(step=step), table, impl, given, **ALL) == want
        alone = step_log_ratio(rows.new, given.old_model_output, given.noise, table, step, impl=impl)
        assert torch.equal(alone, step_log_ratio(*(rows.new, given.old_model_output, given.noise, table, 4), impl=impl))


def test_steps_of_int32_per_row(table, impl, device):
    rows = make_rows((5, 3, 7), device)
    assert run(rows, table, impl, **ALL) == run(rows.replace(step=rows.step.int()), table, impl, **ALL)
    index = rows.index - 2**33
    given = [source("key", rows.replace(index=i), table, impl) for i in (index, index.int())]
    assert run(rows, table, impl, given[0], **ALL) == run(rows, table, impl, given[1], **ALL)
