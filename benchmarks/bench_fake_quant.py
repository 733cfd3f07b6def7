"""fake_quant, in place too, and its backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import assert_codes, assert_same
from harness.clocks import read_ledger
from harness.headline import BYTES, QMAX, QMIN, assert_parity, inputs
from harness.parity import assert_gradients, assert_rival
from harness.peers import Params, fake_quant_peers
from harness.record import saved_bytes, work_of
from harness.rivals import Call, compiled, composite, copies, core_fake_quant, ste_composite
from harness.sweep import F32, Spot, bytes_of, mask_bytes
from harness.timing import Bar, batched, race
from torch import Tensor

import qkernels

pytestmark = pytest.mark.benchmark(timer=read_ledger)

FORWARD = "read x, write y and a mask: 2 N s + N/8"
FORWARD_BACKWARD = "forward: x, y, mask; backward: grad, mask, grad_x: 4 N s + N/4"


@pytest.mark.bar
def bench_forward(benchmark: Any) -> None:
    x, scale, zp, _ = inputs()
    out = torch.empty_like(x)
    column, offset = scale[:, None], zp[:, None]
    by_hand = compiled(composite)
    rivals = {
        "copy": lambda: out.copy_(x),
        "clone": x.clone,
        "torch core": lambda: torch.fake_quantize_per_channel_affine(x, scale, zp, 0, QMIN, QMAX),
        "torch.compile": lambda: by_hand(x, column, offset, QMIN, QMAX),
    }
    assert_parity(x, scale, zp, rivals["torch core"]())
    assert_parity(x, scale, zp, rivals["torch.compile"]())
    xg = x.clone().requires_grad_()  # so that the mask is written too
    race(
        benchmark,
        lambda: qkernels.fake_quant(xg, scale, zp, bits=8, axis=0),
        rivals,
        bars=(Bar("copy", 1 / 1.6), Bar("torch core", 20), Bar("torch.compile", 1)),
        work=work_of("fake_quant", x, 2 * BYTES + BYTES // 32, FORWARD, axis=0, copied=2 * BYTES),
        rounds=15,
    )


@pytest.mark.bar
def bench_forward_backward(benchmark: Any) -> None:
    x, scale, zp, grad = inputs()
    x.requires_grad_()
    out = torch.empty_like(x)

    def clear() -> None:
        x.grad = None

    def step(y: Tensor) -> None:
        y.backward(grad)

    core = torch.fake_quantize_per_channel_affine
    assert_parity(x.detach(), scale, zp, core(x.detach(), scale, zp, 0, QMIN, QMAX))
    step(qkernels.fake_quant(x, scale, zp, bits=8, axis=0))
    got = x.grad
    clear()
    step(core(x, scale, zp, 0, QMIN, QMAX))
    assert_gradients(got, x.grad, x.numel(), "torch core", one_in=50_000)
    clear()
    ideal = 4 * BYTES + 2 * BYTES // 32
    race(
        benchmark,
        lambda: step(qkernels.fake_quant(x, scale, zp, bits=8, axis=0)),
        {
            "copy": lambda: out.copy_(grad),
            "torch core": lambda: step(core(x, scale, zp, 0, QMIN, QMAX)),
        },
        bars=(Bar("torch core", 10),),
        work=work_of("fake_quant fwd+bwd", x, ideal, FORWARD_BACKWARD, axis=0, copied=2 * BYTES),
        before=clear,
        rounds=15,
    )


@pytest.mark.bar
@pytest.mark.parametrize("axis", (None, 0), ids=("per_tensor", "per_channel"))
def bench_1024_elements(benchmark: Any, axis: int | None) -> None:
    x = torch.randn(8, 128, requires_grad=True)
    scale, zp = qkernels.quant_range(x, bits=8, axis=axis)
    core = lambda: core_fake_quant(x, scale, zp, axis, QMIN, QMAX)  # noqa: E731
    ours = lambda: qkernels.fake_quant(x, scale, zp, bits=8, axis=axis)  # noqa: E731
    step = (scale[:, None] if axis == 0 else scale).detach()
    assert_codes((core() / step).round(), (ours() / step).round(), (x / step).detach(), most=1)
    own, ideal = x.detach(), 2 * bytes_of(x) + mask_bytes(x)
    out = torch.empty_like(own)
    race(
        benchmark,
        batched(ours, 100),
        {
            "copy": batched(lambda: out.copy_(own), 100),
            "torch core (100 calls)": batched(core, 100),
        },
        bars=(Bar("torch core (100 calls)", 1 / 1.3),),
        work=work_of(
            "fake_quant, 100 calls",
            x,
            100 * ideal,
            f"100 calls; each: {FORWARD}",
            axis=axis,
            copied=200 * bytes_of(x),
        ),
        rounds=15,
        one=ours,
    )


@pytest.mark.bar
def bench_saved_for_backward(benchmark: Any) -> None:
    x, scale, zp, _ = inputs()
    x.requires_grad_()
    learned = scale.clone().requires_grad_()
    core = torch.fake_quantize_per_channel_affine
    calls: dict[str, Call] = {
        "STE": lambda: qkernels.fake_quant(x, scale, zp, bits=8, axis=0),
        "dynamic": lambda: qkernels.fake_quant(x, bits=8, axis=0),
        "LSQ": lambda: qkernels.fake_quant(x, learned, zp, bits=8, axis=0),
        "torch core": lambda: core(x, scale, zp, 0, QMIN, QMAX),
        "eager composite": lambda: ste_composite(x, scale[:, None], zp[:, None], QMIN, QMAX),
    }
    bits = {name: 8 * saved_bytes(call) / x.numel() for name, call in calls.items()}
    assert bits["STE"] == bits["dynamic"] == 1.0, f"bits saved per element: {bits}"
    benchmark.extra_info["figures"] = {
        f"bits saved per element, {name}": f"{n:.3f}" for name, n in bits.items()
    }
    benchmark.pedantic(lambda: None, rounds=1)


def gpu_bars(spot: Spot, *rivals: str) -> tuple[Bar, ...]:
    """64 Mi elements on a GPU: 85 % of the copy, faster than the rivals."""
    if spot.device == "cuda" and spot.point.size == "64Mi":
        return (Bar("copy", 0.85), *(Bar(name, 1) for name in rivals))
    return ()


def bars_of(spot: Spot, limit: str, speedup: float, *rivals: str) -> tuple[Bar, ...]:
    """gpu_bars; a contiguous fp32 activation on the CPU: `limit` times `speedup`."""
    if spot.device == "cpu" and spot.point.size == "activation" and spot.dtype is F32:
        return (Bar(limit, speedup),)
    return gpu_bars(spot, *rivals)


@pytest.mark.sweep("fake_quant", large=True)
def bench_fake_quant(benchmark: Any, spot: Spot) -> None:
    x, (scale, zp) = spot.x, spot.params()
    by = (spot.column(scale), spot.column(zp), QMIN, QMAX)
    out = torch.empty_like(x)
    work: dict[str, Call] = {
        "torch core": lambda: core_fake_quant(x, scale, zp, spot.axis, QMIN, QMAX),
        "eager composite": lambda: composite(x, *by),
    }
    if spot.compiles():
        by_hand = compiled(composite)
        work["torch.compile"] = lambda: by_hand(x, *by)
    xg = x.detach().requires_grad_()  # so that the mask is written too
    ours = lambda: qkernels.fake_quant(xg, scale, zp, bits=8, **spot.place())  # noqa: E731
    y = ours().detach()
    assert_same(y, qkernels.fake_quant(x, scale, zp, bits=8, axis=spot.axis, backend="reference"))
    for name, call in work.items():
        assert_rival(y, call(), by[0], name)
    work |= checked_peers(spot, scale, zp, y)
    names = tuple(n for n in ("torch core", "torch.compile") if n in work)
    race(
        benchmark,
        ours,
        {"copy": lambda: out.copy_(x), "clone": x.clone, **work},
        bars=bars_of(spot, "clone", 1 / 1.3, *names),
        work=spot.work(2 * bytes_of(x) + mask_bytes(x), FORWARD)._replace(copied=2 * bytes_of(x)),
    )


def checked_peers(spot: Spot, scale: Tensor, zp: Tensor, y: Tensor) -> dict[str, Call]:
    """Peers whose result is ours; the signed ones are compared with ours of the same kind."""
    x = spot.x
    signed = qkernels.fake_quant(x, scale, bits=8, axis=spot.axis, symmetric=True).detach()
    found: dict[str, Call] = {}
    for name, peer in fake_quant_peers(x, Params(scale, zp, spot.axis, 8, spot.column)).items():
        want = signed if peer.symmetric else y
        assert_rival(want, peer.call(x).detach(), spot.column(scale), name)
        found[name] = lambda peer=peer: peer.call(x)
    return found


@pytest.mark.sweep("fake_quant")
def bench_fake_quant_inplace(benchmark: Any, spot: Spot) -> None:
    x, (scale, zp) = spot.x, spot.params()
    by = (spot.column(scale), spot.column(zp), QMIN, QMAX)
    own, out = x.clone(), torch.empty_like(x)
    call = lambda t: qkernels.fake_quant(t, scale, zp, bits=8, inplace=True, **spot.place())  # noqa: E731
    want = qkernels.fake_quant(x, scale, zp, bits=8, axis=spot.axis, backend="reference")
    result = call(own)
    assert result.data_ptr() == own.data_ptr()
    assert_same(result, want)
    own.copy_(x)
    race(
        benchmark,
        lambda: call(own),
        {
            "copy": lambda: out.copy_(x),
            "clone": x.clone,
            "torch core": lambda: core_fake_quant(x, scale, zp, spot.axis, QMIN, QMAX),
            "eager composite": lambda: out.copy_(composite(x, *by)),
        },
        bars=bars_of(spot, "copy", 1 / 1.3),
        work=spot.work(2 * bytes_of(x), "read x, write x: 2 N s", "fake_quant in place"),
    )


@pytest.mark.sweep("fake_quant")
def bench_fake_quant_fwd_bwd(benchmark: Any, spot: Spot) -> None:
    x, (scale, zp), grad = spot.x.requires_grad_(), spot.params(), spot.grad
    by = (spot.column(scale), spot.column(zp), QMIN, QMAX)

    def clear() -> None:
        x.grad = None

    def gradient(forward: Call) -> Tensor:
        clear()
        forward().backward(grad)
        return x.grad

    forward = lambda **kw: qkernels.fake_quant(x, scale, zp, bits=8, **{**spot.place(), **kw})  # noqa: E731
    rivals: dict[str, Call] = {
        "torch core": lambda: core_fake_quant(x, scale, zp, spot.axis, QMIN, QMAX),
        "eager composite": lambda: ste_composite(x, *by),
    }
    rivals |= checked_peers(spot, scale, zp, forward().detach())  # with the gradient of each
    ours = gradient(forward)
    assert_same(ours, gradient(lambda: forward(backend="reference")))
    for name in ("torch core", "eager composite"):
        assert_gradients(ours, gradient(rivals[name]), x.numel(), name)
    clear()
    ideal = 4 * bytes_of(x) + 2 * mask_bytes(x)
    race(
        benchmark,
        lambda: forward().backward(grad),
        {
            **copies(x, ideal),
            **{name: lambda call=call: call().backward(grad) for name, call in rivals.items()},
        },
        work=spot.work(ideal, FORWARD_BACKWARD, "fake_quant fwd+bwd"),
        before=clear,
    )


@pytest.mark.sweep("fake_quant_bwd")
def bench_fake_quant_bwd(benchmark: Any, spot: Spot) -> None:
    """The kernel alone, with memory for its result."""
    x, (scale, zp), grad = spot.x, spot.params(), spot.grad
    qk, row = torch.ops.qkernels, spot.backend or ""
    rest = (QMIN, QMAX, spot.axis, None, "code")
    _, mask = qk.fake_quant(x, scale, zp, *rest, True, backend=row)
    order = [] if x.is_contiguous() else [0, 2, 3, 1]
    wide = torch.randint(2, x.shape, device=x.device, dtype=torch.bool)
    core = torch.ops.aten.fake_quantize_per_channel_affine_cachemask_backward
    got = qk.fake_quant_bwd(grad, mask, order, backend=row)
    assert_same(got, qk.fake_quant_bwd(grad, mask, order, backend="reference"))
    ideal = 2 * bytes_of(x) + mask_bytes(x)
    race(
        benchmark,
        lambda: qk.fake_quant_bwd(grad, mask, order, backend=row),
        {
            **copies(x, ideal),
            "torch core": lambda: core(grad, wide),
            "eager composite": lambda: torch.where(wide, grad, 0.0),
        },
        bars=gpu_bars(spot, "torch core"),
        work=spot.work(ideal, "read grad and mask, write grad_x: 2 N s + N/8"),
    )
