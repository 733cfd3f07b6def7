"""The ops over a list of tensors of any shapes, dtypes and layouts, in one call.

A network is fifty small tensors: one call for all costs one parallel region on the CPU, or one
launch for many tensors on CUDA, where a loop would pay for each. The results are those of the
loop, to the bit, and so are the gradients; the backward of the whole list is one call too.

Every function takes a list (or tuple) of tensors on one device and returns a list. Its other
arguments are those of the function of the same name for one tensor, each either one value for all
or a list (or tuple) with one entry per tensor:

    qkernels.foreach.fake_quant(weights, bits=[8, 4, 4, 8], axis=0, symmetric=True)

An error names the tensor, and nothing is returned. To autograd a list is one step: its gradients
come together, what it saved is freed together, and a second backward through another result of the
same list needs retain_graph=True. Under torch.compile and other tracing the list is taken apart
into the ops of single tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar, Union

import torch
from torch import Tensor

from qkernels.ops import _foreach_fake_quant
from qkernels.ops import fake_quant as _fake_quant
from qkernels.ops import fake_quant_dynamic as _dynamic
from qkernels.ops import quant_range as _range
from qkernels.ops import quantize as _quantize
from qkernels.ops._foreach import Listed
from qkernels.ops._foreach_noise import (
    differential_noise,
    drop_in_noise,
    error_stats,
    uniform_noise,
)
from qkernels.ops.fake_quant_dynamic import FakeQuantized
from qkernels.ops.quant_range import QuantRange

__all__ = [
    "dequantize",
    "differential_noise",
    "drop_in_noise",
    "error_stats",
    "fake_quant",
    "fake_quant_dynamic",
    "observe_range",
    "qparams",
    "quant_range",
    "quantize",
    "uniform_noise",
]

T = TypeVar("T")
Each = Union[T, Sequence[T]]  # noqa: UP007  one value for all tensors, or one per tensor


def fake_quant(
    xs: Sequence[Tensor],
    scales: Each[Tensor | float | None] = None,
    zero_points: Each[Tensor | int | None] = None,
    *,
    bits: Each[int],
    axis: Each[int | None] = None,
    group_size: Each[int | None] = None,
    symmetric: Each[bool] = False,
    narrow_range: Each[bool] = False,
    method: Each[str] = "minmax",
    percentile: Each[float | None] = None,
    clip: Each[str] = "code",
    grad_scale: Each[float | None] = None,
    backend: str | None = None,
) -> list[Tensor]:
    """`qkernels.fake_quant` of every tensor of a list, with its gradients.

    Args:
        xs: tensors on one device.
        scales: one for all, or a list with one per tensor; None (for all or some): dynamic range.
        zero_points: likewise.
        backend: one for all.
        bits, axis, group_size, symmetric, narrow_range, method, percentile, clip, grad_scale: as in
            `qkernels.fake_quant`, each one value or a list with one per tensor.

    Returns:
        The quantized tensors. Where some tensors (or their scales) require grad and others do not,
        the latter save nothing and their results require none.

    Raises:
        TypeError, ValueError: as `qkernels.fake_quant`, with the tensor's place in the list; xs is
            no list, empty or on several devices; a list of another length than xs.
    """
    values = {
        "scale": scales,
        "zero_point": zero_points,
        "bits": bits,
        "axis": axis,
        "group_size": group_size,
        "symmetric": symmetric,
        "narrow_range": narrow_range,
        "method": method,
        "percentile": percentile,
        "clip": clip,
        "grad_scale": grad_scale,
    }
    listed = Listed("fake_quant", xs, values, backend)
    if listed.apart:
        return listed.singles(_fake_quant.fake_quant)

    def run(op: str, calls: list[Any], places: list[int]) -> list[Tensor]:
        run_op = partial(listed.run, op, places=places)
        if op == "fake_quant":
            return _foreach_fake_quant.run_plans(calls, listed.backend, run_op)
        return [y for y, _, _ in _dynamic.run_dynamic(calls, listed.backend, run_op)]

    return listed.run_by_op(listed.each_prepared(_foreach_fake_quant.list_plan), run)


def fake_quant_dynamic(
    xs: Sequence[Tensor],
    *,
    bits: Each[int],
    axis: Each[int | None] = None,
    group_size: Each[int | None] = None,
    symmetric: Each[bool] = False,
    narrow_range: Each[bool] = False,
    method: Each[str] = "minmax",
    percentile: Each[float | None] = None,
    clip: Each[str] = "code",
    backend: str | None = None,
) -> list[FakeQuantized]:
    """`qkernels.fake_quant_dynamic` of every tensor of a list, with its gradient.

    Arguments and errors as in `foreach.fake_quant`; results as `qkernels.fake_quant_dynamic`.
    """
    values = {
        "bits": bits,
        "axis": axis,
        "group_size": group_size,
        "symmetric": symmetric,
        "narrow_range": narrow_range,
        "method": method,
        "percentile": percentile,
        "clip": clip,
    }
    listed = Listed("fake_quant_dynamic", xs, values, backend)
    if listed.apart:
        return listed.singles(_dynamic.fake_quant_dynamic)
    op = "fake_quant_dynamic"
    calls = listed.each_prepared(partial(_dynamic.dynamic_args, op))
    found = _dynamic.run_dynamic(calls, listed.backend, partial(listed.run, op))
    return [FakeQuantized(y, _apart(scale), _apart(zp)) for y, scale, zp in found]


def _apart(x: Tensor) -> Tensor:
    """x in memory of its own: part of a list's piece would keep all of it, write all of it to a
    file, and be one tensor with the others to autograd, stale when one of them is written to."""
    return x.clone() if x.untyped_storage().nbytes() > x.nbytes else x


def quant_range(
    xs: Sequence[Tensor],
    *,
    bits: Each[int],
    axis: Each[int | None] = None,
    group_size: Each[int | None] = None,
    symmetric: Each[bool] = False,
    narrow_range: Each[bool] = False,
    method: Each[str] = "minmax",
    percentile: Each[float | None] = None,
    backend: str | None = None,
) -> list[QuantRange]:
    """`qkernels.quant_range` of every tensor of a list.

    Arguments and errors as in `foreach.fake_quant`; results as `qkernels.quant_range`.
    """
    found = observe_range(
        xs,
        bits=bits,
        axis=axis,
        group_size=group_size,
        symmetric=symmetric,
        narrow_range=narrow_range,
        method=method,
        percentile=percentile,
        backend=backend,
    )
    return [QuantRange(scale, zero_point) for scale, zero_point, _ in found]


def observe_range(
    xs: Sequence[Tensor],
    *,
    bits: Each[int],
    axis: Each[int | None] = None,
    group_size: Each[int | None] = None,
    symmetric: Each[bool] = False,
    narrow_range: Each[bool] = False,
    method: Each[str] = "minmax",
    percentile: Each[float | None] = None,
    backend: str | None = None,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """`qkernels.observe_range` of every tensor of a list: (scale, zero_point, range) of each.

    Arguments and errors as in `foreach.fake_quant`.
    """
    values = {
        "bits": bits,
        "axis": axis,
        "group_size": group_size,
        "symmetric": symmetric,
        "narrow_range": narrow_range,
        "method": method,
        "percentile": percentile,
    }
    listed = Listed("quant_range", xs, values, backend)
    return _run(listed, "quant_range", _range.observe_range, _range.quant_range_args)


def qparams(
    ranges: Sequence[Tensor],
    *,
    bits: Each[int],
    symmetric: Each[bool] = False,
    narrow_range: Each[bool] = False,
    backend: str | None = None,
) -> list[QuantRange]:
    """`qkernels.qparams` of every range of a list.

    Arguments and errors as in `foreach.fake_quant`; results as `qkernels.qparams`.
    """
    values = {"bits": bits, "symmetric": symmetric, "narrow_range": narrow_range}
    listed = Listed("qparams", ranges, values, backend, what="ranges")
    found = _run(listed, "qparams", _range.qparams, _range.qparams_args)
    return [QuantRange(*pair) for pair in found]


def quantize(
    xs: Sequence[Tensor],
    scales: Each[Tensor | float],
    zero_points: Each[Tensor | int | None] = None,
    *,
    bits: Each[int],
    axis: Each[int | None] = None,
    group_size: Each[int | None] = None,
    symmetric: Each[bool] = False,
    narrow_range: Each[bool] = False,
    packed: Each[bool] = False,
    backend: str | None = None,
) -> list[Tensor]:
    """`qkernels.quantize` of every tensor of a list.

    Arguments and errors as in `foreach.fake_quant`; results as `qkernels.quantize`.
    """
    values = {
        "scale": scales,
        "zero_point": zero_points,
        "bits": bits,
        "axis": axis,
        "group_size": group_size,
        "symmetric": symmetric,
        "narrow_range": narrow_range,
        "packed": packed,
    }
    listed = Listed("quantize", xs, values, backend)
    return _run(listed, "quantize", _quantize.quantize, _quantize.quantize_args)


def dequantize(
    codes: Sequence[Tensor],
    scales: Each[Tensor | float],
    zero_points: Each[Tensor | int | None] = None,
    *,
    bits: Each[int],
    axis: Each[int | None] = None,
    group_size: Each[int | None] = None,
    symmetric: Each[bool] = False,
    packed: Each[bool] = False,
    size: Each[int | None] = None,
    dtype: Each[torch.dtype | None] = None,
    backend: str | None = None,
) -> list[Tensor]:
    """`qkernels.dequantize` of every tensor of codes of a list.

    Arguments and errors as in `foreach.fake_quant`; results as `qkernels.dequantize`.
    """
    values = {
        "scale": scales,
        "zero_point": zero_points,
        "bits": bits,
        "axis": axis,
        "group_size": group_size,
        "symmetric": symmetric,
        "packed": packed,
        "size": size,
        "dtype": dtype,
    }
    listed = Listed("dequantize", codes, values, backend, what="codes")
    return _run(listed, "dequantize", _quantize.dequantize, _quantize.dequantize_args)


def _run(
    listed: Listed, op: str, single: Callable[..., Any], arguments: Callable[..., tuple[Any, ...]]
) -> list[Any]:
    """An op without gradient, given as its function of one tensor and what makes that function's
    arguments those of the schema."""
    return listed.singles(single) if listed.apart else listed.run(op, listed.calls(op, arguments))
