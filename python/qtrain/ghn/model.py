"""The graph hypernetwork: graphs of networks in, their weights out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..recipe import require
from .config import GhnConfig
from .decoder import Target, fan_in_gain, make_head
from .embedding import Bits, NodeEmbedding, as_weight_shape
from .encoder import GatedGnn, Graphormer
from .graph import Graph, Node

# a norm's weight and its bias come from one node
NORMS = ("bn", "ln")


class Ghn(nn.Module):
    """Predicts the weights of networks from their graphs, with fresh weights of its own from
    torch's global generator.

    The node features (`NodeEmbedding`) go through an encoder (`Graphormer` or `GatedGnn`) and a
    LayerNorm, and a head (`TiledHead` or `LowRankHead`) decodes the nodes that have parameters.
    GHN-2 (`config.ghn2`) has 1,620,764 parameters for CIFAR-10, GHN-3-T (`config.ghn3`) 4,531,500.

    What a network's parameters become: weights are scaled by fan-in (`fan_in_gain`), norm weights
    lie in (0, 2), biases in (-1, 1), position embeddings are taken as they come. Statistics of
    BatchNorm are not predicted.

    OUR choices: a network counts as a classifier of the config's classes if the last weight of its
    graph is a 1 x 1 one with as many outputs; any other last layer is decoded like every layer.
    Position embeddings come from one weight (1, d, s, s), s = floor(sqrt(tokens)); what is in front
    of those s * s tokens (a class token) gets zeros.

    Args:
        config: see `GhnConfig`.
    """

    def __init__(self, config: GhnConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = NodeEmbedding(config)
        self.encoder: GatedGnn | Graphormer = (
            GatedGnn(config.width)
            if config.encoder == "gated"
            else Graphormer(config.width, config.heads, config.layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.head = make_head(config)
        if config.encoder == "graphormer":
            self._start_embeddings()

    @torch.no_grad()
    def _start_embeddings(self) -> None:
        """As the public GHN-3: N(0, 1 / width of the embedding), cut at 2 as in ViTs."""
        for module in self.modules():
            if isinstance(module, nn.Embedding) and module is not self.embedding.bits:
                nn.init.trunc_normal_(module.weight, std=module.embedding_dim**-0.5)

    def forward(
        self,
        graphs: Sequence[Graph],
        *,
        bits: Bits | Sequence[Bits] = None,
        skeletons: Sequence[nn.Module] | None = None,
    ) -> list[dict[str, Tensor]]:
        """See `predict`, which is the same by name; this one is for wrappers such as DDP."""
        graphs = list(graphs)
        require(bool(graphs), "graphs", "at least one", 0, "ghn")
        for graph in graphs:
            check_graph(graph)
        if bits is None or isinstance(bits, (int, Mapping)):
            bits = [bits] * len(graphs)
        require(len(bits) == len(graphs), "bits", f"{len(graphs)}, one a graph", len(bits), "ghn")
        features = self.encode(graphs, bits)
        predictions = self._decode(features, graphs)
        if skeletons is None:
            return predictions
        rule = f"{len(graphs)}, one a graph"
        require(len(skeletons) == len(graphs), "skeletons", rule, len(skeletons), "ghn")
        return [fit(p, s) for p, s in zip(predictions, skeletons, strict=True)]

    def predict(
        self,
        graphs: Sequence[Graph],
        *,
        bits: Bits | Sequence[Bits] = None,
        skeletons: Sequence[nn.Module] | None = None,
    ) -> list[dict[str, Tensor]]:
        """The parameters of each graph's network, by their names in its state_dict.

        Args:
            graphs: at least one; they are encoded and decoded together and do not influence each
                other.
            bits: what the weights will be quantized to: one width for all, None for float, or a
                mapping from the names of nodes (mixed precision; nodes that are not named are
                float); or a sequence with one of these for each graph. Only with bit_widths in the
                config.
            skeletons: the networks, if the tensors are to have exactly the shapes of their
                parameters (a graph calls a linear layer's weight a 1 x 1 convolution's). Any
                device, also "meta".

        Returns:
            For each graph a dict of tensors on the GHN's device, differentiable in its parameters.

        Raises:
            ValueError: a graph that is none (edges against the order, an unknown primitive, a shape
                that no head decodes); a bit width that the config does not have; a prediction that
                does not fit its skeleton.
        """
        return self(graphs, bits=bits, skeletons=skeletons)

    def encode(self, graphs: Sequence[Graph], bits: Sequence[Bits]) -> Tensor:
        """The node features [N, d] that are decoded, the nodes of all graphs one after another."""
        x = self.embedding(graphs, bits)
        return self.norm(self.encoder(x, [graph.adjacency for graph in graphs]))

    def _decode(self, features: Tensor, graphs: Sequence[Graph]) -> list[dict[str, Tensor]]:
        targets: dict[Target, list[int]] = {}
        nodes: dict[int, Node] = {}
        start = 0
        for graph in graphs:
            for row, target in targets_of(graph, self.config):
                targets.setdefault(target, []).append(start + row)
                nodes[start + row] = graph.nodes[row]
            start += len(graph.nodes)
        decoded = self.head(features, targets)
        values = {
            row: value
            for target, rows in targets.items()
            for row, value in zip(rows, decoded[target].unbind(0), strict=True)
        }
        predictions, start = [], 0
        for graph in graphs:
            rows = [row for row in range(start, start + len(graph.nodes)) if row in nodes]
            named = [pair for row in rows for pair in parameters_of(nodes[row], values[row])]
            predictions.append(dict(named))
            start += len(graph.nodes)
        return predictions


def check_graph(graph: Graph) -> None:
    """Raises: ValueError if the adjacency is not upper triangular with a row for each node."""
    edges, count = graph.adjacency, len(graph.nodes)
    require(count > 0, "graph", "of at least one node", count, "ghn")
    shape = tuple(edges.shape)
    require(shape == (count, count), "adjacency", f"of shape {(count, count)}", shape, "ghn")
    wrong = int(edges.tril().count_nonzero()) + int((edges < 0).sum())
    rule = "upper triangular, of edges of at least 0"
    require(wrong == 0, "adjacency", rule, f"{wrong} other entries", "ghn")


def targets_of(graph: Graph, config: GhnConfig) -> Iterator[tuple[int, Target]]:
    """(index of the node, what is decoded for it) for each node with parameters."""
    weights = [i for i, n in enumerate(graph.nodes) if n.parameters and _is_weight(n)]
    last = weights[-1] if weights else -1
    classifies = last >= 0 and _fits_classes(graph.nodes[last], config.classes)
    for index, node in enumerate(graph.nodes):
        if not node.parameters:
            continue
        shape = as_weight_shape(node)
        if len(node.shape) == 1:
            ends = classifies and index == last + 1 and node.primitive == "bias"
            yield index, Target("class_bias" if ends else "vector", shape)
        elif node.primitive == "pos_enc":
            yield index, Target("weight", shape)
        else:
            size = fan_in_gain(shape, depthwise=node.groups > 1 and shape[1] == 1)
            ends = classifies and index == last
            yield index, Target("classifier" if ends else "weight", shape, config.gain * size)


def _is_weight(node: Node) -> bool:
    return len(node.shape) > 1 and node.primitive != "pos_enc"


def _fits_classes(node: Node, classes: int) -> bool:
    c_out, _, k_h, k_w = as_weight_shape(node)
    return node.primitive == "conv" and (c_out, k_h, k_w) == (classes, 1, 1)


def parameters_of(node: Node, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A node's parameters from what was decoded for it, [2, c] or [c_out, c_in, k_h, k_w]."""
    if len(node.shape) == 1:
        weight, bias = value.unbind(0)
        for i, name in enumerate(node.parameters):
            yield name, weight if i == 0 and node.primitive in NORMS else bias
        return
    if node.primitive == "pos_enc" and len(node.shape) < 4:
        tokens = value.flatten(2).transpose(1, 2)
        value = F.pad(tokens, (0, 0, node.shape[-2] - tokens.shape[1], 0))
    for name in node.parameters:
        yield name, value if value.shape == node.shape else value.reshape(node.shape)


def fit(prediction: Mapping[str, Tensor], skeleton: nn.Module) -> dict[str, Tensor]:
    """The tensors in the shapes of the skeleton's parameters; only dimensions of 1 are added or
    taken away.

    Raises:
        ValueError: a name that the skeleton does not have, or a tensor of another shape.
    """
    shapes = {n: p.shape for n, p in skeleton.named_parameters(remove_duplicate=False)}
    fitted = {}
    for name, value in prediction.items():
        require(name in shapes, "skeleton", f"one with the parameter {name}", "none", "ghn")
        same = _without_ones(value.shape) == _without_ones(shapes[name])
        rule, got = f"of shape {tuple(shapes[name])}", tuple(value.shape)
        require(same, f"prediction of {name}", rule, got, "ghn")
        fitted[name] = value.reshape(shapes[name])
    return fitted


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1]
