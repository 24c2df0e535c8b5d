"""Launch settings: how a row is cut into programs, and how large a program is.

A table, not autotuning: the bits of a sum depend on the block, so the block may depend on the row's length alone. Then
the same inputs give the same bits on every run, and a row alone gives the same bits as in a batch.
"""

from typing import NamedTuple

import triton


class Launch(NamedTuple):
    block: int
    num_warps: int


# the smallest entry that holds the row, else the last one
TABLE = (Launch(1024, 4), Launch(4096, 4))
# a second kernel reduces a row's partial sums with this many warps
REDUCE_WARPS = 4


def launch(numel: int) -> tuple[Launch, int]:
    """The settings for rows of this length, and the number of programs per row."""
    settings = next((entry for entry in TABLE if entry.block >= numel), TABLE[-1])
    return settings, triton.cdiv(numel, settings.block)
