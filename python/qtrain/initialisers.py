"""First weights by name, and float training that starts from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .data import Dataset
from .recipe import Recipe, TrainConfig, require
from .seeds import generator

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
# the papers' summaries name small, medium and large and give no number: a decade apart is our
# choice. He's standard deviation is between the first and the last for fan-ins of 2 to 20000.
SIZES = {"small": 0.01, "medium": 0.1, "large": 1.0}


@dataclass(frozen=True)
class Initialiser:
    """A law with mean 0.

    Attributes:
        std: standard deviation of a weight, from the layer's fan-in and fan-out.
        uniform: uniform in [-b, b), b = sqrt(3) std, and not normal.
    """

    std: Callable[[int, int], float]
    uniform: bool

    def draw(self, layer: Any, random: torch.Generator) -> torch.Tensor:
        """Values for the layer's weight, on the CPU."""
        std = self.std(*fans(layer))
        values = torch.empty(layer.weight.shape)
        if self.uniform:
            bound = math.sqrt(3) * std
            return values.uniform_(-bound, bound, generator=random)
        return values.normal_(0, std, generator=random)


def _constant(std: float) -> Callable[[int, int], float]:
    return lambda fan_in, fan_out: std


def glorot(fan_in: int, fan_out: int) -> float:
    """sqrt(2 / (fan_in + fan_out)): Glorot and Bengio 2010, formula 16."""
    return math.sqrt(2 / (fan_in + fan_out))


def he(fan_in: int, fan_out: int) -> float:
    """sqrt(2 / fan_in): He 2015, arXiv 1502.01852, formula 10."""
    return math.sqrt(2 / fan_in)


_STDS = {**{name: _constant(std) for name, std in SIZES.items()}, "glorot": glorot, "he": he}
INITIALISERS: dict[str, Initialiser] = {
    f"{name}_{law}" if name in ("glorot", "he") else f"{law}_{name}": Initialiser(
        std, law == "uniform"
    )
    for name, std in _STDS.items()
    for law in ("normal", "uniform")
}


def fans(layer: Any) -> tuple[int, int]:
    """(fan-in, fan-out): inputs that an output of the layer reads, and outputs that read an input
    (at stride 1). Groups count: of a depthwise 3x3 convolution both are 9, where torch.nn.init
    takes 9 times the channels for the second and Keras for the first."""
    weight = layer.weight  # [outputs, inputs / groups, ...]
    window = weight[0, 0].numel()
    return weight.shape[1] * window, weight.shape[0] // getattr(layer, "groups", 1) * window


@torch.no_grad()
def initialise(model: nn.Module, name: str, seed: int) -> None:
    """Set the weights of all Conv and Linear layers, and their biases to 0; the rest stays.

    Each layer draws from a stream of its own, named by ``seed`` and the layer's name: for a seed,
    the weights of two normal initialisers (or two uniform ones) differ by a factor for each layer.

    Args:
        name: of ``INITIALISERS``: normal_small, normal_medium, normal_large (standard deviation
            0.01, 0.1, 1), uniform_small, uniform_medium, uniform_large (the same standard
            deviations: bounds 0.0173, 0.173, 1.73; the numbers are our choice), glorot_normal,
            glorot_uniform, he_normal, he_uniform (fan-in). The normal laws are not truncated.

    Raises:
        ValueError: an unknown name.
    """
    initialiser = initialiser_of(name)
    for path, layer in model.named_modules():
        if isinstance(layer, LAYERS):
            random = generator(seed, 0, f"initialiser/{path}")
            layer.weight.copy_(initialiser.draw(layer, random))
            if layer.bias is not None:
                layer.bias.zero_()


def initialiser_of(name: str) -> Initialiser:
    known = ", ".join(INITIALISERS)
    require(name in INITIALISERS, "initialiser", f"one of {known}", repr(name), "initialise")
    return INITIALISERS[name]


class Initialised(Recipe):
    """Float training from the weights of an initialiser.

    Args:
        initialiser: see `initialise`.

    Raises:
        ValueError: an unknown one.
    """

    def __init__(self, initialiser: str) -> None:
        initialiser_of(initialiser)
        self.initialiser = initialiser

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "initialiser": self.initialiser}

    def initialize(self, model: nn.Module, data: Dataset, config: TrainConfig) -> None:
        initialise(model, self.initialiser, config.seed)
