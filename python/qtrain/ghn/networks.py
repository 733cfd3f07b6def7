"""Specifications of networks and the modules built from them: ConvNets of cells, and small ViTs.

A specification is data: it decides the network save for what a dataset decides, channels, classes
and image size, which are given when it is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models import Vit, VitBlock
from .cells import LARGE, CellModule, Shape, conv
from .genotype import Genotype, digest, require

STEMS = ("plain", "pool", "deep")


@dataclass(frozen=True)
class ConvSpec:
    """A ConvNet.

    Attributes:
        genotype: its cells.
        cells: how many; the reducing ones are at a third and two thirds of them.
        width: channels of the stem, and of each state of the cells before the first reduction.
        growth: 1 or 2, the factor of the width at a reduction.
        stem: "plain", a convolution; "pool", and a max pooling that halves the image; "deep", two
            convolutions, of which the second halves it.
        kernel: of the stem's first convolution.
        preprocess: 1x1 convolutions on the inputs of each cell. Only with one sum node and growth 1
            they can be left out.
        hidden: width of a hidden layer of the head; 0: none.
        glob_avg: the head sees the mean over the image, else all of it.
        norm: BatchNorm after convolutions; without, they have biases.
    """

    genotype: Genotype
    cells: int
    width: int
    growth: int
    stem: str
    kernel: int
    preprocess: bool
    hidden: int
    glob_avg: bool
    norm: bool

    def __post_init__(self) -> None:
        for name in ("cells", "width", "growth", "kernel", "hidden"):
            kind = type(getattr(self, name))
            require(kind is int, name, "a whole number", getattr(self, name))
        for name in ("preprocess", "glob_avg", "norm"):
            require(type(getattr(self, name)) is bool, name, "true or false", getattr(self, name))
        require(self.cells >= 1, "cells", "at least 1", self.cells)
        require(self.width >= 2, "width", "at least 2", self.width)
        require(self.growth in (1, 2), "growth", "1 or 2", self.growth)
        require(self.stem in STEMS, "stem", f"one of {', '.join(STEMS)}", self.stem)
        require(self.kernel in (1, 3, 5, 7), "kernel", "1, 3, 5 or 7", self.kernel)
        require(self.hidden >= 0, "hidden", "at least 0", self.hidden)
        plain = self.growth == 1 and all(
            len(cell.concat) == 1 for cell in (self.genotype.normal, self.genotype.reduce)
        )
        rule = "true unless the width stays the same throughout"
        require(self.preprocess or plain, "preprocess", rule, self.preprocess)

    @property
    def digest(self) -> str:
        """Names the genotype; networks that differ in width, depth or head alone share it."""
        return digest(self.genotype.to_json())

    def build(self, channels: int, classes: int, size: int) -> ConvNet:
        return ConvNet(self, channels, classes, size)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "genotype": self.genotype.to_json()}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> ConvSpec:
        return ConvSpec(**{**value, "genotype": Genotype.from_json(value["genotype"])})


class ConvNet(nn.Module):
    """A network of cells for images of any size.

    Args:
        spec: see `ConvSpec`.
        size: height and width; from ``LARGE`` on, the stem's first convolution has stride 4.
    """

    def __init__(self, spec: ConvSpec, channels: int, classes: int, size: int) -> None:
        super().__init__()
        stem, size = _stem(spec, channels, size)
        self.stem = nn.Sequential(*stem)
        before = last = width = spec.width
        halved = False
        thirds = {spec.cells // 3, 2 * spec.cells // 3} - {0}
        cells = []
        for number in range(spec.cells):
            reduction = number in thirds
            if reduction:
                width, size = width * spec.growth, -(-size // 2)
            cell = spec.genotype.reduce if reduction else spec.genotype.normal
            module = CellModule(
                cell,
                (before, last),
                width,
                preprocess=spec.preprocess,
                halved=halved,
                reduction=reduction,
                norm=spec.norm,
            )
            cells.append(module)
            before, last, halved = last, width * len(cell.concat), reduction
        self.cells = nn.ModuleList(cells)
        self.pool = nn.AdaptiveAvgPool2d(1) if spec.glob_avg else nn.Identity()
        inputs = last if spec.glob_avg else last * size * size
        head: list[nn.Module] = []
        if spec.hidden:
            head, inputs = [nn.Linear(inputs, spec.hidden), nn.ReLU()], spec.hidden
        self.head = nn.Sequential(*head, nn.Linear(inputs, classes))

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W]
        before = last = self.stem(x)
        for cell in self.cells:
            before, last = last, cell(before, last)
        return self.head(torch.flatten(self.pool(last), 1))


def _stem(spec: ConvSpec, channels: int, size: int) -> tuple[list[nn.Module], int]:
    """The stem, and the size of the image that leaves it."""
    stride = 4 if size >= LARGE else 1
    size = -(-size // stride)
    if spec.stem == "deep":
        first = Shape(channels, spec.width // 2, stride, spec.norm)
        second = Shape(spec.width // 2, spec.width, 2, spec.norm)
        return [*conv(first, spec.kernel), nn.ReLU(), *conv(second, 3)], -(-size // 2)
    layers = conv(Shape(channels, spec.width, stride, spec.norm), spec.kernel)
    if spec.stem == "pool":
        return [*layers, nn.MaxPool2d(3, 2, 1)], -(-size // 2)
    return layers, size


@dataclass(frozen=True)
class VitSpec:
    """A small ViT: `qtrain.models.Vit` with blocks that differ.

    Attributes:
        blocks: for each the heads of its attention, which divide the width, and the width of its
            MLP in multiples of ``width``.
    """

    width: int
    blocks: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        good = type(self.width) is int and self.width >= 1
        require(good, "width", "a whole number of at least 1", self.width)
        for block in self.blocks:
            good = len(block) == 2 and all(type(part) is int and part >= 1 for part in block)
            rule = f"(heads, ratio), heads dividing {self.width}"
            require(good and self.width % block[0] == 0, "block", rule, block)
        require(bool(self.blocks), "blocks", "at least one", self.blocks)

    @property
    def digest(self) -> str:
        """Names the blocks; networks that differ in width alone share it."""
        return digest([list(block) for block in self.blocks])

    def build(self, channels: int, classes: int, size: int) -> Vit:
        net = Vit(channels, classes, size, width=self.width, depth=0)
        net.blocks = nn.Sequential(*(VitBlock(self.width, *block) for block in self.blocks))
        return net

    def to_json(self) -> dict[str, Any]:
        return {"width": self.width, "blocks": [list(block) for block in self.blocks]}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> VitSpec:
        return VitSpec(value["width"], tuple(tuple(block) for block in value["blocks"]))
