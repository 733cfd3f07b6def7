"""quantize and dequantize: codes of one byte, and of 4 bits packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import assert_same
from harness.clocks import read_ledger
from harness.rivals import Call, compiled, copies, dequantize_composite, quantize_composite
from harness.sweep import Spot, bytes_of
from harness.timing import race
from torch import Tensor

import qkernels

pytestmark = pytest.mark.benchmark(timer=read_ledger)

BITS = pytest.mark.parametrize("bits", (8, 4), ids=("bytes", "packed4"))


def code_bytes(x: Tensor, bits: int) -> int:
    return x.numel() * bits // 8


def assert_near(codes: Tensor, theirs: Tensor) -> None:
    """A rival's codes are ours but next to ties, by one."""
    off = (codes.int() - theirs.int()).abs()
    assert int((off > 0).sum()) <= max(1, codes.numel() // 10_000)
    assert int(off.max()) <= 1


def core_quantize(spot: Spot, scale: Tensor, zp: Tensor) -> Call:
    """torch core's quantized tensor (fp32 only)."""
    if spot.axis is None:
        args = (spot.x, float(scale), int(zp), torch.quint8)
        return lambda: torch.quantize_per_tensor(*args)
    return lambda: torch.quantize_per_channel(spot.x, scale, zp, spot.axis, torch.quint8)


@BITS
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # torch takes it away some day
@pytest.mark.sweep("quantize")
def bench_quantize(benchmark: Any, spot: Spot, bits: int) -> None:
    x, (scale, zp), top = spot.x, spot.params(bits=bits), 2**bits - 1
    by = (spot.column(scale), spot.column(zp), 0, top)
    kw: dict[str, Any] = dict(bits=bits, packed=bits == 4)
    got = qkernels.quantize(x, scale, zp, **kw, **spot.place())
    assert_same(got, qkernels.quantize(x, scale, zp, **kw, axis=spot.axis, backend="reference"))
    # packing has no counterpart in torch: rivals write codes of one byte
    plain = qkernels.quantize(x, scale, zp, bits=bits, **spot.place())
    work: dict[str, Call] = {"eager composite": lambda: quantize_composite(x, *by)}
    assert_near(plain, work["eager composite"]())
    # its CPU op takes no channels_last per channel and no zero point on a GPU
    if bits == 8 and spot.dtype is torch.float32 and spot.device == "cpu" and x.is_contiguous():
        work["torch core"] = core_quantize(spot, scale, zp)
        assert_near(plain, work["torch core"]().int_repr())
    if spot.compiles() and bits == 8:
        fused = compiled(quantize_composite)
        work["torch.compile"] = lambda: fused(x, *by)
        assert_near(plain, work["torch.compile"]())
    ideal = bytes_of(x) + code_bytes(x, bits)
    race(
        benchmark,
        lambda: qkernels.quantize(x, scale, zp, **kw, **spot.place()),
        {**copies(x, ideal), **work},
        work=spot.work(ideal, f"read x, write codes of {bits} bits: N s + N {bits}/8", name(bits)),
    )


@BITS
@pytest.mark.sweep("dequantize")
def bench_dequantize(benchmark: Any, spot: Spot, bits: int) -> None:
    x, (scale, zp) = spot.x, spot.params(bits=bits)
    pack: dict[str, Any] = dict(bits=bits, packed=bits == 4)
    codes = qkernels.quantize(x, scale, zp, **pack, axis=spot.axis)
    plain = qkernels.quantize(x, scale, zp, bits=bits, axis=spot.axis)
    size = x.shape[-1] if bits == 4 else None
    kw: dict[str, Any] = dict(**pack, size=size, dtype=x.dtype)
    ours = lambda **kw2: qkernels.dequantize(codes, scale, zp, **kw, **{**spot.place(), **kw2})  # noqa: E731
    got = ours()
    assert_same(got, ours(backend="reference"))
    by = (spot.column(scale), spot.column(zp))
    work: dict[str, Call] = {
        "eager composite": lambda: dequantize_composite(plain, *by).to(x.dtype)
    }
    torch.testing.assert_close(work["eager composite"](), got, rtol=0, atol=0)
    ideal = bytes_of(x) + code_bytes(x, bits)
    race(
        benchmark,
        ours,
        {**copies(x, ideal), **work},
        work=spot.work(
            ideal, f"read codes of {bits} bits, write y: N s + N {bits}/8", "de" + name(bits)
        ),
    )


def name(bits: int) -> str:
    return "quantize" if bits == 8 else "quantize packed"
