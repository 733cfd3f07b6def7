"""Every row against the reference, from the table: a new row is tested without a new test."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, DTYPE_IDS, DTYPES, LARGE_CASES, RANGES, Case, params_for
from compare import assert_same, assert_sums, assert_values
from fences import fenced
from rows import Runner, params, reference, run

from qkernels import numeric
from qkernels.backends.reference.common import to_channels
from qkernels.backends.reference.fake_quant import quantized

case_of = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
large_case = pytest.mark.parametrize("case", LARGE_CASES, ids=lambda c: c.name)
dtype_of = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
METHODS = ("minmax", "percentile", "mse", "lsq")


def row_of(op: str, large: bool = False) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("runner", params(op, large))


def ranges_for(runner: Runner) -> list[tuple[int, bool, bool]]:
    """Interpreted and shimmed rows take two of the code ranges, the others all."""
    return list(RANGES[1:3]) if runner.slow else list(RANGES)


def order_of(x: torch.Tensor, case: Case) -> list[int]:
    """Memory order of the result of an op on x."""
    if case.group_size is not None:
        return []
    order = numeric.memory_order(torch.empty_like(x))
    assert order is not None
    return order


def check_fake_quant(runner: Runner, case: Case, dtype: torch.dtype, bits_range: tuple) -> None:
    x = case.tensor(dtype, device=runner.device)
    qmin, qmax = numeric.code_range("test", *bits_range)
    scale, zp = (p.to(runner.device) for p in params_for(x, case, qmin, qmax))
    scale = scale / 2  # more to clip
    for clip, zero_point in (("code", zp), ("value", None), ("value", zp.to(scale.dtype) + 0.3)):
        args = (x, scale, zero_point, qmin, qmax, case.axis, case.group_size, clip)
        want, want_mask = reference("fake_quant", *args, True)
        for aligned in (True, False):
            with fenced(aligned):
                got, got_mask = run(runner, *args, True)
                plain, no_mask = run(runner, *args, False)
            assert_same(got, want, f"y, clip={clip}, aligned={aligned}")
            assert_same(plain, want, f"y without mask, clip={clip}, aligned={aligned}")
            assert_same(got_mask, want_mask, f"mask, clip={clip}, aligned={aligned}")
            assert no_mask.numel() == 0


@row_of("fake_quant")
@case_of
@dtype_of
def test_fake_quant(runner: Runner, case: Case, dtype: torch.dtype) -> None:
    for bits_range in ranges_for(runner):
        check_fake_quant(runner, case, dtype, bits_range)


@row_of("fake_quant", large=True)
@large_case
def test_fake_quant_large(runner: Runner, case: Case) -> None:
    check_fake_quant(runner, case, torch.float32, (8, False, False))
    check_fake_quant(runner, case, torch.bfloat16, (2, True, False))


@row_of("fake_quant_bwd")
@case_of
@dtype_of
def test_fake_quant_bwd(runner: Runner, case: Case, dtype: torch.dtype) -> None:
    x = case.tensor(dtype, device=runner.device)
    grad = case.tensor(dtype, seed=1, device=runner.device)
    numel = x.numel()
    if numel:  # a clipped element is 0 all the same
        grad[(0,) * grad.dim()] = float("nan")
        grad[(-1,) * grad.dim()] = float("inf")
    mask = torch.randint(0, 256, (numeric.mask_bytes(numel),), dtype=torch.uint8).to(x.device)
    order = order_of(x, case)
    want = reference("fake_quant_bwd", grad, mask, order)
    for aligned in (True, False):
        with fenced(aligned):
            # the strides of x, and row-major ones, which the row must bring into the mask's order
            got = run(runner, grad if aligned else grad.contiguous(), mask, order)
        assert_same(got, want, f"grad_x, aligned={aligned}")


def lsq_terms(
    grad: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    clip: str,
    grad_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each channel the sum of the sizes of the terms of grad_scale and of grad_zp."""
    v = quantized(to_channels(x, axis, group_size), scale, zero_point, qmin, qmax, clip)
    size = to_channels(torch.empty_like(x).copy_(grad), axis, group_size).double().abs()
    size = size * grad_scale
    slope = torch.where(v.inside, v.q - v.t, v.q).double().abs()
    step = torch.where(v.inside, 0.0, v.scale.double())
    return tuple((size * d).sum(dim=(0, 2)).reshape(scale.shape) for d in (slope, step))


def check_lsq_bwd(runner: Runner, case: Case, dtype: torch.dtype, bits_range: tuple) -> None:
    x = case.tensor(dtype, device=runner.device)
    grad = case.tensor(dtype, seed=1, device=runner.device)
    qmin, qmax = numeric.code_range("test", *bits_range)
    scale, zp = (p.to(runner.device) for p in params_for(x, case, qmin, qmax))
    for clip, zero_point in (("code", zp), ("value", zp.to(scale.dtype) + 0.3)):
        args = (x, scale, zero_point, qmin, qmax, case.axis, case.group_size, clip, 0.5)
        want = reference("lsq_bwd", grad, *args)
        with fenced(aligned=clip == "code"):
            got = run(runner, grad, *args)
            again = run(runner, grad, *args)
        assert_same(got[0], want[0], f"grad_x, clip={clip}")
        scale_terms, zp_terms = lsq_terms(grad, *args)
        assert_sums(got[1], want[1], scale_terms, f"grad_scale, clip={clip}")
        assert_sums(got[2], want[2], zp_terms, f"grad_zp, clip={clip}")
        for one, two in zip(got, again, strict=True):
            assert_same(one, two, "run to run")


@row_of("lsq_bwd")
@case_of
@dtype_of
def test_lsq_bwd(runner: Runner, case: Case, dtype: torch.dtype) -> None:
    for bits_range in ranges_for(runner)[:3]:
        check_lsq_bwd(runner, case, dtype, bits_range)


@row_of("lsq_bwd", large=True)
@large_case
def test_lsq_bwd_large(runner: Runner, case: Case) -> None:
    check_lsq_bwd(runner, case, torch.float32, (4, True, False))


def check_quant_range(
    runner: Runner, case: Case, dtype: torch.dtype, method: str, bits_range: tuple
) -> None:
    bits, symmetric, narrow = bits_range
    x = case.tensor(dtype, device=runner.device)
    qmin, qmax = numeric.code_range("test", bits, symmetric, narrow)
    percentile = 97.3 if method == "percentile" else 99.0
    args = (x, qmin, qmax, case.axis, case.group_size, symmetric, method, percentile)
    want = reference("quant_range", *args)
    with fenced():
        got = run(runner, *args)
    names = ("scale", "zero_point", "range")
    if method in ("minmax", "percentile"):
        for name, a, b in zip(names, got, want, strict=True):
            assert_same(a + 0, b + 0, f"{method} {name}")
    elif method == "lsq":
        assert_values(got[0], want[0], "lsq scale")
        assert_same(got[1], want[1], "lsq zero_point")
    else:
        check_mse(x, case, (got, want), qmin, qmax)


def check_mse(x: torch.Tensor, case: Case, found: tuple, qmin: int, qmax: int) -> None:
    """Both choices are equally good: another order of sums may prefer a near-equal candidate."""
    errors = []
    for scale, zp, _ in found:
        args = (
            x.double(),
            scale.double(),
            zp,
            qmin,
            qmax,
            case.axis,
            case.group_size,
            "code",
            False,
        )
        y, _ = reference("fake_quant", *args)
        errors.append((y - x.double()).square().sum())
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-5, atol=0)


@row_of("quant_range")
@case_of
@dtype_of
@pytest.mark.parametrize("method", METHODS)
def test_quant_range(runner: Runner, case: Case, dtype: torch.dtype, method: str) -> None:
    ranges = ranges_for(runner)[:3]
    if method == "mse" and runner.slow:
        if runner.how == "interpreted" and dtype in (torch.float16, torch.float64):
            pytest.skip("eighty candidates an element last seconds a case here: fp32 and bf16 only")
        ranges = ranges[:1]
    for bits_range in ranges:
        check_quant_range(runner, case, dtype, method, bits_range)


@row_of("quant_range", large=True)
@large_case
@pytest.mark.parametrize("method", METHODS)
def test_quant_range_large(runner: Runner, case: Case, method: str) -> None:
    check_quant_range(runner, case, torch.float32, method, (4, False, False))


@row_of("qparams")
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_qparams(runner: Runner, dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    lo = [-1.0, 0.0, 2.0, -3.0, -1e-42, -inf, nan, -1e30, 0.0, -0.1]
    hi = [2.0, 0.0, 3.0, -1.0, 1e-42, 1.0, 1.0, 1e30, inf, 1e-3]
    bounds = torch.tensor([lo, hi], dtype=dtype, device=runner.device)
    for bits_range in RANGES:
        qmin, qmax = numeric.code_range("test", *bits_range)
        for one in (bounds, bounds[:, 0]):
            want = reference("qparams", one, qmin, qmax, bits_range[1])
            with fenced():
                got = run(runner, one, qmin, qmax, bits_range[1])
            assert_same(got[0], want[0], "scale")
            assert_same(got[1], want[1], "zero_point")


@row_of("qparams")
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_running_range(runner: Runner, dtype: torch.dtype) -> None:
    """It moves in place by what is observed, and the parameters are its own."""
    inf, nan = float("inf"), float("nan")
    running = [
        [0.0, 0.0, -1.0, -1.0, -2.0, nan, 0.0, -0.3],
        [0.0, 1.0, 2.0, 0.0, 3.0, 1.0, 0.0, 0.7],
    ]
    observed = [
        [-1.0, -2.0, nan, -inf, -2.0, 0.0, nan, -0.1],
        [2.0, 3.0, 4.0, 5.0, inf, 1.0, 1.0, 0.9],
    ]
    for columns in (slice(None), 0, 7):
        start, seen = (
            torch.tensor(t, dtype=dtype, device=runner.device)[:, columns].contiguous()
            for t in (running, observed)
        )
        moved, want_moved = start.clone(), start.clone()
        want = reference("qparams", seen, 0, 15, False, want_moved, 0.1)
        with fenced():
            got = run(runner, seen, 0, 15, False, moved, 0.1)
        assert_same(moved, want_moved, "running range")
        assert_same(got[0], want[0], "scale")
        assert_same(got[1], want[1], "zero_point")
    fresh = torch.zeros(2, device=runner.device)
    run(runner, torch.tensor([-1.0, 2.0], device=runner.device), 0, 15, False, fresh, 0.1)
    assert fresh.tolist() == [-1.0, 2.0], "the first observation is taken as it is"
    run(runner, torch.tensor([-3.0, 2.5], device=runner.device), 0, 15, False, fresh, 0.5)
    assert fresh.tolist() == [-2.0, 2.25]


@row_of("fake_quant_dynamic")
@case_of
@dtype_of
def test_fake_quant_dynamic(runner: Runner, case: Case, dtype: torch.dtype) -> None:
    x = case.tensor(dtype, device=runner.device)
    for bits, symmetric, narrow in ranges_for(runner):
        qmin, qmax = numeric.code_range("test", bits, symmetric, narrow)
        for method in ("minmax", "percentile"):
            args = (
                x,
                qmin,
                qmax,
                case.axis,
                case.group_size,
                symmetric,
                method,
                98.0,
                "code",
                True,
            )
            want = reference("fake_quant_dynamic", *args)
            with fenced(aligned=method == "minmax"):
                got = run(runner, *args)
            for name, a, b in zip(("y", "scale", "zero_point", "mask"), got, want, strict=True):
                assert_same(a, b, f"{method} {name}")


@row_of("fake_quant_dynamic", large=True)
@large_case
def test_fake_quant_dynamic_large(runner: Runner, case: Case) -> None:
    x = case.tensor(torch.float32, device=runner.device)
    args = (x, 0, 15, case.axis, case.group_size, False, "minmax", 99.0, "value", True)
    want = reference("fake_quant_dynamic", *args)
    with fenced():
        got = run(runner, *args)
    for name, a, b in zip(("y", "scale", "zero_point", "mask"), got, want, strict=True):
        assert_same(a, b, name)


@row_of("quantize")
@case_of
@dtype_of
def test_quantize(runner: Runner, case: Case, dtype: torch.dtype) -> None:
    x = case.tensor(dtype, device=runner.device)
    for bits, symmetric, narrow in ranges_for(runner):
        qmin, qmax = numeric.code_range("test", bits, symmetric, narrow)
        scale, zp = (p.to(runner.device) for p in params_for(x, case, qmin, qmax))
        for pack in {0, bits if bits in (1, 2, 4) and x.dim() else 0}:
            args = (x, scale, zp, qmin, qmax, case.axis, case.group_size, pack)
            want = reference("quantize", *args)
            with fenced():
                got = run(runner, *args)
            assert_same(got, want, f"codes, pack={pack}")


@row_of("dequantize")
@case_of
@dtype_of
def test_dequantize(runner: Runner, case: Case, dtype: torch.dtype) -> None:
    x = case.tensor(dtype, device=runner.device)
    for bits, symmetric, narrow in ranges_for(runner):
        qmin, qmax = numeric.code_range("test", bits, symmetric, narrow)
        scale, zp = (p.to(runner.device) for p in params_for(x, case, qmin, qmax))
        for pack in {0, bits if bits in (1, 2, 4) and x.dim() else 0}:
            args = (scale, zp, qmin, qmax, case.axis, case.group_size, pack)
            codes = reference("quantize", x, *args)
            size = x.shape[-1] if pack else 0
            args = (codes, scale, zp, qmin, case.axis, case.group_size, pack, size, dtype)
            want = reference("dequantize", *args)
            with fenced():
                got = run(runner, *args)
            assert_same(got, want, f"y, pack={pack}")


@row_of("lsq_bwd")
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=("float16", "float32"))
def test_lsq_bwd_of_every_small_size(runner: Runner, dtype: torch.dtype) -> None:
    """Vectors end anywhere, and few lanes share a short channel."""
    for n in range(1, 70, 5 if runner.how == "interpreted" else 1):
        case = Case(f"n={n}", lambda r, n=n: r(n))
        check_lsq_bwd(runner, case, dtype, (4, True, False))


@row_of("quant_range")
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=("float16", "float32"))
def test_quant_range_of_every_small_size(runner: Runner, dtype: torch.dtype) -> None:
    for n in range(1, 70, 5 if runner.how == "interpreted" else 1):
        case = Case(f"n={n}", lambda r, n=n: r(n).cumsum(0))
        check_quant_range(runner, case, dtype, "minmax", (4, False, False))
