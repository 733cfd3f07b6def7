"""Fake quantization of a random share of the elements: Quant-Noise and QDrop."""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels.nn.calls import Calls
from qkernels.nn.fake_quantize import FakeQuantize
from qkernels.nn.quant_spec import QuantSpec
from qkernels.noise_source import Noise
from qkernels.ops.noise import drop_in_noise


class PartialFakeQuantize(FakeQuantize):
    """What the two have in common: in training each element is quantized with probability spec.p,
    in evaluation all are.

    The mask is a function of the seed and the step of `noise`, of `label` and of the element's
    place, so that a run that goes on draws what it would have drawn: it is drawn at
    `noise.at(label, kind=spec.kind, per_rank=per_rank)`. The caller moves `noise` once per
    optimizer step.

    Attributes:
        noise: the seed and step of the run; `prepare` sets it. In a deep copy or an unpickled
            model it is a copy too.
        per_rank: True: each rank has a mask of its own, and each call of a step (inputs). False:
            one mask for all ranks and all calls of a step (weights, our choice for both).
        mask_enabled: False quantizes all elements in training mode too.
    """

    def __init__(self, spec: QuantSpec, channels: int = 1) -> None:
        super().__init__(spec, channels)
        self.noise: Noise | None = None
        self.per_rank = False
        self.mask_enabled = True
        self.calls = Calls()

    def forward(self, x: Tensor) -> Tensor:
        """As `FakeQuantize.forward`; RuntimeError also if training has no noise to draw from."""
        y = super().forward(x)
        masked = self.training and self.mask_enabled and self.spec.p < 1.0
        if not masked or self._collecting or not self.fake_quant_enabled:
            return y
        return self._mixed(x, y, self.mask(x))

    @torch.no_grad()
    def mask(self, x: Tensor) -> Tensor:
        """Which elements of x this call quantizes: bool, of x's shape."""
        if self.noise is None:
            raise RuntimeError(
                f"{self._name}: noise must be a Noise in training (prepare sets it), got None"
            )
        kind, per_rank = self.spec.kind, self.per_rank
        place = self.noise.at(self.label, kind=kind, per_rank=per_rank, device=x.device)
        if per_rank:
            place["step"] = self.calls.step(self.noise, place["step"], x)
        # 1 in a share p of the elements
        return drop_in_noise(torch.zeros_like(x), (1.0, 0.0), p=self.spec.p, **place) > 0

    def _mixed(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        """x of any shape, y its quantized values."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.spec.p}"


class QuantNoiseFakeQuantize(PartialFakeQuantize):
    """Weights of which a random share carries the quantization error (Quant-Noise, Fan et al. 2020,
    "Training with Quantization Noise for Extreme Model Compression", arXiv 2004.07320).

        out = x + m (Q(x) - x),  m ~ Bernoulli(p) per element

    m (Q(x) - x) is not differentiated: the gradient of x is the identity, for clipped elements too.
    The paper draws blocks where it quantizes to codebooks; for scalar quantization, here, elements.
    """

    kind = "quant_noise"

    def _mixed(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return x + torch.where(mask, y - x, 0.0).detach()


class QDropFakeQuantize(PartialFakeQuantize):
    """Activations of which a random share is quantized (QDrop, Wei et al. 2022, "QDrop: Randomly
    Dropping Quantization for Extremely Low-bit Post-Training Quantization", arXiv 2203.05740).

        out = Q(x) where m, else x,  m ~ Bernoulli(p) per element

    p is the probability of KEEPING the quantized value. Where it is kept, the gradients of x and of
    a learned scale are those of Q; elsewhere x gets the identity and the scale nothing.
    """

    kind = "qdrop"

    def _mixed(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, y, x)
