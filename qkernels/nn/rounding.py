"""SoftRounding: a weight on its grid whose rounding, up or down, is learned (AdaRound)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qkernels import numeric
from qkernels.backends.reference.common import per_channel
from qkernels.nn.quant_spec import QuantSpec
from qkernels.ops import _check
from qkernels.ops.quantize import dequantize

# sigmoid(V) is stretched to (GAMMA, ZETA) and clipped, so that h reaches 0 and 1 at a finite V
ZETA, GAMMA = 1.1, -0.1


class SoftRounding(nn.Module):
    """The rounding of one weight as something to learn (AdaRound, Nagel et al. 2020, "Up or Down?
    Adaptive Rounding for Post-Training Quantization", arXiv 2004.10568).

        code = clamp(floor(w / scale) + h(V) + zero_point, qmin, qmax)
        w~   = (code - zero_point) * scale
        h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1),     zeta = 1.1, gamma = -0.1

    V, the parameter `v` of w's shape, starts where h is the fractional part of w / scale, so that
    w~ is w where no code is clipped. Training V on a loss of the layer's output plus
    lambda * `regularizer` drives each h to 0 (down) or 1 (up). Whatever V is, w~ stays between the
    two neighbours of w on the grid.

    State, besides `v`: the buffers `base`, floor(w / scale) as [outer, channels, inner] in
    row-major order; `scale` and `zero_point`.

    Args:
        weight: float32, float64, float16 or bfloat16; finite. V and the soft weight's arithmetic
            are fp32 (fp64 for fp64). It is read once and not changed.
        scale: 0-dim, or 1-D with one entry per channel or group, as in `qkernels.fake_quant`.
        zero_point: like scale, integer; None: 0.
        spec: bits, symmetric, narrow_range, axis and group_size of the grid; the rest is not used.
            The axis is that of the weight as it lies: of a layer from `prepare` take
            `weight_fake_quant.spec`, in which a ConvTranspose's axis is translated.

    Raises:
        TypeError, ValueError: as `qkernels.fake_quant`; a weight that is not finite; a spec of a
            kind that is not plain when evaluated (PACT's and DoReFa's).
    """

    base: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def __init__(
        self, weight: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec
    ) -> None:
        super().__init__()
        op = "SoftRounding"
        if not isinstance(spec, QuantSpec):
            raise TypeError(f"{op}: spec must be a QuantSpec, got {spec!r}")
        spec.require_plain(op, "spec")
        _check.check_tensor(op, "weight", weight)
        weight = weight.detach()
        axis = _check.normal_axis(op, weight, spec.axis, spec.group_size)
        scale = _check.as_scale(op, weight, scale).detach().clone()
        zero_point = _check.as_zero_point(op, weight, zero_point)
        _check.check_entries(op, weight, scale, zero_point, axis, spec.group_size)
        _check.check_values(op, scale, zero_point)
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{op}: weight must be finite, got NaN or inf")
        self.spec, self.axis, self.dtype = spec, axis, weight.dtype
        self.register_buffer("scale", scale)
        # a zero point that was given as a float is rounded as the ops round it
        codes = None if zero_point is None else zero_point.detach().round().to(torch.int32)
        self.register_buffer("zero_point", codes)
        compute = numeric.compute_dtype(weight.dtype)
        layout = numeric.layout_of(weight.shape, [], axis, spec.group_size)
        lowest, highest = self._bounds()
        ratio = weight.to(compute).reshape(layout) * (1.0 / per_channel(scale, compute))
        # one step beyond the grid is clipped whatever h is, and keeps huge ratios finite
        ratio = torch.minimum(torch.maximum(ratio, lowest - 1), highest + 1)
        self.register_buffer("base", ratio.floor())
        # the inverse of h: logit((fraction - gamma) / (zeta - gamma))
        stretched = (ratio - self.base - GAMMA) / (ZETA - GAMMA)
        self.v = nn.Parameter(torch.logit(stretched).reshape(weight.shape))

    def _bounds(self) -> tuple[Tensor, Tensor]:
        """Of code - zero_point: (qmin - zero_point, qmax - zero_point), each [channels, 1]."""
        spec = self.spec
        lo, hi = numeric.code_range("SoftRounding", spec.bits, spec.symmetric, spec.narrow_range)
        compute = self.scale.dtype
        zeros = torch.zeros_like(self.scale) if self.zero_point is None else self.zero_point
        zero_point = per_channel(zeros, compute)
        return lo - zero_point, hi - zero_point

    def h(self) -> Tensor:
        """What is added to the floor, in [0, 1]; of the weight's shape."""
        return (torch.sigmoid(self.v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def _clipped(self, step: Tensor) -> Tensor:
        """code - zero_point as [outer, channels, inner], for what is added to the floor."""
        lowest, highest = self._bounds()
        codes = self.base + step.reshape(self.base.shape)
        return torch.minimum(torch.maximum(codes, lowest), highest)

    def forward(self) -> Tensor:
        """The soft weight, with gradients to V; the weight's shape (row-major) and dtype."""
        soft = self._clipped(self.h()) * per_channel(self.scale, self.scale.dtype)
        return soft.reshape(self.v.shape).to(self.dtype)

    @torch.no_grad()
    def hard(self) -> Tensor:
        """The weight on the grid, up where h >= 0.5; row-major, no gradient.

        `qkernels.fake_quant` with the same scale gives back the same bits (fp16 and bf16, which
        hold the product code * scale rounded: up to 8 bits).
        """
        spec = self.spec
        codes = self._clipped((self.h() >= 0.5).to(self.base.dtype))
        if self.zero_point is not None:
            codes = codes + per_channel(self.zero_point, codes.dtype)
        lo, hi = numeric.code_range("SoftRounding", spec.bits, spec.symmetric, spec.narrow_range)
        return dequantize(
            codes.reshape(self.v.shape).to(numeric.code_dtype(lo, hi)),
            self.scale,
            self.zero_point,
            bits=spec.bits,
            axis=self.axis,
            group_size=spec.group_size,
            symmetric=spec.symmetric,
            dtype=self.dtype,
        )

    def regularizer(self, beta: float) -> Tensor:
        """sum over all elements of 1 - |2 h(V) - 1| ** beta: 0 where every h is 0 or 1.

        A large beta leaves h free but near 0 and 1; annealed to 2, it pushes all of them there.
        """
        return (1 - (2 * self.h() - 1).abs().pow(beta)).sum()
