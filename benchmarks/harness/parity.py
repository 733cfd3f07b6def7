"""What must hold before anything is timed, on the comparisons of the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from compare import assert_same, assert_sums
from torch import Tensor

import qkernels

PIECE = 1 << 16  # elements of noise that are compared at either end of a large tensor


def assert_rival(ours: Tensor, theirs: Tensor, scale: Tensor, who: str) -> None:
    """A rival's result is ours but next to ties: one element in 10 000, by one step. Most of them
    round x / scale + zero_point or x / scale in other ways; scale broadcasts over x."""
    # a step, and what storing both in a half type may add to it
    eps = torch.finfo(ours.dtype).eps
    off = (ours.float() - theirs.float()).abs()
    near = 1e-3 * scale + eps * ours.float().abs()
    wrong = int((off > near).sum())
    most = max(1, ours.numel() // 10_000)
    assert wrong <= most, f"{who}: {wrong} of {ours.numel()} values differ, at most {most} may"
    assert bool((off <= 1.01 * scale + near).all()), f"{who}: a value is off by more than a step"


def assert_gradients(
    ours: Tensor, theirs: Tensor, elements: int, who: str, one_in: int = 10_000
) -> None:
    """A rival's gradients are ours but next to ties: torch rounds x / scale + zero_point and ours
    x / scale. The sum loses some 2^-17 of a step, so that one element in 100 000 or so gets another
    code; each changes its own entry or its channel's sum. One in `one_in` may."""
    half = 0.02 if ours.dtype in (torch.float16, torch.bfloat16) else 1e-4
    # where nothing is clipped, the gradients of the zero point are all 0
    error = (ours - theirs).abs().float() / theirs.abs().max().float().clamp(min=1e-30)
    off, most = int((~(error <= half)).sum()), max(1, elements // one_in)
    assert off <= most, f"{who}: {off} of {ours.numel()} gradients differ, at most {most} may"


def assert_sum_gradients(ours: Tensor, theirs: Tensor, size: Tensor, who: str) -> None:
    """A rival's gradients of scale and zero point, to 1e-3 of the size of all that is summed; an
    element next to a tie may carry one channel in 50 further."""
    off = (ours.float() - theirs.float().reshape(ours.shape)).abs()
    wrong = int((~(off <= 1e-3 * size.float().reshape(ours.shape))).sum())
    assert wrong <= ours.numel() // 50, f"{who}: {wrong} of {ours.numel()} sums differ"


def assert_learned(got: tuple[Tensor, ...], want: tuple[Tensor, ...], bound: Tensor) -> None:
    """(grad_x, grad_scale, grad_zero_point) of two rows: the first to the bit, sums to rounding."""
    assert_same(got[0], want[0], "grad_x")
    for name, a, b in zip(("grad_scale", "grad_zero_point"), got[1:], want[1:], strict=True):
        assert_sums(a, b, bound.expand_as(b), name)


def assert_statistics(ours: Any, theirs: Any) -> None:
    """error_stats of two rows: sums to rounding."""
    size = theirs.mean_square.sqrt()
    for name, terms in zip(ours._fields, (size, size.square(), size.square(), 1), strict=True):
        one, two = getattr(ours, name), getattr(theirs, name)
        assert_sums(one, two, torch.as_tensor(terms, device=two.device).expand_as(two), name)


def assert_draws(got: Tensor, want: Tensor, exact: bool, what: str) -> None:
    """Noise of two rows: the same bits; of Triton's normals, 4 units in the last place of each."""
    if exact:
        assert_same(got, want, what)
        return
    eps = torch.finfo(got.dtype).eps
    off = (got.float() - want.float()).abs()
    assert bool((off <= eps * want.float().abs() + 2e-6).all()), f"{what} differs"


def assert_noise(
    op: Callable[..., Tensor], x: Tensor, params: Any, axis: int | None, exact: bool
) -> None:
    """op(x, params, axis=, offset=, backend=) is the reference's: all of a small tensor, both ends
    of a large one along dimension 0, whose noise begins at `offset` elements."""
    got = op(x, params, axis=axis, offset=0)
    if x.numel() <= 1 << 18:
        want = op(x, params, axis=axis, offset=0, backend="reference")
        assert_draws(got, want, exact, "noise")
        return
    rest = x[0].numel()
    rows = max(1, PIECE // rest)
    for start in (0, x.shape[0] - rows):
        piece = x[start : start + rows]
        mine = sliced(params, start, rows) if axis == 0 else params
        want = op(piece, mine, axis=axis, offset=start * rest, backend="reference")
        part = got[start : start + rows]
        assert_draws(part.contiguous(), want.contiguous(), exact, f"noise of rows {start} on")


def sliced(params: Any, start: int, rows: int) -> Any:
    """A parameter, or nested tuples of them, for some of the channels."""
    if isinstance(params, tuple):
        return tuple(sliced(p, start, rows) for p in params)
    return params[start : start + rows]


def assert_mse(x: Tensor, axis: int | None, **kw: Any) -> None:
    """The ranges of two rows leave the same error (two candidates may be equally good)."""
    small = x[:16] if axis == 0 else x[:1]
    small = small if axis is not None else small.flatten()[:PIECE]
    backend = kw.pop("backend", None)
    errors = []
    for row in (backend, "reference"):
        scale, zp = qkernels.quant_range(small, axis=axis, method="mse", backend=row, **kw)
        y = qkernels.fake_quant(small, scale, zp, axis=axis, **kw)
        errors.append((y.float() - small.float()).square().sum())
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-5, atol=0)
