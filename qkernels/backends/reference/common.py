"""What the reference rows share: the [outer, channels, inner] view, and bits in bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels import numeric


def to_channels(x: Tensor, axis: int | None, group_size: int | None) -> Tensor:
    """x in the compute dtype and in memory order as [outer, channels, inner]."""
    x, order, layout = numeric.plan(x, axis, group_size)
    flat = x.permute(order) if order else x
    return flat.to(numeric.compute_dtype(x.dtype)).reshape(layout)


def from_channels(y: Tensor, like: Tensor, group_size: int | None) -> Tensor:
    """[outer, channels, inner] back to the shape, strides and dtype of the dense form of like."""
    out = torch.empty_like(like)
    order = [] if group_size is not None else numeric.memory_order(out)
    if order:
        shape = [like.shape[d] for d in order]
        return out.copy_(y.reshape(shape).permute(numeric.inverse(order)))
    return out.copy_(y.reshape(like.shape))


def per_channel(p: Tensor, dtype: torch.dtype) -> Tensor:
    """scale or zero point as [channels, 1], to broadcast over [outer, channels, inner]."""
    return p.to(dtype).reshape(-1, 1)


def pack_bits(bits: Tensor) -> Tensor:
    """Booleans, in memory order, as bytes: element i is bit i mod 8 of byte i / 8."""
    flat = bits.reshape(-1)
    size = numeric.mask_bytes(flat.numel())
    padded = torch.zeros(size * 8, dtype=torch.int32, device=flat.device)
    padded[: flat.numel()] = flat.to(torch.int32)
    weights = 1 << torch.arange(8, dtype=torch.int32, device=flat.device)
    return (padded.reshape(size, 8) * weights).sum(1).to(torch.uint8)


def unpack_bits(mask: Tensor, numel: int) -> Tensor:
    """The inverse of pack_bits."""
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (mask.reshape(-1, 1) >> shifts).bitwise_and(1).reshape(-1)[:numel].bool()
