"""PactFakeQuantize: a range whose width is learned from what it clips (PACT)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qkernels import numeric
from qkernels.nn.fake_quantize import FakeQuantize
from qkernels.ops.fake_quant import fake_quant
from qkernels.ops.quant_range import qparams


class PactFakeQuantize(FakeQuantize):
    """Clips at a learned alpha, then quantizes the range that is left (PACT, Choi et al. 2018,
    "PACT: Parameterized Clipping Activation for Quantized Neural Networks", arXiv 1805.06085).

        y = clip(x, 0, alpha);  out = rint(y n / alpha) alpha / n,  n = 2^bits - 1

    The gradient passes to x where it is not clipped, and to alpha, with factor 1, where x >= alpha.
    It is a plain sum over the elements, without LSQ's factor, as in the paper; the paper adds the
    square of alpha to the loss, which is weight decay on this parameter.

    Our choices, where the paper is silent:
        inputs below 0 (not behind a ReLU): the zero point z is that of the first batch's range and
            stays, as with LSQ here; alpha is then the width of the range, from -z alpha / n to
            (n - z) alpha / n, and its gradient the factor -z / n below and (n - z) / n above. For
            x >= 0, z is 0 and all is as in the paper;
        alpha starts as the width of the first batch's range (of the mean range, in `calibrate`);
        alpha in use is |alpha| + n times the smallest normal number, so that it stays positive.

    State: parameter `alpha`, [1]; buffer `zero_point`, [], int32; buffer `initialized`. All else is
    `FakeQuantize`'s. The clip and what follows it are computed in fp32 (fp64 for fp64 x): rounded
    to x's dtype, alpha could lie outside the codes.
    """

    kind = "pact"
    alpha: nn.Parameter
    zero_point: Tensor

    def _make_state(self, shape: tuple[int, ...]) -> None:
        spec = self.spec
        self._qmin, self._qmax = numeric.code_range(
            "PactFakeQuantize", spec.bits, spec.symmetric, spec.narrow_range
        )
        self.register_parameter("alpha", nn.Parameter(torch.ones(1)))
        self.register_parameter("scale", None)
        self.register_parameter("offset", None)
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))
        self.register_buffer("range", None)
        self.register_buffer("initialized", torch.zeros((), dtype=torch.uint8))

    def _params(self, bounds: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scale = self.alpha.abs() / (self._qmax - self._qmin)
        return scale + numeric.smallest_scale(scale.dtype), self.zero_point

    def _set(self, keep: Tensor, measured: Tensor) -> None:
        scale, zero_point = qparams(measured[1:], **self._of_qparams)
        width = scale * (self._qmax - self._qmin)
        self.alpha.copy_(torch.where(keep, self.alpha, width))
        self.zero_point.copy_(torch.where(keep, self.zero_point, zero_point))

    def _quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        scale = scale.reshape(())
        # the gradient of alpha is that of the bounds; inside, the quantizer is straight-through
        lo = (self._qmin - self.zero_point) * scale
        hi = (self._qmax - self.zero_point) * scale
        wide = x.to(numeric.compute_dtype(x.dtype))
        # not torch.clamp, which halves the gradient of an element on a bound: all zeros of a ReLU
        clipped = torch.where(wide < lo, lo, torch.where(wide >= hi, hi, wide))
        return fake_quant(clipped, scale.detach(), zero_point, **self._of_quant).to(x.dtype)
