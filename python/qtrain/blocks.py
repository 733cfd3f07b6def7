"""A model as n stages in sequence, cut at the outputs of its blocks.

A stage refers to the model's own modules: nothing is copied, and nothing is changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

from torch import Tensor, fx, nn

from qkernels.nn.fold import TRACE_ERRORS

from .recipe import require

Stage = Callable[[Tensor], Tensor]


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules at whose outputs a model can be cut, in the order of the forward.

    A block is a child of an `nn.Sequential` that has children with layers of their own: residual
    blocks of torchvision and timm, MobileNet's inverted ones, encoder layers of a ViT. A Sequential
    within a Sequential is opened up; what is within a block is not. Children without a weight
    (activation, pooling) belong to the one before, and their name is the block's then. A model
    without such a Sequential is cut in those of bare layers (VGG), one block a weight.

    Raises:
        ValueError: fewer than two are found.
    """
    names = tuple(_search(model, "", bare=False) or _search(model, "", bare=True))
    rule = "one with two blocks or more in nn.Sequential containers; name the blocks (blocks=...)"
    require(len(names) > 1, "model", rule, f"{type(model).__name__} with {len(names)}", "bwrf")
    return names


def _search(module: nn.Module, name: str, *, bare: bool) -> list[str]:
    """Blocks of the outermost chains; ``bare``: a Sequential of single layers is a chain too."""
    if isinstance(module, nn.Sequential):
        return _in_chain(module, name) if bare or _is_chain(module) else []
    found = (_search(c, _join(name, key), bare=bare) for key, c in module.named_children())
    return [block for blocks in found for block in blocks]


def _in_chain(chain: nn.Sequential, name: str) -> list[str]:
    found: list[str] = []
    extendable = False
    for key, child in chain.named_children():
        here = _join(name, key)
        if _is_chain(child):
            found += _in_chain(child, here)  # type: ignore[arg-type]
            extendable = False
        elif _has_weight(child):
            found.append(here)
            extendable = True
        elif extendable:
            found[-1] = here
    return found


def _is_chain(module: nn.Module) -> bool:
    """Whether it is a Sequential of more than single layers."""
    return isinstance(module, nn.Sequential) and any(
        _has_weight(child) and any(True for _ in child.children()) for child in module
    )


def _has_weight(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters())


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def split(model: nn.Module, blocks: Sequence[str]) -> list[Stage]:
    """The model as one stage per block: model(x) is stages[-1](.. stages[0](x)).

    Stage 1 begins with the model's input, stage k ends with the output of block k, and the last one
    with that of the model. What lies between two blocks belongs to the later stage.

    Only the forwards of the modules that contain blocks are traced by torch.fx; each block and each
    module beside them is called as a whole. Values that these forwards read while they are traced
    (`self.training`, a size) are kept.

    Args:
        blocks: names of modules, in the order of the forward, each called once.

    Raises:
        TypeError: blocks is a single string.
        ValueError: fewer than two blocks; a name that is not there; blocks out of order or not
            called once; more than the block's output goes on after a block; a forward that torch.fx
            cannot trace.
    """
    if isinstance(blocks, str):
        raise TypeError(f"bwrf: blocks must be a list of names, got {blocks!r}")
    _check_names(model, blocks)
    graph = _trace(model, blocks)
    nodes = list(graph.nodes)
    cuts = _cuts(nodes, blocks)
    starts = [0, *(cut + 1 for cut in cuts)]
    ends = [*cuts, len(nodes) - 1]
    sources = [None, *(nodes[cut] for cut in cuts)]
    return [
        fx.Interpreter(model, graph=_part(nodes[start : end + 1], source)).run
        for start, end, source in zip(starts, ends, sources, strict=True)
    ]


def _check_names(model: nn.Module, blocks: Sequence[str]) -> None:
    sound = len(set(blocks)) == len(blocks) > 1
    require(sound, "blocks", "two names or more, each once", list(blocks), "bwrf")
    known = dict(model.named_modules(remove_duplicate=False))
    for name in blocks:
        if not name or name not in known:
            near = [k for k in known if k and k.count(".") <= name.count(".")]
            rule = f"names of modules of {type(model).__name__} ({', '.join(near[:20])}, ...)"
            require(False, "blocks", rule, repr(name), "bwrf")


class _Tracer(fx.Tracer):
    """Looks only into modules that contain a block."""

    def __init__(self, blocks: Sequence[str]) -> None:
        super().__init__()
        self.blocks = blocks

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not any(block.startswith(f"{module_qualified_name}.") for block in self.blocks)


def _trace(model: nn.Module, blocks: Sequence[str]) -> fx.Graph:
    # all arguments but the first stay at their defaults (timm's attn_mask)
    _, *others = inspect.signature(model.forward).parameters.values()
    defaults = {p.name: p.default for p in others if p.default is not p.empty}
    try:
        return _Tracer(blocks).trace(model, defaults or None)
    except TRACE_ERRORS as error:
        raise ValueError(
            "bwrf: model must be one whose forward outside of its blocks torch.fx can trace, "
            f"got {type(model).__name__} ({type(error).__name__}: {error}). Name larger blocks "
            "(blocks=...), so that what cannot be traced lies within one"
        ) from error


def _cuts(nodes: list[fx.Node], blocks: Sequence[str]) -> list[int]:
    """Places of the outputs of all blocks but the last."""
    places = []
    for name in blocks:
        calls = [i for i, n in enumerate(nodes) if n.op == "call_module" and n.target == name]
        rule = "modules that the forward calls once each, none within another"
        require(len(calls) == 1, "blocks", rule, f"{name!r}, called {len(calls)} times", "bwrf")
        places += calls
    if places != sorted(places):
        order = [name for _, name in sorted(zip(places, blocks, strict=True))]
        rule = f"in the order of the forward ({', '.join(order)})"
        require(False, "blocks", rule, ", ".join(blocks), "bwrf")
    number = {node: place for place, node in enumerate(nodes)}
    for place, name in zip(places[:-1], blocks, strict=False):
        alive = [
            node.name
            for node in nodes[: place + 1]
            # a parameter is read again where it is needed
            if node.op != "get_attr" and any(number[user] > place for user in node.users)
        ]
        rule = f"sequential: after {name!r} its output alone may be used"
        got = f"use of {', '.join(alive) or 'nothing'}"
        require(alive == [nodes[place].name], "blocks", rule, got, "bwrf")
    return places[:-1]


def _part(nodes: list[fx.Node], source: fx.Node | None) -> fx.Graph:
    """The graph of some successive nodes; its input is what ``source`` gave."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    if source is not None:
        copies[source] = graph.placeholder("x")

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:
            copies[node] = graph.node_copy(node, copied)
        return copies[node]

    for node in nodes:
        copied(node)
    if nodes[-1].op != "output":
        graph.output(copies[nodes[-1]])
    return graph
