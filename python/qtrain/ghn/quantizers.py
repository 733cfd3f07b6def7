"""Quantizers around networks whose weights are predicted: one call for the weights of all networks
of a meta-batch, and hooks for the inputs of their layers.

SimQuant is fake quantization with the straight-through gradient, NoiseQuant adds uniform noise as
wide as a quantization step, whose gradient is exact (Yun and Wong, arXiv 2309.13773). In both,
ranges are taken anew in each forward and carry no gradient. Weights are symmetric, inputs affine
and per tensor (OUR choice, as everywhere in qtrain).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import qkernels
from qkernels import foreach

from ..recipe import require
from ..seeds import stream_seed

QUANTIZERS = ("none", "sim", "noise", "paper")
# of a layer that stays float
FLOAT_BITS = 32
# the paper's turn from SimQuant to NoiseQuant
NOISE_FROM = 2


@dataclass(frozen=True)
class Quantizer:
    """How training quantizes.

    Attributes:
        kind: "none" (GHN-Q trains so), "sim", "noise", or "paper": noise at 2 bits and below, where
            SimQuant is said to explode, else sim.
        method: of the ranges of inputs, "minmax" or "percentile"; those of weights are min-max.
        percentile: for that method; None: qkernels' default. The paper has 99 without BatchNorm.
        per_channel: ranges of weights per output channel, else per tensor.

    Raises:
        ValueError: an unknown kind or method; a percentile without use.
    """

    kind: str = "none"
    method: str = "minmax"
    percentile: float | None = None
    per_channel: bool = True

    def __post_init__(self) -> None:
        for name, known in (("kind", QUANTIZERS), ("method", ("minmax", "percentile"))):
            value = getattr(self, name)
            require(value in known, name, f"one of {', '.join(known)}", repr(value), "ghn")
        share = self.percentile
        used = share is None or self.method == "percentile"
        require(used, "percentile", "None unless the method is percentile", share, "ghn")
        inside = share is None or 50 < share <= 100
        require(inside, "percentile", "in (50, 100]", share, "ghn")

    def noisy(self, bits: int) -> bool:
        return self.kind == "noise" or (self.kind == "paper" and bits <= NOISE_FROM)

    @property
    def input_range(self) -> dict[str, Any]:
        return {"method": self.method, "percentile": self.percentile}

    @property
    def weight_range(self) -> dict[str, Any]:
        return {"axis": 0 if self.per_channel else None, "symmetric": True}


@dataclass(frozen=True)
class Place:
    """Where noise is drawn: all of it is named by these and the layer."""

    seed: int
    step: int
    net: int

    def stream(self, layer: str, side: str) -> int:
        """A seed for the noise ops."""
        return stream_seed(self.seed, self.step, f"noise/{self.net}/{layer}/{side}")


class InputQuantizer:
    """A forward pre-hook that quantizes a layer's input; it does nothing until it is `set`."""

    def __init__(self, quantizer: Quantizer, layer: str) -> None:
        self.quantizer, self.layer = quantizer, layer
        self.bits, self.place = FLOAT_BITS, Place(0, 0, 0)

    def set(self, bits: int, place: Place) -> None:
        """What the next forwards do."""
        self.bits, self.place = bits, place

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.bits >= FLOAT_BITS or self.quantizer.kind == "none":
            return args
        x, ranged = args[0], {"bits": self.bits, **self.quantizer.input_range}
        if not self.quantizer.noisy(self.bits):
            return (qkernels.fake_quant(x, **ranged), *args[1:])
        scale = qkernels.quant_range(x.detach(), **ranged).scale
        seed = self.place.stream(self.layer, "input")
        return (qkernels.uniform_noise(x, scale, seed=seed, step=self.place.step), *args[1:])


def hook_inputs(layers: Mapping[str, nn.Module], quantizer: Quantizer) -> dict[str, InputQuantizer]:
    """Hook a quantizer in front of each layer; by the layers' names."""
    hooks = {name: InputQuantizer(quantizer, name) for name in layers}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(hooks[name])
    return hooks


def layer_bits(
    layers: Sequence[str], bits: int | Sequence[int], first_last: int | None = 8
) -> dict[str, int]:
    """The width of each layer, of its weight and its input.

    Args:
        layers: names, in the order of their registration.
        bits: one for all, or one for each.
        first_last: the first and the last layer get at least so many; None: as the others.
    """
    each = [bits] * len(layers) if isinstance(bits, int) else list(bits)
    for end in (0, -1) if first_last is not None else ():
        each[end] = max(each[end], first_last or 0)
    return dict(zip(layers, each, strict=True))


def quantize_weights(
    predictions: Sequence[Mapping[str, Tensor]],
    widths: Sequence[Mapping[str, int]],
    quantizer: Quantizer,
    places: Sequence[Place],
) -> list[dict[str, Tensor]]:
    """The predictions, the weights of their layers quantized: all networks in one call of
    `qkernels.foreach` (two, where some widths are noisy and some are not).

    Args:
        predictions: of each network, by the names in its state_dict.
        widths: of each network, by the names of its layers; others stay float.
        places: of each network.
    """
    quantized = [dict(prediction) for prediction in predictions]
    if quantizer.kind == "none":
        return quantized
    chosen = [
        (index, layer, bits)
        for index, by_layer in enumerate(widths)
        for layer, bits in by_layer.items()
        if bits < FLOAT_BITS
    ]
    for noisy in (False, True):
        part = [entry for entry in chosen if quantizer.noisy(entry[2]) == noisy]
        if not part:
            continue
        weights = [predictions[index][f"{layer}.weight"] for index, layer, _ in part]
        options: dict[str, Any] = {"bits": [bits for _, _, bits in part], **quantizer.weight_range}
        if noisy:
            ranges = foreach.quant_range([weight.detach() for weight in weights], **options)
            results = foreach.uniform_noise(
                weights,
                [found.scale for found in ranges],
                seed=[places[index].stream(layer, "weight") for index, layer, _ in part],
                step=[places[index].step for index, _, _ in part],
                axis=options["axis"],
            )
        else:
            results = foreach.fake_quant(weights, **options)
        for (index, layer, _), result in zip(part, results, strict=True):
            quantized[index][f"{layer}.weight"] = result
    return quantized
