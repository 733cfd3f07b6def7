"""The three comparisons of the tests: bits, values, codes."""

from __future__ import annotations

import torch
from torch import Tensor

# relative, absolute: sums of some thousand terms in fp32 blocks against fp64; half and bfloat16
# store the element-wise results, whose last bit is half of 2^-10 and of 2^-7
VALUES = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (2e-6, 1e-6),
    torch.float16: (1e-3, 1e-5),
    torch.bfloat16: (8e-3, 1e-5),
}


def assert_same(got: Tensor, want: Tensor, what: str = "result") -> None:
    """Same shape, strides, dtype, NaN places and values; 0.0 and -0.0 are told apart."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
    assert got.dtype is want.dtype, f"{what}: {got.dtype}, want {want.dtype}"
    if got.numel():
        assert got.stride() == want.stride(), f"{what}: strides {got.stride()} != {want.stride()}"
    if got.is_floating_point():
        assert_where(got.isnan() == want.isnan(), got, want, f"{what}: NaN")
        known = ~want.isnan()
        assert_where(~known | (got.signbit() == want.signbit()), got, want, f"{what}: sign")
        assert_where(~known | (got == want), got, want, what)
    else:
        assert_where(got == want, got, want, what)


def assert_where(same: Tensor, got: Tensor, want: Tensor, what: str) -> None:
    """All of `same` is true, or a message that shows the first difference."""
    if not bool(same.all()):
        wrong = (~same).nonzero()
        index = tuple(int(i) for i in wrong[0])
        raise AssertionError(
            f"{what}: {len(wrong)} of {same.numel()} differ, first at {index}: "
            f"got {got[index].item()!r}, want {want[index].item()!r}"
        )


def assert_sums(got: Tensor, want: Tensor, terms: Tensor, what: str) -> None:
    """Sums agree to a relative error of the sum of the terms' sizes: what rounding can explain."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
    rtol, _ = VALUES[got.dtype]
    bound = rtol * terms.to(want.dtype) + 1e-37
    assert_where((got - want).abs() <= bound, got, want, what)


def assert_values(got: Tensor, want: Tensor, what: str = "values") -> None:
    """Close to the tolerance of the dtype."""
    rtol, atol = VALUES[got.dtype]
    torch.testing.assert_close(
        got, want, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def assert_codes(got: Tensor, want: Tensor, t: Tensor, most: int) -> None:
    """Codes agree but for at most `most`, each by 1 and where t = x / scale is near a tie."""
    off = (got.to(torch.int64) - want.to(torch.int64)).abs()
    wrong = off > 0
    assert int(wrong.sum()) <= most, f"{int(wrong.sum())} codes differ, at most {most} may"
    assert int(off.max() if off.numel() else 0) <= 1, "codes differ by more than 1"
    distance = ((t - t.floor()) - 0.5).abs()[wrong]
    assert bool((distance < 1e-3 * t.abs()[wrong].clamp(min=1)).all()), (
        "a code differs far from a tie"
    )
