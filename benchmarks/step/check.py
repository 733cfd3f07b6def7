"""What must hold before steps are timed: the contenders do the same work."""

from __future__ import annotations

import math
from typing import Any

import torch
from compare import assert_codes
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantizeBase

import qkernels
from qkernels.nn import FakeQuantize

from .rivals import code_range
from .rows import make_step


def assert_backends_agree(row: str, model: nn.Module, x: Tensor, labels: Tensor) -> None:
    """The row that the table chooses and the reference give the same loss for a step."""
    got = make_step(row, model, x, labels)()
    with qkernels.use_backend("reference"):
        want = make_step(row, model, x, labels)()
    # min-max is exact whatever the order; the sums of LSQ's first scale, of DNQ's statistics and on
    # a GPU those of a convolution may differ in the last bit, and then codes next to a tie do. W4A4
    # moves this loss by some 1 % from the float one
    exact = x.device.type == "cpu" and row == "ours STE"
    tolerance = 0.0 if exact else 1e-3
    assert math.isclose(got, want, rel_tol=tolerance), f"loss {got.item()}, reference {want.item()}"


def assert_same_codes(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    """In each layer, given the input that ours has there, their quantizer has ours' scale and, with
    the scale it has, the codes that ours gives."""
    rivals = dict(theirs.named_modules())

    def compare(name: str) -> Any:
        def hook(module: FakeQuantize, args: tuple[Tensor], y: Tensor) -> None:
            with torch.no_grad():
                assert_same_quantizer(module, rivals[name], args[0])

        return hook

    handles = [
        module.register_forward_hook(compare(name))
        for name, module in ours.named_modules()
        if isinstance(module, FakeQuantize)
    ]
    with torch.no_grad():
        ours.train()(x)
    for handle in handles:
        handle.remove()


def assert_same_quantizer(own: FakeQuantize, rival: nn.Module, x: Tensor) -> None:
    """Of one quantizer: all codes but one in 10 000 (at least 2), which are next to a tie: others
    round 1 / scale otherwise, or add the zero point before they round."""
    spec = own.spec
    scale, zero_point = own_params(own, x)
    other = rival(x)
    if isinstance(rival, FakeQuantizeBase):
        theirs = rival.scale.reshape(scale.shape)
        want = torch_ao_scale(x, own).reshape(scale.shape) if spec.per_channel else scale
        torch.testing.assert_close(theirs, want, rtol=1e-5, atol=0.0)
        scale, zero_point = theirs, rival.zero_point.reshape(scale.shape)
    options = {"bits": spec.bits, "axis": spec.axis, "symmetric": spec.symmetric}
    y = qkernels.fake_quant(x, scale.flatten().squeeze(), zero_point.flatten().squeeze(), **options)
    codes, off = ((t / scale).round() + zero_point for t in (y, other))
    assert_codes(off, codes, x / scale, most=max(2, x.numel() // 10_000))


def own_params(module: FakeQuantize, x: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, zero point) that ours used for x, shaped to broadcast with it."""
    spec = module.spec
    if spec.dynamic:
        options = {"bits": spec.bits, "axis": spec.axis, "symmetric": spec.symmetric}
        scale, zero_point = qkernels.quant_range(x, **options)
    else:
        scale, zero_point = module.qparams()
    shape = (-1,) + (1,) * (x.dim() - 1) if spec.per_channel else ()
    return scale.reshape(shape), zero_point.reshape(shape)


def torch_ao_scale(weight: Tensor, own: FakeQuantize) -> Tensor:
    """[channels]: the fused module's symmetric scale. It differs from ours, max|w| over half the
    codes: max(-min w / -qmin, max w / qmax), and for a channel of one sign its range over the
    codes."""
    qmin, qmax = code_range(own.spec)
    lo, hi = weight.flatten(1).amin(1).clamp(max=0), weight.flatten(1).amax(1).clamp(min=0)
    both = (lo < 0) & (hi > 0)
    return torch.where(both, torch.maximum(lo / qmin, hi / qmax), (hi - lo) / (qmax - qmin))
