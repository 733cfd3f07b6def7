"""fake_quant with the range of the tensor at hand, found in the same call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import assert_codes, assert_same
from harness.clocks import read_ledger
from harness.headline import BYTES, QMAX, QMIN, inputs
from harness.parity import assert_rival
from harness.record import work_of
from harness.rivals import Call, compiled, copies, dynamic_composite
from harness.sweep import Spot, bytes_of, mask_bytes
from harness.timing import Bar, race

import qkernels

pytestmark = pytest.mark.benchmark(timer=read_ledger)

FORWARD = "read x once, write y and a mask: 2 N s + N/8"


@pytest.mark.bar
def bench_dynamic_forward(benchmark: Any) -> None:
    x, *_ = inputs()
    out = torch.empty_like(x)
    by_hand = compiled(dynamic_composite)
    y, scale, _ = qkernels.fake_quant_dynamic(x, bits=8, axis=0)
    assert_same(y, qkernels.fake_quant(x, bits=8, axis=0, backend="reference"))
    column = scale[:, None]
    codes = (by_hand(x, QMIN, QMAX) / column).round()
    assert_codes(codes, (y / column).round(), x / column, most=x.numel() // 10_000)
    xg = x.clone().requires_grad_()
    ideal = 2 * BYTES + BYTES // 32
    race(
        benchmark,
        lambda: qkernels.fake_quant(xg, bits=8, axis=0),
        {"copy": lambda: out.copy_(x), "torch.compile": lambda: by_hand(x, QMIN, QMAX)},
        bars=(Bar("torch.compile", 1.3),),
        work=work_of("fake_quant_dynamic", x, ideal, FORWARD, axis=0, copied=2 * BYTES),
        rounds=15,
    )


@pytest.mark.sweep("fake_quant_dynamic")
def bench_fake_quant_dynamic(benchmark: Any, spot: Spot) -> None:
    """Rivals: the composite; torch core's range and fake quantization in two calls; its fused
    observer, which keeps a moving average and writes a mask."""
    x = spot.x
    xg = x.detach().requires_grad_()  # so that the mask is written too
    ours = lambda: qkernels.fake_quant(xg, bits=8, **spot.place())  # noqa: E731
    y = ours().detach()
    assert_same(y, qkernels.fake_quant(x, bits=8, axis=spot.axis, backend="reference"))
    scale, _ = spot.params()
    by_hand = lambda: dynamic_composite(x, QMIN, QMAX, spot.dims)  # noqa: E731
    work: dict[str, Call] = {"eager composite": by_hand}
    if spot.dtype is torch.float32 and spot.axis in (None, 0):
        work["torch core, fused observer"] = fused_observer(spot)
    if spot.compiles():
        fused = compiled(dynamic_composite)
        work["torch.compile"] = lambda: fused(x, QMIN, QMAX, spot.dims)
    for name, call in work.items():
        assert_rival(y, call(), spot.column(scale), name)
    ideal = 2 * bytes_of(x) + mask_bytes(x)
    race(
        benchmark,
        ours,
        {**copies(x, ideal), **work},
        work=spot.work(ideal, FORWARD),
    )


def fused_observer(spot: Spot) -> Call:
    """torch core's fused moving-average observer and fake quantization. It averages with a weight
    of 1, so that its range is that of x, as ours is."""
    x = spot.x
    channels = 1 if spot.axis is None else x.shape[spot.axis]
    on = torch.ones(1, dtype=torch.long, device=x.device)
    lo, hi, scale = (torch.zeros(channels, device=x.device) for _ in range(3))
    zp = torch.zeros(channels, dtype=torch.int32, device=x.device)
    per_row = spot.axis is not None
    rest = (1.0, QMIN, QMAX, spot.axis or 0, per_row, False)
    return lambda: torch.fused_moving_avg_obs_fake_quant(x, on, on, lo, hi, scale, zp, *rest)
