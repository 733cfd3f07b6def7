"""How long a call takes: the wall clock on the CPU, events with a flushed L2 cache on a GPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

Call = Callable[[], Any]
MIB = 1 << 20


def nothing() -> None:
    """What is prepared where nothing must be."""


class Clock(Protocol):
    """Times calls one by one. `how` goes into the results."""

    how: str

    def times(self, call: Call, count: int, prepare: Call = nothing) -> list[float]:
        """Seconds of each of `count` calls; `prepare` runs untimed before each."""


class CpuClock:
    """The wall clock."""

    how = "wall clock"

    def times(self, call: Call, count: int, prepare: Call = nothing) -> list[float]:
        found = []
        for _ in range(count):
            prepare()
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
        return found


class CudaClock:
    """GPU time between two events round the call, on the current stream.

    Before each call a buffer larger than the L2 cache is written, so that inputs come from memory.
    The host queues the call while the GPU still writes: as many buffers are written as it takes for
    the host to be ahead, so that the time is the kernels' and not Python's (`wall` is the other).
    """

    how = "CUDA events, L2 flushed"

    def __init__(self, cuda: Any = torch.cuda, device: str = "cuda") -> None:
        self.cuda = cuda
        cache = cuda.get_device_properties(cuda.current_device()).L2_cache_size
        self.buffer = torch.empty(max(4 * cache, 256 * MIB), dtype=torch.uint8, device=device)
        self._flush_seconds = 0.0

    def times(self, call: Call, count: int, prepare: Call = nothing) -> list[float]:
        passes = self._passes(call, prepare)
        pairs = []
        for _ in range(count):
            prepare()
            for _ in range(passes):
                self.buffer.zero_()
            begin, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            pairs.append((begin, end))
        self.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]

    def _passes(self, call: Call, prepare: Call, most: int = 64) -> int:
        """How many flushes outlast the host's work for one call."""
        if not self._flush_seconds:
            self._flush_seconds = min(self._gpu_seconds(self.buffer.zero_) for _ in range(3))
        prepare()
        self.cuda.synchronize()
        start = time.perf_counter()
        call()
        queued = time.perf_counter() - start
        return min(most, 1 + math.ceil(queued / max(self._flush_seconds, 1e-6)))

    def _gpu_seconds(self, call: Call) -> float:
        begin, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        self.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3

    def wall(self, call: Call, calls: int = 20, prepare: Call = nothing) -> float:
        """Seconds a call takes eagerly, Python and launch included: the middle of three means."""
        means = []
        for _ in range(3):
            self.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                prepare()  # clears what a backward would add to
                call()
            self.cuda.synchronize()
            means.append((time.perf_counter() - start) / calls)
        return sorted(means)[1]


_clocks: dict[str, Clock] = {}


def clock_for(device: str) -> Clock:
    """The clock of a device type (one of each: the flush buffer is large)."""
    if device not in _clocks:
        _clocks[device] = CudaClock() if device == "cuda" else CpuClock()
    return _clocks[device]


class Ledger:
    """A pytest-benchmark timer that has measured already: it shows the sum of what was spent.

    One clock then times ours and the rivals, on any device, and pytest-benchmark's statistics and
    JSON are those very times.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


ledger = Ledger()


def read_ledger() -> float:
    """For `pytestmark = pytest.mark.benchmark(timer=read_ledger)`, which `race` needs."""
    return ledger()
