"""Every CUDA launcher under the host shim, at sizes that reach each of its paths.

tests/test_parity.py runs the shimmed rows over the shared cases; here memory is aligned to 16
bytes, so that the vector paths run, and blocks and threads run in both orders.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import fences
import pytest
import torch
from cases import DTYPE_IDS, DTYPES, special_values
from compare import assert_same, assert_where
from rows import reference, shimmed
from torch import Tensor

from qkernels import _native, _registry, numeric
from qkernels._table import STEMS

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="the host shim needs g++")
dtype_of = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)


@pytest.fixture
def lib() -> Iterator[ctypes.CDLL]:
    from shim import build

    yield build.library()
    build.library().shim_reverse(0)


# (shape, axis, group_size): the paths of the kernels, see csrc/cuda/reduce.h
LAYOUTS = {
    "one_element": ((1,), None, None),
    "tensor_tail": ((1037,), None, None),
    "tensor_many_blocks": ((140_003,), None, None),
    "rows_vector": ((5, 4608), 0, None),
    "rows_vector_parts": ((3, 17_000), 0, None),
    "rows_scalar": ((6, 147), 0, None),
    "rows_scalar_parts": ((2, 9001), 0, None),
    "middle_vector": ((4, 6, 320), 1, None),
    "middle_scalar": ((9, 5, 49), 1, None),
    "columns_vector": ((700, 24), 1, None),
    "columns_scalar": ((301, 7), 1, None),
    "columns_wide": ((150, 304), 1, None),
    "columns_inner": ((66, 10, 4), 1, None),
    "columns_small_inner": ((200, 6, 3, 3), 1, None),
    "channel_of_one": ((3, 1, 50), 1, None),
    "groups_8": ((10, 64), None, 8),
    "groups_128": ((10, 256), None, 128),
    "groups_odd": ((6, 15), None, 5),
}
# eighty candidates an element: fewer dtypes
RANGE_CASES = [
    pytest.param(method, dtype, id=f"{method}-{name}")
    for method in numeric.METHODS
    for dtype, name in zip(DTYPES, DTYPE_IDS, strict=True)
    if method != "mse" or dtype in (torch.float64, torch.bfloat16)
]
layout_of = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


def tensor(layout: tuple, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(layout[0], generator=generator) * 2).to(dtype)


def run(lib: ctypes.CDLL, op: str, *args: Any) -> Any:
    """The native row over the CUDA kernels, between aligned fences; same bits in both orders."""
    function: Callable[..., Any] = _registry.resolve(f"qkernels.backends.native.{STEMS[op]}:{op}")
    results = []
    for reverse in (1, 0):
        lib.shim_reverse(reverse)
        with shimmed(), fences.fenced(aligned=True):
            result = function(*args)
        results.append((result,) if isinstance(result, Tensor) else result)
    for one, two in zip(*results, strict=True):
        assert_same(one, two, f"{op}: order of blocks and threads")
    return results[0][0] if isinstance(result, Tensor) else results[0]


def params(x: Tensor, layout: tuple, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    _, axis, group_size = layout
    shape = numeric.params_shape(x.shape, axis, group_size)
    generator = torch.Generator().manual_seed(7)
    spread = torch.rand(shape, generator=generator, dtype=torch.float64)
    scale = ((1 + spread) * 4 / (qmax - qmin)).to(numeric.compute_dtype(x.dtype))
    zp = (qmin + qmax + 1) // 2 + torch.randint(-2, 3, shape, generator=generator)
    return scale, zp.to(torch.int32)


@layout_of
@dtype_of
def test_fake_quant_and_backward(lib: ctypes.CDLL, layout: tuple, dtype: torch.dtype) -> None:
    x = tensor(layout, dtype)
    special = special_values().to(dtype)[: x.numel()]
    x.view(-1)[: len(special)] = special
    scale, zp = params(x, layout, 0, 15)
    for clip, zero_point in (("code", zp), ("value", zp.to(scale.dtype) - 0.4)):
        args = (x, scale, zero_point, 0, 15, *layout[1:], clip, True)
        want, got = reference("fake_quant", *args), run(lib, "fake_quant", *args)
        assert_same(got[0], want[0], f"y, {clip}")
        assert_same(got[1], want[1], f"mask, {clip}")
        grad = tensor(layout, dtype, seed=1)
        grad.view(-1)[:2] = float("nan")
        want_grad = reference("fake_quant_bwd", grad, want[1], [])
        assert_same(run(lib, "fake_quant_bwd", grad, want[1], []), want_grad, "grad_x")


@dtype_of
def test_fake_quant_grid_stride(lib: ctypes.CDLL, dtype: torch.dtype) -> None:
    """More tiles than warps: the shim's one multiprocessor gets 32 blocks of 8 warps."""
    tile = 32 * 4 * 16 // dtype.itemsize
    layout = ((256 * tile + tile + 13,), None, None)
    x = tensor(layout, dtype)
    scale, zp = params(x, layout, 0, 3)
    args = (x, scale, zp, 0, 3, None, None, "code", True)
    want, got = reference("fake_quant", *args), run(lib, "fake_quant", *args)
    assert_same(got[0], want[0], "y")
    assert_same(got[1], want[1], "mask")
    assert_same(
        run(lib, "fake_quant_bwd", x, want[1], []), reference("fake_quant_bwd", x, want[1], [])
    )


def assert_total(got: Tensor, want: Tensor, terms: Tensor, what: str) -> None:
    """Sums in fp64, whatever their order: one rounding of the result, and 1e-12 of the terms."""
    eps = torch.finfo(got.dtype).eps
    bound = eps * want.abs().double() + 1e-12 * terms.double() + 1e-300
    assert_where((got.double() - want.double()).abs() <= bound, got, want, what)


@layout_of
@dtype_of
def test_lsq_bwd(lib: ctypes.CDLL, layout: tuple, dtype: torch.dtype) -> None:
    x, grad = tensor(layout, dtype), tensor(layout, dtype, seed=1)
    scale, zp = params(x, layout, -2, 1)
    for clip, zero_point in (("code", zp), ("value", zp.to(scale.dtype) + 0.3)):
        args = (x, scale, zero_point, -2, 1, *layout[1:], clip, 0.37)
        want, got = reference("lsq_bwd", grad, *args), run(lib, "lsq_bwd", grad, *args)
        terms = grad.double().abs().sum() * 8
        assert_same(got[0], want[0], f"grad_x, {clip}")
        assert_total(got[1], want[1], terms, f"grad_scale, {clip}")
        assert_total(got[2], want[2], terms, f"grad_zp, {clip}")


@layout_of
@pytest.mark.parametrize(("method", "dtype"), RANGE_CASES)
def test_quant_range(lib: ctypes.CDLL, layout: tuple, dtype: torch.dtype, method: str) -> None:
    x = tensor(layout, dtype)
    if method == "mse" and x.numel() > 60_000:
        x = x.reshape(-1)[:20_000]  # still several parts
    symmetric = layout[1] is None
    args = (x, -8, 7, *layout[1:], symmetric, method, 97.3)
    want, got = reference("quant_range", *args), run(lib, "quant_range", *args)
    if method == "lsq":
        assert_total(got[0], want[0], torch.zeros(()), "lsq scale")
    else:
        assert_same(got[0], want[0], f"{method} scale")
    assert_same(got[1], want[1], f"{method} zero_point")
    assert_same(got[2] + 0, want[2] + 0, f"{method} range")


@dtype_of
@pytest.mark.parametrize("percentile", [50.001, 75.0, 99.99, 100.0])
def test_percentile_by_several_blocks(
    lib: ctypes.CDLL, dtype: torch.dtype, percentile: float
) -> None:
    x = tensor(((3, 40_000), 0, None), dtype)
    x[1] = 0.25  # all equal
    x[2, 5:30_000] = -0.0
    x[2, 7], x[2, 9] = float("inf"), -float("inf")
    args = (x, 0, 255, 0, None, False, "percentile", percentile)
    want, got = reference("quant_range", *args), run(lib, "quant_range", *args)
    assert_same(got[2] + 0, want[2] + 0, "range")
    x[0, 39_999] = float("nan")
    want, got = reference("quant_range", *args), run(lib, "quant_range", *args)
    assert bool(got[2][:, 0].isnan().all())
    for a, b in zip(got, want, strict=True):
        assert_same(a + 0, b + 0, "with NaN")


@pytest.mark.parametrize("method", numeric.METHODS)
def test_nan_and_inf_stay_in_their_channel(lib: ctypes.CDLL, method: str) -> None:
    x = tensor(((4, 300), 0, None), torch.float32)
    x[1, 299], x[2, 0] = float("nan"), float("inf")
    args = (x, 0, 15, 0, None, False, method, 99.0)
    want, got = reference("quant_range", *args), run(lib, "quant_range", *args)
    for a, b in zip(got, want, strict=True):
        if method == "lsq" and a.is_floating_point() and a.dim() == 1:
            torch.testing.assert_close(a, b, rtol=2.4e-7, atol=0, equal_nan=True)
        else:
            assert_same(a + 0, b + 0, method)


# (shape, axis, group_size), launches: 1 where a channel's elements stay in registers
DYNAMIC = {
    "one": (((1,), None, None), 1),
    "tensor_odd": (((1037,), None, None), 1),
    "tensor_full_block": (((8192,), None, None), 1),
    "tensor_long": (((40_001,), None, None), 3),
    "groups_8": (((9, 64), None, 8), 1),
    "groups_24": (((9, 48), None, 24), 1),
    "groups_128": (((70, 256), None, 128), 1),
    "rows_1000": (((5, 1000), 0, None), 1),
    "rows_4608": (((3, 4608), 0, None), 1),
    "rows_odd": (((5, 147), 0, None), 2),
    "columns": (((64, 6), 1, None), 3),
}


@dtype_of
@pytest.mark.parametrize(("layout", "launches"), DYNAMIC.values(), ids=DYNAMIC.keys())
def test_dynamic(lib: ctypes.CDLL, layout: tuple, launches: int, dtype: torch.dtype) -> None:
    x = tensor(layout, dtype)
    for symmetric, clip, mask in ((False, "code", True), (True, "value", False)):
        args = (x, -8, 7, *layout[1:], symmetric, "minmax", 99.0, clip, mask)
        want = reference("fake_quant_dynamic", *args)
        before = lib.shim_launches()
        got = run(lib, "fake_quant_dynamic", *args)
        assert lib.shim_launches() - before == 2 * launches
        for name, a, b in zip(("y", "scale", "zero_point", "mask"), got, want, strict=True):
            assert_same(a, b, name)


@pytest.mark.parametrize("method", ["percentile", "mse", "lsq"])
def test_dynamic_with_other_methods(lib: ctypes.CDLL, method: str) -> None:
    x = tensor(((6, 320), 0, None), torch.float32)
    args = (x, 0, 15, 0, None, False, method, 98.0, "code", True)
    want = reference("fake_quant_dynamic", *args)
    got = run(lib, "fake_quant_dynamic", *args)
    torch.testing.assert_close(got[1], want[1], rtol=2.4e-7 if method == "lsq" else 0, atol=0)
    again = (x, got[1], got[2], 0, 15, 0, None, "code", True)
    y, mask = reference("fake_quant", *again)
    assert_same(got[0], y, "y")
    assert_same(got[3], mask, "mask")


@layout_of
@dtype_of
@pytest.mark.parametrize(("qmin", "qmax"), [(-8, 7), (0, 255), (0, 65535)])
def test_quantize_and_back(
    lib: ctypes.CDLL, layout: tuple, dtype: torch.dtype, qmin: int, qmax: int
) -> None:
    x = tensor(layout, dtype)
    scale, zp = params(x, layout, qmin, qmax)
    args = (x, scale, zp, qmin, qmax, *layout[1:], 0)
    want = reference("quantize", *args)
    assert_same(run(lib, "quantize", *args), want, "codes")
    back = (want, scale, zp, qmin, *layout[1:], 0, 0, dtype)
    assert_same(run(lib, "dequantize", *back), reference("dequantize", *back), "y")


@dtype_of
@pytest.mark.parametrize("pack", [1, 2, 4])
@pytest.mark.parametrize("width", [1, 8, 64, 77])
def test_packed_codes(lib: ctypes.CDLL, dtype: torch.dtype, pack: int, width: int) -> None:
    layout = ((40, width), 0, None)
    x = tensor(layout, dtype)
    qmin, qmax = numeric.code_range("test", pack, pack == 4, False)
    scale, zp = params(x, layout, qmin, qmax)
    args = (x, scale, zp, qmin, qmax, 0, None, pack)
    want = reference("quantize", *args)
    assert_same(run(lib, "quantize", *args), want, "bytes")
    back = (want, scale, zp, qmin, 0, None, pack, width, dtype)
    assert_same(run(lib, "dequantize", *back), reference("dequantize", *back), "y")


def test_every_launch_is_on_the_given_stream(lib: ctypes.CDLL) -> None:
    x, grad = torch.randn(2, 40_000), torch.randn(2, 40_000)
    scale, zp = torch.ones(2), torch.zeros(2, dtype=torch.int32)
    mask = torch.zeros(10_000, dtype=torch.uint8)
    codes = torch.zeros(2, 40_000, dtype=torch.uint8)
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("fake_quant", (x, scale, zp, 0, 3, 0, None, "code", True)),
        ("fake_quant_bwd", (grad, mask, [])),
        ("lsq_bwd", (grad, x, scale, zp, 0, 3, 0, None, "code", 1.0)),
        ("fake_quant_dynamic", (x, 0, 3, 0, None, False, "minmax", 99.0, "code", True)),
        ("qparams", (torch.ones(2, 2), 0, 3, False)),
        ("quantize", (x, scale, zp, 0, 3, 0, None, 2)),
        ("dequantize", (codes, scale, zp, 0, 0, None, 0, 0, torch.float32)),
    ]
    calls += [
        ("quant_range", (x, 0, 3, 0, None, False, method, 99.0)) for method in numeric.METHODS
    ]
    from shim import build

    for stream, (op, args) in enumerate(calls, start=0x100):
        target = (build.load(), 0, stream)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_native, "target", lambda _, t=target: t)
            _registry.resolve(f"qkernels.backends.native.{STEMS[op]}:{op}")(*args)
        assert lib.shim_last_stream() == stream, op
