"""Lists of error_stats and noise: those of single calls, to the bit, gradients and errors too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import channels_last
from compare import assert_same
from torch import Tensor

import qkernels
from qkernels import foreach

P = 0.4
SEEDS = [3, 2**63 - 1, 5, 7, 11, 13]
OFFSETS = [0, 1, 4, 0, 2**40, 7]


def tensors() -> list[Tensor]:
    """Shapes, dtypes and layouts that have nothing in common but an axis 0."""
    g = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(shape, generator=g)  # noqa: E731
    return [
        randn(24, 1000),
        channels_last(randn(6, 5, 4, 3)).bfloat16(),
        randn(3, 40).double(),
        randn(0, 4),
        randn(12, 9)[::3, 1:7].half(),
        randn(1),
    ]


def stats_of(xs: list[Tensor]) -> list[Any]:
    return [qkernels.error_stats(x, bits=3, axis=0) for x in xs]


def calls(op: str, xs: list[Tensor]) -> tuple[Callable[..., list[Tensor]], Callable[..., Tensor]]:
    """(the list form, the single form of tensor i) with the same arguments."""
    now = stats_of(xs)
    before: list[Any] = [(s.mean * 2, s.std / 2) for s in now]
    common: dict[str, Any] = {"step": 4}
    if op == "differential_noise":
        args, per = (now, before), {"ramp": [0.5, 1.0, 0.0, 1.0, 2.0, 0.25]}
    elif op == "drop_in_noise":
        args, per = (now,), {"ramp": [0.5, 1.0, 0.0, 1.0, 2.0, 0.25]}
        common |= {"p": P, "axis": 0}
    else:
        args, per = ([s.std for s in now],), {"p": [0.0, 1.0, P, P, P, P]}
        common |= {"axis": 0}
    per |= {"seed": SEEDS, "offset": OFFSETS}

    def listed(ts: list[Tensor], **kw: Any) -> list[Tensor]:
        return getattr(foreach, op)(ts, *args, **common, **per, **kw)

    def single(i: int, x: Tensor, **kw: Any) -> Tensor:
        own = {name: values[i] for name, values in per.items()}
        return getattr(qkernels, op)(x, *(a[i] for a in args), **common, **own, **kw)

    return listed, single


OPS = ("differential_noise", "drop_in_noise", "uniform_noise")
BACKENDS = (None, "reference")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threads", (1, 2, 7))
def test_error_stats_of_a_list(backend: str | None, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        xs = tensors()
        bits = [2, 3, 4, 5, 8, 1]
        scales: list[Any] = [0.1, None, 0.3, None, None, 2.0]  # found in the call, or given
        for i, s in enumerate(scales):
            if s is not None:
                scales[i] = torch.full((xs[i].shape[0],), s, dtype=stats_of(xs)[i].mean.dtype)
        got = foreach.error_stats(xs, scales, bits=bits, axis=0, backend=backend)
        for i, x in enumerate(xs):
            want = qkernels.error_stats(x, scales[i], bits=bits[i], axis=0, backend=backend)
            for name in want._fields:
                assert_same(getattr(got[i], name), getattr(want, name), f"{name} of tensor {i}")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threads", (1, 2, 7))
@pytest.mark.parametrize("op", OPS)
def test_noise_of_a_list(op: str, threads: int, backend: str | None) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        xs = tensors()
        listed, single = calls(op, xs)
        for i, got in enumerate(listed(xs, backend=backend)):
            assert_same(got, single(i, xs[i], backend=backend), f"tensor {i}")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("op", OPS)
def test_in_place(op: str) -> None:
    xs = tensors()
    listed, single = calls(op, xs)
    want = [single(i, x) for i, x in enumerate(xs)]
    versions = [x._version for x in xs]
    got = listed(xs, inplace=True)
    for i, x in enumerate(xs):
        assert got[i] is x
        assert_same(x.clone(), want[i].clone(), f"tensor {i}")
        assert x._version > versions[i], "autograd must notice the change"


@pytest.mark.parametrize("op", OPS)
def test_gradients(op: str) -> None:
    xs = tensors()
    listed, _ = calls(op, xs)
    for x in xs[::2]:
        x.requires_grad_()
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ys = listed(xs)
    assert not saved, "nothing is kept for the backward"
    assert [y.requires_grad for y in ys] == [True, False] * 3
    cotangents = [torch.randn_like(y) for y in ys[::2]]
    torch.autograd.backward(ys[::2], cotangents)
    for x, g in zip(xs[::2], cotangents, strict=True):
        assert x.grad is not None
        assert_same(x.grad + 0, g + 0, "gradient")


def test_in_place_on_values_with_a_graph() -> None:
    leaf = torch.randn(4, 8, requires_grad=True)
    x, other = leaf * 2, torch.randn(3, 5)
    want = qkernels.uniform_noise(x.detach(), 0.5, seed=1, step=2)
    foreach.uniform_noise([x, other], 0.5, seed=1, step=2, inplace=True)
    assert_same(x.detach(), want)
    g = torch.randn(4, 8)
    x.backward(g)
    assert_same(leaf.grad, 2 * g)


def test_compiled_lists_are_taken_apart() -> None:
    xs = [torch.randn(4, 8), torch.randn(3, 5, 2)]
    stats = [(torch.zeros(4), torch.ones(4)), (torch.zeros(3), torch.ones(3))]

    def run(ts: list[Tensor]) -> list[Tensor]:
        return foreach.differential_noise(ts, stats, seed=[1, 2], step=3)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(xs), run(xs), strict=True):
        assert_same(got, want)


GOOD = (0.0, 1.0)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    (
        ({"xs": []}, ValueError, "xs must be a list of at least one tensor, got []"),
        ({"xs": torch.ones(3)}, TypeError, "xs must be a list of tensors, got Tensor"),
        (
            {"xs": [torch.ones(3), torch.ones(3, device="meta")]},
            ValueError,
            "xs must be on one device, got cpu and, for tensor 1, meta",
        ),
        ({"seed": [1]}, ValueError, "seed must be one value or a list of 2, one per tensor"),
        ({"seed": [1, "2"]}, TypeError, "tensor 1: drop_in_noise: seed must be an int"),
        ({"p": [0.5, 1.5]}, ValueError, "tensor 1: drop_in_noise: p must be in [0, 1], got 1.5"),
        (
            {"stats": [GOOD, (0.0, -1.0)]},
            ValueError,
            "tensor 1: drop_in_noise: std must be finite and at least 0, got -1.0 at channel 0",
        ),
        (
            {"stats": [GOOD, (torch.zeros(2), torch.ones(2))]},
            ValueError,
            "tensor 1: drop_in_noise: mean must be 0-dim (or one entry), got shape (2,)",
        ),
        ({"inplace": True, "twice": True}, ValueError, "inplace must be False for a tensor given"),
    ),
)
def test_bad_lists(change: dict[str, Any], error: type[Exception], text: str) -> None:
    xs = [torch.randn(3), torch.randn(4, 2)]
    kw: dict[str, Any] = {"stats": GOOD, "p": 0.5, "seed": 1, "step": 1, **change}
    given = kw.pop("xs", [xs[0], xs[0]] if kw.pop("twice", False) else xs)
    before = [x.clone() for x in xs]
    for inplace in (False, True):
        with pytest.raises(error) as caught:
            foreach.drop_in_noise(given, **{"inplace": inplace, **kw})
        assert str(caught.value).startswith("foreach.drop_in_noise: ")
        assert text in str(caught.value)
    for x, was in zip(xs, before, strict=True):
        assert_same(x, was, "an error leaves all as it was")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_refused_list_leaves_all_as_they_were(backend: str | None) -> None:
    """Values, and what autograd knows of them."""
    leaf = torch.randn(4, requires_grad=True)
    a, b = leaf * 1, torch.randn(4, 2)
    later = (a * a).sum()
    before = [a.clone(), b.clone()]
    stats = [(0.0, 1.0), (0.0, -1.0)]
    with pytest.raises(ValueError, match=r"tensor 1: .* std must be finite and at least 0"):
        foreach.differential_noise(
            [a, b], stats, seed=1, step=1, axis=None, inplace=True, backend=backend
        )
    with pytest.raises(RuntimeError, match="leaf"):
        foreach.uniform_noise([a, leaf], 0.1, seed=1, step=1, inplace=True, backend=backend)
    assert_same(a.detach(), before[0].detach())
    assert_same(b, before[1])
    later.backward()
    assert_same(leaf.grad, 2 * leaf.detach())


def test_tensors_that_share_memory_are_refused() -> None:
    x = torch.randn(4, 4)
    was = x.clone()
    with pytest.raises(ValueError, match="inplace must be False for tensors that share memory"):
        foreach.uniform_noise([x, x.view(-1)], 0.1, seed=[1, 2], step=1, inplace=True)
    assert_same(x, was)
