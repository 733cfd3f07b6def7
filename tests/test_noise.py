"""What the noise ops mean: laws of differential noise, composites in plain torch, places in memory,
autograd, memory. The draws themselves are tested in test_philox.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from cases import DTYPE_IDS, DTYPES, channels_last
from compare import assert_same
from test_philox import LAST, backend_of, gates, normals, uniforms
from torch import Tensor

import qkernels
from qkernels import numeric


@backend_of
def test_laws_of_differential_noise(backend: str) -> None:
    n, std = 100_000, 0.5
    zeros = torch.zeros(n)
    # the mean is large, and must not show: delta_t and delta_{t-1} both have it
    rows = torch.stack(
        [
            qkernels.differential_noise(
                zeros, (3.0, std), seed=2, step=step, axis=None, backend=backend
            )
            for step in range(1, 7)
        ]
    ).double()
    variance = 2 * std**2
    assert float(rows.mean(1).abs().max()) < 5 * math.sqrt(variance / n)
    # the variance of the sample variance of a normal is 2 variance^2 / n
    assert float((rows.var(1) - variance).abs().max()) < 5 * variance * math.sqrt(2 / n)
    c = torch.corrcoef(rows)
    # a sample correlation around rho has standard deviation (1 - rho^2) / sqrt(n)
    assert float((c.diagonal(1) + 0.5).abs().max()) < 5 * 0.75 / math.sqrt(n)
    for lag in range(2, 6):
        assert float(c.diagonal(lag).abs().max()) < 5.5 / math.sqrt(n), f"lag {lag}"


@backend_of
def test_differential_noise_telescopes(backend: str) -> None:
    """Exactly, in fp64: eps has 24 bits, std is a power of two and the mean has two bits, so that
    every delta is a multiple of 2^-45 below 8 in size (checked), and every sum one of 2^-45 below
    32. Those have 50 bits at most: no addition rounds."""
    n, steps, law = 500, 40, (0.75, 0.5)
    start = torch.arange(n, dtype=torch.float64) / 64
    zeros, w = torch.zeros_like(start), start.clone()
    deltas = []
    for step in range(steps + 1):
        args = dict(seed=11, step=step, backend=backend)
        deltas.append(qkernels.drop_in_noise(zeros, law, p=1.0, **args))
        grid = deltas[-1] * 2.0**45
        assert bool((grid == grid.round()).all()) and float(deltas[-1].abs().max()) < 8
        if step:
            w = qkernels.differential_noise(w, law, axis=None, **args)
    assert_same(w - start, deltas[-1] - deltas[0])
    assert float((w - start).abs().max()) > 1


# (x, mean, std, earlier mean, earlier std, the rest) -> result; RAMP is no fp32 number on purpose
RAMP, P = 0.7, 0.6
OPS: dict[str, Callable[..., Tensor]] = {
    "differential_noise": lambda x, m, s, m0, s0, **kw: qkernels.differential_noise(
        x, (m, s), (m0, s0), ramp=RAMP, **kw
    ),
    "drop_in_noise": lambda x, m, s, m0, s0, **kw: qkernels.drop_in_noise(
        x, (m, s), p=P, ramp=RAMP, **kw
    ),
    "uniform_noise": lambda x, m, s, m0, s0, **kw: qkernels.uniform_noise(x, s, p=P, **kw),
}
op_of = pytest.mark.parametrize("op", OPS)


def params_for(x: Tensor, channels: int | None) -> list[Tensor]:
    """mean, std and the earlier ones, one entry per channel (None: 0-dim), all different."""
    compute = numeric.compute_dtype(x.dtype)
    n = 1 if channels is None else channels
    ramp = torch.arange(1, n + 1, dtype=compute) / n
    rows = [ramp - 0.4, ramp * 0.3, 0.2 - ramp, ramp.flip(0) * 0.9]
    return [r[0] if channels is None else r for r in rows]


def composite(
    op: str, x: Tensor, law: list[Tensor], seed: int, step: int, axis: int | None, offset: int = 0
) -> Tensor:
    """The op in plain torch, from the draws at x's own indices."""
    compute = numeric.compute_dtype(x.dtype)
    if axis is not None:
        law = [p.reshape([-1 if d == axis else 1 for d in range(x.dim())]) for p in law]
    mean, std, earlier_mean, earlier_std = law
    wide, shape = x.to(compute), tuple(x.shape)
    eps = normals(shape, seed, step, offset=offset).to(compute)
    if op == "differential_noise":
        before = normals(shape, seed, step - 1 if step else LAST, offset=offset).to(compute)
        y = wide + ((mean + std * eps) - (earlier_mean + earlier_std * before)) * RAMP
        return y.to(x.dtype)
    noise = (mean + std * eps) * RAMP
    if op == "uniform_noise":
        noise = std * uniforms(shape, seed, step, offset=offset).to(compute)
    is_open = gates(x.numel(), P, seed, step, offset=offset).reshape(shape)
    return torch.where(is_open, (wide + noise).to(x.dtype), x)


@backend_of
@op_of
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("axis", (None, 0, 1, -1))
def test_meaning(backend: str, op: str, dtype: torch.dtype, axis: int | None) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 5, 7).to(dtype)
    x[0, 0, :3] = torch.tensor([-0.0, math.inf, math.nan])
    front = None if axis is None else axis % 3
    law = params_for(x, None if axis is None else x.shape[axis])
    for seed, step, offset in (
        (5, 7, 0),
        (0, 0, 3),
        (LAST, LAST, 2**62 + 1),
        (2**40 + 1, 2**33, 1),
    ):
        counter = dict(seed=seed, step=step, offset=offset)
        got = OPS[op](x, *law, axis=axis, **counter, backend=backend)
        assert_same(got, composite(op, x, law, seed, step, front, offset), f"{op} at {counter}")


@backend_of
@op_of
def test_groups(backend: str, op: str) -> None:
    x = torch.randn(4, 6)
    law = params_for(x, 8)
    got = OPS[op](x, *law, axis=None, group_size=3, seed=1, step=2, backend=backend)
    want = composite(op, x.reshape(8, 3), law, 1, 2, 0)
    assert_same(got, want.reshape(4, 6))


@backend_of
def test_statistics_in_every_form(backend: str) -> None:
    x = torch.randn(3, 8)
    args = dict(seed=1, step=2, backend=backend)
    error = qkernels.error_stats(x, bits=2, axis=0)
    want = qkernels.differential_noise(x, (error.mean, error.std), **args)
    assert_same(qkernels.differential_noise(x, error, **args), want)
    assert_same(qkernels.differential_noise(x, error, error, **args), want)
    assert not torch.equal(want, qkernels.differential_noise(x, error, (0.0, 1.0), **args))
    same = qkernels.drop_in_noise(x, (0.5, 0.25), p=1.0, **args)
    for number in (torch.tensor(0.25), torch.tensor([0.25]), torch.tensor(0.25).half()):
        assert_same(qkernels.drop_in_noise(x, (0.5, number), p=1.0, **args), same)
    every = torch.full((3,), 0.25)
    assert_same(qkernels.drop_in_noise(x, (0.5, every), p=1.0, axis=0, **args), same)
    negated = torch._neg_view(-every)
    assert_same(qkernels.drop_in_noise(x, (0.5, negated), p=1.0, axis=0, **args), same)
    wide = qkernels.uniform_noise(x.double(), torch.full((8,), 0.1), axis=1, **args)
    # a number is fp64 for fp64 x, a tensor what it was
    same = qkernels.uniform_noise(x.double(), float(torch.tensor(0.1)), **args)
    assert_same(wide, same)


@backend_of
def test_no_noise(backend: str) -> None:
    x = torch.tensor([1.5, -0.0, 0.0, math.inf, -math.inf, math.nan, 1e-45, 3e38] * 9)
    args = dict(seed=1, step=2, backend=backend)
    for dtype in DTYPES:
        want = x.to(dtype)
        # a closed gate leaves the very bits, -0.0 too
        assert_same(qkernels.drop_in_noise(want, (5.0, 9.0), p=0.0, **args), want)
        assert_same(qkernels.uniform_noise(want, 9.0, p=0.0, **args), want)
        for got in (
            qkernels.differential_noise(want, (4.0, 0.0), axis=None, **args),
            qkernels.differential_noise(want, (4.0, 3.0), axis=None, ramp=0.0, **args),
            qkernels.drop_in_noise(want, (4.0, 3.0), p=1.0, ramp=0.0, **args),
            qkernels.uniform_noise(want, 0.0, **args),
        ):  # x + 0.0: only the sign of a zero may change
            assert_same(got + 0.0, want + 0.0)
    moved = qkernels.differential_noise(torch.zeros(9), (4.0, 0.0), (1.0, 0.0), axis=None, **args)
    assert moved.tolist() == [3.0] * 9


@backend_of
@op_of
def test_seed_and_step_as_tensors(backend: str, op: str) -> None:
    x = torch.randn(4, 9)
    law = params_for(x, 4)
    for seed, step in ((0, 0), (3, 5), (2**40 + 7, 2**35 + 1), (LAST, LAST)):
        want = OPS[op](x, *law, axis=0, seed=seed, step=step, backend=backend)
        at = torch.tensor(seed), torch.tensor(step)
        for one, two in ((at[0], at[1]), (seed, at[1]), (at[0], step)):
            assert_same(OPS[op](x, *law, axis=0, seed=one, step=two, backend=backend), want)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@backend_of
@op_of
def test_same_bits_for_any_number_of_threads(
    backend: str, op: str, threads: Callable[[int], None]
) -> None:
    for x, axis in (
        (torch.randn(100_003), None),
        (torch.randn(7, 14_001), 0),
        (torch.randn(2501, 39), 1),
    ):
        law = params_for(x, None if axis is None else x.shape[axis])
        results = []
        for n in (1, 2, 7):
            threads(n)
            results.append(OPS[op](x, *law, axis=axis, seed=1, step=2, backend=backend))
        assert_same(results[1], results[0], "2 threads")
        assert_same(results[2], results[0], "7 threads")


@backend_of
@op_of
@pytest.mark.parametrize("axis", (None, 0, 1, 3))
def test_same_noise_in_any_layout(backend: str, op: str, axis: int | None) -> None:
    x = torch.randn(6, 5, 4, 9)
    law = params_for(x, None if axis is None else x.shape[axis])
    args = dict(axis=axis, seed=1, step=2, backend=backend)
    want = OPS[op](x, *law, **args)
    last = OPS[op](channels_last(x), *law, **args)
    assert last.is_contiguous(memory_format=torch.channels_last)
    turned = x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    wide = torch.randn(6, 5, 8, 10)[:, :, ::2, 1:].copy_(x)
    for got in (last, OPS[op](turned, *law, **args), OPS[op](wide, *law, **args)):
        assert_same(got.contiguous(), want)


@backend_of
@op_of
def test_shards_draw_their_piece(backend: str, op: str) -> None:
    for offset in (0, 2**33 + 2):
        args = dict(seed=1, step=2, backend=backend)
        x = torch.randn(1037)
        law = params_for(x, None)
        want = OPS[op](x, *law, axis=None, offset=offset, **args)
        for cut in (1, 2, 3, 4, 7, 64, 501, 1036):
            parts = [
                OPS[op](x[a:b], *law, axis=None, offset=offset + a, **args)
                for a, b in ((0, cut), (cut, 1037))
            ]
            assert_same(torch.cat(parts), want, f"cut at {cut}")
        x = torch.randn(9, 5, 3)  # rows of 15 elements: offsets of every remainder by 4
        law = params_for(x, 9)
        want = OPS[op](x, *law, axis=0, offset=offset, **args)
        parts = [
            OPS[op](
                x[a : a + 1], *(p[a : a + 1] for p in law), axis=0, offset=offset + 15 * a, **args
            )
            for a in range(9)
        ]
        assert_same(torch.cat(parts), want)


@backend_of
@op_of
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_in_place(backend: str, op: str, dtype: torch.dtype) -> None:
    base = torch.randn(12, 20).to(dtype)
    for view in (
        lambda b: b,
        lambda b: b[3:7],
        lambda b: b[1::3, 2:18:5],
        lambda b: b.t()[4:9],
        lambda b: b.view(3, 4, 20)[:, 1],
        lambda b: b[2, 3],
        lambda b: b[5:5],
        torch._neg_view,
    ):
        ours, theirs = base.clone(), base.clone()
        x = view(ours)
        axis = 0 if x.dim() else None
        law = params_for(x, x.shape[0] if x.dim() else None)
        args = dict(axis=axis, seed=1, step=2, backend=backend)
        view(theirs).copy_(OPS[op](view(theirs), *law, **args))
        before = x._version
        assert OPS[op](x, *law, inplace=True, **args) is x
        assert x._version > before and ours._version == x._version
        assert_same(ours, theirs)  # all of the memory, also outside the view


@backend_of
@op_of
def test_in_place_on_shared_memory_is_refused(backend: str, op: str) -> None:
    x = torch.zeros(1, 3)
    args = dict(axis=0, seed=1, step=2, backend=backend)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        OPS[op](x.expand(4, 3), *params_for(x, 4), inplace=True, **args)
    assert x.tolist() == [[0.0] * 3]


@backend_of
@op_of
def test_gradient_is_the_identity_and_nothing_is_saved(backend: str, op: str) -> None:
    w = torch.randn(4, 9, requires_grad=True)
    grad = torch.randn(4, 9)
    law = [p.requires_grad_() for p in params_for(w, 4)]
    args = dict(axis=0, seed=1, step=2, backend=backend)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = OPS[op](w, *law, **args)
        node = y.grad_fn
        changed = OPS[op](w.clone(), *law, inplace=True, **args)
    assert not saved and not getattr(node, "saved_tensors", ())
    assert_same(y.detach(), OPS[op](w.detach(), *law, **args))
    assert_same(changed.detach(), y.detach())
    for result in (y, changed):
        assert_same(torch.autograd.grad(result, w, grad)[0], grad)
        assert torch.autograd.grad(result, law, grad, allow_unused=True) == (None,) * 4


@op_of
def test_gradcheck(op: str) -> None:
    """The noise of fixed counters is a constant, so that finite differences see the identity."""
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    law = params_for(x, 3)

    def add(x: Tensor) -> Tensor:
        return OPS[op](x, *law, axis=0, seed=1, step=2).square()

    assert torch.autograd.gradcheck(add, x) and torch.autograd.gradgradcheck(add, x)


@backend_of
@op_of
def test_in_place_on_a_leaf_is_refused_before_it_is_written(backend: str, op: str) -> None:
    w = torch.randn(4, 9, requires_grad=True)
    before = w.detach().clone()
    law = params_for(w, 4)
    args = dict(seed=1, step=2, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad has been used"):
        OPS[op](w, *law, axis=0, **args)
    with pytest.raises(RuntimeError, match="a view of a leaf Variable that requires grad"):
        OPS[op](w[1:3], *(p[:2] for p in law), axis=0, **args)
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        OPS[op](w.clone().unbind()[0], *params_for(w, 9), axis=0, **args)
    assert_same(w.detach(), before)
    with torch.no_grad():
        OPS[op](w, *law, axis=0, **args)
    assert not torch.equal(w.detach(), before) and w.is_leaf


@backend_of
@op_of
def test_autograd_notices_a_change_in_place(backend: str, op: str) -> None:
    w = torch.randn(4, 9, requires_grad=True)
    law = params_for(w, 4)
    args = dict(axis=0, seed=1, step=2, inplace=True, backend=backend)
    for x in (torch.randn(4, 9), w.clone()):
        y = w * x  # keeps x for the gradient of w
        OPS[op](x, *law, **args)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(torch.ones_like(y))
    base = w.clone()
    OPS[op](base[1:3], *(p[:2] for p in law), **args)
    grad = torch.randn(4, 9)
    assert_same(torch.autograd.grad(base, w, grad)[0], grad)
