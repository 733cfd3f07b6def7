"""Traces a model by torch.fx, or else by torch.export, and reads its graph off the trace."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, fx, nn

from qkernels.nn.fold import TRACE_ERRORS

from ..adaround import evaluating
from .graph import Graph
from .rules import BATCH_NORMS, NOTHING, Builder, NoPrimitiveError, Value, merged

# traced as a whole, subclasses too
LAYERS: tuple[type[nn.Module], ...] = (
    nn.Conv2d,
    nn.Linear,
    nn.LayerNorm,
    nn.MultiheadAttention,
    *BATCH_NORMS,
)
# of the images that torch.export is shown if the caller has none
SIZE = 224


class UntraceableError(ValueError):
    """Why a tracer gave up."""


class LayerTracer(fx.Tracer):
    """Stops at layers and at torch's own modules; those that hold others are gone into."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, LAYERS):
            return True
        whole = super().is_leaf_module(m, module_qualified_name)
        return whole and next(m.children(), None) is None


def trace(model: nn.Module, example: Tensor | None = None) -> Graph:
    """See `qtrain.ghn.graph.build_graph`."""
    with evaluating(model):
        try:
            return by_fx(model)
        except (UntraceableError, NoPrimitiveError) as first:
            try:
                return by_export(model, example)
            except UntraceableError as second:
                if isinstance(first, NoPrimitiveError):
                    raise first from second
                raise ValueError(
                    "graph: model must be one that torch.fx or torch.export can trace, got "
                    f"{type(model).__name__}: {first}; {second}"
                ) from first
            except NoPrimitiveError as second:
                # torch.fx names the operation as the model's author wrote it
                raise (first if isinstance(first, NoPrimitiveError) else second) from None


def by_fx(model: nn.Module) -> Graph:
    """Raises: UntraceableError, NoPrimitiveError."""
    tracer = LayerTracer()
    given = inspect.signature(model.forward).parameters.values()
    kept = {p.name: p.default for p in given if p.default is not p.empty}
    try:
        traced = tracer.trace(model, concrete_args=kept or None)
    except TRACE_ERRORS as error:
        last = next(reversed(tracer.graph.nodes), None)
        where = "at the start" if last is None else f"after node {last.name!r}{inside(last)}"
        raise UntraceableError(f"torch.fx stopped {where} ({short(error)})") from error
    modules = dict(model.named_modules(remove_duplicate=False))
    builder = Builder(model)

    def value_of(node: fx.Node, values: list[Value]) -> Value:
        if node.op == "call_module":
            return builder.module(str(node.target), modules[str(node.target)], values)
        if node.op == "get_attr":
            name = str(node.target)
            return Value(parameters=(name,)) if name in builder.shapes else NOTHING
        return builder.function(op_name(node), node, values)

    return read(traced, builder, value_of)


def by_export(model: nn.Module, example: Tensor | None) -> Graph:
    """Raises: UntraceableError, NoPrimitiveError."""
    try:
        exported = torch.export.export(model, (example_for(model, example),))
    except TRACE_ERRORS as error:
        raise UntraceableError(f"torch.export stopped ({short(error)})") from error
    signature = exported.graph_signature
    inputs = set(signature.user_inputs)
    builder = Builder(model)

    def value_of(node: fx.Node, values: list[Value]) -> Value:
        if node.op == "placeholder":
            name = signature.inputs_to_parameters.get(node.name)
            return NOTHING if name is None else Value(parameters=(name,))
        if node.op == "get_attr":
            return NOTHING
        return builder.function(op_name(node), node, values)

    return read(exported.graph, builder, value_of, inputs)


def read(
    traced: fx.Graph,
    builder: Builder,
    value_of: Callable[[fx.Node, list[Value]], Value],
    inputs: Collection[str] | None = None,
) -> Graph:
    """The graph of a trace.

    Args:
        value_of: the value of a node from those that it reads.
        inputs: names of the placeholders that are inputs of the model; None: all are.
    """
    values: dict[fx.Node, Value] = {}
    needed = reached(traced)
    for node in traced.nodes:
        if node not in needed:
            continue
        if node.op == "placeholder" and (inputs is None or node.name in inputs):
            values[node] = builder.add("input", node.name)
        else:
            before = [values[argument] for argument in node.all_input_nodes]
            if only_writes(node) and merged(before).sources:
                raise NoPrimitiveError(
                    "graph: model must use the results of its operations, got one that only "
                    f"writes in place, {raw_name(node)!r} at node {node.name!r}"
                )
            if node.op == "output":
                builder.activation(merged(before), node.name)
            else:
                values[node] = value_of(node, before)
    return builder.graph()


def reached(traced: fx.Graph) -> set[fx.Node]:
    """The nodes that the output depends on, as far as a trace tells, and those that only write."""
    needed: set[fx.Node] = set()
    for node in reversed(traced.nodes):
        if node.op == "output" or only_writes(node) or any(user in needed for user in node.users):
            needed.add(node)
    return needed


def only_writes(node: fx.Node) -> bool:
    """Changes one of its arguments in place by another: nothing in a trace shows who reads that."""
    if not node.op.startswith("call_") or node.op == "call_module" or node.users:
        return False
    name = raw_name(node)
    writes = name == "setitem" or (name.endswith("_") and not name.endswith("__"))
    return writes and len(node.all_input_nodes) > 1


def raw_name(node: fx.Node) -> str:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):  # aten::add.Tensor
        return target.name().partition("::")[2].partition(".")[0]
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def op_name(node: fx.Node) -> str:
    """Of a function, a method or an operator, alike for all three and for in-place forms."""
    name = raw_name(node)
    return name.rstrip("_") if not name.startswith("_") else name


def inside(node: fx.Node) -> str:
    """In which module of the model a node is."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0] if stack else ""
    return f" in {path!r}" if path else ""


def short(error: Exception) -> str:
    """The first line: torch.export explains itself over a page."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"


def example_for(model: nn.Module, example: Tensor | None) -> Tensor:
    if example is not None:
        return example
    convs = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    first = next(convs, None)
    channels = 3 if first is None else first.in_channels
    parameter = next(model.parameters(), torch.zeros(()))
    return parameter.new_zeros(1, channels, SIZE, SIZE)
