"""What a graph hypernetwork is: the settings that decide its parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..recipe import require

ENCODERS = ("graphormer", "gated")
HEADS = ("tiled", "low_rank")
# GHN-3 by size: width, heads, layers
GHN3_SIZES = {"t": (64, 8, 3), "s": (128, 16, 5), "l": (256, 16, 12), "xl": (384, 16, 24)}


@dataclass(frozen=True)
class GhnConfig:
    """A graph hypernetwork. The default is GHN-3-T in the shape for CIFAR-10.

    Attributes:
        encoder: "graphormer" (GHN-3, Knyazev et al. 2023, arXiv 2303.04143) or "gated" (GHN-2,
            Knyazev et al. 2021, arXiv 2110.13100). It decides where a kernel smaller than the
            largest is cropped, too: at the centre, or at the corner.
        width: d, of the node features; a multiple of 4.
        heads, layers: of the graphormer; heads divide width.
        max_shape: (c_out, c_in, k, k), the largest weight that the tiled head decodes. A larger one
            is tiled, a larger kernel interpolated.
        classes: of the networks whose last layer has weights of its own in the tiled head.
        head: "tiled", or "low_rank" as in LoGAH (Zhou et al. 2024, arXiv 2405.16287).
        rank: r of the low-rank head, W = A B.
        factor_size: the most rows of A (c_out * k_h) and columns of B (c_in * k_w) there.
        bit_widths: those that a node can be told it will be quantized to; empty: none, and then the
            GHN is that of the papers. OUR choice: GHN-QAT names it as future work.
        gain: factor on all predicted weights, not on biases and norms; 1: the papers' GHN. OUR
            choice, for networks without BatchNorm: beside BatchNorm the size of weights is free,
            and a GHN trained so predicts what is far too large without.

    Raises:
        TypeError, ValueError: a setting of another kind, or outside its range.
    """

    encoder: str = "graphormer"
    width: int = 64
    heads: int = 8
    layers: int = 3
    max_shape: tuple[int, int, int, int] = (64, 64, 11, 11)
    classes: int = 10
    head: str = "tiled"
    rank: int = 32
    factor_size: int = 8192
    bit_widths: tuple[int, ...] = ()
    gain: float = 1.0

    def __post_init__(self) -> None:
        for name in ("max_shape", "bit_widths"):
            # JSON has lists only
            object.__setattr__(self, name, _whole_numbers(name, getattr(self, name)))
        for name in ("width", "heads", "layers", "classes", "rank", "factor_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"ghn: {name} must be a whole number, got {value!r}")
            require(value >= 1, name, "at least 1", value, "ghn")
        for name, known in (("encoder", ENCODERS), ("head", HEADS)):
            value = getattr(self, name)
            require(value in known, name, f"one of {', '.join(known)}", repr(value), "ghn")
        require(self.width % 4 == 0, "width", "a multiple of 4", self.width, "ghn")
        attends = self.encoder == "gated" or self.width % self.heads == 0
        require(attends, "heads", f"a divisor of width {self.width}", self.heads, "ghn")
        if isinstance(self.gain, bool) or not isinstance(self.gain, (int, float)):
            raise TypeError(f"ghn: gain must be a number, got {self.gain!r}")
        require(0 < self.gain < math.inf, "gain", "positive and finite", self.gain, "ghn")
        shape = self.max_shape
        square = len(shape) == 4 and min(shape) >= 1 and shape[2] == shape[3]
        require(square, "max_shape", "4 sizes of at least 1 with a square kernel", shape, "ghn")
        rising = all(a < b for a, b in zip((0, *self.bit_widths), self.bit_widths, strict=False))
        require(rising, "bit_widths", "positive and rising", self.bit_widths, "ghn")

    @property
    def centred(self) -> bool:
        """Whether a small kernel is cropped from the middle of the largest, not from its corner."""
        return self.encoder == "graphormer"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` takes it back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> GhnConfig:
        """Raises: ValueError if a setting is unknown."""
        known = {setting.name for setting in fields(cls)}
        unknown = sorted(set(settings) - known)
        rule = f"among {', '.join(sorted(known))}"
        require(not unknown, "settings", rule, ", ".join(unknown), "ghn")
        return cls(**settings)


def ghn2(**settings: Any) -> GhnConfig:
    """GHN-2: 1,620,764 parameters for CIFAR-10. ``settings`` replace any of `GhnConfig`."""
    return GhnConfig(**{"encoder": "gated", "width": 32, **settings})


def ghn3(size: str = "t", **settings: Any) -> GhnConfig:
    """GHN-3 of a size, "t", "s", "l" or "xl": 4,531,500 parameters at "t" for CIFAR-10.

    Width, heads and layers are those of the public models; max_shape stays that of CIFAR-10 unless
    ``settings`` replace it (the public ones for ImageNet have (width, width, 16, 16)).
    """
    require(size in GHN3_SIZES, "size", f"one of {', '.join(GHN3_SIZES)}", repr(size), "ghn")
    width, heads, layers = GHN3_SIZES[size]
    return GhnConfig(**{"width": width, "heads": heads, "layers": layers, **settings})


def _whole_numbers(name: str, values: Any) -> tuple[int, ...]:
    whole = isinstance(values, (tuple, list)) and all(
        isinstance(v, int) and not isinstance(v, bool) for v in values
    )
    if not whole:
        raise TypeError(f"ghn: {name} must be a tuple of whole numbers, got {values!r}")
    return tuple(values)
