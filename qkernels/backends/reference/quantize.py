"""Integer codes and back.

    code = clamp(rint(x / scale) + zp, qmin, qmax),  y = (code - zp) * scale

NaN and channels with an invalid scale have no code: they get the code of zero, clamp(zp). Packed
codes are the low `pack` bits of each code in two's complement, lowest bits first, along the last
dim, each row padded to whole bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels import numeric
from qkernels.backends.reference.common import from_channels, per_channel, to_channels
from qkernels.backends.reference.fake_quant import quantized, valid_params
from qkernels.ops._check import check_values


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    pack: int,
) -> Tensor:
    """-> codes in code_dtype(qmin, qmax) with x's strides, or packed bytes if pack is 1, 2 or 4."""
    check_values("quantize", scale, zero_point)
    v = quantized(to_channels(x, axis, group_size), scale, zero_point, qmin, qmax, "code")
    zp = torch.where(v.zero_point.abs() <= numeric.LARGEST_ZERO_POINT, v.zero_point, 0.0)
    code = torch.where(v.q.isnan(), zp.clamp(qmin, qmax), v.q + zp)
    dtype = numeric.code_dtype(qmin, qmax)
    code = from_channels(code, torch.empty_like(x, dtype=dtype), group_size)
    return pack_codes(code, pack) if pack else code


def dequantize(
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
    """-> (code - zp) * scale in dtype; size is the length of the last dim of packed codes."""
    check_values("dequantize", scale, zero_point)
    if pack:
        codes = unpack_codes(codes, pack, size, signed=qmin < 0)
    compute = numeric.compute_dtype(dtype)
    s = per_channel(scale, compute)
    zp = torch.zeros_like(s) if zero_point is None else per_channel(zero_point, compute).round()
    valid = valid_params(s, zp)
    # to_channels would round large codes to the compute dtype, and so does every row: 16 bits fit
    q = to_channels(codes.to(compute), axis, group_size) - zp
    y = q * torch.where(valid, s, torch.nan)
    return from_channels(y, torch.empty_like(codes, dtype=dtype), group_size)


def pack_codes(code: Tensor, pack: int) -> Tensor:
    """[..., n] integers -> [..., ceil(n pack / 8)] bytes."""
    per_byte = 8 // pack
    code = code.to(torch.int32).bitwise_and((1 << pack) - 1)
    pad = -code.shape[-1] % per_byte
    code = torch.nn.functional.pad(code, (0, pad)).unflatten(-1, (-1, per_byte))
    shifts = torch.arange(per_byte, dtype=torch.int32, device=code.device) * pack
    return (code << shifts).sum(-1).to(torch.uint8)


def unpack_codes(packed: Tensor, pack: int, size: int, signed: bool) -> Tensor:
    """[..., ceil(size pack / 8)] bytes -> [..., size] int32."""
    shifts = torch.arange(8 // pack, dtype=torch.int32, device=packed.device) * pack
    code = packed.to(torch.int32).unsqueeze(-1) >> shifts
    code = code.bitwise_and((1 << pack) - 1).flatten(-2)[..., :size]
    return (code - ((code >> (pack - 1)) << pack) if signed else code).clone(
        memory_format=torch.contiguous_format
    )
