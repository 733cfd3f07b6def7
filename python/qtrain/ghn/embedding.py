"""What a graph hypernetwork is told of each node before the nodes hear of one another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..recipe import require
from .config import GhnConfig
from .graph import PRIMITIVES, Graph, Node

Shape = tuple[int, int, int, int]  # (c_out, c_in, k_h, k_w)

# the bit width of all nodes of a graph, or of the nodes of these names; None is float
Bits = int | None | Mapping[str, int | None]


def channel_vocabulary(classes: int) -> list[int]:
    """The numbers of channels that have an embedding of their own (Knyazev et al. 2021)."""
    steps = {*range(8, 64, 8), *range(64, 4096, 16), *range(4096, 8193, 32)}
    return sorted({1, 3, classes} | steps)


def kernel_vocabulary(largest: int) -> list[int]:
    """The kernel sizes that have an embedding of their own."""
    return sorted({*range(1, max(12, largest), 2), 14, 16})


def nearest_rows(vocabulary: Sequence[int]) -> list[int]:
    """For each size from 0 to the largest known, the row of the nearest known size; of two, that of
    the smaller."""
    known = np.array(vocabulary)
    return [int(abs(known - size).argmin()) for size in range(known[-1] + 1)]


class NodeEmbedding(nn.Module):
    """x_v = E[primitive] + concat(Ec[c_out], Ec[c_in], Es[k_h], Es[k_w]) (+ Eb[bits]).

    The parts of the concat are d / 4 wide each. A size that is not in the vocabulary takes the
    nearest one's row (4 to 7 channels those of 8, a 2 x 2 kernel those of 3 x 3, as the public
    GHN-2 has it), a node without a shape a row for that.

    Eb, there if the config names bit widths, has a row for each and one for float; it starts at
    zero, so that the widths make no difference before they are trained. OUR choice.

    Args:
        config: width, classes, max_shape and bit_widths are used.
    """

    def __init__(self, config: GhnConfig) -> None:
        super().__init__()
        self.bit_widths = config.bit_widths
        channels = channel_vocabulary(config.classes)
        kernels = kernel_vocabulary(config.max_shape[3])
        self.primitive = nn.Embedding(len(PRIMITIVES), config.width)
        self.channel = nn.Embedding(len(channels) + 1, config.width // 4)
        self.kernel = nn.Embedding(len(kernels) + 1, config.width // 4)
        self.bits: nn.Embedding | None = None
        if config.bit_widths:
            self.bits = nn.Embedding(len(config.bit_widths) + 1, config.width)
            nn.init.zeros_(self.bits.weight)
        self._no_channel, self._no_kernel = len(channels), len(kernels)
        self._channel_row, self._kernel_row = nearest_rows(channels), nearest_rows(kernels)
        for size in {4, 5, 6, 7} - {config.classes}:
            self._channel_row[size] = channels.index(8)
        self._kernel_row[2] = kernels.index(3)

    def forward(self, graphs: Sequence[Graph], bits: Sequence[Bits]) -> Tensor:  # [N, d]
        nodes = [node for graph in graphs for node in graph.nodes]
        device = self.primitive.weight.device
        primitives = torch.tensor([_primitive_row(node) for node in nodes], device=device)
        rows = torch.tensor([self.shape_rows(node) for node in nodes], device=device)
        shape = torch.cat((self.channel(rows[:, :2]), self.kernel(rows[:, 2:])), 1).flatten(1)
        x = self.primitive(primitives) + shape
        if self.bits is None:
            told = any(b is not None for b in bits)
            require(not told, "bits", "None without bit_widths in the config", list(bits), "ghn")
            return x
        widths = [row for g, b in zip(graphs, bits, strict=True) for row in self._bit_rows(g, b)]
        return x + self.bits(torch.tensor(widths, device=device))

    def shape_rows(self, node: Node) -> Shape:
        """Rows of (c_out, c_in) in ``channel`` and of (k_h, k_w) in ``kernel``."""
        if not node.shape:
            return self._no_channel, self._no_channel, self._no_kernel, self._no_kernel
        c_out, c_in, k_h, k_w = as_weight_shape(node)
        channel, kernel = self._channel_row, self._kernel_row
        return (
            channel[min(c_out, len(channel) - 1)],
            channel[min(c_in, len(channel) - 1)],
            kernel[min(k_h, len(kernel) - 1)],
            kernel[min(k_w, len(kernel) - 1)],
        )

    def _bit_rows(self, graph: Graph, bits: Bits) -> list[int]:
        if isinstance(bits, Mapping):
            strangers = sorted(set(bits) - {node.name for node in graph.nodes})
            require(not strangers, "bits", "of nodes of the graph", ", ".join(strangers), "ghn")
        widths = [bits.get(n.name) if isinstance(bits, Mapping) else bits for n in graph.nodes]
        rule = f"among {', '.join(map(str, self.bit_widths))} and None"
        known = (*self.bit_widths, None)
        for width in dict.fromkeys(widths):
            require(width in known, "bits", rule, width, "ghn")
        return [known.index(width) for width in widths]


def as_weight_shape(node: Node) -> Shape:
    """A node's shape as (c_out, c_in, k_h, k_w), with 1 for what is not there.

    Position embeddings of ([1,] tokens, d) count as (1, d, s, s) with s = floor(sqrt(tokens)).

    Raises:
        ValueError: a shape that is neither 1-D, 2-D, 4-D nor that of position embeddings.
    """
    shape = node.shape
    if node.primitive == "pos_enc" and (len(shape) == 2 or (len(shape) == 3 and shape[0] == 1)):
        side = math.isqrt(shape[-2])
        return 1, shape[-1], side, side
    rule = "1-D, 2-D or 4-D, or (1, tokens, width) of positions"
    require(len(shape) in (1, 2, 4), f"shape of {node.name}", rule, shape, "ghn")
    c_out, c_in, k_h, k_w = (*shape, 1, 1, 1)[:4]
    return c_out, c_in, k_h, k_w


def _primitive_row(node: Node) -> int:
    if node.primitive not in PRIMITIVES:
        raise ValueError(
            f"ghn: primitive of {node.name} must be one of {', '.join(PRIMITIVES)}, "
            f"got {node.primitive!r}"
        )
    return PRIMITIVES.index(node.primitive)
