"""What the bars share: fp32, 512 x 4608, per channel, 8 bits."""

from __future__ import annotations

import torch
from compare import assert_codes, assert_same
from torch import Tensor

import qkernels

SHAPE = (512, 4608)
QMIN, QMAX = 0, 255
BYTES = SHAPE[0] * SHAPE[1] * 4


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, scale, zero point, cotangent)."""
    x = torch.randn(SHAPE)
    scale, zp = qkernels.quant_range(x, bits=8, axis=0)
    return x, scale, zp, torch.randn(SHAPE)


def assert_parity(x: Tensor, scale: Tensor, zp: Tensor, theirs: Tensor) -> None:
    """Nothing is timed unless ours equals the reference, and theirs ours but for ties."""
    ours = qkernels.fake_quant(x, scale, zp, bits=8, axis=0)
    assert_same(ours, qkernels.fake_quant(x, scale, zp, bits=8, axis=0, backend="reference"))
    column = scale[:, None]
    codes, other = (ours / column).round(), (theirs / column).round()
    assert_codes(other, codes, x / column, most=x.numel() // 10_000)
