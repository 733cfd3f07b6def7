"""``qtrain ghn-weights``: how predicted weights are distributed, beside random ones.

For every layer of some networks that no GHN was trained on: the size of its weights against He's
sqrt(2 / fan_in), the shape of their distribution, and what rounding them to a few bits costs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from qkernels import foreach
from qkernels.nn import quantizable_layers

from ..data import load_dataset
from ..progress import Track
from ..recipe import require
from ..report import (
    REPORT,
    RESULTS,
    broken,
    colour,
    figure,
    markdown_grid,
    rich_grid,
    save_figure,
)
from ..rundir import to_json, write_atomic
from ..seeds import keeping_globals, seed_globals
from .checkpoint import load_ghn
from .prediction import predict
from .run import settings_for
from .space import Net, draw_nets
from .study import Job, Plan, train_variants

PICTURE = "weights.png"
BITS = (8, 4, 2)
# of a histogram, in standard deviations of the layer
EDGES = [place / 10 for place in range(-50, 51)]
# what is compared: a slug of `VARIANTS`, or a way to draw random weights
SOURCES = {
    "torch's default": None,
    "He, normal": None,
    "GHN-Q": "q",
    "GHN-QAT W4A4": "w4",
    "GHN-QAT W2A2": "w2",
}


@dataclass
class Layers:
    """The layers' weights from one source, over all networks and seeds.

    Attributes:
        size: standard deviation over sqrt(2 / fan_in), by layer.
        tails: excess kurtosis (0 for a Gaussian, -1.2 if uniform), by layer.
        peak: largest magnitude over the standard deviation, by layer.
        noise: by bits, of each layer: mean squared error of rounding over the mean square, in dB
            (symmetric, per channel, min-max).
        counts: of weights by ``EDGES``, in standard deviations of their layer.
    """

    source: str
    size: list[float] = field(default_factory=list)
    tails: list[float] = field(default_factory=list)
    peak: list[float] = field(default_factory=list)
    noise: dict[int, list[float]] = field(default_factory=lambda: {bits: [] for bits in BITS})
    counts: Tensor = field(default_factory=lambda: torch.zeros(len(EDGES) - 1))

    def add(self, weights: Sequence[Tensor]) -> None:
        """Layers of a network: [out, in / groups, ...] each."""
        for w in weights:
            fan_in = w[0].numel()
            z = (w - w.mean()) / w.std(correction=0)
            self.size.append(w.std(correction=0).item() / math.sqrt(2 / fan_in))
            self.tails.append((z**4).mean().item() - 3)
            self.peak.append(z.abs().max().item())
            self.counts += torch.histogram(z, torch.tensor(EDGES)).hist
        for bits in BITS:
            rounded = foreach.fake_quant(list(weights), bits=bits, axis=0, symmetric=True)
            for w, q in zip(weights, rounded, strict=True):
                share = (q - w).square().mean() / w.square().mean()
                self.noise[bits].append(10 * math.log10(max(share.item(), 1e-12)))


def layer_weights(model: nn.Module) -> list[Tensor]:
    """Of the layers that are quantized, but for the first and the last, which have 8 bits, and for
    layers whose weights do not vary."""
    layers = [layer.module.weight.detach() for layer in quantizable_layers(model, "ghn-weights")]
    return [w for w in layers[1:-1] if w.numel() > 1 and w.std() > 0]


def run_weights(
    plan: Plan, out: str | Path, *, seeds: Iterable[int] = range(3), jobs: int = 2
) -> list[Layers]:
    """Train the GHNs that are not yet there, and write weights/report.md, results.json and a
    picture.

    Args:
        plan: of `qtrain ghn-study`, with which ``out`` is shared.

    Raises:
        ValueError: as `run_study`.
    """
    numbers, out = sorted(set(seeds)), Path(out)
    require(bool(numbers), "seeds", "at least one", "none", "ghn-weights")
    slugs = [slug for slug in SOURCES.values() if slug is not None]
    train_variants(slugs, plan, out, numbers, jobs)
    config, training = settings_for(plan.preset, train=plan.train)
    data = load_dataset(config.dataset, config.data_options)
    shapes = [Layers(source) for source in SOURCES]
    images = data.channels, data.classes, data.size
    with Track(len(numbers) * plan.nets, "weights") as track:
        for seed in numbers:
            ghns = {slug: load_ghn(Job(slug, seed, plan, out).folder()) for slug in slugs}
            for net in draw_nets(training.space, "id", seed + 1000, plan.nets, quiet=True):
                for shape in shapes:
                    model = _model(net, shape.source, seed, images)
                    slug = SOURCES[shape.source]
                    if slug is not None:
                        model.load_state_dict(predict(model, ghns[slug]), strict=False)
                    shape.add(layer_weights(model))
                track.advance()
    _write(out / "weights", shapes, len(numbers) * plan.nets)
    return shapes


def _model(net: Net, source: str, seed: int, shape: tuple[int, int, int]) -> nn.Module:
    with keeping_globals():
        seed_globals(seed, net.index, "weights")
        model = net.build(*shape)
        if source == "He, normal":
            for layer in quantizable_layers(model, "ghn-weights"):
                nn.init.kaiming_normal_(layer.module.weight, nonlinearity="relu")
    return model


def table(shapes: Sequence[Layers]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows): medians over layers, and between brackets the quartiles."""
    rows = []
    for shape in shapes:
        cells = [_quartiles(v, 2) for v in (shape.size, shape.tails, shape.peak)]
        cells += [_quartiles(shape.noise[bits], 1) for bits in BITS]
        rows.append([shape.source, *cells])
    noise = [f"error at {bits} bits, dB" for bits in BITS]
    return ["weights", "size / He's", "excess kurtosis", "largest / sd", *noise], rows


def screen_table(shapes: Sequence[Layers]) -> Table:
    """The medians, for a terminal."""
    columns, rows = table(shapes)
    cells = [[row[0], *(cell.split(" (")[0] for cell in row[1:])] for row in rows]
    heads = broken(columns, " /", " at", ", ")
    return rich_grid(heads, cells, "weights by layer: medians", left=1, narrow=True)


def _quartiles(values: Sequence[float], digits: int) -> str:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.{digits}f} ({low:.{digits}f} .. {high:.{digits}f})"


def _write(out: Path, shapes: Sequence[Layers], nets: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    _plot(out / PICTURE, shapes)
    text = f"""# Predicted weights beside random ones: {nets} networks of the id split

Medians over layers (quartiles); the first and the last layer are left out.

{markdown_grid(*table(shapes), left=1)}
size: standard deviation over sqrt(2 / fan_in). error: mean squared error of rounding (symmetric,
per channel, min-max) over the mean square; lower is better.

![histograms]({PICTURE})
"""
    write_atomic(out / REPORT, text.encode())
    found: list[dict[str, Any]] = [{**asdict(s), "counts": s.counts.tolist()} for s in shapes]
    write_atomic(out / RESULTS, to_json({"edges": EDGES, "shapes": found}))


def _plot(path: Path, shapes: Sequence[Layers]) -> None:
    """Weights in standard deviations of their layer, all layers together; and beside it the size
    of layers."""
    canvas, (left, right) = figure(2)
    middles = [(low + high) / 2 for low, high in pairwise(EDGES)]
    for number, shape in enumerate(shapes):
        density = shape.counts / shape.counts.sum() * 10
        left.plot(middles, density.tolist(), color=colour(number), label=shape.source)
        logs = [math.log10(size) for size in shape.size if size > 0]
        right.hist(logs, bins=40, histtype="step", density=True, color=colour(number))
    left.set(xlabel="weight / standard deviation of its layer", ylabel="density", yscale="log")
    right.set(xlabel="log10 of the layer's size over He's", ylabel="density")
    left.legend(fontsize="small")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    save_figure(canvas, path)
