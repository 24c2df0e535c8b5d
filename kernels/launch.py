"""Launch settings: how a row is cut into programs, how large a program is, and how a row's programs end together.

A table, not autotuning: the bits of a sum depend on the block, so the block may depend on the row's length alone. Then
the same inputs give the same bits on every run, and a row alone gives the same bits as in a batch.

The programs of a row leave partial sums, and the last of them to arrive adds these up, in the same order whoever it
is. That keeps an op one launch. Arrivals are counted in integers, which atomics add exactly.
"""

import threading
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Launch(NamedTuple):
    """Settings for rows of up to `longest` elements (None: any longer row)."""

    longest: int | None
    block: int
    num_warps: int


TABLE = (Launch(256, 256, 1), Launch(1024, 1024, 4), Launch(65_536, 2048, 4), Launch(None, 4096, 8))

# a row's partial sums, one per block, are added by one program
LONGEST_ROW = 2**26

# per device and stream, since two kernels that run at once must not count in the same place
_tickets: dict[tuple[torch.device, int], Tensor] = {}


def launch(numel: int) -> tuple[dict[str, int], int]:
    """The settings for rows of this length, as a kernel takes them, and the number of programs per row."""
    if numel > LONGEST_ROW:
        raise ValueError(
            f"a row has {numel} elements, the kernels take up to {LONGEST_ROW}; cut it into rows, or use impl='torch'"
        )
    settings = next(entry for entry in TABLE if entry.longest is None or entry.longest >= numel)
    splits = triton.cdiv(numel, settings.block)
    constants = {"SPLITS": splits, "SPLITS_BLOCK": triton.next_power_of_2(splits), "BLOCK": settings.block}
    return constants | {"num_warps": settings.num_warps}, splits


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def tickets(count: int, device: torch.device) -> Tensor:
    """`count` counters that are 0. Whoever counts with them leaves them at 0."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        # a captured graph gets counters of its own: it may be replayed beside other work
        return torch.zeros(count, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device)
    key = device, stream.cuda_stream
    if key not in _tickets or len(_tickets[key]) < count:

        def make() -> None:
            with torch.cuda.device(device), torch.cuda.stream(stream):
                _tickets[key] = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)

        # a memory pool that this thread allocates from, such as torch.compile's for graphs, would take them back
        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
    return _tickets[key]


@triton.jit
def is_last(ticket_ptr, count):
    """Whether this is the last of `count` programs to get here. What they stored before can then be read, past the
    first-level cache (".cg")."""
    # every thread's stores come before this program's ticket
    tl.debug_barrier()
    last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == count - 1
    if last:
        tl.store(ticket_ptr, 0)
    return last
