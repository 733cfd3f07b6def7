"""DoReFa's weights, normalised by tanh, and its activations, clipped to [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels import numeric
from qkernels.nn.fake_quantize import FakeQuantize
from qkernels.nn.quant_spec import QuantSpec
from qkernels.ops.fake_quant import fake_quant
from qkernels.ops.quant_range import QuantRange, observe_range


class DorefaWeightFakeQuantize(FakeQuantize):
    """tanh-normalised weights (DoReFa-Net, Zhou et al. 2016, arXiv 1606.06160).

        u = tanh(w) / (2 m) + 1/2,  m = max |tanh(w)| over the tensor;  v = 2 quantize(u) - 1

    with quantize(u) = rint(u n) / n, n = 2^bits - 1, straight-through; tanh and the maximum are
    differentiated. The grid, -1 .. 1 in n steps, has no zero.

    Our choice: the output is m v, with m not differentiated here. v alone, as in the paper, is made
    for training from scratch: it blows the weights of a float model up to [-1, 1]. A BatchNorm
    behind the layer takes that back, a last linear layer has none. m v is near tanh(w), hence near
    w while |w| is well below 1, and with a BatchNorm behind it the network is the paper's. At 1 bit
    the factor is mean |w|, so that the output is the paper's sign(w) mean |w|; its gradient is by
    the formula above, and not 1.

    Nothing is kept: the output is a function of w, in training as in evaluation. There are no
    `qparams`: 0 lies half way between two codes, and no integer zero point says that. fp16 and bf16
    weights are computed in fp32.
    """

    kind = "dorefa_weight"

    def __init__(self, spec: QuantSpec, channels: int = 1) -> None:
        super().__init__(spec, channels)
        self._unit_scale = 1.0 / ((1 << spec.bits) - 1)

    def _quantize_dynamic(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            return x
        w = x.to(numeric.compute_dtype(x.dtype))
        t = w.tanh()
        largest = t.abs().amax().clamp_min(numeric.smallest_scale(t.dtype))
        y = fake_quant(t / (2 * largest) + 0.5, self._unit_scale, bits=self.spec.bits)
        size = w.abs().mean() if self.spec.bits == 1 else largest
        return ((2 * y - 1) * size.detach()).to(x.dtype)

    def qparams(self) -> QuantRange:
        """Raises ValueError: see the class."""
        raise ValueError(f"{self._name}: kind must be one with a zero point, got {self.kind}")


class DorefaActivationFakeQuantize(FakeQuantize):
    """Activations clipped to [0, 1] (DoReFa-Net, Zhou et al. 2016, arXiv 1606.06160).

        out = rint(clip(x, 0, 1) n) / n,  n = 2^bits - 1

    With clip="value", as `QConfig.dorefa` has it, the gradient passes where 0 <= x <= 1.

    Our choice for inputs below 0, of which the paper has none: where the first batch (in
    `calibrate`, any batch) has one, the range is [-1, 1], as the library quantizes that: one of the
    codes is 0.

    State: buffer `range`, [2], which starts as [0, 1] and stays so if the first batch holds NaN or
    inf; buffer `initialized`. All else is `FakeQuantize`'s.
    """

    kind = "dorefa_activation"

    def _make_state(self, shape: tuple[int, ...]) -> None:
        super()._make_state(shape)
        self.register_buffer("range", torch.tensor([0.0, 1.0]))

    def reset(self) -> None:
        super().reset()
        assert self.range is not None, "made in _make_state"
        self.range[1] = 1.0

    @property
    def _union(self) -> bool:
        return True

    @torch.no_grad()
    def measure(self, x: Tensor) -> Tensor:
        """[2], the bounds: [0, 1] or [-1, 1]; those of x if it holds NaN or inf."""
        bounds = observe_range(x, **self._of_range)[2]
        lowest = -(bounds[0] < 0).to(bounds.dtype)
        fixed = torch.stack((lowest, torch.ones_like(lowest)))
        return torch.where(bounds.isfinite().all(), fixed, bounds)
