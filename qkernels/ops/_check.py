"""Argument checks that the ops share. Text: "<op>: <argument> must be <rule>, got <value>"."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkernels import numeric

_PLAIN = (Tensor, torch.nn.Parameter)
_FLOAT32, _FLOAT64, _INT32 = torch.float32, torch.float64, torch.int32
_STRIDED = torch.strided
# GPU calls do not wait for the scale to check it, unless the user is looking for a bug
CHECK_ON_GPU = os.environ.get("QKERNELS_CHECK", "0") == "1"


class ListError(Exception):
    """The error of one call of a list; `named` makes it the user's."""

    def __init__(self, index: int, error: Exception) -> None:
        super().__init__(index, error)
        self.index, self.error = index, error


def each_call(
    function: Callable[..., Any],
    calls: Iterable[tuple[Any, ...]],
    keywords: Iterable[dict[str, Any]] = repeat({}),
) -> list[Any]:
    """function(*args, **keywords) for every call of a list.

    Raises:
        ListError: the TypeError or ValueError of a call, with its place.
    """
    results = []
    # keywords may go on for ever
    for i, (args, kw) in enumerate(zip(calls, keywords, strict=False)):
        try:
            results.append(function(*args, **kw))
        except (TypeError, ValueError) as error:
            raise ListError(i, error) from error
    return results


@contextmanager
def named(op: str, places: Sequence[int] | None = None) -> Iterator[None]:
    """Inside, the error of a call says which tensor of the user's list it was about.

    Args:
        op: the function of qkernels.foreach.
        places: where the calls stand in the user's list; None: the same order.
    """
    try:
        yield
    except ListError as failed:
        place = failed.index if places is None else places[failed.index]
        text = f"foreach.{op}: tensor {place}: {failed.error}"
        raise type(failed.error)(text) from failed.error


def check_tensor(op: str, name: str, x: Any) -> None:
    """x must be a floating tensor of a supported dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(x).__name__}")
    if x.dtype not in numeric.FLOAT_DTYPES:
        raise TypeError(
            f"{op}: {name} must be float32, float64, float16 or bfloat16, got {x.dtype}"
        )
    if x.layout is not _STRIDED:
        raise TypeError(f"{op}: {name} must be a dense (strided) tensor, got {x.layout}")


def normal_axis(op: str, x: Tensor, axis: Any, group_size: Any) -> int | None:
    """axis counted from the front; raises on an axis or a group_size that x does not have."""
    if axis is None:
        if group_size is not None:
            check_granularity(op, x.shape, None, group_size)
        return None
    if type(axis) is not int:
        raise TypeError(f"{op}: axis must be an int or None, got {axis!r}")
    if group_size is not None:
        raise ValueError(f"{op}: group_size must be None when axis is given, got {group_size!r}")
    if not -x.dim() <= axis < x.dim():
        rule = f"in {-x.dim()}..{x.dim() - 1}" if x.dim() else "None for a 0-dim x"
        raise ValueError(f"{op}: axis must be {rule}, got {axis}")
    return axis % x.dim()


def check_granularity(op: str, shape: torch.Size, axis: int | None, group_size: Any) -> None:
    """axis in 0..ndim-1 or None; group_size divides the elements of one x[0]."""
    if axis is not None:
        if group_size is not None:
            raise ValueError(f"{op}: group_size must be None when axis is given, got {group_size}")
        if not 0 <= axis < len(shape):
            raise ValueError(f"{op}: axis must be in 0..{len(shape) - 1}, got {axis}")
    elif group_size is not None:
        if type(group_size) is not int:
            raise TypeError(f"{op}: group_size must be an int or None, got {group_size!r}")
        row = shape[1:].numel() if len(shape) > 1 else shape.numel()
        if group_size < 1 or row % group_size:
            raise ValueError(
                f"{op}: group_size must be a divisor of {row} (elements of one x[0]), "
                f"got {group_size}"
            )


class Like(NamedTuple):
    """What the checks of parameters ask of x, for an op that makes it."""

    dtype: torch.dtype
    device: torch.device
    is_cpu: bool
    shape: torch.Size


def check_params(
    op: str,
    x: Tensor | Like,
    scale: Tensor,
    zero_point: Tensor | None,
    axis: int | None,
    group_size: int | None,
) -> None:
    """scale and zero_point: dtype, device and one entry per channel."""
    compute = numeric.compute_dtype(x.dtype)
    if scale.dtype is not compute:
        raise TypeError(f"{op}: scale must be {compute} for {x.dtype} x, got {scale.dtype}")
    if zero_point is not None and zero_point.dtype not in (torch.int32, compute):
        raise TypeError(
            f"{op}: zero_point must be torch.int32 or {compute}, got {zero_point.dtype}"
        )
    check_entries(op, x, scale, zero_point, axis, group_size)


def fit(x: Tensor, scale: Any, zero_point: Any, axis: int | None, group_size: int | None) -> bool:
    """Whether as_scale and as_zero_point would give back both as they are and check_entries pass,
    for what most calls have: fp32 on the CPU, int32 zero points. Looks at each thing once, for a
    small tensor feels every look; False says nothing. Not for tracing (`_library.traced`)."""
    if group_size is not None or not x.is_cpu or x.dtype is _FLOAT64:
        return False
    channels = 1 if axis is None else x.size(axis)
    if (
        type(scale) not in _PLAIN
        or scale.dtype is not _FLOAT32
        or scale.numel() != channels
        or scale.dim() > 1
        or not scale.is_cpu
        or scale.is_neg()
    ):
        return False
    return zero_point is None or (
        type(zero_point) is Tensor
        and zero_point.dtype is _INT32
        and zero_point.numel() == channels
        and zero_point.dim() <= 1
        and zero_point.is_cpu
        and not zero_point.is_neg()
    )


def check_entries(
    op: str,
    x: Tensor | Like,
    scale: Tensor,
    zero_point: Tensor | None,
    axis: int | None,
    group_size: int | None,
) -> None:
    """What check_params asks besides the dtypes, which as_scale and as_zero_point see to."""
    per_tensor = axis is None and group_size is None  # x.shape takes a while
    channels = 1 if per_tensor else numeric.channel_count(x.shape, axis, group_size)
    check_param(op, "scale", scale, x, channels)
    if zero_point is not None:
        check_param(op, "zero_point", zero_point, x, channels)


def check_param(op: str, name: str, p: Tensor, x: Tensor | Like, channels: int) -> None:
    """p must have one entry per channel, on x's device."""
    if p.dim() > 1 or p.numel() != channels:
        rule = f"1-D with {channels} entries" if channels != 1 else "0-dim (or one entry)"
        raise ValueError(f"{op}: {name} must be {rule}, got shape {tuple(p.shape)}")
    if not (p.is_cpu and x.is_cpu) and p.device != x.device:  # the latter takes longer
        raise ValueError(f"{op}: {name} must be on {x.device} like x, got {p.device}")


def as_scale(op: str, x: Tensor | Like, scale: Any) -> Tensor:
    """scale in the compute dtype; a Python number becomes a 0-dim tensor.

    Narrow floats are widened (autograd sends the gradient back in their dtype), so that a model
    cast to bf16 keeps working. fp64 is not narrowed behind the user's back.
    """
    compute = numeric.compute_dtype(x.dtype)
    if isinstance(scale, Tensor):
        if scale.dtype is compute:
            return scale.resolve_neg()  # the kernels read memory, which a negated view shares
        if scale.dtype not in numeric.FLOAT_DTYPES or scale.dtype is torch.float64:
            raise TypeError(
                f"{op}: scale must be {compute} or a narrower float for {x.dtype} x, "
                f"got {scale.dtype}"
            )
        return scale.to(compute)
    if isinstance(scale, (int, float)) and not isinstance(scale, bool):
        return torch.full((), float(scale), dtype=compute, device=x.device)
    raise TypeError(f"{op}: scale must be a Tensor, a float or None, got {type(scale).__name__}")


def as_zero_point(op: str, x: Tensor | Like, zero_point: Any) -> Tensor | None:
    """zero_point as int32 or in the compute dtype, or None."""
    if zero_point is None:
        return None
    compute = numeric.compute_dtype(x.dtype)
    if isinstance(zero_point, Tensor):
        dtype = zero_point.dtype
        if dtype is torch.int32 or dtype is compute:
            return zero_point.resolve_neg()
        if dtype is torch.bool or dtype.is_complex or dtype is torch.float64:
            raise TypeError(
                f"{op}: zero_point must be an integer, {compute} or a narrower float, got {dtype}"
            )
        if dtype is torch.int64:  # through a float: what is out of range must not wrap around
            return zero_point.to(compute)
        return zero_point.to(compute if dtype.is_floating_point else torch.int32)
    if isinstance(zero_point, (int, float)) and not isinstance(zero_point, bool):
        return torch.full((), float(zero_point), dtype=compute, device=x.device)
    raise TypeError(
        f"{op}: zero_point must be a Tensor, a number or None, got {type(zero_point).__name__}"
    )


def check_values(op: str, scale: Tensor, zero_point: Tensor | None) -> None:
    """Raise if a scale is not positive, finite and normal, or a zero point not finite.

    On CUDA this would wait for the GPU, so it looks only if QKERNELS_CHECK=1.
    """
    if scale.is_cuda and not CHECK_ON_GPU:
        return
    bad = ~(scale.isfinite() & (scale >= numeric.smallest_scale(scale.dtype)))
    if bad.any():
        channel = int(bad.reshape(-1).nonzero()[0])
        value = float(scale.reshape(-1)[channel])
        raise ValueError(
            f"{op}: scale must be positive, finite and at least "
            f"{numeric.smallest_scale(scale.dtype):.3g}, got {value} at channel {channel}"
        )
    if zero_point is None:
        return
    most = numeric.LARGEST_ZERO_POINT  # not abs(): of the least int32 that is negative
    far = ~((zero_point <= most) & (zero_point >= -most))
    if far.any():
        channel = int(far.reshape(-1).nonzero()[0])
        value = float(zero_point.reshape(-1)[channel])
        raise ValueError(
            f"{op}: zero_point must be finite and at most {most} in size, "
            f"got {value} at channel {channel}"
        )


def check_stats(op: str, mean: Tensor | None, std: Tensor, prefix: str = "") -> None:
    """Raise if a mean is not finite or a std (or noise scale) is negative or not finite.

    On CUDA this would wait for the GPU, so it looks only if QKERNELS_CHECK=1.
    """
    if std.is_cuda and not CHECK_ON_GPU:
        return
    name = "scale" if mean is None else "std"
    for what, rule, p in (("mean", "finite", mean), (name, "finite and at least 0", std)):
        if p is None:
            continue
        bad = ~p.isfinite() if what == "mean" else ~((p >= 0) & p.isfinite())
        if bad.any():
            channel = int(bad.reshape(-1).nonzero()[0])
            value = float(p.reshape(-1)[channel])
            raise ValueError(
                f"{op}: {prefix}{what} must be {rule}, got {value} at channel {channel}"
            )


def check_choice(op: str, name: str, value: Any, known: tuple[str, ...]) -> None:
    """value must be one of the known names."""
    if value not in known:
        raise ValueError(f"{op}: {name} must be one of {', '.join(known)}, got {value!r}")


def as_percentile(op: str, method: str, percentile: Any) -> float:
    """The percentile to use; raises if it is out of (50, 100] or given with another method."""
    check_choice(op, "method", method, numeric.METHODS)
    if percentile is None:
        return numeric.DEFAULT_PERCENTILE
    if method != "percentile":
        raise ValueError(
            f"{op}: percentile must be None unless method='percentile', got {percentile!r} "
            f"with method={method!r}"
        )
    if isinstance(percentile, bool) or not isinstance(percentile, (int, float)):
        raise TypeError(f"{op}: percentile must be a number in (50, 100], got {percentile!r}")
    check_percentile(op, float(percentile))
    return float(percentile)


def check_number(op: str, name: str, value: Any, rule: str = "a number") -> None:
    """value must be a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be {rule}, got {value!r}")
    # not math.isfinite, which torch.compile cannot trace for a number that changes between calls
    if not -math.inf < value < math.inf:
        raise ValueError(f"{op}: {name} must be finite, got {value}")


def check_percentile(op: str, percentile: float) -> None:
    """percentile must be in (50, 100]."""
    if not 50.0 < percentile <= 100.0:
        raise ValueError(f"{op}: percentile must be in (50, 100], got {percentile}")


def check_probability(op: str, name: str, p: Any) -> None:
    """p must be a number in [0, 1]."""
    check_number(op, name, p)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{op}: {name} must be in [0, 1], got {p}")


def check_decay(op: str, decay: Any) -> None:
    """decay must be a number in [0, 1)."""
    check_number(op, "decay", decay)
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"{op}: decay must be in [0, 1), got {decay}")
