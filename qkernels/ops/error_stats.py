"""error_stats: statistics of the quantization error of each channel, in one read of x."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkernels import _registry, numeric
from qkernels.backends.reference.error_stats import move_average
from qkernels.ops import _check
from qkernels.ops._inplace import written
from qkernels.ops._library import call, define, run_checked, traced


class ErrorStats(NamedTuple):
    """Statistics of e = Q(x) - x, 0-dim per tensor or 1-D with one entry per channel."""

    mean: Tensor
    var: Tensor
    mean_square: Tensor
    clip_rate: Tensor

    @property
    def std(self) -> Tensor:
        """sqrt(var), correctly rounded."""
        return numeric.exact_sqrt(self.var)


def check_error_stats(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    clip: str,
    ema: Tensor | None = None,
    decay: float = 0.0,
) -> None:
    """Raise on arguments that no row could run."""
    _check.check_tensor("error_stats", "x", x)
    _check.check_choice("error_stats", "clip", clip, numeric.CLIPS)
    _check.check_granularity("error_stats", x.shape, axis, group_size)
    _check.check_params("error_stats", x, scale, zero_point, axis, group_size)
    check_ema(x, axis, group_size, ema)


def check_ema(x: Tensor, axis: int | None, group_size: int | None, ema: Tensor | None) -> None:
    """ema must be [5, channels] without gaps, in the compute dtype, on x's device."""
    if ema is None:
        return
    compute = numeric.compute_dtype(x.dtype)
    shape = (5, numeric.channel_count(x.shape, axis, group_size))
    if ema.dtype is not compute:
        raise TypeError(f"error_stats: ema must be {compute} for {x.dtype} x, got {ema.dtype}")
    if tuple(ema.shape) != shape or not ema.is_contiguous():
        raise ValueError(
            f"error_stats: ema must be contiguous of shape {shape}, got {tuple(ema.shape)}"
        )
    if ema.device != x.device:
        raise ValueError(f"error_stats: ema must be on {x.device} like x, got {ema.device}")


def check_error_stats_dynamic(
    x: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    symmetric: bool,
    method: str,
    percentile: float,
    clip: str,
    ema: Tensor | None = None,
    decay: float = 0.0,
) -> None:
    """Raise on arguments that no row could run."""
    _check.check_tensor("error_stats", "x", x)
    _check.check_choice("error_stats", "method", method, numeric.METHODS)
    _check.check_choice("error_stats", "clip", clip, numeric.CLIPS)
    _check.check_percentile("error_stats", percentile)
    _check.check_granularity("error_stats", x.shape, axis, group_size)
    check_ema(x, axis, group_size, ema)


def _fake(x: Tensor, axis: int | None, group_size: int | None) -> Tensor:
    shape = numeric.params_shape(x.shape, axis, group_size)
    return x.new_empty((4, *shape), dtype=numeric.compute_dtype(x.dtype))


def _fake_stats(x: Tensor, scale: Tensor, zero_point: Tensor | None, *rest: Any) -> Tensor:
    return _fake(x, rest[2], rest[3])


def _fake_dynamic(x: Tensor, qmin: int, qmax: int, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    stats = _fake(x, rest[0], rest[1])
    return stats, torch.empty_like(stats[0]), torch.empty_like(stats[0], dtype=torch.int32)


define(
    "error_stats",
    "(Tensor x, Tensor scale, Tensor? zero_point, int qmin, int qmax, int? axis, int? group_size, "
    "str clip, *, str backend='') -> Tensor",
    check_error_stats,
    _fake_stats,
)
define(
    "error_stats_dynamic",
    "(Tensor x, int qmin, int qmax, int? axis, int? group_size, bool symmetric, str method, "
    "float percentile, str clip, *, str backend='') -> (Tensor, Tensor, Tensor)",
    check_error_stats_dynamic,
    _fake_dynamic,
)


def stats_call(
    x: Tensor,
    scale: Tensor | float | None = None,
    zero_point: Tensor | int | None = None,
    *,
    bits: int,
    axis: int | None = None,
    group_size: int | None = None,
    symmetric: bool = False,
    narrow_range: bool = False,
    method: str = "minmax",
    percentile: float | None = None,
    clip: str = "code",
) -> tuple[str, tuple[Any, ...]]:
    """The op to run, and its arguments, for the arguments of `error_stats`."""
    _check.check_tensor("error_stats", "x", x)
    qmin, qmax = numeric.code_range("error_stats", bits, symmetric, narrow_range)
    axis = _check.normal_axis("error_stats", x, axis, group_size)
    p = _check.as_percentile("error_stats", method, percentile)
    x = x.detach()
    if scale is None:
        if zero_point is not None:
            raise ValueError("error_stats: zero_point must be None when scale is None, got a value")
        args = (x, qmin, qmax, axis, group_size, symmetric, method, p, clip)
        return "error_stats_dynamic", args
    scale = _check.as_scale("error_stats", x, scale).detach()
    zero_point = _check.as_zero_point("error_stats", x, zero_point)
    if zero_point is not None:
        zero_point = zero_point.detach()
    return "error_stats", (x, scale, zero_point, qmin, qmax, axis, group_size, clip)


def as_error_stats(op: str, result: Any) -> ErrorStats:
    """What the op returns as ErrorStats."""
    stats = result if op == "error_stats" else result[0]
    return ErrorStats(*stats.unbind())


def error_stats(
    x: Tensor,
    scale: Tensor | float | None = None,
    zero_point: Tensor | int | None = None,
    *,
    bits: int,
    axis: int | None = None,
    group_size: int | None = None,
    symmetric: bool = False,
    narrow_range: bool = False,
    method: str = "minmax",
    percentile: float | None = None,
    clip: str = "code",
    backend: str | None = None,
) -> ErrorStats:
    """Mean and variance of the quantization error e = Q(x) - x; e itself is never stored.

    mean = sum e / n;  var = sum (e - mean)^2 / n;  mean_square = sum e^2 / n;
    clip_rate = share of elements that Q clips (NaN counts as clipped)

    The recorders of DNQ (WQER and AQER; Xia et al., arXiv 2511.01462) keep moving averages of it:
    see `qkernels.nn.ErrorEMA`. `differential_noise` and `drop_in_noise` take them as they are.

    Args:
        x, scale, zero_point, bits, axis, group_size, symmetric, narrow_range, method, percentile,
            clip, backend: as in `fake_quant`. scale=None finds the range of x in the same call.

    Returns:
        ErrorStats(mean, var, mean_square, clip_rate) in fp32 (fp64 for fp64 x), 0-dim per tensor or
        1-D with one entry per channel. var divides by n, so that one element has variance 0. A
        channel without elements has zeros; NaN in x shows in its channel. No gradient.

    Raises:
        TypeError, ValueError: as in `fake_quant`.
    """
    op, args = stats_call(
        x,
        scale,
        zero_point,
        bits=bits,
        axis=axis,
        group_size=group_size,
        symmetric=symmetric,
        narrow_range=narrow_range,
        method=method,
        percentile=percentile,
        clip=clip,
    )
    row = _registry.check_backend(backend, "error_stats: backend")
    return as_error_stats(op, call(op, row, *args))


def update_error_stats(ema: Tensor, decay: float, backend: str, op: str, *args: Any) -> Tensor:
    """error_stats that also moves an average: in the same launch, or, traced, in torch's terms.

    Args:
        ema: [5, channels], contiguous, fp32 (fp64 for fp64 x): averages of mean, var, mean_square
            and clip_rate, and the weight gathered so far; starts as zeros.
        op, args: what `stats_call` returned.

    Returns:
        The statistics of this call, [4] or [4, channels].
    """
    by_torch = traced(args[0])
    if by_torch:
        result = call(op, backend, *args)
    else:
        result = run_checked(op, backend, *args, ema, decay)
        written(ema)
    stats = result if op == "error_stats" else result[0]
    if by_torch:
        move_average(ema, stats.reshape(4, -1), decay)
    return stats
