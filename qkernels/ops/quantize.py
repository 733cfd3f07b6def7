"""quantize and dequantize: integer codes, optionally packed, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkernels import _registry, numeric
from qkernels.ops import _check
from qkernels.ops._library import call, define

PACKABLE = (1, 2, 4)


def check_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    pack: int,
) -> None:
    """Raise on arguments that no row could run."""
    _check.check_tensor("quantize", "x", x)
    _check.check_granularity("quantize", x.shape, axis, group_size)
    _check.check_params("quantize", x, scale, zero_point, axis, group_size)
    check_pack("quantize", pack, x)


def check_pack(op: str, pack: int, codes: Tensor) -> None:
    """pack is 0 or a number of bits that divides 8; only then is a last dim needed."""
    if pack and pack not in PACKABLE:
        raise ValueError(f"{op}: packed must be False unless bits is 1, 2 or 4, got bits={pack}")
    if pack and codes.dim() == 0:
        raise ValueError(f"{op}: packed must be False for a 0-dim tensor, got True")


def _fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    pack: int,
) -> Tensor:
    if pack:
        return x.new_empty(numeric.packed_shape(x.shape, pack), dtype=torch.uint8)
    return torch.empty_like(x, dtype=numeric.code_dtype(qmin, qmax))


def check_dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    axis: int | None,
    group_size: int | None,
    pack: int,
    size: int,
    dtype: torch.dtype,
) -> None:
    """Raise on arguments that no row could run."""
    if codes.dtype not in (torch.int8, torch.uint8, torch.int16, torch.int32):
        raise TypeError(f"dequantize: codes must be int8, uint8, int16 or int32, got {codes.dtype}")
    if dtype not in numeric.FLOAT_DTYPES:
        raise TypeError(
            f"dequantize: dtype must be float32, float64, float16 or bfloat16, got {dtype}"
        )
    check_pack("dequantize", pack, codes)
    shape = codes.shape
    if pack:
        if codes.dtype is not torch.uint8:
            raise TypeError(f"dequantize: packed codes must be uint8, got {codes.dtype}")
        if numeric.packed_shape(torch.Size((size,)), pack) != [shape[-1]]:
            low, high = (shape[-1] - 1) * 8 // pack + 1, shape[-1] * 8 // pack
            raise ValueError(f"dequantize: size must be in {low}..{high}, got {size}")
        shape = torch.Size((*shape[:-1], size))
    _check.check_granularity("dequantize", shape, axis, group_size)
    like = _check.Like(dtype, codes.device, codes.is_cpu, shape)
    _check.check_params("dequantize", like, scale, zero_point, axis, group_size)


def _fake_dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    axis: int | None,
    group_size: int | None,
    pack: int,
    size: int,
    dtype: torch.dtype,
) -> Tensor:
    if pack:
        return codes.new_empty([*codes.shape[:-1], size], dtype=dtype)
    return torch.empty_like(codes, dtype=dtype)


define(
    "quantize",
    "(Tensor x, Tensor scale, Tensor? zero_point, int qmin, int qmax, int? axis, int? group_size, "
    "int pack, *, str backend='') -> Tensor",
    check_quantize,
    _fake_quantize,
)
define(
    "dequantize",
    "(Tensor codes, Tensor scale, Tensor? zero_point, int qmin, int? axis, int? group_size, "
    "int pack, int size, ScalarType dtype, *, str backend='') -> Tensor",
    check_dequantize,
    _fake_dequantize,
)


def detached(zero_point: Tensor | None) -> Tensor | None:
    """Codes carry no gradient, whatever mode the call is in."""
    return None if zero_point is None else zero_point.detach()


def quantize_args(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int | None,
    bits: int,
    axis: int | None,
    group_size: int | None,
    symmetric: bool,
    narrow_range: bool,
    packed: bool,
) -> tuple[Any, ...]:
    """The schema's arguments."""
    _check.check_tensor("quantize", "x", x)
    qmin, qmax = numeric.code_range("quantize", bits, symmetric, narrow_range)
    axis = _check.normal_axis("quantize", x, axis, group_size)
    scale = _check.as_scale("quantize", x, scale).detach()
    zero_point = detached(_check.as_zero_point("quantize", x, zero_point))
    return x.detach(), scale, zero_point, qmin, qmax, axis, group_size, bits if packed else 0


def dequantize_args(
    codes: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int | None,
    bits: int,
    axis: int | None,
    group_size: int | None,
    symmetric: bool,
    packed: bool,
    size: int | None,
    dtype: torch.dtype | None,
) -> tuple[Any, ...]:
    """The schema's arguments."""
    if not isinstance(codes, Tensor):
        raise TypeError(f"dequantize: codes must be a Tensor, got {type(codes).__name__}")
    qmin, _ = numeric.code_range("dequantize", bits, symmetric, False)
    # the groups of packed codes are counted in codes, not in bytes: checked with the size below
    axis = _check.normal_axis("dequantize", codes, axis, None if packed else group_size)
    if dtype is None:
        dtype = torch.float32
        if isinstance(scale, Tensor) and scale.dtype in numeric.FLOAT_DTYPES:
            dtype = scale.dtype
    if dtype not in numeric.FLOAT_DTYPES:
        raise TypeError(
            f"dequantize: dtype must be float32, float64, float16 or bfloat16, got {dtype}"
        )
    like = _check.Like(dtype, codes.device, codes.is_cpu, codes.shape)
    scale = _check.as_scale("dequantize", like, scale).detach()
    zero_point = detached(_check.as_zero_point("dequantize", like, zero_point))
    pack = bits if packed else 0
    if pack and size is None and codes.dim():
        size = codes.shape[-1] * 8 // bits
    if size is not None and type(size) is not int:
        raise TypeError(f"dequantize: size must be an int or None, got {size!r}")
    if size is not None and size < 0:
        raise ValueError(f"dequantize: size must be at least 0, got {size}")
    return codes, scale, zero_point, qmin, axis, group_size, pack, size or 0, dtype


def quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int | None = None,
    *,
    bits: int,
    axis: int | None = None,
    group_size: int | None = None,
    symmetric: bool = False,
    narrow_range: bool = False,
    packed: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Integer codes of x: code = clamp(rint(x / scale) + zero_point, qmin, qmax).

    Args:
        x, scale, zero_point, bits, axis, group_size, symmetric, narrow_range, backend: as in
            `fake_quant`; no gradient.
        packed: for bits 1, 2 and 4: codes side by side in bytes, lowest bits first, in two's
            complement, along the last dim (each row padded to whole bytes).

    Returns:
        Codes with x's shape and strides in the narrowest of int8, uint8, int16, int32 that holds
        them; or uint8 of shape [..., ceil(n bits / 8)] if packed. NaN has no code: it gets the code
        of zero.

    Raises:
        TypeError, ValueError: as in `fake_quant`; packed with other bits or a 0-dim x.
    """
    args = quantize_args(
        x, scale, zero_point, bits, axis, group_size, symmetric, narrow_range, packed
    )
    row = _registry.check_backend(backend, "quantize: backend")
    return call("quantize", row, *args)


def dequantize(
    codes: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int | None = None,
    *,
    bits: int,
    axis: int | None = None,
    group_size: int | None = None,
    symmetric: bool = False,
    packed: bool = False,
    size: int | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = (code - zero_point) * scale, the inverse of `quantize`: equal to `fake_quant` to the bit.

    No gradient.

    Args:
        codes: what `quantize` returned for the same bits, symmetric and packed.
        scale, zero_point, axis, group_size: as given to `quantize`; axis counts the dims of x.
        size: for packed codes: length of x's last dim; None: as many codes as the bytes hold.
        dtype: of the result; None: scale's dtype (float32 if scale is a number).
        backend: as in `fake_quant`.

    Raises:
        TypeError: dtype of codes, scale, zero_point or dtype.
        ValueError: the others, as in `fake_quant`; a size that does not fit the bytes.
    """
    args = dequantize_args(
        codes, scale, zero_point, bits, axis, group_size, symmetric, packed, size, dtype
    )
    row = _registry.check_backend(backend, "dequantize: backend")
    return call("dequantize", row, *args)
