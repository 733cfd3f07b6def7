"""Bad input: the error names the op, the argument, the rule and the value. Hostile shapes work."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qkernels
from qkernels.ops import _check

X = torch.ones(4, 6)
S = torch.ones(())
EVERY = ("fake_quant", "fake_quant_dynamic", "quant_range", "quantize")


def call(op: str, x: object = X, **kwargs: object) -> object:
    kwargs.setdefault("bits", 4)
    if op in ("quantize", "dequantize"):
        kwargs.setdefault("scale", S)
    return getattr(qkernels, op)(x, **kwargs)


@pytest.mark.parametrize("op", EVERY)
@pytest.mark.parametrize("bits", (0, 17, -1))
def test_bits_out_of_range(op: str, bits: int) -> None:
    with pytest.raises(ValueError, match=rf"^{op}: bits must be in 1..16, got {bits}$"):
        call(op, bits=bits)


@pytest.mark.parametrize("op", EVERY)
@pytest.mark.parametrize("bits", (4.0, "4", True, None))
def test_bits_not_an_int(op: str, bits: object) -> None:
    with pytest.raises(TypeError, match=rf"^{op}: bits must be an int in 1..16, got {bits!r}$"):
        call(op, bits=bits)


@pytest.mark.parametrize("op", EVERY)
def test_granularity(op: str) -> None:
    with pytest.raises(ValueError, match=rf"^{op}: axis must be in -2..1, got 2$"):
        call(op, axis=2)
    with pytest.raises(ValueError, match=rf"^{op}: axis must be in -2..1, got -3$"):
        call(op, axis=-3)
    with pytest.raises(ValueError, match=rf"^{op}: axis must be None for a 0-dim x, got 0$"):
        call(op, torch.ones(()), axis=0)
    with pytest.raises(TypeError, match=rf"^{op}: axis must be an int or None, got 0.0$"):
        call(op, axis=0.0)
    with pytest.raises(
        ValueError, match=rf"^{op}: group_size must be None when axis is given, got 2$"
    ):
        call(op, axis=0, group_size=2)
    for size in (4, 0, -2, 12):
        with pytest.raises(
            ValueError, match=rf"^{op}: group_size must be a divisor of 6 .*got {size}$"
        ):
            call(op, group_size=size, **({"scale": torch.ones(6)} if op == "quantize" else {}))


@pytest.mark.parametrize("op", EVERY)
@pytest.mark.parametrize("dtype", (torch.int32, torch.uint8, torch.bool, torch.complex64))
def test_dtype_of_x(op: str, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"^{op}: x must be float32, .*got {dtype}$"):
        call(op, torch.ones(4, 6, dtype=dtype))
    with pytest.raises(TypeError, match=rf"^{op}: x must be a Tensor, got list$"):
        call(op, [1.0, 2.0])


@pytest.mark.parametrize("op", ("fake_quant", "quantize", "dequantize"))
def test_parameters(op: str) -> None:
    x = torch.ones(4, 6, dtype=torch.uint8) if op == "dequantize" else X
    for name in ("scale", "zero_point"):
        ones = {"scale": torch.ones(4), "zero_point": torch.zeros(4)}
        for bad in (torch.ones(5), torch.ones(4, 1), torch.ones(())):
            with pytest.raises(
                ValueError, match=rf"^{op}: {name} must be 1-D with 4 entries, got shape"
            ):
                call(op, x, axis=0, **{**ones, name: bad})
        with pytest.raises(ValueError, match=rf"^{op}: {name} must be 0-dim \(or one entry\), got"):
            call(op, x, **{"scale": S, "zero_point": torch.zeros(()), name: torch.ones(2)})
        with pytest.raises(ValueError, match=rf"^{op}: {name} must be on cpu.*got meta"):
            call(op, x, axis=0, **{**ones, name: torch.ones(4, device="meta")})
        with pytest.raises(TypeError, match=rf"^{op}: {name} must be .*got torch.complex64"):
            call(op, x, axis=0, **{**ones, name: torch.ones(4, dtype=torch.complex64)})
        with pytest.raises(TypeError, match=rf"^{op}: {name} must be .*got str"):
            call(op, x, axis=0, **{**ones, name: "1"})
    with pytest.raises(TypeError, match=rf"^{op}: scale must be .*got torch.int32"):
        call(op, x, scale=torch.ones((), dtype=torch.int32))
    if op != "dequantize":
        with pytest.raises(TypeError, match=rf"^{op}: scale must be .*got torch.float64"):
            call(op, x, scale=torch.ones((), dtype=torch.float64))
    for bad in (0.0, -0.5, float("nan"), float("inf")):
        with pytest.raises(
            ValueError, match=rf"^{op}: scale must be positive.*got {bad} at channel 0"
        ):
            call(op, x, scale=bad)
    with pytest.raises(
        ValueError, match=rf"^{op}: zero_point must be finite .*got nan at channel 0"
    ):
        call(op, x, scale=1.0, zero_point=float("nan"))


@pytest.mark.parametrize("op", ("fake_quant", "fake_quant_dynamic", "quant_range"))
def test_methods(op: str) -> None:
    with pytest.raises(ValueError, match=rf"^{op}: method must be one of minmax, .*got 'best'$"):
        call(op, method="best")
    for p in (50.0, 100.5, -1, float("nan")):
        with pytest.raises(ValueError, match=rf"^{op}: percentile must be in \(50, 100\], got"):
            call(op, method="percentile", percentile=p)
    with pytest.raises(TypeError, match=rf"^{op}: percentile must be a number .*got '99'$"):
        call(op, method="percentile", percentile="99")
    with pytest.raises(
        ValueError, match=rf"^{op}: percentile must be None unless method='perc.*got 99"
    ):
        call(op, percentile=99)
    with pytest.raises(
        ValueError, match=rf"^{op}: narrow_range must be False for bits=1, got True"
    ):
        call(op, bits=1, narrow_range=True)


def test_rest_of_the_arguments() -> None:
    for op in ("fake_quant", "fake_quant_dynamic"):
        with pytest.raises(
            ValueError, match=rf"^{op}: clip must be one of code, value, got 'hard'$"
        ):
            call(op, clip="hard")
    with pytest.raises(
        ValueError, match=r"^fake_quant: clip must be one of code, value, got 'hard'$"
    ):
        call("fake_quant", scale=S, clip="hard")
    with pytest.raises(
        ValueError, match=r"^fake_quant: zero_point must be None when scale is None"
    ):
        call("fake_quant", zero_point=3)
    with pytest.raises(
        ValueError, match=r"^quantize: packed must be False unless bits is 1, 2 or 4"
    ):
        call("quantize", bits=3, packed=True)
    with pytest.raises(ValueError, match=r"^quantize: packed must be False for a 0-dim tensor"):
        call("quantize", torch.ones(()), packed=True)
    packed = qkernels.quantize(torch.ones(2, 5), 1.0, bits=4, packed=True)
    with pytest.raises(ValueError, match=r"^dequantize: size must be in 5..6, got 7$"):
        call("dequantize", packed, packed=True, size=7)
    with pytest.raises(TypeError, match=r"^dequantize: codes must be int8, .*got torch.float32"):
        call("dequantize")
    with pytest.raises(TypeError, match=r"^dequantize: dtype must be float32, .*got torch.int8"):
        call("dequantize", packed, dtype=torch.int8)
    with pytest.raises(
        TypeError, match=r"^qparams: range must be float32 or float64, got torch.int64"
    ):
        qkernels.qparams(torch.ones(2, dtype=torch.int64), bits=4)
    with pytest.raises(ValueError, match=r"^qparams: range must be of shape .*got \(3,\)$"):
        qkernels.qparams(torch.ones(3), bits=4)


def test_raw_ops_check_too() -> None:
    """torch.ops reaches the kernels past the public functions: bad sizes must not reach memory."""
    fq = torch.ops.qkernels.fake_quant
    with pytest.raises(ValueError, match="fake_quant: scale must be 1-D with 4 entries"):
        fq(X, torch.ones(3), None, 0, 15, 0, None, "code", True)
    with pytest.raises(ValueError, match=r"fake_quant: axis must be in 0..1, got 5"):
        fq(X, torch.ones(4), None, 0, 15, 5, None, "code", True)
    with pytest.raises(ValueError, match="fake_quant_bwd: mask must be 3 bytes"):
        torch.ops.qkernels.fake_quant_bwd(X, torch.zeros(2, dtype=torch.uint8), [])
    with pytest.raises(ValueError, match="fake_quant_bwd: order must be"):
        torch.ops.qkernels.fake_quant_bwd(X, torch.zeros(3, dtype=torch.uint8), [0, 0])
    with pytest.raises(ValueError, match="lsq_bwd: grad must be of shape"):
        torch.ops.qkernels.lsq_bwd(X[:2], X, S, None, 0, 15, None, None, "code", 1.0)


@settings(max_examples=150, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=4),
    axis=st.one_of(st.none(), st.integers(-5, 5)),
    group_size=st.one_of(st.none(), st.integers(-1, 9)),
    bits=st.integers(-1, 18),
    symmetric=st.booleans(),
    narrow_range=st.booleans(),
    method=st.sampled_from(("minmax", "percentile", "mse", "lsq", "x")),
    permute=st.randoms(use_true_random=False),
)
def test_any_arguments_give_a_result_or_a_clear_error(
    shape: list[int],
    axis: int | None,
    group_size: int | None,
    bits: int,
    symmetric: bool,
    narrow_range: bool,
    method: str,
    permute: object,
) -> None:
    order = list(range(len(shape)))
    permute.shuffle(order)
    x = torch.linspace(-2, 3, torch.Size(shape).numel()).reshape(shape).permute(order)
    args = dict(bits=bits, axis=axis, group_size=group_size, symmetric=symmetric)
    args |= dict(narrow_range=narrow_range, method=method)
    try:
        y = qkernels.fake_quant(x, **args)
    except (ValueError, TypeError) as error:
        assert str(error).startswith("fake_quant: ") and ", got " in str(error)
        return
    assert y.shape == x.shape and not y.isnan().any()
    want = qkernels.fake_quant(x, **args, backend="reference")
    if method != "mse":  # near-equal candidates may differ
        torch.testing.assert_close(y, want, rtol=1e-6, atol=0)


def test_more_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"^fake_quant: symmetric must be a bool, got 'no'$"):
        call("fake_quant", symmetric="no")
    s = S.clone().requires_grad_()
    with pytest.raises(TypeError, match=r"^fake_quant: grad_scale must be a number .*got 'a'"):
        call("fake_quant", scale=s, grad_scale="a")
    with pytest.raises(ValueError, match=r"^fake_quant: grad_scale must be finite, got nan$"):
        call("fake_quant", scale=s, grad_scale=float("nan"))
    with pytest.raises(TypeError, match=r"^fake_quant: x must be a dense .*got torch.sparse_coo$"):
        call("fake_quant", X.to_sparse())
    for zp in (2**24, -(2**40), 2**62):
        for value in (zp, torch.tensor(zp)):
            with pytest.raises(ValueError, match=r"zero_point must be finite and at most 8388608"):
                call("fake_quant", scale=1.0, zero_point=value)
    with pytest.raises(TypeError, match=r"^explain: args\[0\] must be a Tensor, got int$"):
        qkernels.explain("fake_quant", 3)
    mask = torch.zeros(6, dtype=torch.uint8)[::2]
    with pytest.raises(ValueError, match=r"^fake_quant_bwd: mask must be contiguous, got strides"):
        torch.ops.qkernels.fake_quant_bwd(X, mask, [])


def test_what_fits_passes_the_checks_in_full() -> None:
    """`fit` may say no to anything, and yes only where the other checks change nothing."""
    x, imaginary = torch.randn(4, 3), torch.randn(4, dtype=torch.complex64).conj()
    params = [
        torch.ones(()), torch.ones(1), torch.ones(4), torch.ones(1, 1), torch.ones(4, 1),
        torch.ones(4).half(), torch.ones(4).double(), torch.ones(4, dtype=torch.int32),
        torch.ones(1, dtype=torch.int64), torch.ones(4, device="meta"), torch.ones(3),
        torch.nn.Parameter(torch.ones(4)), imaginary.imag, 0.5, None, "1",
        torch.ones((), dtype=torch.int32), torch.ones(1, 4, dtype=torch.int32),
    ]  # fmt: skip
    assert imaginary.imag.is_neg()
    said_yes = 0
    for scale, zero_point, axis, group_size in itertools.product(
        params, params, (None, 0), (None, 3)
    ):
        if axis is not None and group_size is not None:
            continue
        if _check.fit(x, scale, zero_point, axis, group_size):
            said_yes += 1
            assert _check.as_scale("fake_quant", x, scale) is scale
            assert _check.as_zero_point("fake_quant", x, zero_point) is zero_point
            _check.check_entries("fake_quant", x, scale, zero_point, axis, group_size)
    # a 0-dim or 1-entry scale with none or one int32; 4 entries, 2 scales, none or one int32
    assert said_yes == 2 * 2 + 2 * 2
