"""Gradients of the list forms: those of single calls, with what single calls save."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, DTYPES
from compare import assert_same
from lists import Sample, assert_all_same
from torch import Tensor

import qkernels
from qkernels import foreach, numeric

# What a list of every kind of gradient is made of: (needs grad: x, scale, zero point)
KINDS = {
    "straight": (True, False, False),
    "learned": (True, True, True),
    "scale_alone": (False, True, False),
    "none": (False, False, False),
    "dynamic": (True, None, None),
    "dynamic_none": (False, None, None),
}


def leaves(kind: str, i: int) -> list[Tensor | None]:
    """[x, scale, zero point] of a sample, as leaves that require grad or not."""
    s = Sample(i, CASES[[6, 11, 13, 18, 20, 8, 22][i % 7]], DTYPES[i % 4])
    zp = (s.zp if s.zp is not None else torch.zeros_like(s.scale)).to(s.scale.dtype)
    wants = KINDS[kind]
    made = [s.x, s.scale, zp] if wants[1] is not None else [s.x, None, None]
    pairs = zip(made, wants, strict=True)
    return [t if t is None else t.detach().requires_grad_(w) for t, w in pairs]


def mixed() -> tuple[list[list[Tensor | None]], dict[str, list[Any]]]:
    """A list with every kind of gradient twice, and its keyword arguments."""
    kinds = [*KINDS, *KINDS]
    chosen = [CASES[[6, 11, 13, 18, 20, 8, 22][i % 7]] for i in range(len(kinds))]
    kw = {
        "bits": [(4, 8, 2)[i % 3] for i in range(len(kinds))],
        "axis": [c.axis for c in chosen],
        "group_size": [c.group_size for c in chosen],
        "clip": [numeric.CLIPS[i % 2] for i in range(len(kinds))],
        "grad_scale": [(None, 0.5)[i % 2] for i in range(len(kinds))],
    }
    return [leaves(kind, i) for i, kind in enumerate(kinds)], kw


def one_by_one(tensors: list[list[Tensor | None]], kw: dict[str, list[Any]]) -> list[Tensor]:
    return [
        qkernels.fake_quant(*three, **{k: v[i] for k, v in kw.items()})
        for i, three in enumerate(tensors)
    ]


def at_once(tensors: list[list[Tensor | None]], kw: dict[str, list[Any]]) -> list[Tensor]:
    xs, scales, zps = (list(column) for column in zip(*tensors, strict=True))
    return foreach.fake_quant(xs, scales, zps, **kw)


def backward(ys: list[Tensor], skip: int | None = None) -> None:
    """A cotangent of its own for every result that has a gradient."""
    wanted = [(i, y) for i, y in enumerate(ys) if y.requires_grad and i != skip]
    cotangents = [
        torch.linspace(-1, 2, y.numel()).reshape(y.shape).to(y.dtype) * (i + 1) for i, y in wanted
    ]
    torch.autograd.backward([y for _, y in wanted], cotangents)


def test_gradients_are_those_of_single_calls() -> None:
    for skip in (None, 1, 4):
        ours, theirs = mixed(), mixed()
        got, want = at_once(*ours), one_by_one(*theirs)
        assert_all_same([y.detach() for y in got], [y.detach() for y in want])
        assert [y.requires_grad for y in got] == [y.requires_grad for y in want]
        backward(got, skip)
        backward(want, skip)
        for i, (a, b) in enumerate(zip(ours[0], theirs[0], strict=True)):
            for name, p, q in zip(("x", "scale", "zero_point"), a, b, strict=True):
                grads = [None if t is None else t.grad for t in (p, q)]
                assert (grads[0] is None) == (grads[1] is None), f"gradient of {name} of {i}"
                if grads[0] is not None:
                    assert_same(*grads, f"gradient of {name} of tensor {i}")


def test_the_backward_saves_what_single_calls_save() -> None:
    def saved(run: Callable[..., list[Tensor]]) -> Counter[torch.dtype]:
        """Elements of each dtype; the masks of a list may be one tensor."""
        found: Counter[torch.dtype] = Counter()
        made = mixed()
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: found.update({t.dtype: t.numel()}) or t, lambda t: t
        )
        with hooks:
            run(*made)
        return found

    assert saved(at_once) == saved(one_by_one) != Counter()


def test_what_is_saved_does_not_hold_the_inputs() -> None:
    """The straight-through gradient keeps a mask; x itself may go."""
    x = torch.randn(64, requires_grad=True) * 1
    gone = weakref.ref(x)
    (y,) = foreach.fake_quant([x], 0.1, bits=4)
    (z, _, _) = foreach.fake_quant_dynamic([x], bits=4)[0]
    del x
    gc.collect()
    assert y.grad_fn is not None and z.grad_fn is not None
    assert gone() is None


def test_gradient_of_dynamic_results() -> None:
    xs = [torch.randn(4, 5, requires_grad=True), torch.randn(3), torch.randn(2, 3).double()]
    xs[2].requires_grad_()
    results = foreach.fake_quant_dynamic(xs, bits=[4, 4, 8], axis=[0, None, 1])
    assert [r.y.requires_grad for r in results] == [True, False, True]
    assert not any(t.requires_grad for r in results for t in (r.scale, r.zero_point))
    grads = torch.autograd.grad([results[0].y, results[2].y], [xs[0], xs[2]], [xs[0], xs[2]])
    for x, grad, bits, axis in zip((xs[0], xs[2]), grads, (4, 8), (0, 1), strict=True):
        y = qkernels.fake_quant_dynamic(x, bits=bits, axis=axis).y
        assert_same(grad, *torch.autograd.grad(y, x, x))


def test_hooks_see_the_masks_of_a_list_once() -> None:
    """Each mask alone would be a view, of which torch.save writes all that the list saved."""
    seen: list[int] = []

    def pack(x: Tensor) -> Tensor:
        seen.append(x.untyped_storage().nbytes())
        return x.clone()

    xs = [torch.randn(n, 24, requires_grad=n != 2) for n in (1, 2, 3, 4)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        ys = foreach.fake_quant(xs, bits=2, axis=0)
    assert sum(seen) == (1 + 3 + 4) * 24 // 8
    sum(y.sum() for y in ys).backward()
    for x in xs:
        if x.requires_grad:
            (want,) = torch.autograd.grad(qkernels.fake_quant(x, bits=2, axis=0).sum(), x)
            assert torch.equal(x.grad, want)


def test_scales_of_dynamic_results_can_be_written_to_one_by_one() -> None:
    """Views of one piece of memory would be one tensor to autograd."""
    w = torch.ones(8, requires_grad=True)
    results = foreach.fake_quant_dynamic([torch.randn(8, 3), torch.randn(4, 5)], bits=4, axis=0)
    loss = (w * results[0].scale).sum()
    for written in (results[1].scale, results[0].zero_point, results[1].zero_point):
        written.zero_()
    loss.backward()
    assert results[0].scale.untyped_storage().nbytes() == results[0].scale.nbytes
    assert torch.equal(w.grad, results[0].scale) and bool((results[0].scale > 0).all())


def test_a_shared_scale_gathers_the_gradients_of_all_tensors() -> None:
    torch.manual_seed(0)
    xs = [torch.randn(9), torch.randn(4, 4), torch.randn(5)]
    scale = torch.tensor(0.25, requires_grad=True)
    loss = sum((y * y).sum() for y in foreach.fake_quant(xs, scale, bits=4, symmetric=True))
    (got,) = torch.autograd.grad(loss, scale)
    ones = [qkernels.fake_quant(x, scale, bits=4, symmetric=True) for x in xs]
    (want,) = torch.autograd.grad(sum((y * y).sum() for y in ones), scale)
    torch.testing.assert_close(got, want)
    assert got.abs() > 0


def test_double_backward_as_in_single_calls() -> None:
    xs = [torch.randn(6, requires_grad=True) for _ in range(3)]
    cotangents = [torch.randn(6, requires_grad=True) for _ in xs]
    ys = foreach.fake_quant(xs, 0.3, bits=2, symmetric=True)
    grads = torch.autograd.grad(ys, xs, cotangents, create_graph=True)
    seconds = torch.autograd.grad([(g * g).sum() for g in grads], cotangents)
    for g, second in zip(grads, seconds, strict=True):
        assert_same(second, (2 * g).detach())
    assert any((g != 0).any() for g in grads) and any((g == 0).any() for g in grads)
    scales = [torch.tensor(0.3, requires_grad=True) for _ in xs]
    ys = foreach.fake_quant(xs, scales, bits=2, symmetric=True)
    grads = torch.autograd.grad(ys, scales, cotangents, create_graph=True)
    with pytest.raises(NotImplementedError, match="must not be differentiated again"):
        torch.autograd.grad(sum(grads), xs)
