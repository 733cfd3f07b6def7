"""fold_batchnorm: the BatchNorm after a Conv, ConvTranspose or Linear layer becomes part of it."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from qkernels.nn.prepare import log, require_float

NORMS: tuple[type, ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS: tuple[type, ...] = (*CONVS, *TRANSPOSED, nn.Linear)

# what tracing runs is the model's own forward, on stand-ins for tensors; these are the errors that
# Python and torch raise there for a stand-in
TRACE_ERRORS = (
    fx.proxy.TraceError,
    TypeError,
    ValueError,
    RuntimeError,
    AttributeError,
    LookupError,
    AssertionError,
)


class Pair(NamedTuple):
    """A layer and the BatchNorm that alone reads its output."""

    layer: Any  # of LAYERS
    norm: Any  # of NORMS


def fold_batchnorm(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Fold each BatchNorm that follows a Conv, ConvTranspose or Linear layer into that layer.

        weight <- weight * gamma / sqrt(var + eps)       per output channel
        bias   <- (bias - mean) * gamma / sqrt(var + eps) + beta

    with the running statistics, so the result equals the model in eval mode (up to rounding; the
    product is taken in fp64). The BatchNorm becomes an `nn.Identity` under the same name; a layer
    without bias gets one; all other names stay.

    The pairs come from torch.fx, which traces the model in eval mode. A pair is folded if nothing
    else reads the layer's output, and both are called once, of these very classes, with running
    statistics and parameters of their own. A model without such a pair comes back unchanged.

    Args:
        model: a float model that torch.fx can trace.
        inplace: change the model itself and not a copy.

    Raises:
        ValueError: torch.fx cannot trace the model, or it is prepared (fold first, then prepare).
    """
    require_float("fold_batchnorm", model)
    if not inplace:
        model = copy.deepcopy(model)
    pairs = find_pairs(model)
    for pair in pairs:
        fold(pair)
    folded = {id(pair.norm) for pair in pairs}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) in folded:
                setattr(parent, name, nn.Identity().train(child.training))
    return model


def find_pairs(model: nn.Module) -> list[Pair]:
    """The pairs that can be folded, in the order of the forward."""
    graph = trace(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = Counter(id(modules[n.target]) for n in graph.nodes if n.op == "call_module")
    owners = Counter(
        id(p) for m in model.modules() for p in m._parameters.values() if p is not None
    )
    # a forward that reads a module's tensors itself would see them change
    read = {id(modules.get(n.target.rpartition(".")[0])) for n in graph.nodes if n.op == "get_attr"}
    pairs = []
    for node in graph.nodes:
        pair = pair_at(node, modules)
        if pair is None:
            continue
        reason = why_not(pair, calls, owners, read)
        if reason is None:
            pairs.append(pair)
        else:
            log.info("fold_batchnorm: %s stays: %s", node.target, reason)
    return pairs


def trace(model: nn.Module) -> fx.Graph:
    """The model's graph in eval mode."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        return fx.Tracer().trace(model)
    except TRACE_ERRORS as error:
        raise ValueError(
            "fold_batchnorm: model must be one that torch.fx can trace, "
            f"got {type(model).__name__} ({type(error).__name__}: {error}). "
            "Fold its traceable submodules one by one, or train with BatchNorm unfolded"
        ) from error
    finally:
        for module, flag in training.items():
            module.training = flag


def pair_at(node: fx.Node, modules: dict[Any, nn.Module]) -> Pair | None:
    """The layer and BatchNorm at a call of a BatchNorm whose only input is a layer's output."""
    if node.op != "call_module" or type(modules[node.target]) not in NORMS:
        return None
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
        return None
    layer = modules[source.target]
    return Pair(layer, modules[node.target]) if type(layer) in LAYERS else None


def why_not(pair: Pair, calls: Counter[int], owners: Counter[int], read: set[int]) -> str | None:
    """Why a pair must not be folded, or None."""
    layer, norm = pair
    if calls[id(layer)] != 1 or calls[id(norm)] != 1:
        return "the layer or the norm is called more than once"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    if "weight" not in layer._parameters or layer.weight is None:
        return "the layer's weight is not a plain parameter"
    if any(owners[id(p)] != 1 for p in (layer.weight, layer.bias) if p is not None):
        return "the layer shares a parameter with another"
    if id(layer) in read or id(norm) in read:
        return "the forward reads the layer's or the norm's tensors itself"
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if norm.num_features != channels:
        return "the norm is over another dimension than the layer's output channels"
    return None


@torch.no_grad()
def fold(pair: Pair) -> None:
    """Fold one pair, in fp64, into new parameters of the layer's dtype."""
    layer, norm = pair
    inv = (norm.running_var.double() + norm.eps).rsqrt()
    factor = inv if norm.weight is None else norm.weight.double() * inv  # [out]
    shift = -norm.running_mean.double()
    if layer.bias is not None:
        shift = shift + layer.bias.double()
    bias = shift * factor
    if norm.bias is not None:
        bias = bias + norm.bias.double()
    weight = scaled(layer, factor)
    old = layer.weight
    layer.weight = nn.Parameter(weight.to(old.dtype), requires_grad=old.requires_grad)
    layer.bias = nn.Parameter(bias.to(old.dtype), requires_grad=old.requires_grad)


def scaled(layer: Any, factor: Tensor) -> Tensor:
    """The layer's weight in fp64, each output channel times its factor [out]."""
    weight = layer.weight.double()
    if not isinstance(layer, TRANSPOSED):
        return weight * factor.reshape(-1, *[1] * (weight.dim() - 1))
    # [in, out / groups, ...]: the input channels of a group go to its own output channels
    groups = layer.groups
    split = weight.reshape(groups, layer.in_channels // groups, *weight.shape[1:])
    factor = factor.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))
    return (split * factor).reshape(weight.shape)
