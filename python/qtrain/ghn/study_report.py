"""Tables and a picture of `qtrain ghn-study`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

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
from ..study import percent, plus_minus
from .evaluate import NetScore

PICTURE = "accuracy.png"


@dataclass(frozen=True)
class Outcome:
    """A variant with a seed.

    Attributes:
        scores: none if the training gave up.
        loss, highest: the last and the highest of the logged training losses.
        skipped, exploded: steps whose gradient was not finite, and whose loss exploded.
    """

    variant: str
    seed: int
    scores: tuple[NetScore, ...]
    loss: float
    highest: float
    skipped: int
    exploded: int
    steps: int

    def accuracies(self, split: str, way: tuple[str, str]) -> list[float]:
        """Of the networks of a split, at (width, ranges)."""
        return [s.accuracy for s in self.scores if (s.split, (s.bits, s.method)) == (split, way)]


def _ways(outcomes: Sequence[Outcome]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((s.bits, s.method) for o in outcomes for s in o.scores))


def _splits(outcomes: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(s.split for o in outcomes for s in o.scores))


def _of(outcomes: Sequence[Outcome], variant: str) -> list[Outcome]:
    return [o for o in outcomes if o.variant == variant]


def _way_name(way: tuple[str, str]) -> str:
    return " ".join(part for part in way if part)


def accuracy_table(
    outcomes: Sequence[Outcome], split: str, ways: Sequence[tuple[str, str]] | None = None
) -> tuple[list[str], list[list[str]]]:
    """(columns, rows): the mean over a split's networks, its mean and standard deviation over
    seeds, and after a slash the best network of all, in %; at all (width, ranges), or at these."""
    ways = _ways(outcomes) if ways is None else ways
    rows = []
    for variant in dict.fromkeys(o.variant for o in outcomes):
        mine = _of(outcomes, variant)
        cells = []
        for way in ways:
            nets = [o.accuracies(split, way) for o in mine if o.scores]
            lost = len(mine) - len(nets)
            note = f" ({lost} gave up)" if lost else ""
            cells.append(f"{_summary(nets)}{note}" if nets else "gave up")
        rows.append([variant, *cells])
    return ["GHN", *map(_way_name, ways)], rows


def _summary(nets: Sequence[Sequence[float]]) -> str:
    means = [statistics.fmean(values) for values in nets]
    return f"{percent(means, '.1f')} / {100 * max(map(max, nets)):.1f}"


def difference_table(
    outcomes: Sequence[Outcome], split: str, pairs: Sequence[tuple[str, str]]
) -> tuple[list[str], list[list[str]]]:
    """(columns, rows): differences of the means over networks in points, seed by seed: mean,
    standard deviation, and in how many seeds the first of a pair was better. Seeds in which either
    gave up are left out."""
    ways = _ways(outcomes)
    rows = []
    for ours, theirs in pairs:
        both = [
            (one, other)
            for one, other in zip(_of(outcomes, ours), _of(outcomes, theirs), strict=True)
            if one.scores and other.scores
        ]
        cells = [_gaps(both, split, way) if both else "gave up" for way in ways]
        rows.append([f"{ours} - {theirs}", *cells])
    return ["difference", *map(_way_name, ways)], rows


def _gaps(both: Sequence[tuple[Outcome, Outcome]], split: str, way: tuple[str, str]) -> str:
    means = [[statistics.fmean(o.accuracies(split, way)) for o in pair] for pair in both]
    gaps = [ours - theirs for ours, theirs in means]
    wins = sum(gap > 0 for gap in gaps)
    return f"{percent(gaps, '+.1f')} ({wins} of {len(gaps)})"


def training_table(outcomes: Sequence[Outcome]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows): how the training went, over seeds."""
    rows = []
    for variant in dict.fromkeys(o.variant for o in outcomes):
        mine = _of(outcomes, variant)
        loss = plus_minus([o.loss for o in mine], ".3f")
        highest = f"{max(o.highest for o in mine):.2f}"
        counts = [", ".join(str(getattr(o, n)) for o in mine) for n in ("skipped", "exploded")]
        rows.append([variant, str(mine[0].steps), loss, highest, *counts])
    return ["GHN", "steps", "last loss", "highest loss", "skipped", "exploded"], rows


def screen_tables(name: str, outcomes: Sequence[Outcome]) -> list[Table]:
    """What a terminal has room for: the id split, with the first kind of ranges alone."""
    ways = _ways(outcomes)
    ranges = next((method for _, method in ways if method), "")
    columns, rows = accuracy_table(outcomes, "id", [way for way in ways if way[1] in ("", ranges)])
    cells = [broken(row, " / ") for row in rows]
    training, counts = training_table(outcomes)
    return [
        rich_grid(broken(columns, " "), cells, f"{name}: id split, %", left=1, narrow=True),
        rich_grid(broken(training, " "), counts, "training", left=1, narrow=True),
    ]


def write_report(
    name: str,
    preset: str,
    outcomes: Sequence[Outcome],
    pairs: Sequence[tuple[str, str]],
    out: Path,
    plan: Mapping[str, Any],
) -> None:
    """accuracy.png, report.md and, last, results.json."""
    out.mkdir(parents=True, exist_ok=True)
    seeds = sorted({o.seed for o in outcomes})
    plot(out / PICTURE, outcomes)
    first = next((o for o in outcomes if o.scores), outcomes[0])
    nets = len({(s.seed, s.index) for s in first.scores if s.split == first.scores[0].split})
    parts = [
        f"# qtrain ghn-study {name}: {preset}\n",
        f"Test accuracy in % of networks with predicted weights: mean over the networks of a split "
        f"({nets} of each for a seed),\nits mean ± standard deviation over {len(seeds)} seeds "
        f"({', '.join(map(str, seeds))}) / the best network of all.\n",
    ]
    for split in _splits(outcomes):
        parts += [f"## {split}\n", markdown_grid(*accuracy_table(outcomes, split), left=1)]
        parts += [markdown_grid(*difference_table(outcomes, split, pairs), left=1)]
    parts += ["## Training\n", markdown_grid(*training_table(outcomes), left=1)]
    parts += [f"![accuracy by split]({PICTURE})\n"]
    write_atomic(out / REPORT, "\n".join(parts).encode())
    results = {"study": name, "plan": plan, "outcomes": [asdict(o) for o in outcomes]}
    write_atomic(out / RESULTS, to_json(results))


def plot(path: Path, outcomes: Sequence[Outcome]) -> None:
    """A panel per width and kind of range, splits along the axis, a colour for each variant: its
    mean over networks, a dot for each seed."""
    ways, splits = _ways(outcomes), _splits(outcomes)
    variants = list(dict.fromkeys(o.variant for o in outcomes))
    columns = min(4, len(ways))
    canvas, grid = figure(columns, -(-len(ways) // columns), width=3.2, height=2.6)
    axes = [grid] if len(ways) == 1 else grid.reshape(-1)
    for axis, way in zip(axes, ways, strict=False):
        for number, variant in enumerate(variants):
            for place, split in enumerate(splits):
                values = [
                    100 * statistics.fmean(o.accuracies(split, way))
                    for o in _of(outcomes, variant)
                    if o.scores
                ]
                at = place + 0.7 * ((number + 0.5) / len(variants) - 0.5)
                label = variant if place == 0 else None
                axis.plot(
                    [at] * len(values), values, "o", color=colour(number), markersize=3, label=label
                )
        axis.set_xticks(range(len(splits)), splits, fontsize="small")
        axis.set(title=_way_name(way), ylabel="test accuracy, %")
        axis.grid(alpha=0.3, axis="y")
    for axis in axes[len(ways) :]:
        axis.axis("off")
    canvas.legend(*axes[0].get_legend_handles_labels(), fontsize="small", loc="outside upper right")
    save_figure(canvas, path)
