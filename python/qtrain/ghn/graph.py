"""The graph of a network's operations, which is what a graph hypernetwork reads.

Nodes are operations that have parameters or that branch, join or pool; ReLU, dropout, reshapes and
the like are none, and an edge goes through them. The rules are those of GHN-2 (Knyazev et al. 2021,
arXiv 2110.13100), which takes them from an autograd graph. Here they are applied to a traced one
(``trace``, ``rules``), so that neither weights nor a forward pass are needed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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
)  # the index is the embedding row
# the longest virtual edge
FARTHEST = 50


@dataclass(frozen=True)
class Node:
    """One operation.

    Attributes:
        primitive: one of ``PRIMITIVES``.
        name: dotted name of the module, or of the fx node where it has no parameter.
        shape: of the parameter that is decoded for it, () for none; a conv or linear weight is 4-D
            (c_out, c_in / groups, k_h, k_w), a bias or norm weight 1-D. That of a ``pos_enc`` node
            is the parameter's own.
        parameters: state_dict names this node's decoding fills: ("conv.weight",),
            ("bn.weight", "bn.bias").
    """

    primitive: str
    name: str
    shape: tuple[int, ...] = ()
    parameters: tuple[str, ...] = ()
    groups: int = 1


@dataclass(frozen=True)
class Graph:
    """The operations of a network in an order in which they can run, the input first.

    Attributes:
        adjacency: [N, N] int64, upper triangular: 0 none, 1 an edge i -> j, s a virtual edge: j is
            s edges away from i by the shortest path, 2 <= s <= ``FARTHEST``.
    """

    nodes: tuple[Node, ...]
    adjacency: Tensor  # [N, N]

    def undecoded(self, model: nn.Module) -> tuple[str, ...]:
        """Names of the model's parameters that no node fills: layer scales, tied weights' second
        names, and whatever the output does not depend on. They keep the values they have."""
        filled = {name for node in self.nodes for name in node.parameters}
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        return tuple(name for name in names if name not in filled)


def build_graph(model: nn.Module, example: Tensor | None = None) -> Graph:
    """The graph of any model that torch.fx or torch.export can trace; the model is not changed.

    Conv2d and Linear weights are ``conv`` nodes (a Linear is a 1x1 convolution), ``sep_conv`` if
    grouped, ``dil_conv`` if grouped and dilated; their bias is a node of its own right after.
    BatchNorm and LayerNorm are ``bn`` and ``ln``, weight and bias in one node. Additions and
    concatenations are ``sum`` and ``concat`` where they join different operations, attention is
    ``msa``, a gate on channels (squeeze and excitation) ``cse`` without the average inside. Our
    choices, where the papers' code has none or another:

    - a parameter that the forward itself adds or concatenates (positions, a class token) is
      ``pos_enc``; one that it multiplies by (a layer scale) is no node and keeps its value;
    - any mean is ``glob_avg``; a difference is a ``sum``;
    - of a layer that is called twice, the second call is a node without parameters;
    - the model is traced in eval mode, and arguments of its forward that have defaults keep them.

    torch.fx comes first: it needs no input. Where it fails (the forward branches on sizes, say),
    or leads to an operation without a primitive, torch.export is tried.

    Args:
        model: on any device, meta too.
        example: [N, C, H, W], an input, for torch.export alone; None: zeros of [1, C, 224, 224] on
            the model's device, C being what the first Conv2d takes.

    Raises:
        ValueError: neither can trace the model (the node where torch.fx stopped is named, with both
            reasons), or an operation has no primitive (it is named).
    """
    from .trace import trace

    return trace(model, example)


def adjacency(sources: Sequence[Collection[int]]) -> Tensor:
    """Direct and virtual edges, as in `Graph`.

    Args:
        sources: for each node those that it reads from, all of which come before it.

    Returns:
        [N, N] int64.
    """
    n = len(sources)
    unreachable = n + FARTHEST
    distance = torch.full((n, n), unreachable, device="cpu")  # [to, from]
    for node, read in enumerate(sources):
        if read:
            distance[node] = distance[sorted(read)].amin(0) + 1
        distance[node, node] = 0
    return torch.where(distance <= FARTHEST, distance, 0).T.contiguous()
