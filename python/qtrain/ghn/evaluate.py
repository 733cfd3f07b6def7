"""How well predicted weights do: in float, and quantized after prediction without any training.

A network gets its weights from the GHN and BatchNorm's statistics from training images; then
BatchNorm is folded into the layers, ranges of activations are taken from training images, and the
network is evaluated (Yun and Wong, arXiv 2208.12489). Nothing of it is trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.nn import QConfig, quantizable_layers

from ..data import Batch, Dataset
from ..loop import evaluate
from ..progress import Track
from ..ptq import calibration_images, ptq_qconfig, quantize_after_training
from ..ptq_run import IMAGES as RANGE_IMAGES
from ..recipe import TrainConfig, require
from ..report import bits_name
from ..seeds import keeping_globals, seed_globals
from .embedding import Bits
from .genotype import Draw
from .graph import Graph, build_graph
from .model import Ghn
from .prediction import predicted_model
from .space import Net

# for BatchNorm's statistics, unless there are fewer training images
IMAGES = 1024
# by a plan's bits for the weights and the inputs of each layer
LayerBits = Mapping[str, int]


@dataclass(frozen=True)
class EvalPlan:
    """How networks are evaluated.

    Attributes:
        bits: of weights and layer inputs alike, beside float; none: float alone.
        methods: of ranges: minmax, percentile, mse. Those of weights are min-max where inputs
            have percentile, as in training.
        per_channel: ranges of weights per output channel, else per tensor.
        mixed: two widths or more, for mixed precision beside those: each layer but the first and
            the last draws one of them, named by (seed, network); none: not.
        first_last_bits: the first and last layer get at least so many; None: as the others (with
            mixed: the widest).
        percentile: for that method. The papers' summaries have "top and bottom 1 %".
        batchnorm_images: random training images for BatchNorm's statistics; None: 1024, or all if
            there are fewer.
        range_images: of these the first so many for the ranges of activations; None: 512, or all
            if there are fewer.
        batch_size: of both; a range by percentile or mse is the mean over the batches.
        seed: names the images, the widths of mixed precision, and the values of parameters that no
            GHN predicts.

    Raises:
        ValueError: unknown method; bits or percentile out of range or twice the same.
    """

    bits: tuple[int, ...] = (8, 4, 2)
    methods: tuple[str, ...] = ("minmax", "percentile")
    mixed: tuple[int, ...] = ()
    first_last_bits: int | None = 8
    percentile: float = 99.0
    per_channel: bool = True
    batchnorm_images: int | None = None
    range_images: int | None = None
    batch_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("bits", "methods", "mixed"):
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)  # JSON has lists only
            once = len(set(values)) == len(values)
            require(once, name, "each once", ", ".join(map(str, values)), "ghn-eval")
        some = bool(self.methods) or not (self.bits or self.mixed)
        require(some, "methods", "at least one", "none", "ghn-eval")
        rule = "two widths or more, or none"
        require(len(self.mixed) != 1, "mixed", rule, self.mixed, "ghn-eval")
        for method, bits in product(self.methods, (*self.bits, *self.mixed)):
            self.qconfig(method, bits)

    def qconfig(self, method: str, bits: int, layers: LayerBits | None = None) -> QConfig:
        """Of all layers alike, or of ``layers`` by name and the others with ``bits``."""
        overrides = {name: self._alike(method, own) for name, own in (layers or {}).items()}
        return replace(self._alike(method, bits), overrides=overrides)

    def _alike(self, method: str, bits: int) -> QConfig:
        cut = method == "percentile"
        return ptq_qconfig(
            method,
            bits,
            bits,
            weight_method="minmax" if cut else None,
            percentile=self.percentile if cut else None,
            first_last_bits=self.first_last_bits,
            per_tensor=not self.per_channel,
        )

    @property
    def mixed_name(self) -> str:
        return f"mixed {'/'.join(map(str, sorted(self.mixed)))}"

    def check(self, known: Sequence[int]) -> None:
        """Raises: ValueError if a GHN knows these bit widths, and not all of the plan's."""
        strange = sorted({*self.bits, *self.mixed} - set(known)) if known else []
        rule = f"among {', '.join(map(str, known))}, which the GHN knows"
        require(not strange, "bits", rule, ", ".join(map(str, strange)), "ghn-eval")

    def describe(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class NetScore:
    """One network at one width, quantized in one way.

    Attributes:
        split, seed, index: of the network.
        bits: "FP32", "W4A4", "mixed 2/4/8".
        method: of the ranges; "" in float.
        accuracy: on the test split.
        loss: mean cross entropy there; None if the logits are not all finite.
    """

    split: str
    seed: int
    index: int
    bits: str
    method: str
    accuracy: float
    loss: float | None


@dataclass(frozen=True)
class Ground:
    """What networks are evaluated on.

    Attributes:
        batchnorm: training images for BatchNorm's statistics.
        ranges: for the ranges of activations.
    """

    data: Dataset
    batchnorm: Sequence[Batch]
    ranges: Sequence[Batch]

    @classmethod
    def of(cls, data: Dataset, plan: EvalPlan) -> Ground:
        """Raises: ValueError if there are not so many training images."""
        config = TrainConfig(batch_size=plan.batch_size, seed=plan.seed)
        asked = ((plan.batchnorm_images, IMAGES), (plan.range_images, RANGE_IMAGES))
        counts = [min(most, len(data.train)) if n is None else n for n, most in asked]
        return cls(data, *(calibration_images(data, config, count) for count in counts))


def materialize(
    net: Net | nn.Module,
    ghn: Ghn,
    data: Dataset,
    *,
    graph: Graph | None = None,
    bits: Bits = None,
    plan: EvalPlan | None = None,
) -> nn.Module:
    """The network with predicted weights, in eval mode, on the device of the data.

    BatchNorm's statistics are taken anew on random training images (`EvalPlan`), nothing else of it
    is trained. A module is not changed: the network is a copy.

    Args:
        graph: the network's, if it is there already.
        bits: what the GHN is told that it will be quantized to; see `Ghn.predict`.

    Raises:
        ValueError: as `qtrain.ghn.prediction.predict`; not so many training images.
    """
    plan = plan or EvalPlan()
    ground = Ground.of(data, plan)
    model = skeleton_of(net, ground, plan.seed) if isinstance(net, Net) else net
    return predicted_model(model, ghn, ground.batchnorm, graph=graph, bits=bits, seed=plan.seed)


def skeleton_of(net: Net, ground: Ground, seed: int) -> nn.Module:
    """The network with fresh weights, which stay where the GHN predicts none."""
    data = ground.data
    with keeping_globals():
        seed_globals(seed, 0, "init")
        model = net.build(data.channels, data.classes, data.size)
    return model.to(ground.batchnorm[0][0].device)


def evaluate_networks(
    ghn: Ghn,
    nets: Sequence[Net],
    data: Dataset,
    plan: EvalPlan | None = None,
    *,
    track: Track | None = None,
) -> list[NetScore]:
    """Evaluate networks with predicted weights: in float, and quantized in each way of the plan.

    A GHN with bit widths is told, for each width, that width (and for float nothing), with mixed
    precision the width of each layer (`node_bits`): the weights of the rows then differ. One
    without is told nothing, and all rows are of the same weights. Each network is predicted by
    itself, so that its scores do not depend on the others.

    Args:
        ghn: on any device.
        data: on the device where the networks are to run.
        track: a progress bar to advance by 1 for each network; None: one of our own.

    Returns:
        The scores, network by network in their order, float first.

    Raises:
        ValueError: bits that the GHN does not know; not so many training images.
    """
    plan = plan or EvalPlan()
    plan.check(ghn.config.bit_widths)
    ground = Ground.of(data, plan)
    scores: list[NetScore] = []
    ours = Track(len(nets), "networks")
    with ours if track is None else nullcontext(track) as bar:
        for net in nets:
            scores += score_net(ghn, net, ground, plan)
            bar.advance()
    return scores


def score_net(ghn: Ghn, net: Net, ground: Ground, plan: EvalPlan) -> list[NetScore]:
    """The scores of one network, see `evaluate_networks`."""
    skeleton = skeleton_of(net, ground, plan.seed)
    graph = build_graph(skeleton)

    def predicted(bits: Bits) -> nn.Module:
        told = bits if ghn.config.bit_widths else None
        return predicted_model(
            skeleton, ghn, ground.batchnorm, graph=graph, bits=told, seed=plan.seed
        )

    def score(bits: str, method: str, scores: Mapping[str, float]) -> NetScore:
        loss = scores["test_loss"]
        known = loss if math.isfinite(loss) else None
        origin = net.split, net.seed, net.index
        return NetScore(*origin, bits, method, scores["test_accuracy"], known)

    model = predicted(None)
    found = [score("FP32", "", evaluate(model, ground.data.test))]
    known = ghn.config.bit_widths
    for width in plan.bits:
        if known:
            model = predicted(width)
        name = bits_name((width, width))
        found += [score(name, *row) for row in quantized(model, width, {}, ground, plan)]
    if plan.mixed:
        layers = drawn_bits(model, net, plan)
        if known:
            model = predicted(told(graph, layers, known))
        rows = quantized(model, max(plan.mixed), layers, ground, plan)
        found += [score(plan.mixed_name, *row) for row in rows]
    return found


def quantized(
    model: nn.Module, bits: int, layers: LayerBits, ground: Ground, plan: EvalPlan
) -> Iterator[tuple[str, Mapping[str, float]]]:
    """(method, scores) for each kind of range; ``layers`` have widths of their own."""
    sound = finite_inside(model, ground.ranges)
    for method in plan.methods:
        scores = lost(ground.data)
        if sound:
            qconfig = plan.qconfig(method, bits, layers)
            made = quantize_after_training(model, qconfig, ground.ranges)
            scores = evaluate(made, ground.data.test)
        yield method, scores


def drawn_bits(model: nn.Module, net: Net, plan: EvalPlan) -> dict[str, int]:
    """The width of each layer, named by (the plan's seed, network). The first and the last have the
    widest, and at least the plan's for them."""
    widths = sorted(plan.mixed)
    draw = Draw(plan.seed, net.index, f"mixed/{net.space}/{net.split}/{net.seed}")
    names = [layer.names[0] for layer in quantizable_layers(model, "ghn-eval")]
    middle = {name: draw.pick(widths) for name in names[1:-1]}
    ends = max(*widths, plan.first_last_bits or 0)
    return {name: middle.get(name, ends) for name in names}


def told(graph: Graph, layers: LayerBits, known: Sequence[int]) -> Bits:
    """What a GHN that knows these widths is told of a network: its width, or where its layers
    differ that of each node.

    The first and the last layer, whose rule is the same for all networks, do not make a difference.
    OUR choice, as that a width that the GHN does not know is float to it.

    Args:
        layers: the width of every layer, in the order of registration.
    """
    if not known:
        return None
    middle = set(list(layers.values())[1:-1]) or set(layers.values())
    if len(middle) > 1:
        heard = {name: bits if bits in known else None for name, bits in layers.items()}
        return node_bits(graph, heard)
    return next((bits for bits in middle if bits in known), None)


def node_bits(graph: Graph, layers: Mapping[str, int | None]) -> dict[str, int | None]:
    """The widths of a graph's nodes, by name, from those of its layers.

    OUR choice: a node that is no layer (a norm, a sum, a pooling) has the width of what it reads,
    of several the latest; the input that of the first layer. So all layers in one width are as that
    width for the whole network, which is what a GHN hears in training.
    """
    widths: list[int | None] = []
    for row, node in enumerate(graph.nodes):
        sources = (graph.adjacency[:row, row] == 1).nonzero().flatten().tolist()
        before = widths[sources[-1]] if sources else next(iter(layers.values()), None)
        widths.append(layers.get(node.name, before))
    return dict(zip((node.name for node in graph.nodes), widths, strict=True))


@torch.no_grad()
def finite_inside(model: nn.Module, batches: Sequence[Batch]) -> bool:
    """Whether the inputs of all layers and the logits are finite; else ranges cannot be taken."""
    found: list[Tensor] = []

    def look(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0].isfinite().all())

    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    handles = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        found += [model(x).isfinite().all() for x, _ in batches]
    finally:
        for handle in handles:
            handle.remove()
    return bool(torch.stack(found).all())


class _Lost(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W]
        return x.new_full((len(x), self.classes), math.nan)


def lost(data: Dataset) -> dict[str, float]:
    """What a network that gives NaN scores: the share of the first class, and no loss."""
    return evaluate(_Lost(data.classes), data.test)
