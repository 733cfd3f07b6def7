"""What the native rows share: how calls are run, and arguments in the order of params.h."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qkernels import _native, numeric
from qkernels.ops._check import each_call

# What one call comes down to: the fields of its struct in csrc/params.h; the result; what those
# fields point to and the result does not hold; and, if the result is not done when the kernels are,
# what completes it.
Prepared = tuple[tuple[Any, ...], Any, Any, Callable[[], Any] | None]

# on the CPU whatever torch's default device is when this is imported
NOTHING = torch.empty(0, device="cpu")
NO_BYTES = torch.empty(0, dtype=torch.uint8, device="cpu")
METHOD_IDS = {name: i for i, name in enumerate(numeric.METHODS)}


def forms(
    op: str,
    prepare: Callable[..., Prepared],
    check: Callable[..., None] | None = None,
    outputs: Callable[[list[tuple[Any, ...]]], list[Any]] | None = None,
) -> tuple[Callable[..., Any], Callable[[list[tuple[Any, ...]]], list[Any]]]:
    """The two forms of an op: of one call's arguments, and of a list of them (on one device).

    Args:
        op: name in the compiled module.
        prepare: (target, *a call's arguments) -> Prepared.
        check: (*a call's arguments), raises if a given scale or zero point is invalid: called where
            the kernel found one, and on CUDA, where `check` itself decides whether to look.
        outputs: makes for every call of a list the `outputs` that `prepare` can be given: small
            ones side by side, for to take memory costs as much as the kernel of a small tensor.
    """

    # the list of one, written out: a small tensor feels every step
    def single(*args: Any) -> Any:
        target = lib, device, handle = _native.target(args[0])
        fields, result, _kept, finish = prepare(target, *args)
        bad = getattr(lib, op)(device, handle, [fields])
        if check is not None and (bad >= 0 or device >= 0):
            check(*args)
        return result if finish is None else finish()

    def many(calls: list[tuple[Any, ...]]) -> list[Any]:
        target = lib, device, handle = _native.target(calls[0][0])
        if outputs is None or device >= 0:  # CUDA's kernels want each aligned
            prepared = [prepare(target, *args) for args in calls]
        else:
            pairs = zip(calls, outputs(calls), strict=True)
            prepared = [prepare(target, *args, outputs=own) for args, own in pairs]
        bad = getattr(lib, op)(device, handle, [p[0] for p in prepared])
        if check is not None and (bad >= 0 or device >= 0):
            each_call(check, calls)  # names the first invalid one
        return [p[1] if p[3] is None else p[3]() for p in prepared]

    return single, many


def new_bytes(x: Tensor, size: int) -> Tensor:
    """Uninitialised bytes on x's device."""
    # a dtype asked for takes a third of the time of an allocation
    return NO_BYTES.new_empty(size) if x.is_cpu else x.new_empty(size, dtype=torch.uint8)


def pieces(sizes: list[int], dtype: torch.dtype) -> list[Tensor]:
    """Uninitialised 1-D tensors on the CPU, side by side in one piece of memory."""
    return list(NOTHING.new_empty(sum(sizes), dtype=dtype).split(sizes))


def flat_params(scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor | None, bool]:
    """(scale, zero point, whether int32) without gaps, as the kernels index them."""
    if zero_point is None:
        return scale.contiguous(), None, False
    return scale.contiguous(), zero_point.contiguous(), zero_point.dtype is torch.int32


def range_fields(
    x: Tensor,
    layout: numeric.Layout,
    qmin: int,
    qmax: int,
    symmetric: bool,
    method: str,
    percentile: float,
) -> tuple[int | float | bool, ...]:
    """The fields of QuantRangeParams that are not memory."""
    (lo_k, lo_w), (hi_k, hi_w) = (0, 0.0), (0, 0.0)
    if method == "percentile":
        outer, _, inner = layout
        (lo_k, lo_w), (hi_k, hi_w) = numeric.percentile_ranks(percentile, max(outer * inner, 1))
    dtype = _native.DTYPES[x.dtype]
    return dtype, *layout, qmin, qmax, symmetric, METHOD_IDS[method], lo_k, lo_w, hi_k, hi_w


def workspace(target: _native.Target, x: Tensor, size_of: str, *args: int) -> Tensor:
    """Scratch memory of a kernel over x, of the bytes that `size_of` in the compiled module says;
    empty on the CPU, whose kernels take their own."""
    lib, device, _ = target
    if device < 0:
        return NOTHING
    size = getattr(lib, size_of)(device, _native.DTYPES[x.dtype], *args)
    return x.new_empty((size + 7) // 8, dtype=torch.float64)  # holds aligned doubles


def range_workspace(
    target: _native.Target, x: Tensor, layout: numeric.Layout, method: str
) -> Tensor:
    """Scratch memory of the range kernels."""
    return workspace(target, x, "quant_range_workspace", *layout, METHOD_IDS[method])


def params_like(x: Tensor, axis: int | None, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Uninitialised (scale, zero point) for a tensor."""
    shape = numeric.params_shape(x.shape, axis, group_size)
    scale = x.new_empty(shape, dtype=numeric.compute_dtype(x.dtype))
    return scale, x.new_empty(shape, dtype=torch.int32)


def with_strides_of(x: Tensor, out: Tensor) -> Tensor:
    """A copy of the row-major out with the strides that x asks for."""
    return torch.empty_like(x, dtype=out.dtype).copy_(out)
