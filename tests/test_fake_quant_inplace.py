"""fake_quant(inplace=True): the values, masks and gradients of the other form, where x lies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, Case, params_for
from compare import assert_same
from rows import Runner, params, reference, run
from torch import Tensor

import qkernels
from qkernels import numeric

BACKENDS = ("native", "reference")
case_of = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
backend_of = pytest.mark.parametrize("backend", BACKENDS)
KW: dict[str, Any] = {"bits": 4, "axis": 0, "symmetric": True}


def writable(case: Case, x: Tensor) -> bool:
    order = numeric.memory_order(x)
    return order == [] or (order is not None and case.group_size is None)


def check_row(runner: Runner, op: str, case: Case, dtype: torch.dtype, *args: Any) -> None:
    x = case.tensor(dtype, device=runner.device)
    if not writable(case, x):
        x = x.contiguous()  # what the public function does not hand to a row in place
    *_, want_mask = want = reference(op, x, *args, True)
    for masked in (True, False):
        here = x.clone()
        *_, mask = got = run(runner, op_x := here, *args, masked, True)
        assert got[0] is op_x, "the row must return x itself"
        assert_same(here, want[0], "x")
        for a, b in zip(got[1:-1], want[1:-1], strict=True):
            assert_same(a, b, "scale or zero point")
        assert_same(mask, want_mask if masked else want_mask[:0], "mask")


@pytest.mark.parametrize("runner", params("fake_quant"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@case_of
def test_rows(runner: Runner, case: Case, dtype: torch.dtype) -> None:
    x = case.tensor(dtype, device=runner.device)
    scale, zp = (p.to(runner.device) for p in params_for(x, case, 0, 255))
    args = (scale / 2, zp, 0, 255, case.axis, case.group_size, "code")
    check_row(runner, "fake_quant", case, dtype, *args)


@pytest.mark.parametrize("runner", params("fake_quant_dynamic"))
@case_of
def test_dynamic_rows(runner: Runner, case: Case) -> None:
    args = (0, 15, case.axis, case.group_size, False, "minmax", 99.0, "code")
    check_row(runner, "fake_quant_dynamic", case, torch.float32, *args)


@backend_of
@case_of
@pytest.mark.parametrize("given", (True, False), ids=("given", "dynamic"))
def test_gradient(case: Case, given: bool, backend: str) -> None:
    """In the middle of a graph, for any layout that torch lets an op write to."""
    x = case.tensor(torch.float32)
    layout = {"axis": case.axis, "group_size": case.group_size}
    scale = params_for(x, case, -8, 7)[0] / 2 if given else None
    kw = dict(bits=4, symmetric=True, backend=backend, **layout)
    cotangent = case.tensor(torch.float32, seed=1)

    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    want = qkernels.fake_quant(leaf * 1.0, scale, **kw)
    want.backward(cotangent)
    middle = other * 1.0
    got = qkernels.fake_quant(middle, scale, inplace=True, **kw)
    assert got is middle
    assert_same(got.detach(), want.detach())
    got.backward(cotangent)
    assert_same(other.grad, leaf.grad)


@backend_of
def test_a_view_in_memory_with_gaps(backend: str) -> None:
    x = torch.randn(6, 20)
    want = x.clone()
    want[::2, 1::3] = qkernels.fake_quant(x[::2, 1::3], 0.3, bits=3, symmetric=True)
    part = x[::2, 1::3]
    assert qkernels.fake_quant(part, 0.3, bits=3, symmetric=True, inplace=True) is part
    assert_same(x, want)


@backend_of
@pytest.mark.parametrize("scale", (0.3, None))
def test_refusals_leave_x_alone(scale: float | None, backend: str) -> None:
    kw = dict(bits=4, inplace=True, backend=backend)
    leaf = torch.randn(4, 8, requires_grad=True)
    before = leaf.detach().clone()
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        qkernels.fake_quant(leaf, scale, **kw)
    part = (leaf * 1.0).unbind(0)[0]
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        qkernels.fake_quant(part, scale, **kw)
    wide = torch.randn(1, 8).expand(4, 8)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        qkernels.fake_quant(wide, scale, **kw)
    assert_same(leaf.detach(), before)
    assert_same(part.detach(), before[0])


@backend_of
@pytest.mark.parametrize("grad", (False, True))
def test_a_bad_scale_leaves_x_alone(grad: bool, backend: str) -> None:
    x = torch.randn(4, 8, requires_grad=grad) * 1.0
    before, version = x.detach().clone(), x._version
    scale = torch.tensor([0.1, 0.2, 0.0, 0.1])
    with pytest.raises(ValueError, match="scale must be positive, finite"):
        qkernels.fake_quant(x, scale, inplace=True, backend=backend, **KW)
    assert_same(x.detach(), before)
    assert x._version == version


def test_a_learned_scale_is_refused() -> None:
    x = torch.randn(4, 8)
    scale = torch.full((4,), 0.1, requires_grad=True)
    with pytest.raises(ValueError, match="inplace must be False where scale or zero_point"):
        qkernels.fake_quant(x, scale, inplace=True, **KW)
    zero_point = torch.zeros(4, requires_grad=True)
    with pytest.raises(ValueError, match="inplace must be False where scale or zero_point"):
        qkernels.fake_quant(x, scale.detach(), zero_point, inplace=True, **KW)
    with torch.no_grad():  # nothing is learned here
        want = qkernels.fake_quant(x, scale, **KW)
        assert_same(qkernels.fake_quant(x, scale, inplace=True, **KW), want)


@backend_of
def test_what_autograd_saved_is_stale(backend: str) -> None:
    """A ReLU saves its result: torch says so in its backward. A product saves its factors."""
    y = torch.randn(4, 8, requires_grad=True).relu()
    qkernels.fake_quant(y, 0.1, bits=4, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    x, w = torch.randn(8), torch.randn(8, requires_grad=True)
    product = x * w
    qkernels.fake_quant(x, 0.1, bits=4, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@backend_of
def test_inference_mode(backend: str) -> None:
    x = torch.randn(4, 8)
    want = qkernels.fake_quant(x, bits=4)
    with torch.inference_mode():
        y = x.clone()
        assert qkernels.fake_quant(y, bits=4, inplace=True, backend=backend) is y
        assert_same(y.clone(), want)


@backend_of
def test_inference_tensor_outside_of_it(backend: str) -> None:
    """As torch's own ops: autograd could not notice."""
    with torch.inference_mode():
        x = torch.randn(4, 8)
    before = x.clone()
    with pytest.raises(ValueError, match="inplace must be False for an inference tensor"):
        qkernels.fake_quant(x, 0.1, bits=4, inplace=True, backend=backend)
    with pytest.raises(ValueError, match="inplace must be False for an inference tensor"):
        qkernels.uniform_noise(x, 0.1, seed=1, step=2, inplace=True, backend=backend)
    assert_same(x.clone(), before)


def test_bad_arguments() -> None:
    x = torch.randn(4, 8)
    with pytest.raises(TypeError, match="grad_scale must be a number"):
        qkernels.fake_quant(x, 0.1, bits=4, grad_scale="x", inplace=True)
    least = torch.tensor(-(2**31), dtype=torch.int32)
    for inplace in (True, False):
        with pytest.raises(ValueError, match="zero_point must be finite and at most"):
            qkernels.fake_quant(x, 0.1, least, bits=8, inplace=inplace)


def test_compiled() -> None:
    """Under torch.compile the functional op runs and its result is copied."""

    def step(x: Tensor, w: Tensor) -> Tensor:
        return qkernels.fake_quant(x * w, 0.1, bits=4, inplace=True).square().sum()

    x = torch.randn(6, 10)
    ours, theirs = (torch.ones(10, requires_grad=True) for _ in range(2))
    step(x, ours).backward()
    torch.compile(step, fullgraph=True, backend="aot_eager")(x, theirs).backward()
    assert_same(theirs.grad, ours.grad)


def test_checkpoint_and_saved_tensors() -> None:
    """Recomputed forwards write anew; the mask is all that is saved."""
    x = torch.randn(64, 128, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        return qkernels.fake_quant(x + 1.0, 0.1, bits=4, inplace=True)

    sizes: list[int] = []

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = block(x)
    assert sizes == [x.numel() // 8]
    grad = torch.randn_like(x)
    y.backward(grad)
    want, x.grad = x.grad, None
    torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).backward(grad)
    assert_same(x.grad, want)
