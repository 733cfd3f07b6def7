"""fake_quant, its backward and its dynamic form: fp32, 512 x 4608, per channel, 2 threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import assert_codes, assert_same
from rivals import compiled, composite, dynamic_composite
from timing import Bar, batched, race
from torch import Tensor

import qkernels

SHAPE = (512, 4608)
QMIN, QMAX = 0, 255
BYTES = SHAPE[0] * SHAPE[1] * 4


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, scale, zero point, cotangent)."""
    x = torch.randn(SHAPE)
    scale, zp = qkernels.quant_range(x, bits=8, axis=0)
    return x, scale, zp, torch.randn(SHAPE)


def assert_parity(x: Tensor, scale: Tensor, zp: Tensor, theirs: Tensor) -> None:
    """Nothing is timed unless ours equals the reference, and theirs ours but for ties."""
    ours = qkernels.fake_quant(x, scale, zp, bits=8, axis=0)
    assert_same(ours, qkernels.fake_quant(x, scale, zp, bits=8, axis=0, backend="reference"))
    column = scale[:, None]
    codes, other = (ours / column).round(), (theirs / column).round()
    assert_codes(other, codes, x / column, most=x.numel() // 10_000)


def bench_forward(benchmark: Any) -> None:
    x, scale, zp, _ = inputs()
    out = torch.empty_like(x)
    column, offset = scale[:, None], zp[:, None]
    by_hand = compiled(composite)
    rivals = {
        "copy": lambda: out.copy_(x),
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
        ideal_bytes=2 * BYTES + BYTES // 32,
        copy_bytes=2 * BYTES,
    )


def assert_gradients_agree(ours: Tensor, theirs: Tensor) -> None:
    """All but a few entries agree: torch rounds x / scale + zero_point and ours x / scale. The sum
    loses some 2^-17 of a step, so that one element in 100 000 or so, next to a tie, gets another
    code; each changes its own entry or its channel's sum."""
    error = (ours - theirs).abs() / theirs.abs().max()
    off = int((error > 1e-4).sum())
    most = SHAPE[0] * SHAPE[1] // 50_000
    assert off <= most, f"{off} of {ours.numel()} gradients differ, at most {most} may"


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
    assert_gradients_agree(got, x.grad)
    clear()
    race(
        benchmark,
        lambda: step(qkernels.fake_quant(x, scale, zp, bits=8, axis=0)),
        {
            "copy": lambda: out.copy_(grad),
            "torch core": lambda: step(core(x, scale, zp, 0, QMIN, QMAX)),
        },
        bars=(Bar("torch core", 10),),
        ideal_bytes=4 * BYTES + 2 * BYTES // 32,
        copy_bytes=2 * BYTES,
        before=clear,
    )


def bench_lsq_forward_backward(benchmark: Any) -> None:
    x, scale, zp, grad = inputs()
    leaves = [x.requires_grad_(), scale.requires_grad_(), zp.float().requires_grad_()]
    out = torch.empty_like(x)
    core = torch._fake_quantize_learnable_per_channel_affine

    def clear() -> None:
        for leaf in leaves:
            leaf.grad = None

    def ours() -> None:
        y = qkernels.fake_quant(*leaves, bits=8, axis=0, grad_scale=1.0)
        y.backward(grad)

    def theirs() -> None:
        core(*leaves, 0, QMIN, QMAX, 1.0).backward(grad)

    ours()
    got = [leaf.grad for leaf in leaves]
    clear()
    theirs()
    for a, leaf in zip(got, leaves, strict=True):
        assert_gradients_agree(a, leaf.grad)
    race(
        benchmark,
        ours,
        {"copy": lambda: out.copy_(grad), "torch core": theirs},
        bars=(Bar("torch core", 10),),
        ideal_bytes=5 * BYTES,  # forward: x, y; backward: x, grad, grad_x
        copy_bytes=2 * BYTES,
        before=clear,
    )


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
    race(
        benchmark,
        lambda: qkernels.fake_quant(xg, bits=8, axis=0),
        {"copy": lambda: out.copy_(x), "torch.compile": lambda: by_hand(x, QMIN, QMAX)},
        bars=(Bar("torch.compile", 1.3),),
        ideal_bytes=2 * BYTES + BYTES // 32,
        copy_bytes=2 * BYTES,
    )


@pytest.mark.parametrize("axis", (None, 0), ids=("per_tensor", "per_channel"))
def bench_1024_elements(benchmark: Any, axis: int | None) -> None:
    x = torch.randn(8, 128, requires_grad=True)
    scale, zp = qkernels.quant_range(x, bits=8, axis=axis)
    if axis is None:
        core = lambda: torch.fake_quantize_per_tensor_affine(x, scale, zp, QMIN, QMAX)  # noqa: E731
    else:
        core = lambda: torch.fake_quantize_per_channel_affine(x, scale, zp, 0, QMIN, QMAX)  # noqa: E731
    ours = lambda: qkernels.fake_quant(x, scale, zp, bits=8, axis=axis)  # noqa: E731
    step = (scale[:, None] if axis == 0 else scale).detach()
    assert_codes((core() / step).round(), (ours() / step).round(), (x / step).detach(), most=1)
    race(
        benchmark,
        batched(ours, 100),
        {"torch core (100 calls)": batched(core, 100)},
        bars=(Bar("torch core (100 calls)", 1 / 1.3),),
    )


def bench_saved_for_backward(benchmark: Any) -> None:
    x, scale, zp, _ = inputs()
    x.requires_grad_()
    saved: dict[str, int] = {}

    def count(name: str, call: Any) -> None:
        sizes: list[int] = []

        def pack(t: Tensor) -> Tensor:
            sizes.append(t.numel() * t.element_size())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            call()
        saved[name] = sum(sizes)

    learned = scale.clone().requires_grad_()
    count("STE", lambda: qkernels.fake_quant(x, scale, zp, bits=8, axis=0))
    count("dynamic", lambda: qkernels.fake_quant(x, bits=8, axis=0))
    count("LSQ", lambda: qkernels.fake_quant(x, learned, zp, bits=8, axis=0))
    core = torch.fake_quantize_per_channel_affine
    count("torch core", lambda: core(x, scale, zp, 0, QMIN, QMAX))
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info["figures"] = {
        f"bits saved per element, {name}": f"{8 * n / x.numel():.3f}" for name, n in saved.items()
    }
