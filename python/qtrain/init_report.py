"""The tables and the picture of ``qtrain init-study``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from .init_outcome import Combination, Outcome
from .init_study import FINE, Plan
from .recipe import TrainConfig
from .report import REPORT, RESULTS, bits_name, figure, markdown_grid, save_figure
from .rundir import to_json, write_atomic
from .study import PICTURE, spread

UNTRAINED = "did not train"
# granularity -> how a column is headed
HEADS = {"channel": "per channel", "tensor": "per tensor"}
NAMES = ["block", "BN", "initialiser"]
# column -> figure of `LayerRange`
FIGURES = {
    "max w": "weight",
    "max x": "input",
    "share": "share",
    "peak w": "weight_peak",
    "peak x": "input_peak",
}
NOTES = """\
trained: in how many seeds the net trained: its loss stayed finite, and its accuracy is at least
halfway between chance and 100 %. What follows is the mean ± standard deviation over these (of
ranges the mean); where there are none, "float" is over the others and there is no loss to speak of.

WnAm: loss of test accuracy in points, float less quantized, with weights of n bits (symmetric) and
layer inputs of m bits (affine, per tensor), min-max ranges, BatchNorm folded; per channel and per
tensor: scales of weights. First and last layer: {first_last}.

Of the layers, BatchNorm folded: max w, max x: the largest |weight| and |input|, of the layer where
it is largest. peak w, peak x: the same / root mean square, of the layer where it is largest. share:
max |w| of an output channel / max |w| of the layer, mean over channels, of the layer where it is
least: 1 where scales for each channel gain nothing, 0.1 where they make steps a tenth as large.
"""


def grouped(outcomes: Sequence[Outcome]) -> dict[Combination, list[Outcome]]:
    """By combination, in the order in which they come."""
    groups: dict[Combination, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.combination, []).append(outcome)
    return groups


def trained(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.failure is None]


def name_cells(one: Combination) -> list[str]:
    return [one.block, "yes" if one.batchnorm else "no", one.initialiser]


def _plus_minus(values: Sequence[float], form: str) -> str:
    mean, deviation = (_unsigned_zero(format(value, form)) for value in spread(values))
    return mean if len(values) == 1 else f"{mean} ± {deviation.lstrip('+')}"


def _unsigned_zero(text: str) -> str:
    """ "-0.0", which a small negative number is printed as, without its sign."""
    return text if float(text) else text.lstrip("+-")


def _float_cell(group: Sequence[Outcome]) -> str:
    finite = [100 * o.accuracy for o in trained(group) or group if o.accuracy is not None]
    return _plus_minus(finite, ".1f") if finite else "not finite"


def _loss_cells(
    group: Sequence[Outcome], columns: Sequence[tuple[str, tuple[int, int]]]
) -> list[str]:
    mine = trained(group)
    if not mine:
        return [UNTRAINED] + ["-"] * (len(columns) - 1)
    return [_plus_minus([o.loss(*column) for o in mine], ".1f") for column in columns]


def _heads(columns: Sequence[tuple[str, tuple[int, int]]]) -> list[str]:
    return [f"{bits_name(bits)}\n{HEADS[granularity]}" for granularity, bits in columns]


def together(plan: Plan) -> list[tuple[str, tuple[int, int]]]:
    """(granularity, bits) of the models with weights and inputs quantized alike."""
    return [(granularity, (b, b)) for granularity in plan.granularities for b in plan.bits]


def apart(plan: Plan) -> list[tuple[str, tuple[int, int]]]:
    """(granularity, bits) of the models with one side quantized. The inputs' ranges do not depend
    on the granularity of weights, so that one will do for them."""
    sides = [(g, (b, FINE)) for b in plan.bits for g in plan.granularities]
    return [*sides, *((plan.granularities[0], (FINE, b)) for b in plan.bits)]


def main_table(plan: Plan, outcomes: Sequence[Outcome]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows): float accuracy, losses and ranges, a row a combination."""
    columns = together(plan)
    rows = []
    for one, group in grouped(outcomes).items():
        mine = trained(group)
        ranges = [
            f"{spread([o.widest(figure) for o in mine])[0]:.3g}" if mine else "-"
            for figure in FIGURES.values()
        ]
        count = f"{len(mine)} of {len(group)}"
        cells = [_float_cell(group), *_loss_cells(group, columns), *ranges]
        rows.append([*name_cells(one), count, *cells])
    return [*NAMES, "trained", "float, %", *_heads(columns), *FIGURES], rows


def side_table(plan: Plan, outcomes: Sequence[Outcome]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows): losses with weights alone and inputs alone quantized."""
    columns = apart(plan)
    groups = grouped(outcomes).items()
    rows = [[*name_cells(one), *_loss_cells(group, columns)] for one, group in groups]
    return [*NAMES, *_heads(columns)], rows


def _mean_loss(mine: Sequence[Outcome], column: tuple[str, tuple[int, int]]) -> str:
    return _unsigned_zero(f"{spread([o.loss(*column) for o in mine])[0]:.1f}") if mine else "-"


def short_table(plan: Plan, outcomes: Sequence[Outcome]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) for the screen: means alone."""
    columns = together(plan)
    rows = []
    for one, group in grouped(outcomes).items():
        mine = trained(group)
        losses = [_mean_loss(mine, column) for column in columns]
        name = f"{one.block}{' BN' if one.batchnorm else ''} {one.initialiser}"
        rows.append([name, _float_cell(group).split(" ±")[0], *losses])
    short = {"channel": "ch", "tensor": "t"}
    return ["", "float", *(f"{bits_name(b)}\n{short[g]}" for g, b in columns)], rows


def law_table(plan: Plan, outcomes: Sequence[Outcome]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows): loss with a uniform law less loss with the normal one of its standard
    deviation, over blocks, BatchNorm and seeds where both trained."""
    mine = {(o.combination, o.seed): o for o in trained(outcomes)}
    pairs: dict[str, list[tuple[Outcome, Outcome]]] = {}
    for (one, seed), outcome in mine.items():
        twin = replace(one, initialiser=one.initialiser.replace("uniform", "normal"))
        if twin != one and (twin, seed) in mine:
            pairs.setdefault(one.initialiser, []).append((outcome, mine[twin, seed]))
    columns = together(plan)
    rows = []
    for name, some in pairs.items():
        cells = []
        for column in columns:
            gaps = [uniform.loss(*column) - normal.loss(*column) for uniform, normal in some]
            wins = f"{sum(gap < 0 for gap in gaps)} of {len(gaps)}"
            cells.append(f"{_plus_minus(gaps, '+.1f')} ({wins})")
        rows.append([f"{name} less {name.replace('uniform', 'normal')}", *cells])
    return ["", *_heads(columns)], rows


def rank_table(plan: Plan, outcomes: Sequence[Outcome]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows): Spearman's rank correlation of losses with ranges among the runs of one
    block with or without BatchNorm, mean over these nets: what differs among them is the
    initialiser."""
    nets: dict[tuple[str, bool], list[Outcome]] = {}
    for outcome in trained(outcomes):
        one = outcome.combination
        nets.setdefault((one.block, one.batchnorm), []).append(outcome)
    rows = []
    for column in [*together(plan), *apart(plan)]:
        cells = [_correlation(list(nets.values()), figure, column) for figure in FIGURES.values()]
        granularity, bits = column
        rows.append([bits_name(bits), HEADS[granularity], *cells])
    return ["bits", "weights", *FIGURES], rows


def _correlation(
    nets: Sequence[Sequence[Outcome]], figure: str, column: tuple[str, tuple[int, int]]
) -> str:
    found = []
    for runs in nets:
        ours, theirs = [o.widest(figure) for o in runs], [o.loss(*column) for o in runs]
        # of fewer than three runs, or of equal ones, there is none
        if len(runs) >= 3 and len(set(ours)) > 1 and len(set(theirs)) > 1:
            found.append(float(spearmanr(ours, theirs).statistic))
    return _unsigned_zero(f"{spread(found)[0]:+.2f}") if found else "-"


def plot_study(path: Path, plan: Plan, outcomes: Sequence[Outcome]) -> None:
    """A panel for each width and granularity: mean losses by initialiser, and by block with and
    without BatchNorm."""
    groups = grouped(outcomes)
    laws = list(dict.fromkeys(one.initialiser for one in groups))
    nets = list(dict.fromkeys((one.block, one.batchnorm) for one in groups))
    down, across = len(plan.granularities), len(plan.bits)
    size = {"width": 1.9 + 0.45 * len(nets), "height": 1.5 + 0.3 * len(laws)}
    canvas, axes = figure(across, down, **size)
    panels = np.array(axes, dtype=object).reshape(down, across)
    for place, (granularity, bits) in enumerate(together(plan)):
        grid = np.full((len(laws), len(nets)), math.nan)
        for one, group in groups.items():
            if mine := trained(group):
                where = laws.index(one.initialiser), nets.index((one.block, one.batchnorm))
                grid[where] = spread([o.loss(granularity, bits) for o in mine])[0]
        axis = panels[divmod(place, across)]
        _heat(axis, grid)
        titles = [f"{block}{', BN' if batchnorm else ''}" for block, batchnorm in nets]
        axis.set_xticks(range(len(nets)), titles, rotation=45, ha="right", fontsize="x-small")
        axis.set_yticks(range(len(laws)), laws, fontsize="x-small")
        axis.set_title(f"{bits_name(bits)}, {HEADS[granularity]}", fontsize="small")
    canvas.suptitle("loss of accuracy in points (-: did not train)", fontsize="medium")
    save_figure(canvas, path)


def _heat(axis: Any, grid: Any) -> None:
    """Losses as colours, the same in all panels, and as numbers."""
    most = 90
    axis.imshow(grid, cmap="viridis_r", vmin=0, vmax=most, aspect="auto")
    for (row, column), value in np.ndenumerate(grid):
        text = "-" if math.isnan(value) else _unsigned_zero(f"{value:.0f}")
        ink = "white" if value > most / 2 else "black"
        look = {"color": ink, "ha": "center", "va": "center", "fontsize": "x-small"}
        axis.text(column, row, text, **look)


def report_text(base: TrainConfig, plan: Plan, outcomes: Sequence[Outcome]) -> str:
    seeds = ", ".join(str(seed) for seed in sorted({o.seed for o in outcomes}))
    edge = plan.first_last_bits
    first_last = "as the others" if edge is None else f"at least {edge} bits"
    failures = [
        f"- {' '.join(name_cells(o.combination))}, seed {o.seed}: {o.failure}"
        for o in outcomes
        if o.failure is not None
    ]
    return f"""# qtrain init-study {base.dataset}

Nets of {len(base.model_options.get("widths", (0, 0, 0)))} blocks, {dict(base.model_options)};
{base.epochs} epochs of {base.optimizer} at {base.lr:g}, batch {base.batch_size}. Seeds {seeds}.

{markdown_grid(*main_table(plan, outcomes), left=4)}
{NOTES.format(first_last=first_last)}
![loss of accuracy by combination]({PICTURE})

## Weights alone, inputs alone
The other side has {FINE} bits.

{markdown_grid(*side_table(plan, outcomes), left=3)}
## Uniform laws and normal ones of the same standard deviation
Difference of the losses in points, mean ± standard deviation over blocks, BatchNorm and seeds where
both trained, and in how many the uniform one loses less.

{markdown_grid(*law_table(plan, outcomes), left=1)}
## Losses and ranges
Spearman's rank correlation among the runs of a block with or without BatchNorm, mean over these
nets ({len(trained(outcomes))} runs that trained).

{markdown_grid(*rank_table(plan, outcomes), left=2)}
## Runs that did not train
{chr(10).join(failures) or "None."}

Each run is a directory in runs/; its results.json has the ranges of every layer.
"""


def write_study(base: TrainConfig, plan: Plan, outcomes: Sequence[Outcome], out: Path) -> None:
    """study.png, report.md and, last, results.json."""
    plot_study(out / PICTURE, plan, outcomes)
    write_atomic(out / REPORT, report_text(base, plan, outcomes).encode())
    results = {"plan": asdict(plan), "outcomes": [asdict(outcome) for outcome in outcomes]}
    write_atomic(out / RESULTS, to_json(results))
