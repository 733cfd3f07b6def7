"""Lists of tensors in one launch: a table tells each program which tensor it works for.

A table is int64 on the device: the first program of each tensor, then a record of FIELDS words per
tensor, addresses among them. A program finds its tensor by bisection of the first programs, which
the caches hold, and casts the addresses of its record to pointers.

The table is filled on the host and copied in the order of the stream. torch keeps the pinned source
of an ordinary call until the copy is done. A CUDA graph copies from the same source at each replay:
a table of a captured call lies in a reserve of pinned memory, of which no word is used twice and
which lives as long as the process. The reserve is made by the first list that runs without capture
(memory cannot be pinned during one); a capture before that, or with the reserve used up, takes its
lists tensor by tensor, in as many launches.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels.backends.triton import launch

# int64 in the reserve, 1 MiB: 160 captured lists of 54 tensors with records of 14 words
RESERVED = 1 << 17

DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.int32: tl.int32,
}


@triton.jit
def find(table_ptr, count, FIELDS: tl.constexpr):
    """-> (the record of this program's tensor, the number of this program among the tensor's)"""
    pid = tl.program_id(0)
    item = 0
    end = count
    while end - item > 1:
        middle = (item + end) // 2
        before = tl.load(table_ptr + middle) <= pid
        item = tl.where(before, middle, item)
        end = tl.where(before, end, middle)
    first = tl.load(table_ptr + item).to(tl.int32)
    return table_ptr + count + item * FIELDS, pid - first


@triton.jit
def pointer(at, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in a record as a pointer, ALIGNED to 16 bytes or to no more than its dtype."""
    found = tl.load(at).to(tl.pointer_type(dtype))
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def size(at, EVEN: tl.constexpr):
    """A number below 2^31 in a record. EVEN: a multiple of 16, as Triton's launcher tells it of the
    arguments of a kernel; without that, masked accesses are not of 16 bytes."""
    value = tl.load(at).to(tl.int32)
    if EVEN:
        value = tl.multiple_of(value, 16)
    return value


class Reserve:
    """Pinned memory of which every word is given away once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # autograd runs backwards on threads of its own
        self._memory: Tensor | None = None
        self._used = 0

    def make(self) -> None:
        """Pin the memory, unless that is done."""
        with self._lock:
            if self._memory is None:
                self._memory = torch.empty(RESERVED, dtype=torch.int64, pin_memory=True)

    def holds(self, words: int) -> bool:
        """Whether so many words are left."""
        return self._memory is not None and self._used + words <= RESERVED

    def take(self, words: list[int]) -> Tensor:
        """The words in memory that nothing else will be written to."""
        with self._lock:
            if self._memory is None or not self.holds(len(words)):
                raise RuntimeError("foreach: no pinned memory is left for lists in CUDA graphs")
            taken = self._memory[self._used : self._used + len(words)]
            self._used += len(words)
        return taken.copy_(torch.tensor(words, dtype=torch.int64))


reserve = Reserve()


def capturing(device: torch.device) -> bool:
    """Whether the launches that follow go into a CUDA graph."""
    if device.type != "cuda":
        return False
    with launch.on(device):
        return torch.cuda.is_current_stream_capturing()


def takes(calls: Sequence[tuple[Any, ...]], fields: int) -> bool:
    """Whether a list runs by a table: not a single tensor, nor where a graph has no room for it."""
    if len(calls) < 2:
        return False
    device = calls[0][0].device
    if capturing(device):
        return reserve.holds(len(calls) * (fields + 1))
    if device.type == "cuda":
        reserve.make()
    return True


def to_device(words: list[int], device: torch.device) -> Tensor:
    """The words on the device, without waiting for it."""
    if capturing(device):
        source = reserve.take(words)
    elif device.type == "cuda":
        source = torch.tensor(words, dtype=torch.int64, pin_memory=True)
    else:
        return torch.tensor(words, dtype=torch.int64)
    table = torch.empty(len(words), dtype=torch.int64, device=device)
    return table.copy_(source, non_blocking=True)


def even(*numbers: int) -> bool:
    """Whether all are multiples of 16: addresses and sizes that allow accesses of 16 bytes."""
    bits = 0
    for number in numbers:
        bits |= number
    return bits % 16 == 0


def address(tensor: Tensor | None) -> int:
    """Of the memory; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def dtype_of(tensor: Tensor | None) -> Any:
    """Triton's, as `pointer` takes it."""
    return None if tensor is None else DTYPES[tensor.dtype]


class Batch:
    """Gathers the records of one kernel, which is launched once for each set of constants.

    Args:
        kernel: (table_ptr, count, **constants), with FIELDS among the constants.
        fields: words of a record.
    """

    def __init__(self, kernel: Any, fields: int) -> None:
        self.kernel, self.fields = kernel, fields
        # constants -> (first programs and, at the end, their number; records)
        self.groups: dict[tuple[tuple[str, Any], ...], tuple[list[int], list[int]]] = {}

    def add(self, programs: int, record: tuple[int, ...], **constants: Any) -> None:
        """One tensor. The memory that a record points to must be held until `launch_batches`."""
        if programs == 0:
            return
        firsts, records = self.groups.setdefault(tuple(constants.items()), ([0], []))
        firsts.append(firsts[-1] + programs)
        records.extend(record)


def launch_batches(device: torch.device, *batches: Batch) -> None:
    """Launch the batches, one after the other, with one copy of their tables."""
    words: list[int] = []
    starts = []
    for batch in batches:
        for firsts, records in batch.groups.values():
            starts.append(len(words))
            words += [*firsts[:-1], *records]
    if not words:
        return
    table, start = to_device(words, device), iter(starts)
    for batch in batches:
        for constants, (firsts, _) in batch.groups.items():
            launch.run(
                batch.kernel,
                firsts[-1],
                table[next(start) :],
                len(firsts) - 1,
                FIELDS=batch.fields,
                **dict(constants),
            )


def tiling_constants(plan: launch.Tiling) -> dict[str, bool]:
    """What Triton's launcher would tell the compiler of (channels, inner, n) and of the blocks. It
    decides how a tile is shared out among threads, and so on the order of summation: a launch for
    many tensors must know no less and no more than that for one of them."""
    channels, inner, n = plan.sizes
    return {
        "CHANNELS_EVEN": channels % 16 == 0,
        "INNER_EVEN": inner % 16 == 0,
        "N_EVEN": n % 16 == 0,
        "ONE_BLOCK": plan.blocks == 1,
    }
