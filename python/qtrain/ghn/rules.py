"""From traced operations to nodes: which operation is which primitive.

One set of rules serves both tracers, because torch.export's operators are called what the functions
of torch and torch.nn.functional are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from .graph import Graph, Node, adjacency

SUMS = frozenset(("add", "iadd", "radd", "sub", "isub", "rsub"))
JOINS = frozenset(("cat", "concat", "concatenate", "stack"))
PRODUCTS = frozenset(("mul", "imul", "rmul", "multiply", "div", "truediv"))
CONTRACTIONS = frozenset(("matmul", "imatmul", "bmm", "einsum"))
SOFTMAX = frozenset(("softmax", "_softmax"))
# only the first argument decides the value; the second lends its shape or type
LIKE = frozenset(("expand_as", "view_as", "reshape_as", "type_as", "to"))
# a number or a shape, whatever it is asked of
MEASURES = frozenset(("size", "dim", "ndimension", "numel", "stride", "len", "sym_size", "getattr"))
# of an activation they take the shape or the device alone
CREATIONS = frozenset(
    f"{what}_like" for what in ("zeros", "ones", "full", "empty", "rand", "randn")
) | frozenset(f"new_{what}" for what in ("zeros", "ones", "full", "empty", "tensor"))
TENSOR_ATTRIBUTES = frozenset(("T", "mT", "H", "mH", "data", "real"))
# without parameters, by name; a mean is the global average however it is written
POOLS = {
    "max_pool2d": "max_pool",
    "max_pool2d_with_indices": "max_pool",
    "adaptive_max_pool2d": "max_pool",
    "avg_pool2d": "avg_pool",
    "adaptive_avg_pool2d": "glob_avg",
    "mean": "glob_avg",
}
# as modules, which torch.fx leaves whole
POOL_MODULES: dict[type[nn.Module], str] = {
    nn.MaxPool2d: "max_pool",
    nn.AdaptiveMaxPool2d: "max_pool",
    nn.AvgPool2d: "avg_pool",
    nn.AdaptiveAvgPool2d: "glob_avg",
}
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class NoPrimitiveError(ValueError):
    """An operation that the graph hypernetwork has no primitive for."""


@dataclass(frozen=True)
class Value:
    """What the graph knows of a value in the traced forward.

    Attributes:
        sources: nodes that it was made from; none for numbers, shapes and constants.
        parameters: those of the model that it was made from without any node.
        scores: the operation that multiplied two activations, for attention's scores; "" else.
        soft: after a softmax of scores.
    """

    sources: frozenset[int] = frozenset()
    parameters: tuple[str, ...] = ()
    scores: str = ""
    soft: bool = False


NOTHING = Value()


def merged(values: Iterable[Value]) -> Value:
    """One value made from several, by an operation that is no node."""
    values = tuple(values)
    return Value(
        frozenset().union(*(value.sources for value in values)),
        tuple(dict.fromkeys(name for value in values for name in value.parameters)),
        next((value.scores for value in values if value.scores), ""),
        any(value.soft for value in values),
    )


class Builder:
    """Grows a graph, operation by operation in the order of the forward.

    Args:
        model: for the shapes and names of its parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        self.nodes: list[Node] = []
        self.sources: list[frozenset[int]] = []
        self.squeezed: set[int] = set()  # averages inside a gate on channels
        self.taken: set[str] = set()
        named = list(model.named_parameters(remove_duplicate=False))
        first: dict[int, str] = {}
        for name, parameter in named:
            first.setdefault(id(parameter), name)
        self.canonical = {name: first[id(parameter)] for name, parameter in named}
        self.shapes = {name: tuple(parameter.shape) for name, parameter in named}

    def graph(self) -> Graph:
        """What has grown, the averages inside gates left out."""
        kept = [i for i in range(len(self.nodes)) if i not in self.squeezed]
        place = {node: i for i, node in enumerate(kept)}
        sources = [{place[s] for s in self.around(self.sources[node])} for node in kept]
        return Graph(tuple(self.nodes[i] for i in kept), adjacency(sources))

    def around(self, sources: frozenset[int]) -> frozenset[int]:
        """The sources, each one that is left out replaced by its own."""
        found: frozenset[int] = frozenset()
        for source in sources:
            left_out = source in self.squeezed
            found |= self.around(self.sources[source]) if left_out else {source}
        return found

    def add(
        self,
        primitive: str,
        name: str,
        sources: Iterable[int] = (),
        *,
        shape: tuple[int, ...] = (),
        parameters: tuple[str, ...] = (),
        groups: int = 1,
    ) -> Value:
        """A node. What an earlier node fills is not filled again: it has no parameters then."""
        parameters = tuple(dict.fromkeys(self.canonical[p] for p in parameters))
        fresh = tuple(p for p in parameters if p not in self.taken)
        self.taken.update(fresh)
        self.nodes.append(Node(primitive, name, shape if fresh else (), fresh, groups))
        self.sources.append(frozenset(sources))
        return Value(frozenset({len(self.nodes) - 1}))

    def activation(self, value: Value, name: str) -> frozenset[int]:
        """The sources of what an operation reads; parameters become ``pos_enc`` nodes.

        Raises:
            NoPrimitiveError: it is the product of two activations, and not attention.
        """
        if value.scores:
            raise NoPrimitiveError(
                f"graph: model must multiply activations in attention or gates only, got "
                f"{value.scores!r}, whose product {name!r} reads"
            )
        return value.sources | self.embeddings(value)

    def embeddings(self, value: Value) -> frozenset[int]:
        found: frozenset[int] = frozenset()
        for parameter in value.parameters:
            shape = self.shapes[parameter]
            found |= self.add("pos_enc", parameter, shape=shape, parameters=(parameter,)).sources
        return found

    def weighted(
        self,
        name: str,
        value: Value,
        weight: str,
        bias: str | None,
        *,
        groups: int = 1,
        dilated: bool = False,
    ) -> Value:
        """A convolution or linear layer, and its bias."""
        shape = self.shape(name, weight)
        if len(shape) == 2:
            shape = (*shape, 1, 1)
        if len(shape) != 4:
            raise NoPrimitiveError(
                f"graph: model must have the weights of Conv2d and Linear only, got {weight!r} of "
                f"shape {shape}"
            )
        primitive = "conv" if groups == 1 else "dil_conv" if dilated else "sep_conv"
        read = self.activation(value, name)
        out = self.add(primitive, name, read, shape=shape, parameters=(weight,), groups=groups)
        if bias is None:
            return out
        shape = self.shape(name, bias)
        return self.add("bias", name, out.sources, shape=shape, parameters=(bias,))

    def norm(self, primitive: str, name: str, value: Value, parameters: tuple[str, ...]) -> Value:
        """BatchNorm or LayerNorm, its weight and bias in one node."""
        shape = self.shape(name, parameters[0]) if parameters else ()
        if len(shape) > 1:
            raise NoPrimitiveError(
                f"graph: model must have norms over one dimension, got {name!r} over {shape}"
            )
        read = self.activation(value, name)
        return self.add(primitive, name, read, shape=shape, parameters=parameters)

    def shape(self, name: str, parameter: str) -> tuple[int, ...]:
        if parameter not in self.shapes:
            raise NoPrimitiveError(
                f"graph: model must have plain parameters, got {name!r}, whose "
                f"{parameter.rpartition('.')[2]} is computed"
            )
        return self.shapes[parameter]

    def attention(self, name: str, module: nn.MultiheadAttention, values: list[Value]) -> Value:
        """torch's own attention: projections in, ``msa``, projection out."""
        bias = None if module.in_proj_bias is None else f"{name}.in_proj_bias"
        if module.in_proj_weight is not None:
            inputs = self.weighted(name, merged(values), f"{name}.in_proj_weight", bias)
        else:
            weights = [f"{name}.{which}_proj_weight" for which in "qkv"]
            inputs = merged(
                self.weighted(name, value, weight, None)
                for value, weight in zip(values, weights, strict=False)
            )
            if bias is not None:
                shape = self.shapes[bias]
                inputs = self.add("bias", name, inputs.sources, shape=shape, parameters=(bias,))
        mixed = self.add("msa", name, inputs.sources)
        out = f"{name}.out_proj"
        out_bias = None if module.out_proj.bias is None else f"{out}.bias"
        return self.weighted(out, mixed, f"{out}.weight", out_bias)

    def module(self, name: str, module: nn.Module, values: list[Value]) -> Value:
        """The call of a module that is traced as a whole.

        Raises:
            NoPrimitiveError: it has parameters and no primitive.
        """
        own = {key: f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)}
        value = values[0] if values else NOTHING
        if isinstance(module, nn.MultiheadAttention):
            return self.attention(name, module, values)
        if isinstance(module, nn.Conv2d):
            dilated = min(module.dilation) > 1
            how: dict[str, Any] = {"groups": module.groups, "dilated": dilated}
            return self.weighted(name, value, f"{name}.weight", own.get("bias"), **how)
        if isinstance(module, nn.Linear):
            return self.weighted(name, value, f"{name}.weight", own.get("bias"))
        if isinstance(module, (*BATCH_NORMS, nn.LayerNorm)):
            kind = "ln" if isinstance(module, nn.LayerNorm) else "bn"
            both = tuple(own[key] for key in ("weight", "bias") if key in own)
            return self.norm(kind, name, value, both)
        if next(module.parameters(), None) is not None:
            raise NoPrimitiveError(
                f"graph: model must be made of operations with a primitive, got {name!r} "
                f"({type(module).__name__}), which has parameters and none"
            )
        for pool, primitive in POOL_MODULES.items():
            if isinstance(module, pool):
                return self.add(primitive, name, self.activation(value, name))
        op = "softmax" if isinstance(module, nn.Softmax) else type(module).__name__
        return self.operation(op, name, values)

    def function(self, op: str, node: fx.Node, values: list[Value]) -> Value:
        """The call of a function, a method or an operator of torch.export.

        Args:
            op: its name, without the underscores of in-place forms.
            values: of the nodes that it reads, in the order of its arguments.

        Raises:
            NoPrimitiveError: it has none.
        """
        if op in ("conv2d", "linear", "batch_norm", "layer_norm"):
            return self.layer(op, node, values)
        if op == "getattr" and node.args[1] in TENSOR_ATTRIBUTES:
            return values[0]
        return self.operation(op, node.name, values)

    def layer(self, op: str, node: fx.Node, values: list[Value]) -> Value:
        """A layer whose parameters come as arguments."""
        rest = [value for value in values[1:] if value.sources or value.parameters]
        if any(value.sources or len(value.parameters) != 1 for value in rest):
            raise NoPrimitiveError(
                f"graph: model must have plain parameters, got {op!r} at node {node.name!r} with "
                "computed ones"
            )
        # torch.nn.functional and aten have BatchNorm's in other places, but the weight comes first
        given = tuple(value.parameters[0] for value in rest)
        name = given[0].rpartition(".")[0] or given[0] if given else node.name
        if op in ("batch_norm", "layer_norm"):
            return self.norm("bn" if op == "batch_norm" else "ln", name, values[0], given)
        if not given:  # a fixed kernel: blurring, say
            return values[0]
        # linear has neither, and no arguments at these places
        dilation, groups = argument(node, 5, "dilation"), argument(node, 6, "groups")
        dilated = min(dilation) > 1 if isinstance(dilation, (tuple, list)) else dilation > 1
        how: dict[str, Any] = {"groups": groups, "dilated": dilated}
        bias = given[1] if len(given) > 1 else None
        return self.weighted(name, values[0], given[0], bias, **how)

    def operation(self, op: str, name: str, values: list[Value]) -> Value:
        """An operation without parameters of its own."""
        if op in MEASURES or op in CREATIONS:
            return NOTHING
        if op in LIKE:
            return values[0]
        whole = merged(values)
        if not whole.sources and op not in JOINS:
            return whole
        if op in SUMS or op in JOINS:
            return self.joined(op, name, whole)
        if op in POOLS:
            return self.add(POOLS[op], name, self.activation(whole, name))
        if op == "scaled_dot_product_attention":
            return self.add("msa", name, self.activation(whole, name))
        if op in SOFTMAX:
            return replace(whole, soft=bool(whole.scores))
        if op in CONTRACTIONS:
            return self.contracted(op, name, values)
        if op in PRODUCTS:
            return self.product(op, name, values)
        differ = len({value.sources for value in values if value.sources}) > 1
        if differ or whole.parameters:
            raise without_primitive(op, name, values)
        return whole

    def joined(self, op: str, name: str, whole: Value) -> Value:
        """A sum or concatenation: a node if it joins different operations."""
        if not whole.sources and len(whole.parameters) < 2:
            return whole
        sources = whole.sources | self.embeddings(whole)
        if len(sources) < 2:
            return Value(sources, scores=whole.scores, soft=whole.soft)
        out = self.add("sum" if op in SUMS else "concat", name, sources)
        # a bias on attention's scores leaves them scores
        return replace(out, scores=whole.scores, soft=whole.soft)

    def contracted(self, op: str, name: str, values: list[Value]) -> Value:
        """A product of matrices: scores of attention, or their product with what they weigh."""
        whole = merged(values)
        if whole.parameters:
            raise without_primitive(op, name, values)
        if whole.soft:
            return self.add("msa", name, whole.sources)
        both = sum(bool(value.sources) for value in values) > 1
        return replace(whole, scores=whole.scores or (name if both else ""))

    def product(self, op: str, name: str, values: list[Value]) -> Value:
        """Elementwise: a gate on channels, or no node. A parameter among the factors is dropped."""
        sources = {value.sources for value in values if value.sources}
        if len(sources) < 2:
            return replace(merged(values), parameters=())
        for gated, gate in ((a, b) for a in sources for b in sources if a != b):
            averages = self.averages_between(gated, gate)
            if len(sources) == 2 and averages and not merged(values).scores:
                self.squeezed |= averages
                return self.add("cse", name, gated | gate)
        raise without_primitive(op, name, values)

    def averages_between(self, gated: frozenset[int], gate: frozenset[int]) -> frozenset[int]:
        """The global averages over ``gated`` that all of ``gate`` is made from; none if a part of
        it is made otherwise."""
        averages: set[int] = set()
        ahead, seen = list(gate), set(gate)
        while ahead:
            node = ahead.pop()
            if self.nodes[node].primitive == "glob_avg" and self.sources[node] == gated:
                averages.add(node)
            elif node in gated or not self.sources[node]:
                return frozenset()
            else:
                ahead.extend(self.sources[node] - seen)
                seen |= self.sources[node]
        return frozenset(averages)


def argument(node: fx.Node, position: int, name: str) -> Any:
    """An argument that is 1 if it is not given, of functions that torch and aten order alike."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, 1)


def without_primitive(op: str, name: str, values: list[Value]) -> NoPrimitiveError:
    parameters = merged(values).parameters
    reads = f", which reads {parameters[0]!r}" if parameters else " of different activations"
    return NoPrimitiveError(
        f"graph: model must be made of operations with a primitive, got {op!r} at node "
        f"{name!r}{reads}"
    )
