"""Predicted weights for any model: `predict`, and `predicted_model`, which is ready to be used."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from ..recipe import require
from ..seeds import generator, keeping_globals, seed_globals
from .checkpoint import load_ghn, load_public_ghn2
from .config import GhnConfig
from .decoder import VECTORS
from .embedding import Bits
from .graph import Graph, build_graph
from .model import Ghn, targets_of

# what torch.save writes, and with it the public GHN-2's files
PUBLIC_SUFFIXES = (".pt", ".pth")


def predict(
    model: nn.Module,
    ghn: Ghn | str | Path = "runs/ghn",
    *,
    bits: Bits = None,
    example: Tensor | None = None,
    graph: Graph | None = None,
    noise: float = 0.0,
    rescale: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The parameters that a graph hypernetwork predicts for a model, by their state_dict names.

    ``model.load_state_dict(weights, strict=False)`` takes them. BatchNorm's statistics are not
    among them (`predicted_model` takes them anew), nor are the parameters that the graph does not
    reach (`Graph.undecoded`).

    Beyond the GHN's largest shape weights repeat: channels c and c + 64 of a GHN for CIFAR-10 are
    the same, and gradient descent never parts them if what reads them is the same too. ``noise``
    does: each weight w becomes w + noise * std(w) * e, e ~ N(0, 1) for every element, named by
    (seed, name). OUR choice: norm weights and biases get none.

    Args:
        model: one that `build_graph` can trace, on any device, meta too; it is not changed.
        ghn: a GHN, or its run directory, its model.safetensors, or a public GHN-2's .pt file.
        bits: what the weights will be quantized to, for a GHN with bit_widths; see `Ghn.predict`.
        example: [N, C, H, W], an input, where torch.export is needed; see `build_graph`.
        graph: the model's, if it is there already.
        noise: relative size of the noise that breaks the symmetry; a few per cent for fine-tuning.
        rescale: give each weight of a layer He's standard deviation, sqrt(2 / fan_in) (He et al.,
            arXiv 1502.01852), before the noise. Before BatchNorm the function stays the same, but
            not how far a step of the optimizer moves it.
        seed: names that noise.

    Returns:
        Tensors of the shapes of the model's parameters, detached, in their dtypes and on their
        devices; for a model on meta fp32 on the CPU.

    Raises:
        FileNotFoundError: no such GHN.
        ValueError: a damaged file, or one of something else; a model that cannot be traced (node
            and reason are named); an operation without a primitive; a bit width that the GHN does
            not know; a negative noise.
    """
    require(0 <= noise < math.inf, "noise", "at least 0 and finite", noise, "ghn")
    ghn = as_ghn(ghn)
    graph = build_graph(model, example) if graph is None else graph
    with torch.no_grad():
        (weights,) = ghn.predict([graph], bits=bits, skeletons=[model])
    if rescale:
        weights = {name: _he_sized(w) for name, w in weights.items()}
    if noise:
        weights = {name: _shaken(name, w, noise, seed) for name, w in weights.items()}
    own = dict(model.named_parameters(remove_duplicate=False))
    return {name: _placed(weight, own[name]) for name, weight in weights.items()}


def predicted_model(
    model: nn.Module,
    ghn: Ghn | str | Path = "runs/ghn",
    batches: Iterable[Any] | None = None,
    *,
    bits: Bits = None,
    example: Tensor | None = None,
    graph: Graph | None = None,
    noise: float = 0.0,
    rescale: bool = False,
    seed: int = 0,
) -> nn.Module:
    """A copy of a model with predicted weights, in eval mode.

    Args:
        model: with values, on any device; it is not changed.
        batches: x, or tuples that start with x: BatchNorm's statistics are the mean of theirs, each
            batch counting alike (`torch.optim.swa_utils.update_bn`). Dropout is on in these
            forwards, named by the seed. None: the statistics stay as they are.
        ghn, bits, example, graph, noise, rescale, seed: see `predict`.

    Raises:
        FileNotFoundError, ValueError: as `predict`; a model on meta.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    require(device.type != "meta", "model", "one with values", "one on the meta device", "ghn")
    how: dict[str, Any] = {"bits": bits, "noise": noise, "rescale": rescale, "seed": seed}
    weights = predict(model, ghn, example=example, graph=graph, **how)
    model = copy.deepcopy(model)
    model.load_state_dict(weights, strict=False)
    if batches is not None:
        with keeping_globals():
            seed_globals(seed, 0, "batchnorm")
            update_bn(batches, model, device=device)
    return model.eval()


def as_ghn(ghn: Ghn | str | Path) -> Ghn:
    """The GHN itself, or that of a file: ours, or a public GHN-2 (.pt, .pth).

    Raises:
        FileNotFoundError, ValueError: as `load_ghn` and `load_public_ghn2`.
    """
    if isinstance(ghn, Ghn):
        return ghn
    public = Path(ghn).suffix in PUBLIC_SUFFIXES
    return load_public_ghn2(ghn) if public else load_ghn(ghn)


@dataclass(frozen=True)
class Coverage:
    """How a model's parameters come about.

    Attributes:
        predicted: names of those that are decoded.
        tiled: of these the ones with more channels than the head decodes, which repeat.
        interpolated: of these the ones with a larger kernel than the head decodes.
        undecoded: names of the others, which keep the values they have.
    """

    predicted: tuple[str, ...]
    tiled: tuple[str, ...]
    interpolated: tuple[str, ...]
    undecoded: tuple[str, ...]


def coverage(model: nn.Module, graph: Graph, config: GhnConfig) -> Coverage:
    """What a GHN of this config does for each of the model's parameters.

    Args:
        graph: the model's.
    """
    c_out, c_in, size, _ = config.max_shape
    predicted: list[str] = []
    tiled: list[str] = []
    interpolated: list[str] = []
    for row, (kind, shape, _) in targets_of(graph, config):
        names = graph.nodes[row].parameters
        predicted += names
        if config.head != "tiled":
            continue
        if kind in VECTORS:
            wide = kind == "vector" and shape[0] > max(c_out, c_in)
        else:
            wide = shape[1] > c_in or (kind == "weight" and shape[0] > c_out)
            interpolated += names if max(shape[2:]) > size else ()
        tiled += names if wide else ()
    left = graph.undecoded(model)
    return Coverage(tuple(predicted), tuple(tiled), tuple(interpolated), left)


def _he_sized(weight: Tensor) -> Tensor:
    """A weight [out, in / groups, ...] with He's standard deviation. What does not vary stays, and
    so do embeddings of positions, [1, N, D]."""
    if weight.ndim not in (2, 4) or not weight.std(correction=0) > 0:
        return weight
    return weight * (math.sqrt(2 / weight[0].numel()) / weight.std(correction=0))


def _shaken(name: str, weight: Tensor, noise: float, seed: int) -> Tensor:
    """A weight with its noise. Drawn on the CPU: the same on every device."""
    if weight.ndim < 2:
        return weight
    numbers = torch.randn(weight.shape, generator=generator(seed, 0, f"symmetry/{name}"))
    return weight + noise * weight.std(correction=0) * numbers.to(weight)


def _placed(weight: Tensor, like: Tensor) -> Tensor:
    """In memory of its own: the head decodes many weights into one tensor."""
    if like.is_meta:
        return weight.cpu().float().clone(memory_format=torch.contiguous_format)
    return weight.to(like).clone(memory_format=torch.contiguous_format)
