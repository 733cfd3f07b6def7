"""quant_range: scale and zero point by min-max, percentile, MSE search or LSQ's rule."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkernels import _registry, numeric
from qkernels.backends.reference.quant_range import moved_range
from qkernels.ops import _check
from qkernels.ops._inplace import written
from qkernels.ops._library import call, define, traced


class QuantRange(NamedTuple):
    """Result of `quant_range`."""

    scale: Tensor
    zero_point: Tensor


def check_quant_range(
    x: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    symmetric: bool,
    method: str,
    percentile: float,
) -> None:
    """Raise on arguments that no row could run."""
    _check.check_tensor("quant_range", "x", x)
    _check.check_granularity("quant_range", x.shape, axis, group_size)
    _check.check_choice("quant_range", "method", method, numeric.METHODS)
    _check.check_percentile("quant_range", percentile)


def _fake(
    x: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = numeric.params_shape(x.shape, axis, group_size)
    compute = numeric.compute_dtype(x.dtype)
    return (
        x.new_empty(shape, dtype=compute),
        x.new_empty(shape, dtype=torch.int32),
        x.new_empty((2, *shape), dtype=compute),
    )


def check_qparams(
    range: Tensor,
    qmin: int,
    qmax: int,
    symmetric: bool,
    running: Tensor | None = None,
) -> None:
    """Raise on arguments that no row could run."""
    if range.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"qparams: range must be float32 or float64, got {range.dtype}")
    if range.dim() not in (1, 2) or range.shape[0] != 2:
        raise ValueError(
            f"qparams: range must be of shape [2] or [2, channels], got {tuple(range.shape)}"
        )
    if running is None:
        return
    if running.dtype is not range.dtype:
        raise TypeError(f"qparams: running range must be {range.dtype}, got {running.dtype}")
    if running.shape != range.shape or not running.is_contiguous():
        raise ValueError(
            f"qparams: running range must be of shape {tuple(range.shape)} without gaps, as what "
            f"is observed, got {tuple(running.shape)} with strides {tuple(running.stride())}"
        )
    if running.device != range.device:
        raise ValueError(
            f"qparams: running range must be on {range.device} like what is observed, "
            f"got {running.device}"
        )


def _fake_qparams(range: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = range.shape[1:]
    return range.new_empty(shape), range.new_empty(shape, dtype=torch.int32)


define(
    "quant_range",
    "(Tensor x, int qmin, int qmax, int? axis, int? group_size, bool symmetric, str method, "
    "float percentile, *, str backend='') -> (Tensor, Tensor, Tensor)",
    check_quant_range,
    _fake,
)
define(
    "qparams",
    "(Tensor range, int qmin, int qmax, bool symmetric, *, str backend='') -> (Tensor, Tensor)",
    check_qparams,
    _fake_qparams,
)


def quant_range_args(
    x: Tensor,
    bits: int,
    axis: int | None,
    group_size: int | None,
    symmetric: bool,
    narrow_range: bool,
    method: str,
    percentile: float | None,
) -> tuple[Any, ...]:
    """The schema's arguments."""
    _check.check_tensor("quant_range", "x", x)
    qmin, qmax = numeric.code_range("quant_range", bits, symmetric, narrow_range)
    axis = _check.normal_axis("quant_range", x, axis, group_size)
    percentile = _check.as_percentile("quant_range", method, percentile)
    return x.detach(), qmin, qmax, axis, group_size, symmetric, method, percentile


def qparams_args(range: Tensor, bits: int, symmetric: bool, narrow_range: bool) -> tuple[Any, ...]:
    """The schema's arguments."""
    qmin, qmax = numeric.code_range("qparams", bits, symmetric, narrow_range)
    if not isinstance(range, Tensor):
        raise TypeError(f"qparams: range must be a Tensor, got {type(range).__name__}")
    return range.detach(), qmin, qmax, symmetric


def quant_range(
    x: Tensor,
    *,
    bits: int,
    axis: int | None = None,
    group_size: int | None = None,
    symmetric: bool = False,
    narrow_range: bool = False,
    method: str = "minmax",
    percentile: float | None = None,
    backend: str | None = None,
) -> QuantRange:
    """Scale and zero point that suit x. No gradient; nothing is read back from a GPU.

    Args:
        x, bits, axis, group_size, symmetric, narrow_range, backend: as in `fake_quant`.
        method:
            "minmax": the least and the greatest value.
            "percentile": the (100 - P)-th and P-th percentile, exact at any size, with the linear
                interpolation of torch.quantile.
            "mse": the min-max range shrunk by 0, 1, .. 79 %, whichever gives the least squared
                error of the fake-quantized x (the first of equals).
            "lsq": scale = 2 mean|x| / sqrt(Qp) (Esser et al. 2019), Qp = qmax if symmetric; else
                the zero point of the min-max range, and Qp the codes on its larger side, so that
                for x >= 0 it is the paper's 2^bits - 1.
        percentile: for method="percentile": in (50, 100], default 99.

    From a range [lo, hi] to the result, n = qmax - qmin (docs/numerics.md):
        affine: widened to hold 0; scale = (hi - lo) / n;
            zero_point = clamp(qmin - rint(lo / scale), qmin, qmax)
        symmetric: scale = max|x| / (n / 2); zero_point = 0

    Returns:
        QuantRange(scale, zero_point), 0-dim per tensor or 1-D with one entry per channel; fp32
        (fp64 for fp64 x) and int32. A channel of zeros gets the smallest normal scale; NaN in a
        channel makes its scale NaN.

    Raises:
        TypeError, ValueError: as in `fake_quant`.
    """
    scale, zero_point, _ = observe_range(
        x,
        bits=bits,
        axis=axis,
        group_size=group_size,
        symmetric=symmetric,
        narrow_range=narrow_range,
        method=method,
        percentile=percentile,
        backend=backend,
    )
    return QuantRange(scale, zero_point)


def observe_range(
    x: Tensor,
    *,
    bits: int,
    axis: int | None = None,
    group_size: int | None = None,
    symmetric: bool = False,
    narrow_range: bool = False,
    method: str = "minmax",
    percentile: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """quant_range with the range itself: (scale, zero_point, range [2] or [2, channels]).

    For observers that average ranges and turn the average into parameters with `qparams`.
    Arguments and errors as in `quant_range`.
    """
    args = quant_range_args(x, bits, axis, group_size, symmetric, narrow_range, method, percentile)
    row = _registry.check_backend(backend, "quant_range: backend")
    return call("quant_range", row, *args)


def qparams(
    range: Tensor,
    *,
    bits: int,
    symmetric: bool = False,
    narrow_range: bool = False,
    backend: str | None = None,
) -> QuantRange:
    """(scale, zero_point) of given bounds: the last step of `quant_range`.

    Args:
        range: [2] or [2, channels]: lower and upper bounds; float32 or float64.
        bits, symmetric, narrow_range, backend: as in `fake_quant`.

    Returns:
        QuantRange of shape [] or [channels].

    Raises:
        TypeError, ValueError: dtype or shape of range, bits.
    """
    args = qparams_args(range, bits, symmetric, narrow_range)
    row = _registry.check_backend(backend, "qparams: backend")
    return QuantRange(*call("qparams", row, *args))


def follow_range(
    running: Tensor,
    observed: Tensor,
    decay: float,
    *,
    bits: int,
    symmetric: bool = False,
    narrow_range: bool = False,
) -> QuantRange:
    """Move a running range towards an observed one, in place; `qparams` of the moved one.

    running = decay * running + (1 - decay) * observed. A running range that is still [0, 0] takes
    the observed one as it is, so that the average has no bias towards 0 at the start; a bound
    observed as NaN or infinite leaves its own alone. For observers.

    Args:
        running: [2] or [2, channels]; float32 or float64.
        observed: of running's shape, on its device.
        bits, symmetric, narrow_range: as in `fake_quant`.

    Raises:
        ValueError: another shape or device of observed.
    """
    args = qparams_args(observed.to(running.dtype), bits, symmetric, narrow_range)
    seen, qmin, qmax, _ = args
    dense, weight = running.contiguous(), 1.0 - decay
    check_qparams(seen, qmin, qmax, symmetric, dense)
    if traced(observed) or traced(running):
        running.copy_(moved_range(running, seen, weight))
        return QuantRange(*call("qparams", "", running, *args[1:]))
    params = QuantRange(*_registry.run("qparams", "", *args, dense, weight))
    if dense is running:
        written(running)
    else:
        running.copy_(dense)
    return params
