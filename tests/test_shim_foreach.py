"""The list form of every CUDA launcher under the host shim: the bits of the single calls, in few
launches."""

from __future__ import annotations

import ctypes
import itertools
import random
import shutil
from collections.abc import Iterator
from typing import Any

import fences
import pytest
import torch
from cases import DTYPES
from compare import assert_same
from rows import shimmed
from torch import Tensor

from qkernels import _registry, numeric
from qkernels._table import STEMS

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="the host shim needs g++")

# (shape, axis, group_size): every path of the kernels, empty ones, and one that fills the grid
LAYOUTS = (
    ((1,), None, None),
    ((12, 147), 0, None),
    ((5, 4608), 0, None),
    ((0,), None, None),
    ((700, 24), 1, None),
    ((3, 9001), 0, None),
    ((66, 10, 4), 1, None),
    ((301, 7), 1, None),
    ((4, 0), 0, None),
    ((10, 64), None, 8),
    ((33, 5), 0, None),
    ((3, 17_000), 0, None),
    ((1037,), None, None),
    ((0, 4), 0, None),
    ((70_001,), None, None),
)
Call = tuple[Any, ...]


@pytest.fixture
def lib() -> Iterator[ctypes.CDLL]:
    from shim import build

    yield build.library()
    build.library().shim_reverse(0)


def randn(shape: tuple[int, ...], dtype: torch.dtype, seed: int, offset: int = 0) -> Tensor:
    """Normal numbers; an offset of one element makes the memory unaligned."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(torch.Size(shape).numel() + offset, generator=generator) * 2
    return flat.to(dtype)[offset:].view(shape)


def inputs() -> list[tuple[Tensor, int | None, int | None]]:
    """Tensors of all layouts and dtypes in a mixed order, every fifth one unaligned."""
    made = []
    for k, (shape, axis, group_size) in enumerate(LAYOUTS * 2):
        dtype = DTYPES[(k + k // len(LAYOUTS)) % len(DTYPES)]
        made.append((randn(shape, dtype, k, offset=int(k % 5 == 3)), axis, group_size))
    random.Random(0).shuffle(made)
    return made


def params(x: Tensor, axis: int | None, group_size: int | None, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = numeric.params_shape(x.shape, axis, group_size)
    scale = 0.2 + torch.rand(shape, generator=generator, dtype=torch.float64)
    zp = torch.randint(5, 10, shape, generator=generator).to(torch.int32)
    return scale.to(numeric.compute_dtype(x.dtype)), zp


def row(op: str) -> str:
    return f"qkernels.backends.native.{STEMS[op]}"


def results(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def check(lib: ctypes.CDLL, op: str, calls: list[Call]) -> int:
    """The list's results are those of the single calls, with outputs aligned or not, and blocks and
    threads in both orders. Returns the launches that the list took with aligned outputs."""
    one = _registry.resolve(f"{row(op)}:{op}")
    many = _registry.resolve(f"{row(op)}:foreach_{op}")
    launches = set()
    for aligned, reverse in ((True, 0), (True, 1), (False, 0)):
        lib.shim_reverse(reverse)
        with shimmed(), fences.fenced(aligned):
            want = [results(one(*args)) for args in calls]
            before = lib.shim_launches()
            got = [results(outputs) for outputs in many(calls)]
        if aligned:
            launches.add(lib.shim_launches() - before)
        for k, (a, b) in enumerate(zip(got, want, strict=True)):
            for j, (first, second) in enumerate(zip(a, b, strict=True)):
                assert_same(first, second, f"{op}, call {k}, output {j}, aligned={aligned}")
    assert len(launches) == 1
    return launches.pop()


def clips(k: int) -> str:
    return ("code", "value")[k % 3 == 0]


def test_fake_quant(lib: ctypes.CDLL) -> None:
    calls = []
    for k, (x, axis, group_size) in enumerate(inputs()):
        scale, zp = params(x, axis, group_size, k)
        zero_point = (zp, None, zp.to(scale.dtype))[k % 3]
        calls.append((x, scale, zero_point, 0, 15, axis, group_size, clips(k), k % 4 != 1))
    assert check(lib, "fake_quant", calls) <= 4 * 2 * 3  # dtype, clip and path


def test_fake_quant_bwd(lib: ctypes.CDLL) -> None:
    calls = []
    for grad, _, _ in inputs():
        mask = torch.randint(0, 256, (numeric.mask_bytes(grad.numel()),)).to(torch.uint8)
        calls.append((grad, mask, []))
    assert check(lib, "fake_quant_bwd", calls) == 3  # element sizes


def test_lsq_bwd(lib: ctypes.CDLL) -> None:
    calls = []
    for k, (x, axis, group_size) in enumerate(inputs()):
        scale, zp = params(x, axis, group_size, k)
        grad = randn(tuple(x.shape), x.dtype, 100 + k)
        calls.append((grad, x, scale, zp, 0, 15, axis, group_size, clips(k), 0.1 * k))
    assert check(lib, "lsq_bwd", calls) <= 4 * 2 * 5  # dtype, clip, four paths and their partials


def test_ranges_and_mean_of_abs(lib: ctypes.CDLL) -> None:
    calls = [
        (x, -8, 7, axis, group_size, k % 2 == 0, ("minmax", "lsq")[k % 2], 99.0)
        for k, (x, axis, group_size) in enumerate(inputs())
    ]
    assert check(lib, "quant_range", calls) <= 4 * 2 * 5


def test_every_range_method(lib: ctypes.CDLL) -> None:
    xs = [x.reshape(-1)[:900].view(-1, 9) for x, _, _ in inputs() if x.numel() > 900]
    methods = numeric.METHODS
    calls = [
        (x, -8, 7, 0, None, k % 2 == 0, methods[k % len(methods)], 97.3) for k, x in enumerate(xs)
    ]
    check(lib, "quant_range", calls)


def test_qparams(lib: ctypes.CDLL) -> None:
    calls = []
    for k in range(110):
        dtype = (torch.float32, torch.float64)[k % 2]
        calls.append((randn((2, k % 7 * 20), dtype, k).sort(0).values, 0, 15, k % 3 == 0))
    assert check(lib, "qparams", calls) == 2


def test_fake_quant_dynamic(lib: ctypes.CDLL) -> None:
    calls = [
        (x, 0, 15, axis, group_size, k % 2 == 0, "minmax", 99.0, clips(k), k % 4 != 1)
        for k, (x, axis, group_size) in enumerate(inputs())
    ]
    assert check(lib, "fake_quant_dynamic", calls) < len(calls) * 3 // 2


def test_dynamic_blocks_of_several_widths(lib: ctypes.CDLL) -> None:
    """Warps, blocks of 288 and 304 threads, which share a launch, and of 64."""
    lengths = (4608, 64, 1024, 4864, 288, 1000, 4608)
    xs = [randn((2 + k, n), torch.float32, k) for k, n in enumerate(lengths)]
    calls = [(x, 0, 15, 0, None, False, "minmax", 99.0, "code", True) for x in xs]
    assert check(lib, "fake_quant_dynamic", calls) == 3


@pytest.mark.parametrize("pack", [0, 2])
def test_quantize_and_back(lib: ctypes.CDLL, pack: int) -> None:
    calls, back = [], []
    quantize = _registry.resolve(f"{row('quantize')}:quantize")
    for k, (x, axis, group_size) in enumerate(inputs()):
        scale, zp = params(x, axis, group_size, k)
        qmin, qmax = (0, 3) if pack else ((0, 255), (-8, 7), (0, 65535))[k % 3]
        zp = zp.clamp(qmin, qmax)
        calls.append((x, scale, zp, qmin, qmax, axis, group_size, pack))
        with shimmed():
            codes = quantize(*calls[-1])
        size = x.shape[-1] if pack else 0
        back.append((codes, scale, zp, qmin, axis, group_size, pack, size, x.dtype))
    # dtypes, and sizes of a code; read, those of a byte may be signed
    assert check(lib, "quantize", calls) <= 4 * (1 if pack else 2)
    assert check(lib, "dequantize", back) <= 4 * (1 if pack else 3)


def small_calls(op: str, count: int) -> list[Call]:
    calls: list[Call] = []
    for k in range(count):
        x = randn((2 + k % 3, 32 + 32 * (k % 5)), torch.float32, k)
        scale, zp = params(x, 0, None, k)
        if op == "fake_quant":
            calls.append((x, scale, zp, 0, 15, 0, None, "code", True))
        elif op == "fake_quant_bwd":
            mask = torch.full((numeric.mask_bytes(x.numel()),), k, dtype=torch.uint8)
            calls.append((x, mask, []))
        else:
            calls.append((x, x.flip(0), scale, zp, 0, 15, 0, None, "code", 1.0))
    return calls


@pytest.mark.parametrize(
    ("op", "count", "launches"),
    [
        ("fake_quant", 54, 2),
        ("fake_quant_bwd", 54, 1),
        ("lsq_bwd", 54, 2),
        ("fake_quant", 100, 4),
        ("fake_quant_bwd", 100, 2),
        ("lsq_bwd", 100, 4),
    ],
)
def test_more_calls_than_a_launch_takes(
    lib: ctypes.CDLL, op: str, count: int, launches: int
) -> None:
    """54 are the weights of a ResNet-50."""
    assert check(lib, op, small_calls(op, count)) == launches


def test_nothing_to_do(lib: ctypes.CDLL) -> None:
    from shim import build

    for name, function in vars(build.load()).items():
        if not callable(function) or name.endswith("_workspace") or name == "build_info":
            continue
        before = lib.shim_launches()
        assert function(0, 0, []) == -1, name
        assert lib.shim_launches() == before, name


def test_shares_of_the_grid(lib: ctypes.CDLL) -> None:
    """Every block works on the same number of those wanted, which is as small as `most` allows."""
    rng = random.Random(0)
    for _ in range(300):
        count, most = rng.randint(1, 90), rng.choice([1, 32, 4224, 2**30])
        wanted = [rng.randint(1, 2 ** rng.randint(1, 40)) for _ in range(count)]
        first = (ctypes.c_int * (count + 1))()
        array = (ctypes.c_int64 * count)(*wanted)
        lib.shim_share_blocks(array, count, ctypes.c_int64(most), first)
        blocks = [b - a for a, b in itertools.pairwise(first)]
        assert first[0] == 0
        rounds = -(-sum(wanted) // most)
        assert blocks == [-(-want // rounds) for want in wanted]
        assert sum(blocks) < most + count
