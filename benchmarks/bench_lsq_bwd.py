"""Learned scales: the LSQ forward and backward through autograd, and the backward alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness.clocks import read_ledger
from harness.headline import BYTES, QMAX, QMIN, inputs
from harness.parity import assert_gradients, assert_learned, assert_sum_gradients
from harness.record import work_of
from harness.rivals import (
    Call,
    compiled,
    copies,
    core_learnable,
    core_learnable_backward,
    lsq_composite,
)
from harness.sweep import BF16, Spot, bytes_of
from harness.timing import Bar, race
from torch import Tensor

import qkernels

pytestmark = pytest.mark.benchmark(timer=read_ledger)

FORWARD_BACKWARD = "forward: x, y; backward: x, grad, grad_x: 5 N s"


@pytest.mark.bar
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
        assert_gradients(a, leaf.grad, grad.numel(), "torch core", one_in=50_000)
    race(
        benchmark,
        ours,
        {"copy": lambda: out.copy_(grad), "torch core": theirs},
        bars=(Bar("torch core", 10),),
        work=work_of("LSQ fwd+bwd", x, 5 * BYTES, FORWARD_BACKWARD, axis=0, copied=2 * BYTES),
        before=clear,
        rounds=15,
    )


def learned_inputs(spot: Spot) -> list[Tensor]:
    """[x, scale, zero point], the last two fp32 leaves."""
    scale, zp = spot.params()
    return [spot.x, scale.clone(), zp.float()]


def bound(spot: Spot) -> Tensor:
    """What the terms of grad_scale and grad_zero_point of a channel may add up to in size."""
    size = spot.grad.float().abs()
    return (size.sum(spot.dims) if spot.axis is not None else size.sum()) * QMAX


def assert_all_gradients(
    spot: Spot, got: tuple[Tensor, ...], theirs: tuple[Tensor, ...], who: str
) -> None:
    """A rival's gradients of x, scale and zero point."""
    assert_gradients(got[0], theirs[0], spot.x.numel(), who)
    size = bound(spot) / QMAX
    for a, b in zip(got[1:], theirs[1:], strict=True):
        assert_sum_gradients(a, b, size, who)


@pytest.mark.sweep("lsq_bwd")
def bench_lsq_fwd_bwd(benchmark: Any, spot: Spot) -> None:
    grad = spot.grad
    leaves = [leaf.requires_grad_() for leaf in learned_inputs(spot)]

    def clear() -> None:
        for leaf in leaves:
            leaf.grad = None

    def gradients(call: Call) -> tuple[Tensor, ...]:
        clear()
        call().backward(grad)
        return tuple(leaf.grad for leaf in leaves)

    def forward(**kw: Any) -> Tensor:
        place = spot.place(**kw)
        return qkernels.fake_quant(*leaves, bits=8, grad_scale=1.0, **place)

    columns = lambda: [spot.column(leaf) for leaf in leaves[1:]]  # noqa: E731
    rivals: dict[str, Call] = {
        "eager composite": lambda: lsq_composite(leaves[0], *columns(), QMIN, QMAX)
    }
    if takes_learnable(spot):
        rivals["torch core"] = lambda: core_learnable(*leaves, spot.axis, QMIN, QMAX)
    got = gradients(forward)
    assert_learned(got, gradients(lambda: forward(backend="reference")), bound(spot))
    for name, call in rivals.items():
        assert_all_gradients(spot, got, gradients(call), name)
    clear()
    ideal = 5 * bytes_of(spot.x)
    race(
        benchmark,
        lambda: forward().backward(grad),
        {
            **copies(spot.x, ideal),
            **{name: lambda call=call: call().backward(grad) for name, call in rivals.items()},
        },
        work=spot.work(ideal, FORWARD_BACKWARD, "LSQ fwd+bwd"),
        before=clear,
    )


@pytest.mark.sweep("lsq_bwd")
def bench_lsq_bwd(benchmark: Any, spot: Spot) -> None:
    """The kernel alone, with memory for its results."""
    x, scale, zp = learned_inputs(spot)
    grad, qk, row = spot.grad, torch.ops.qkernels, spot.backend or ""
    args = (grad, x, scale, zp, QMIN, QMAX, spot.axis, None, "code", 1.0)
    got = qk.lsq_bwd(*args, backend=row)
    assert_learned(got, qk.lsq_bwd(*args, backend="reference"), bound(spot))
    work: dict[str, Call] = {}
    if takes_learnable(spot):
        core = lambda: core_learnable_backward(grad, x, scale, zp, spot.axis, QMIN, QMAX)  # noqa: E731
        work["torch core"] = core
    by_hand = lambda: lsq_gradients(grad, x, spot.column(scale), spot.column(zp), spot.dims)  # noqa: E731
    work["eager composite"] = by_hand
    if spot.compiles():
        fused = compiled(lsq_gradients)
        columns = spot.column(scale), spot.column(zp)
        work["torch.compile"] = lambda: fused(grad, x, *columns, spot.dims)
    for name, call in work.items():
        assert_all_gradients(spot, got, call(), name)
    ideal = 3 * bytes_of(x)
    on_gpu = spot.device == "cuda" and spot.point.size == "64Mi" and "torch core" in work
    race(
        benchmark,
        lambda: qk.lsq_bwd(*args, backend=row),
        {**copies(x, ideal), **work},
        bars=(Bar("torch core", 4 if spot.dtype is BF16 else 2),) if on_gpu else (),
        work=spot.work(ideal, "read x and grad, write grad_x: 3 N s"),
    )


def lsq_gradients(
    grad: Tensor, x: Tensor, scale: Tensor, zp: Tensor, dims: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward as one writes it by hand."""
    t = x.float() * (1.0 / scale)
    code = torch.round(t) + zp
    inside = (code >= QMIN) & (code <= QMAX)
    gx = torch.where(inside, grad, torch.zeros_like(grad))
    slope = torch.clamp(code, QMIN, QMAX) - zp - torch.where(inside, t, torch.zeros_like(t))
    gs = (grad.float() * slope).sum(dims)
    gz = -(torch.where(inside, torch.zeros_like(t), grad.float()) * scale).sum(dims)
    return gx, gs, gz


def takes_learnable(spot: Spot) -> bool:
    """torch core's learned op takes no half type with an fp32 scale per channel (an internal
    assert), and per tensor only fp32."""
    return spot.dtype is torch.float32
