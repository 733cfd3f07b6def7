"""The host shim itself (tests/shim): barriers, shuffles, shared memory, and faults it reports."""

from __future__ import annotations

import ctypes
import random
import re
import shutil
from collections.abc import Iterator

import pytest
import torch

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="the host shim needs g++")

KERNELS = (
    "barrier_sum",
    "shuffles",
    "atomics",
    "uninitialised",
    "barrier_in_a_branch",
    "two_barriers",
    "shuffle_in_a_branch",
    "beyond_shared",
    "misaligned",
    "out_of_bounds",
)
THREADS = 256
LAUNCH_FAILURE, INVALID_CONFIGURATION = 719, 9


@pytest.fixture
def lib() -> Iterator[ctypes.CDLL]:
    from shim import build

    yield build.library()
    build.library().shim_reverse(0)


def launch(lib: ctypes.CDLL, name: str, out: list[int], shared: int = 4 * THREADS) -> int:
    """Run a kernel of tests/shim/selfcheck.cu with one block; out is replaced by what it wrote."""
    memory = torch.zeros(THREADS + 8, dtype=torch.int64).to(torch.int32)
    memory[: len(out)] = torch.tensor(out, dtype=torch.int32)
    address, size = ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(shared)
    error = lib.shim_selfcheck(KERNELS.index(name), address, size)
    out[:] = [v & 0xFFFFFFFF for v in memory[:THREADS].tolist()]
    return error


def written(lib: ctypes.CDLL, name: str) -> list[int]:
    """What a kernel without faults writes."""
    out: list[int] = []
    assert launch(lib, name, out) == 0
    return out


@pytest.mark.parametrize("reverse", [0, 1])
def test_barriers_shuffles_and_atomics(lib: ctypes.CDLL, reverse: int) -> None:
    lib.shim_reverse(reverse)
    assert written(lib, "barrier_sum") == [sum(range(THREADS))] * THREADS
    for t, word in enumerate(written(lib, "shuffles")):
        lane = t % 32
        got = [word >> shift & 0xFF for shift in (0, 8, 16, 24)]
        assert got == [lane ^ 1, max(lane - 1, 0), 5, 0xAA]
    assert written(lib, "atomics")[:2] == [sum(range(THREADS)), 0xFFFFFFFF]


def test_shared_memory_starts_poisoned(lib: ctypes.CDLL) -> None:
    written(lib, "barrier_sum")  # leaves its own values behind
    assert written(lib, "uninitialised") == [0xFFFFFFFF] * THREADS


@pytest.mark.parametrize(
    ("kernel", "text"),
    [
        ("barrier_in_a_branch", "40 at a barrier, 216 have left: none can go on"),
        ("two_barriers", "threads of a block wait at different barriers"),
        ("shuffle_in_a_branch", "40 threads wait for their warp, 0 at a barrier, 216 have left"),
        ("beyond_shared", "shared memory was written beyond its 512 bytes"),
        ("misaligned", "misaligned access at .*selfcheck.cu"),
        ("out_of_bounds", "index out of bounds at .*selfcheck.cu"),
    ],
)
def test_faults_are_reported(lib: ctypes.CDLL, kernel: str, text: str) -> None:
    shared = 512 if kernel == "beyond_shared" else 4 * THREADS
    assert launch(lib, kernel, [1000], shared) == LAUNCH_FAILURE
    assert re.search(text, lib.shim_error_text().decode())
    # a fault must not outlive its launch
    assert written(lib, "barrier_sum") == [sum(range(THREADS))] * THREADS


def test_more_shared_memory_than_a_launch_gives(lib: ctypes.CDLL) -> None:
    assert launch(lib, "barrier_sum", [], shared=48 * 1024 + 1) == INVALID_CONFIGURATION


def test_fast_division(lib: ctypes.CDLL) -> None:
    rng = random.Random(0)
    divisors = [1, 2, 3, 5, 7, 4608, 2**31 - 1, 2**31, 2**31 + 1, 2**62, 2**62 + 1, 2**63 - 1]
    divisors += [rng.getrandbits(rng.randint(1, 62)) | 1 for _ in range(300)]
    for d in divisors:
        near = [k * d + e for k in (1, 2, 1000) for e in (-1, 0, 1)]
        numbers = [0, 1, 2**63 - 1, *near, *(rng.getrandbits(63) for _ in range(20))]
        for n in numbers:
            if 0 <= n < 2**63:
                got = lib.shim_fast_quotient(ctypes.c_int64(n), ctypes.c_int64(d))
                assert got == n // d, (n, d)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_mask_transpose(lib: ctypes.CDLL, n: int) -> None:
    """Lane l ends with what the four lanes around it hold for packet l % 4; twice undoes."""
    rng = random.Random(n)
    words = [rng.getrandbits(4 * n) for _ in range(32)]
    memory = (ctypes.c_uint32 * 32)(*words)
    assert lib.shim_transpose(n, memory) == 0
    ones = (1 << n) - 1
    for lane, got in enumerate(memory):
        quad = lane // 4 * 4
        packet = lane % 4
        want = sum((words[quad + j] >> packet * n & ones) << j * n for j in range(4))
        assert got == want
    assert lib.shim_transpose(n, memory) == 0
    assert list(memory) == words
