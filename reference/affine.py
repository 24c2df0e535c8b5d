"""The affine Gaussian step x' = a x + b m + s z, and how the CPU path walks over its rows.

The CPU path works in tiles that stay in the cache, and writes every pass over a tile into memory that is there already.
Two rules make its bits independent of the tiling, of the number of threads and of the other rows of a batch:

- an elementwise pass gives an element the same bits wherever it stands, and transcendental functions of a row are taken
  in float64 and rounded once;
- a row is summed in chunks of `CHUNK` elements counted from its own start, then over its chunks. PyTorch sums a
  chunk of this size with one thread.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pcpo_fast.columns import COLUMNS

CHUNK = 16_384
TILE_CHUNKS_PER_THREAD = 8


def coefficients(table: Tensor, step: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The table's columns at each row's step by name, (rows,) each.

    Raises:
        ValueError: for a step that is not in the table.
    """
    try:
        rows = table.index_select(0, step)
    except (IndexError, RuntimeError):
        check_steps(step, len(table))
        raise
    return dict(zip(COLUMNS, cast(rows, dtype).unbind(1), strict=True))


def check_steps(step: Tensor, num_steps: int) -> None:
    """Raises ValueError for a step that is not in the table; looks at tensors on the CPU alone."""
    if step.device.type != "cpu":
        return
    first, last = (int(end) for end in step.aminmax())
    if not 0 <= first <= last < num_steps:
        raise ValueError(
            f"step holds {first} ... {last} and the table has {num_steps} steps; give indices from 0 to {num_steps - 1}"
        )


def inverse(column: Tensor) -> Tensor:
    """1 / column, and 0 where it is 0: at the std of a deterministic step."""
    return column.reciprocal().masked_fill_(column == 0, 0.0)


def per_row(*columns: Tensor) -> list[Tensor]:
    """(rows,) as (rows, 1), to stand beside the elements of a row."""
    return [column[:, None] for column in columns]


def gaussian_log_prob(sum_of_squares: Tensor, coef: dict[str, Tensor], numel: int, reduction: str) -> Tensor:
    """log N(x'; a x + b m, s^2) of each row from its <z, z>, or what the table has in its place, in float64; 0 for a
    deterministic step."""
    std, k, offset = (coef[name].double() for name in ("std", "log_prob_scale", "log_prob_offset"))
    log_prob = torch.addcmul(offset * numel, k, sum_of_squares, value=-0.5)
    return log_prob.mul_(reduction_scale(numel, reduction)).masked_fill_(std == 0, 0.0)


def reduction_scale(numel: int, reduction: str) -> float:
    return 1 / numel if reduction == "mean" else 1.0


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any tensor is, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def row_numel(tensor: Tensor) -> int:
    """The number of elements of a row."""
    return tensor.numel() // tensor.shape[0]


def as_rows(tensor: Tensor) -> Tensor:
    """(rows, ...) as a contiguous (rows, numel)."""
    return (tensor if tensor.is_contiguous() else tensor.contiguous()).view(tensor.shape[0], -1)


def tiles(*tensors: Tensor | None) -> Iterator[list[Any]]:
    """Cuts (rows, numel) tensors, and (rows, 1) tensors beside them, into tiles, in order: several rows or part of one.

    Yields the tile's columns and its part of every tensor. The first must be (rows, numel); on a GPU there is one tile.
    """
    rows, numel = tensors[0].shape
    budget = CHUNK * TILE_CHUNKS_PER_THREAD * torch.get_num_threads()
    if rows * numel <= budget or tensors[0].device.type != "cpu":
        yield [slice(0, numel), *tensors]
        return
    height, width = max(1, budget // numel), min(numel, budget)
    for top in range(0, rows, height):
        for left in range(0, numel, width):
            columns = slice(left, min(left + width, numel))
            tile = slice(top, top + height), columns
            parts = (t if t is None else t[tile if t.shape[1] == numel else tile[0]] for t in tensors)
            yield [columns, *parts]


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, without the microsecond that doing nothing takes there."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def chunk_sums(tile: Tensor, reduce: Callable[..., Tensor] = torch.sum) -> Tensor:
    """The sums of a tile's chunks, row by row: (chunks,). Another reduction over a dim may take the sum's place."""
    numel = tile.shape[1]
    whole = numel // CHUNK * CHUNK
    if whole == numel:
        return reduce(tile.view(-1, CHUNK), dim=1)
    rest = reduce(tile[:, whole:], dim=1)
    if whole == 0:
        return rest
    return torch.cat([reduce(tile[:, :whole].unflatten(1, (-1, CHUNK)), dim=2), rest[:, None]], dim=1).flatten()


def chunk_squares(tile: Tensor) -> Tensor:
    """The sums of squares of a tile's chunks, row by row: (chunks,). Nothing as large is written."""
    return chunk_sums(tile, torch.linalg.vector_norm).square_()


def row_sums(chunk_sums_of_tiles: list[Tensor], rows: int) -> Tensor:
    """The sum of each row, (rows,) float64, from the chunk sums of all its tiles."""
    chunks = chunk_sums_of_tiles[0] if len(chunk_sums_of_tiles) == 1 else torch.cat(chunk_sums_of_tiles)
    return chunks.double() if len(chunks) == rows else chunks.view(rows, -1).double().sum(dim=1)


def guided_output(cond: Tensor, uncond: Tensor, guidance_scale: float, dtype: torch.dtype, out: Tensor) -> Tensor:
    """u + g (c - u) of one tile, made in `dtype` and rounded once, into `out`."""
    cond, uncond = cast(cond, dtype), cast(uncond, dtype)
    if out.dtype == dtype:
        return torch.lerp(uncond, cond, guidance_scale, out=out)
    return out.copy_(torch.lerp(uncond, cond, guidance_scale))


def affine_mean(sample: Tensor, model_output: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a x + b m of one tile, in memory of its own."""
    return (sample * a).addcmul_(model_output, b)
