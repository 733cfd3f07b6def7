"""The graph of a network's operations, which is what a graph hypernetwork reads."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# the index is the embedding row
PRIMITIVES = (
    "max_pool",
    "avg_pool",
    "sep_conv",
    "dil_conv",
    "conv",
    "msa",
    "cse",
    "sum",
    "concat",
    "input",
    "bias",
    "bn",
    "ln",
    "pos_enc",
    "glob_avg",
)


@dataclass(frozen=True)
class Node:
    """One operation.

    Attributes:
        primitive: one of ``PRIMITIVES``.
        name: dotted name of the module, or of the fx node where it has no parameter.
        shape: of the parameter that is decoded for it, () for none; a conv or linear weight is 4-D
            (c_out, c_in / groups, k_h, k_w), a bias or norm weight 1-D.
        parameters: state_dict names that this node's decoding fills: ("conv.weight",),
            ("bn.weight", "bn.bias").
    """

    primitive: str
    name: str
    shape: tuple[int, ...] = ()
    parameters: tuple[str, ...] = ()
    groups: int = 1


@dataclass(frozen=True)
class Graph:
    """Nodes in topological order.

    Attributes:
        adjacency: [N, N] int64, upper triangular: 0 none, 1 edge i -> j, s: virtual edge of length
            s (2 .. 50).
    """

    nodes: tuple[Node, ...]
    adjacency: Tensor
