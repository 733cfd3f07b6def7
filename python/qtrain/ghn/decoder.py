"""The two heads of a graph hypernetwork: from node features to weights.

A head decodes many nodes in one call. Nodes that want the same thing (a ``Target``) are decoded
together, and what targets have in common is computed once for all of them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..recipe import require
from .config import GhnConfig
from .embedding import Shape

log = logging.getLogger("qtrain")

WEIGHTS, VECTORS = ("weight", "classifier"), ("vector", "class_bias")


class Target(NamedTuple):
    """What is to be decoded for a node.

    Attributes:
        kind: "weight"; "classifier", the weight of a last layer with as many classes as the config;
            "vector", a norm's weight and bias, or a bias alone; "class_bias", of that last layer.
        shape: (c_out, c_in, k_h, k_w); of a vector (c, 1, 1, 1).
        gain: factor on a weight, see `fan_in_gain`; of vectors 1.
    """

    kind: str
    shape: Shape
    gain: float = 1.0


Targets = Mapping[Target, Sequence[int]]


def fan_in_gain(shape: Shape, *, depthwise: bool) -> float:
    """sqrt(beta / fan_in), fan_in = (c_in / groups) k_h k_w: He's rule (Knyazev et al. 2021).

    beta is 1 where no ReLU is taken to follow (a depthwise weight, or one with k_h < k_w) and 2
    elsewhere.
    """
    _, c_in, k_h, k_w = shape
    return math.sqrt((1 if depthwise or k_h < k_w else 2) / (c_in * k_h * k_w))


def bounded(vectors: Tensor) -> Tensor:  # [n, 2, c]
    """Row 0 as a norm's weight, 2 sigmoid(p / 2), in (0, 2); row 1 as a bias, tanh(0.2 p), in
    (-1, 1) (Knyazev et al. 2021)."""
    weight, bias = vectors.unbind(1)
    return torch.stack((2 * torch.sigmoid(0.5 * weight), torch.tanh(0.2 * bias)), 1)


def tiled(block: Tensor, c_out: int, c_in: int) -> Tensor:  # [n, o, i, ...]
    """W[:, a, b] = block[:, a mod o, b mod i], [n, c_out, c_in, ...]."""
    o, i = block.shape[1:3]
    if c_out > o or c_in > i:
        times = (1, -(-c_out // o), -(-c_in // i), *(1 for _ in block.shape[3:]))
        block = block.repeat(times)
    return block[:, :c_out, :c_in].contiguous()


def bucket(size: int, largest: int) -> int:
    """The next power of two, at most ``largest``: so many channels are computed for ``size``."""
    return min(1 << (size - 1).bit_length(), largest)


class TiledHead(nn.Module):
    """The decoder of GHN-2 and GHN-3 (Knyazev et al. 2021, 2023): a small weight, tiled.

    With (C_o, C_i, S, S) the config's max_shape, a weight is

        ReLU(Linear(x)) as [4d, S, S], cropped to k_h x k_w, at each place of the kernel
        ReLU(Linear 4d -> 8d), Linear 8d -> C_o C_i

    as [C_o, C_i, k_h, k_w], tiled to (c_out, c_in) and multiplied by its gain. Channels a and
    a + C_o are the same. A kernel larger than S is interpolated (bilinear) from S; the log says so
    once for each size. The last layer of a network goes on from the 1 x 1 weight with ReLU and a
    Linear C_o -> classes along the output channels. Vectors are Linear d -> 2d, ReLU,
    Linear 2d -> 2 C, C = max(C_o, C_i), tiled; the last layer's bias a ReLU and a
    Linear C -> classes on that.

    Only the outputs that a weight needs are computed, rounded up to a power of two of channels so
    that weights of nearly the same size go together. It does not change their values.

    Args:
        config: width, max_shape, classes and encoder (which decides the crop) are used. With the
            graphormer the last layers start with a fifth of their usual weight and no bias, as the
            public GHN-3 does it.
    """

    def __init__(self, config: GhnConfig) -> None:
        super().__init__()
        width, (c_out, c_in, size, _) = config.width, config.max_shape
        self.channels, self.size, self.centred = (c_out, c_in), size, config.centred
        self.spread = nn.Linear(width, 4 * width * size * size)
        self.hidden = nn.Linear(4 * width, 8 * width)
        self.block = nn.Linear(8 * width, c_out * c_in)
        self.classes = nn.Linear(c_out, config.classes)
        most = max(c_out, c_in)
        self.vectors = _mlp(width, 2 * width, 2 * most)
        self.class_bias = nn.Linear(most, config.classes)
        self._announced: set[tuple[int, int]] = set()
        if config.encoder == "graphormer":
            for layer in (self.block, self.classes, self.vectors[-1]):
                _start_small(layer)

    def forward(self, x: Tensor, targets: Targets) -> dict[Target, Tensor]:  # [N, d]
        """[n, *shape] for each weight and classifier, [n, 2, c] for each vector and class bias."""
        return dict([*self._weights(x, targets), *self._vectors(x, targets)])

    def _weights(self, x: Tensor, targets: Targets) -> Iterator[tuple[Target, Tensor]]:
        kernels: dict[tuple[int, int], dict[tuple, list[Target]]] = {}
        for target in targets:
            if target.kind in WEIGHTS:
                c_out, c_in, k_h, k_w = target.shape
                whole = target.kind == "classifier"
                rows = self.channels[0] if whole else bucket(c_out, self.channels[0])
                key = (target.kind, rows, bucket(c_in, self.channels[1]))
                kernel = (min(k_h, self.size), min(k_w, self.size))
                kernels.setdefault(kernel, {}).setdefault(key, []).append(target)
        for kernel, buckets in kernels.items():
            groups = [_rows(group, targets) for group in buckets.values()]
            trunk = self._trunk(x[[row for group in groups for row in group]], kernel)
            parts = trunk.split([len(group) for group in groups])
            for (key, group), part in zip(buckets.items(), parts, strict=True):
                yield from self._blocks(part, key, group, targets)

    def _trunk(self, x: Tensor, kernel: tuple[int, int]) -> Tensor:  # [n, d] -> [n, k_h, k_w, 8d]
        start_h, start_w = (self.size // 2 - k // 2 if self.centred else 0 for k in kernel)
        places = (
            slice(None),
            slice(start_h, start_h + kernel[0]),
            slice(start_w, start_w + kernel[1]),
        )
        grid = (-1, self.size, self.size)
        weight = self.spread.weight.unflatten(0, grid)[places].permute(1, 2, 0, 3)
        bias = self.spread.bias.unflatten(0, grid)[places].permute(1, 2, 0)
        spread = F.linear(x, weight.flatten(0, 2), bias.flatten()).relu()
        return self.hidden(spread.unflatten(1, (*kernel, -1))).relu()

    def _blocks(
        self, trunk: Tensor, key: tuple, group: list[Target], targets: Targets
    ) -> Iterator[tuple[Target, Tensor]]:
        kind, c_out, c_in = key
        weight = self.block.weight.unflatten(0, self.channels)[:c_out, :c_in].flatten(0, 1)
        bias = self.block.bias.unflatten(0, self.channels)[:c_out, :c_in].flatten()
        block = F.linear(trunk, weight, bias).permute(0, 3, 1, 2).unflatten(1, (c_out, c_in))
        if kind == "classifier":
            block = self.classes(block.relu().transpose(1, -1)).transpose(1, -1)
        parts = block.split([len(targets[target]) for target in group])
        for target, part in zip(group, parts, strict=True):
            whole = self._interpolated(part, target.shape[2:])
            yield target, tiled(whole, *target.shape[:2]) * target.gain

    def _interpolated(self, block: Tensor, kernel: tuple[int, int]) -> Tensor:  # [n, o, i, h, w]
        if block.shape[3:] == kernel:
            return block
        if kernel not in self._announced:
            self._announced.add(kernel)
            log.warning(
                "ghn: a kernel of %d x %d is interpolated, the head decodes up to %d x %d",
                *kernel,
                self.size,
                self.size,
            )
        wide = F.interpolate(block.flatten(1, 2), kernel, mode="bilinear")
        return wide.unflatten(1, block.shape[1:3])

    def _vectors(self, x: Tensor, targets: Targets) -> Iterator[tuple[Target, Tensor]]:
        group = [target for target in targets if target.kind in VECTORS]
        if not group:
            return
        both = self.vectors(x[_rows(group, targets)]).unflatten(1, (2, -1))
        parts = both.split([len(targets[target]) for target in group])
        for target, part in zip(group, parts, strict=True):
            vector = self.class_bias(part.relu()) if target.kind == "class_bias" else part
            yield target, tiled(bounded(vector), 2, target.shape[0])


class LowRankHead(nn.Module):
    """The decoder of LoGAH (Zhou et al. 2024, arXiv 2405.16287): a weight as a product, not tiled.

        F = Linear r -> K (ReLU(MLP(x))),  MLP: d -> 4d -> 2 r^2, as [2, r, K]
        W[(a, p), (b, q)] = sum_r F[0, r, (a, p)] F[1, r, (b, q)] / sqrt(r)

    with a, b the output and input channels and p, q the row and column in the kernel, times its
    gain. K is the config's factor_size. A vector is a weight of 2 input channels: its norm's weight
    and its bias. The factor 1 / sqrt(r), which keeps the size of W when the rank changes, the
    hidden width and the vectors are OUR choices.

    Args:
        config: width, rank and factor_size are used.
    """

    def __init__(self, config: GhnConfig) -> None:
        super().__init__()
        self.rank, self.factor_size = config.rank, config.factor_size
        self.core = _mlp(config.width, 4 * config.width, 2 * config.rank**2)
        self.factor = nn.Linear(config.rank, config.factor_size)

    def forward(self, x: Tensor, targets: Targets) -> dict[Target, Tensor]:  # [N, d]
        """[n, *shape] for each weight and classifier, [n, 2, c] for each vector and class bias.

        Raises:
            ValueError: a weight whose factors have more than factor_size rows or columns.
        """
        buckets: dict[int, list[Target]] = {}
        for target in targets:
            most = max(_factor_sizes(target))
            rule = f"a product of factors of at most {self.factor_size} rows (factor_size)"
            require(most <= self.factor_size, f"weight of {target.shape}", rule, most, "ghn")
            buckets.setdefault(bucket(most, self.factor_size), []).append(target)
        return dict(
            decoded
            for size, group in buckets.items()
            for decoded in self._products(x[_rows(group, targets)], size, group, targets)
        )

    def _products(
        self, x: Tensor, size: int, group: list[Target], targets: Targets
    ) -> Iterator[tuple[Target, Tensor]]:
        core = self.core(x).unflatten(1, (2, self.rank, self.rank)).relu()
        factors = F.linear(core, self.factor.weight[:size], self.factor.bias[:size])
        parts = factors.split([len(targets[target]) for target in group])
        for target, part in zip(group, parts, strict=True):  # [n, 2, r, size]
            rows, columns = _factor_sizes(target)
            left, right = part[:, 0, :, :rows], part[:, 1, :, :columns]
            product = left.transpose(1, 2) @ right * self.rank**-0.5
            if target.kind in VECTORS:
                yield target, bounded(product.transpose(1, 2))
            else:
                c_out, c_in, k_h, k_w = target.shape
                split = product.unflatten(2, (c_in, k_w)).unflatten(1, (c_out, k_h))
                yield target, split.transpose(2, 3).contiguous() * target.gain


def _factor_sizes(target: Target) -> tuple[int, int]:
    c_out, c_in, k_h, k_w = target.shape
    return c_out * k_h, 2 if target.kind in VECTORS else c_in * k_w


def make_head(config: GhnConfig) -> TiledHead | LowRankHead:
    return LowRankHead(config) if config.head == "low_rank" else TiledHead(config)


def _rows(group: Sequence[Target], targets: Targets) -> list[int]:
    return [row for target in group for row in targets[target]]


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


@torch.no_grad()
def _start_small(layer: nn.Module) -> None:
    for name, parameter in layer.named_parameters():
        parameter.mul_(0.2 if name == "weight" else 0)
