"""Tables and pictures of `qtrain ghn-eval`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..report import colour, figure, save_figure
from ..study import spread
from .evaluate import EvalPlan, Ground, NetScore
from .model import Ghn

HISTOGRAMS = "accuracy.png"
COLUMNS = ("split", "bits", "ranges", "mean", "sd", "max", "loss", "not finite")
# of a histogram, over 0 .. 100 %
BINS = 25


@dataclass(frozen=True)
class SplitScore:
    """The networks of a split at one width, quantized in one way.

    Attributes:
        nets: how many.
        mean, sd, best: of their test accuracy; sd is nan for a single network.
        loss: mean over those whose logits are finite; nan if none are.
        not_finite: how many others there are. They count in mean, sd and best.
    """

    split: str
    bits: str
    method: str
    nets: int
    mean: float
    sd: float
    best: float
    loss: float
    not_finite: int

    def cells(self) -> tuple[str, ...]:
        """What stands in the table, in the order of ``COLUMNS``."""
        accuracies = (_text(100 * value, 1) for value in (self.mean, self.sd, self.best))
        lost = str(self.not_finite) if self.not_finite else "-"
        return self.split, self.bits, self.method or "-", *accuracies, _text(self.loss, 3), lost


def _text(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def summarise(scores: Sequence[NetScore]) -> list[SplitScore]:
    """Over the networks of each split, by split, width and method in the order of the scores."""
    found = []
    for key in dict.fromkeys((s.split, s.bits, s.method) for s in scores):
        mine = [s for s in scores if (s.split, s.bits, s.method) == key]
        accuracies = [s.accuracy for s in mine]
        losses = [s.loss for s in mine if s.loss is not None]
        loss = sum(losses) / len(losses) if losses else math.nan
        figures = (*spread(accuracies), max(accuracies), loss)
        found.append(SplitScore(*key, len(mine), *figures, len(mine) - len(losses)))
    return found


def table(scores: Sequence[NetScore]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(columns, rows); accuracies in %."""
    return COLUMNS, [row.cells() for row in summarise(scores)]


def notes(ghn: Ghn, ground: Ground, plan: EvalPlan, scores: Sequence[NetScore]) -> list[str]:
    """How the numbers of a table came about, a sentence or two in each line."""
    widths = ", ".join(map(str, ghn.config.bit_widths))
    told = f"told the width, of {widths}" if widths else "not told the width"
    images, ranges = (sum(len(y) for _, y in b) for b in (ground.batchnorm, ground.ranges))
    grain = "per channel" if plan.per_channel else "per tensor"
    ends = "as the others"
    if plan.first_last_bits is not None:
        ends = f"at least {plan.first_last_bits} bits"
    nets = Counter(s.split for s in scores if s.bits == "FP32")
    lines = [
        f"{', '.join(f'{count} networks of {split}' for split, count in nets.items())}.",
        f"The GHN was {told}. BatchNorm: statistics of {images} training images, folded into the "
        "layers before quantization.",
        f"WnAn: weights of n bits (symmetric, {grain}), layer inputs of n bits (affine, per "
        f"tensor), their ranges from {ranges} training images; first and last layer {ends}.",
        f"Chance is {100 / ground.data.classes:.1f} %. Not finite: networks with logits of NaN or "
        "inf; they count in the accuracies, not in the loss.",
    ]
    if "percentile" in plan.methods:
        low, high = 100 - plan.percentile, plan.percentile
        lines.append(
            f"percentile: ranges from percentile {low:g} to {high:g} of inputs; weights min-max."
        )
    if plan.mixed:
        lines.append(
            f"{plan.mixed_name}: each layer but the first and the last draws its width, for its "
            "weight and its input alike."
        )
    if ghn.config.classes != ground.data.classes:
        lines.append(
            f"The GHN has a last layer for {ghn.config.classes} classes, the data "
            f"{ground.data.classes}: it is decoded as the other layers are."
        )
    return lines


def plot_histograms(path: Path, scores: Sequence[NetScore]) -> None:
    """Histograms of test accuracy over networks: a row for each split, a column for each width,
    colours for the ranges."""
    splits, widths = (list(dict.fromkeys(getattr(s, k) for s in scores)) for k in ("split", "bits"))
    methods = list(dict.fromkeys(s.method for s in scores if s.method))
    canvas, grid = figure(len(widths), len(splits), width=2.6, height=2.0)
    axes = [grid] if len(widths) == len(splits) == 1 else grid.reshape(-1)
    edges = [100 * place / BINS for place in range(BINS + 1)]
    for place, axis in enumerate(axes):
        row, column = divmod(place, len(widths))
        here = [s for s in scores if (s.split, s.bits) == (splits[row], widths[column])]
        for method in dict.fromkeys(s.method for s in here):
            shade = colour(methods.index(method)) if method else "black"
            values = [100 * s.accuracy for s in here if s.method == method]
            look = {"histtype": "stepfilled", "alpha": 0.5, "color": shade}
            axis.hist(values, edges, label=method or "float", **look)
        if row == 0:
            axis.set_title(widths[column], fontsize="medium")
        if row == len(splits) - 1:
            axis.set_xlabel("test accuracy, %", fontsize="small")
        if column == 0:
            axis.set_ylabel(f"{splits[row]}: networks", fontsize="small")
        if row == 0 and methods:
            axis.legend(fontsize="x-small")
        axis.set(xlim=(0, 100))
        axis.tick_params(labelsize="x-small")
    save_figure(canvas, path)
