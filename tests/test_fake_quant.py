"""What fake_quant means: values, gradients, and the defects of others that it must not have."""

from __future__ import annotations

import importlib
from unittest import mock

import pytest
import torch
from cases import DTYPE_IDS, DTYPES, special_values
from compare import assert_same, assert_sums, assert_values
from rows import Runner, params, reference, run
from torch import Tensor

import qkernels
from qkernels import numeric
from qkernels.backends.reference.common import unpack_bits

BACKENDS = ("native", "reference")
backend_of = pytest.mark.parametrize("backend", BACKENDS)
INF, NAN = float("inf"), float("nan")


class Round(torch.autograd.Function):
    """Rounds, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: object, v: Tensor) -> Tensor:
        return v.round()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad


def composite(x: Tensor, scale: Tensor, zp: Tensor, qmin: int, qmax: int) -> Tensor:
    """Fake quantization in differentiable torch: autograd's own answer for the gradients."""
    code = Round.apply(x / scale) + Round.apply(zp)
    # not torch.clamp: whether its gradient passes at the bounds depends on torch's version
    code = torch.where(code < qmin, qmin, torch.where(code > qmax, qmax, code))
    return (code - Round.apply(zp)) * scale


@pytest.mark.parametrize("runner", params("fake_quant"))
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("clip", numeric.CLIPS)
def test_special_values(runner: Runner, dtype: torch.dtype, clip: str) -> None:
    x = special_values().to(runner.device, dtype)
    compute = numeric.compute_dtype(dtype)
    for scale, zp, qmin, qmax in (
        (0.5, 0, -8, 7),
        (0.5, 3, 0, 15),
        (0.037, 128, 0, 255),
        (1e-38 * 1.2, 0, -128, 127),
        (1e38, 0, -2, 1),
        (0.25, -40, 0, 255),
        (2.0, 65535, 0, 65535),
    ):
        args = (
            x,
            torch.tensor(scale, dtype=compute, device=x.device),
            torch.tensor(zp, dtype=torch.int32, device=x.device),
        )
        want = reference("fake_quant", *args, qmin, qmax, None, None, clip, True)
        got = run(runner, *args, qmin, qmax, None, None, clip, True)
        assert_same(got[0], want[0], f"y at scale {scale}")
        assert_same(got[1], want[1], f"mask at scale {scale}")


@backend_of
@pytest.mark.parametrize("axis", (None, 0))
def test_values_by_hand(backend: str, axis: int | None) -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, INF, -INF, 1e30, NAN, 100.0]], requires_grad=True)
    scale = torch.ones(()) if axis is None else torch.ones(1)
    y = qkernels.fake_quant(x, scale, bits=3, symmetric=True, axis=axis, backend=backend)
    # half to even; both infinities and 1e30 to the near bound; NaN stays
    want = torch.tensor([[0.0, 2.0, 2.0, 0.0, 3.0, -4.0, 3.0, NAN, 3.0]])
    assert_same(y.detach(), want)
    y.backward(torch.full_like(x, 7.0))
    grad = torch.tensor([[7.0, 7.0, 7.0, 7.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    assert_same(x.grad, grad)


@backend_of
def test_clip_modes_differ_between_the_bound_and_half_a_step_beyond(backend: str) -> None:
    x = torch.tensor([2.9, 3.0, 3.3, 3.6, -4.3], requires_grad=True)
    for clip, want in (("code", [1.0, 1, 1, 0, 1]), ("value", [1.0, 1, 0, 0, 0])):
        x.grad = None
        y = qkernels.fake_quant(x, 1.0, bits=3, symmetric=True, clip=clip, backend=backend)
        y.backward(torch.ones_like(x))
        assert x.grad.tolist() == want, clip


@backend_of
@pytest.mark.parametrize("bad", (0.0, -1.0, INF, NAN, 1e-39))
def test_invalid_scale_raises_on_the_cpu(backend: str, bad: float) -> None:
    scale = torch.tensor([1.0, bad])
    with pytest.raises(ValueError, match=r"fake_quant: scale must be positive.*at channel 1"):
        qkernels.fake_quant(torch.ones(2, 3), scale, bits=8, axis=0, backend=backend)


@pytest.mark.parametrize("runner", params("fake_quant"))
@pytest.mark.parametrize("axis", (0, 1))
@pytest.mark.parametrize("bad", ("scale", "zero_point"))
def test_invalid_channel_is_nan_where_values_are_not_checked(
    runner: Runner, axis: int, bad: str
) -> None:
    wrong = torch.tensor(
        [1.0, 0.0, -1.0, INF, NAN, 1e-39] if bad == "scale" else [0, INF, NAN, -INF, 3e7]
    )
    wrong = wrong.to(runner.device)
    scale, zp = (wrong, None) if bad == "scale" else (torch.ones_like(wrong), wrong)
    x = torch.arange(-3.0, 4.0, device=runner.device).repeat(len(wrong), 1)
    x = x if axis == 0 else x.t().contiguous()
    module = importlib.import_module(runner.row.target.partition(":")[0])
    # as on CUDA, where no call waits for the device to look at its values
    with mock.patch.object(module, "check_values", lambda *_: None):
        y, mask = run(runner, x, scale, zp, -8, 7, axis, None, "code", True)
    y = y.movedim(axis, 0)
    assert not y[0].isnan().any() and y[1:].isnan().all()
    bits = unpack_bits(mask, x.numel()).reshape(x.shape).movedim(axis, 0)
    assert bits[0].all() and not bits[1:].any()


def gradients(fn: object, *tensors: Tensor, grad: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    fn(*leaves).backward(grad)
    return [leaf.grad for leaf in leaves]


@backend_of
@pytest.mark.parametrize("layout", ("rows", "columns", "tensor", "channels_last", "groups"))
def test_lsq_gradient_against_autograd(backend: str, layout: str) -> None:
    torch.manual_seed(3)
    x = torch.randn(6, 8, 5, 4, dtype=torch.float64) * 2
    axis, group_size, shape = {
        "rows": (0, None, (6, 1, 1, 1)),
        "columns": (1, None, (8, 1, 1)),
    }.get(layout, (1, None, (8, 1, 1)))
    if layout == "tensor":
        axis, shape = None, ()
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    if layout == "groups":
        axis, group_size, shape = None, 40, (24, 1)
    scale = torch.rand(shape, dtype=torch.float64) + 0.3
    zp = torch.randint(2, 6, shape).double() + 0.2
    grad = torch.randn_like(x)

    def ours(x: Tensor, scale: Tensor, zp: Tensor) -> Tensor:
        flat = (scale.reshape(-1), zp.reshape(-1)) if shape else (scale, zp)
        return qkernels.fake_quant(
            x, *flat, bits=3, axis=axis, group_size=group_size, grad_scale=1.0, backend=backend
        )

    def theirs(x: Tensor, scale: Tensor, zp: Tensor) -> Tensor:
        if group_size:
            rows = composite(x.reshape(-1, group_size), scale, zp, 0, 7)
            return rows.reshape(x.shape)
        return composite(x, scale, zp, 0, 7)

    got = gradients(ours, x, scale, zp, grad=grad)
    want = gradients(theirs, x, scale, zp, grad=grad)
    assert_values(got[0].contiguous(), want[0].contiguous(), "grad_x")
    terms = grad.abs().sum() * 8
    assert_sums(got[1], want[1], terms, "grad_scale")
    assert_sums(got[2], want[2], terms, "grad_zp")


def test_lsq_gradient_scale() -> None:
    x = torch.randn(4, 50)
    grad = torch.randn_like(x)
    plain, scaled, doubled = (
        gradients(
            lambda s, g=g: qkernels.fake_quant(x, s, bits=3, symmetric=True, axis=0, grad_scale=g),
            torch.full((4,), 0.5),
            grad=grad,
        )[0]
        for g in (1.0, None, 2.0)
    )
    torch.testing.assert_close(scaled, plain / (50 * 3) ** 0.5)  # N = 50 elements per scale, Qp = 3
    torch.testing.assert_close(doubled, plain * 2)


def test_straight_through_is_the_detached_residual() -> None:
    x = torch.randn(64, 33)
    grad = torch.randn_like(x)
    (got,) = gradients(lambda x: qkernels.fake_quant(x, 0.5, bits=8, symmetric=True), x, grad=grad)
    q = qkernels.fake_quant(x, 0.5, bits=8, symmetric=True)
    (want,) = gradients(lambda x: x + (q - x).detach(), x, grad=grad)
    assert_same(got, want)  # nothing is clipped at 8 bits


def test_double_backward_of_the_straight_through_gradient() -> None:
    x = torch.randn(40, requires_grad=True)
    y = qkernels.fake_quant(x, 0.3, bits=3, symmetric=True)
    (g,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), x)
    mask = torch.autograd.grad(qkernels.fake_quant(x, 0.3, bits=3, symmetric=True).sum(), x)[0]
    assert_same(h, 2 * mask)


def test_double_backward_of_lsq_is_refused() -> None:
    x, s = torch.randn(40, requires_grad=True), torch.tensor(0.3, requires_grad=True)
    y = qkernels.fake_quant(x, s, bits=3, symmetric=True)
    (g,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="lsq_bwd: the gradient of a learned scale"):
        g.sum().backward()


@pytest.mark.parametrize("shape", ((1000,), (512, 46), (3, 5)))
def test_saves_one_bit_per_element(shape: tuple[int, ...]) -> None:
    saved: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    x = torch.randn(shape, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        qkernels.fake_quant(x, 0.1, bits=8)
        qkernels.fake_quant(x, bits=4, axis=0)
    assert [t.numel() * t.element_size() for t in saved] == [(x.numel() + 7) // 8] * 2


def test_threads_do_not_change_bits() -> None:
    torch.manual_seed(0)
    x, grad = torch.randn(64, 4001), torch.randn(64, 4001)
    scale = torch.rand(64) + 0.2
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            args = (x, scale, None, -8, 7, 0, None)
            y, mask = torch.ops.qkernels.fake_quant(*args, "code", True)
            back = torch.ops.qkernels.lsq_bwd(grad, *args, "code", 1.0)
            ranges = [
                qkernels.observe_range(t, bits=4, method=m)
                for t in (x, x[:, :1000])
                for m in ("minmax", "percentile", "mse", "lsq")
            ]
            results.append([y, mask, *back, *(t for r in ranges for t in r)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same(a, b)


# the defects of torch 2.13 that peers share; each is a property that users rely on


@backend_of
def test_infinity_goes_to_the_positive_bound_per_channel(backend: str) -> None:
    x = torch.tensor([[INF, 1e30, 5.0]])
    y = qkernels.fake_quant(x, torch.tensor([0.1]), bits=8, axis=0, symmetric=True, backend=backend)
    torch.testing.assert_close(y, torch.tensor([[12.7, 12.7, 5.0]]))


@backend_of
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("axis", (None, 0))
def test_learned_scale_in_half_precision(
    backend: str, dtype: torch.dtype, axis: int | None
) -> None:
    x = torch.randn(3, 40).to(dtype).requires_grad_()
    scale = torch.full((3,) if axis == 0 else (), 0.5).to(dtype).requires_grad_()
    y = qkernels.fake_quant(x, scale, bits=4, symmetric=True, axis=axis, backend=backend)
    y.backward(torch.ones_like(y))
    wide = scale.detach().float().requires_grad_()
    qkernels.fake_quant(x.detach(), wide, bits=4, symmetric=True, axis=axis).backward(
        torch.ones_like(y)
    )
    assert y.dtype is dtype and scale.grad.dtype is dtype and x.grad.dtype is dtype
    assert_same(scale.grad, wide.grad.to(dtype))


@backend_of
def test_float_zero_point_rounds_alike_in_forward_and_backward(backend: str) -> None:
    x = torch.tensor([10.4], requires_grad=True)
    zp = torch.tensor(-3.4, requires_grad=True)
    scale = torch.tensor(1.0, requires_grad=True)
    y = qkernels.fake_quant(x, scale, zp, bits=3, grad_scale=1.0, backend=backend)
    y.backward(torch.ones_like(y))
    # rint(10.4) - 3 = 7 is in 0..7: inside, forward and backward alike
    assert y.item() == 10.0 and x.grad.item() == 1.0 and zp.grad.item() == 0.0
    torch.testing.assert_close(scale.grad, torch.tensor(10.0 - 10.4))


def test_symmetric_scale_is_the_same_fused_or_not() -> None:
    x = torch.randn(5, 1000)
    fused = qkernels.fake_quant_dynamic(x, bits=4, axis=0, symmetric=True)
    alone = qkernels.quant_range(x, bits=4, axis=0, symmetric=True)
    assert_same(fused.scale, alone.scale)
    assert_same(fused.scale, x.abs().amax(1) / 7.5)


def test_tensor_scale_that_requires_grad_is_taken() -> None:
    x = torch.randn(10)
    scale = torch.tensor(0.1, requires_grad=True)
    zp = torch.tensor(0, dtype=torch.int32)
    qkernels.fake_quant(x, scale, zp, bits=8).sum().backward()
    assert scale.grad is not None and torch.isfinite(scale.grad)


@pytest.mark.parametrize("runner", params("fake_quant"))
def test_parameters_that_are_views(runner: Runner) -> None:
    x = torch.randn(4, 9, device=runner.device)
    scale = torch.rand(8, device=runner.device)[::2] + 0.2
    zp = torch.tensor([3], dtype=torch.int32, device=runner.device).expand(4)
    args = (-8, 7, 0, None, "code", True)
    want = reference("fake_quant", x, scale, zp, *args)
    got = run(runner, x, scale, zp, *args)
    assert_same(got[0], want[0])
    assert_same(got[1], want[1])


# odd parameters and odd tensors: each gave wrong values, or crashed


@backend_of
@pytest.mark.parametrize("shapes", (((), (1,)), ((1,), ())))
def test_gradients_have_the_shapes_of_their_parameters(
    backend: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    x = torch.linspace(-3, 9, 7, requires_grad=True)
    scale, zp = (torch.ones(shape, requires_grad=True) for shape in shapes)
    qkernels.fake_quant(x, scale, zp, bits=3, grad_scale=1.0, backend=backend).sum().backward()
    assert scale.grad.shape == shapes[0] and zp.grad.shape == shapes[1]
    # codes -2, 8 and 10 are clipped to 0, 7 and 7: steps -1, 6 and 6 from the zero point
    assert scale.grad.item() == 11.0 and zp.grad.item() == -3.0


@backend_of
@pytest.mark.parametrize(("shape", "axis"), (((0,), None), ((0, 3), None), ((0, 3), 1)))
def test_no_elements_give_a_learned_scale_the_gradient_zero(
    backend: str, shape: tuple[int, ...], axis: int | None
) -> None:
    scale = torch.ones(() if axis is None else shape[axis])
    got = gradients(
        lambda *args: qkernels.fake_quant(*args, bits=4, axis=axis, backend=backend),
        *(torch.empty(shape), scale, scale),
        grad=torch.empty(shape),
    )
    for a, b in zip(got, (torch.empty(shape), scale * 0, scale * 0), strict=True):
        assert_same(a, b)


def imaginary(x: Tensor) -> Tensor:
    """Equal to x, while torch keeps -x in memory and notes that the sign is to be turned."""
    return torch.complex(x, -x).conj().imag


@backend_of
@pytest.mark.parametrize("numel", (1, 9))
@pytest.mark.parametrize("turned", range(4), ids=("x", "scale", "zero_point", "grad"))
@pytest.mark.parametrize("learned", (False, True))
def test_negated_views(backend: str, numel: int, turned: int, learned: bool) -> None:
    x, grad = torch.linspace(-2.3, 4.1, numel), torch.linspace(0.5, 1.5, numel)
    plain = [x, torch.tensor([0.4]), torch.tensor([3.0]), grad]

    def results(backend: str, *tensors: Tensor) -> list[Tensor]:
        *leaves, grad = (t.detach() for t in tensors)
        wanted = [t.requires_grad_() for t in (leaves if learned else leaves[:1])]
        y = qkernels.fake_quant(*leaves, bits=3, backend=backend)
        return [y.detach(), *torch.autograd.grad(y, wanted, grad)]

    want = results("reference", *plain)
    for turn in (imaginary, lambda t: torch._neg_view(-t)):
        view = turn(plain[turned])
        assert view.is_neg() and torch.equal(view, plain[turned])
        got = results(backend, *plain[:turned], view, *plain[turned + 1 :])
        for a, b in zip(got, want, strict=True):
            assert_values(a.resolve_neg(), b)


@backend_of
def test_mask_that_is_a_view(backend: str) -> None:
    grad = torch.randn(40)
    stored = torch.arange(10, dtype=torch.uint8) * 23
    for mask in (stored[::2], stored[:1].expand(5), stored[1:6]):
        x = torch.zeros(40, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda _, m=mask: m):
            y = qkernels.fake_quant(x, 1.0, bits=8, backend=backend)
            (got,) = torch.autograd.grad(y, x, grad)
        assert_same(got, torch.where(unpack_bits(mask.clone(), 40), grad, 0.0))
