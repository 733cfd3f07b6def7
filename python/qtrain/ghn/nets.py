"""The networks that a GHN is trained on: skeletons without weights of their own, kept once made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qkernels.nn import quantizable_layers

from ..data import Dataset
from ..recipe import require
from .graph import Graph, build_graph
from .quantizers import InputQuantizer, Quantizer, hook_inputs
from .space import Space, draw_net, without_norm

# skeletons and graphs of so many networks stay in memory (an adjacency is N x N)
KEPT = 2048


@dataclass(frozen=True)
class TrainNet:
    """A network to be run with predicted weights.

    Attributes:
        skeleton: on the meta device, in training mode; BatchNorm has batch statistics only.
        inputs: the quantizers of its layers' inputs, by layer, in the order of registration.
    """

    graph: Graph
    skeleton: nn.Module
    inputs: Mapping[str, InputQuantizer]

    def run(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:  # [N, C, H, W]
        """Its outputs [N, classes] with these weights, differentiable in them."""
        return functional_call(self.skeleton, dict(weights), (x,))


class NetPool:
    """The first ``count`` networks of a space's train split, made when they are first asked for.

    Args:
        norm: False: without BatchNorm (the convolutions have biases instead).

    Raises:
        ValueError: a space whose networks have no BatchNorm to leave out.
    """

    def __init__(
        self,
        space: Space | str,
        seed: int,
        count: int,
        data: Dataset,
        quantizer: Quantizer,
        *,
        norm: bool = True,
    ) -> None:
        self.space, self.seed, self.count, self.norm = space, seed, count, norm
        self.shape = data.channels, data.classes, data.size
        self.quantizer = quantizer
        self.get = lru_cache(KEPT)(self._make)

    def _make(self, index: int) -> TrainNet:
        net = draw_net(self.space, "train", self.seed, index)
        spec = (net if self.norm else without_norm(net)).spec
        with torch.device("meta"):
            skeleton: nn.Module = spec.build(*self.shape)
        return prepare_net(skeleton, self.quantizer)


def prepare_net(skeleton: nn.Module, quantizer: Quantizer) -> TrainNet:
    """A network for training, changed in place.

    Args:
        skeleton: on the meta device; all of its parameters are to be predicted.

    Raises:
        ValueError: it cannot be traced, or has a parameter that its graph does not hold.
    """
    graph = build_graph(skeleton)
    left = graph.undecoded(skeleton)
    require(not left, "network", "one whose parameters are all predicted", ", ".join(left), "ghn")
    layers = {layer.names[0]: layer.module for layer in quantizable_layers(skeleton, "ghn")}
    for module in skeleton.modules():
        if isinstance(module, nn.BatchNorm2d):
            # the moving averages would be those of all networks' weights
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return TrainNet(graph, skeleton.train(), hook_inputs(layers, quantizer))
