"""The tables of ``qtrain basin-study``: what the reports of several seeds say together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from .basin_measure import BasinConfig
from .basin_result import QAT, BasinReport, Width, answer, rtn
from .recipe import TrainConfig
from .report import REPORT, RESULTS, markdown_grid
from .rundir import to_json, write_atomic
from .study import (
    PICTURE,
    Comparison,
    Score,
    accuracy_table,
    difference_table,
    paired,
    plot_study,
    plus_minus,
    spread,
)

ADAROUND, CONTROL = "AdaRound", "more float + AdaRound"
ARMS = (
    rtn("minmax"),
    rtn("mse"),
    f"more float + {rtn('minmax')}",
    f"more float + {rtn('mse')}",
    ADAROUND,
    CONTROL,
    QAT,
)
METHOD = "test accuracy"
# CIFAR-10, ResNet-20, top-1 in %
PAPER = {4: (91.79, 91.75, 91.87), 3: (91.19, 91.19, 91.08), 2: (86.62, 87.92, 84.51)}
DIAGNOSIS = (
    "bits",
    "f, float",
    "f, RTN",
    "f, AdaRound",
    "f, QAT",
    "outside: RTN, AdaRound, control, QAT",
    "first entry, steps",
    "cosine at Q(w)",
    "cosine at w",
    "angle",
    "deployed first",
    "answers",
)


def comparison(dataset: str) -> Comparison:
    """How the tables are laid out."""
    return Comparison("basin-study", dataset, ARMS, (ADAROUND, CONTROL))


def scores(reports: dict[int, BasinReport]) -> list[Score]:
    """By width, arm and seed."""
    found = []
    for seed, report in reports.items():
        before = report.home.test_accuracy or 0.0
        for width in report.widths:
            for s in width.solutions:
                loss = math.nan if s.test_loss is None else s.test_loss
                accuracy = s.test_accuracy or 0.0
                pair = (width.bits, 32)
                found.append(Score(s.name, pair, METHOD, seed, accuracy, loss, before))
    return sorted(found, key=lambda s: (-s.bits[0], ARMS.index(s.arm), s.seed))


def loss_table(found: Sequence[Score]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows): test losses of the arms, mean ± standard deviation, by width."""
    rows = []
    for bits in dict.fromkeys(s.bits[0] for s in found):
        cells = []
        for arm in ARMS:
            losses = [s.loss for s in found if s.bits[0] == bits and s.arm == arm]
            cells.append(_plus_minus(losses))
        rows.append([f"W{bits}", *cells])
    return ["bits", *ARMS], rows


def diagnosis_table(reports: dict[int, BasinReport]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows): the figures of the basins, by width."""
    widths = [width.bits for width in next(iter(reports.values())).widths]
    return list(DIAGNOSIS), [_diagnosis(bits, list(reports.values())) for bits in widths]


def _diagnosis(bits: int, reports: Sequence[BasinReport]) -> list[str]:
    mine = [report.width(bits) for report in reports]
    entries = [width.entry(r.limit) for width, r in zip(mine, reports, strict=True)]
    falls = [width.half_fall for width in mine]
    said = [answer(width) for width in mine]
    counts = [f"{text}: {said.count(text)}" for text in dict.fromkeys(said)]
    return [
        f"W{bits}",
        _plus_minus([report.home.loss for report in reports]),
        _plus_minus([width.nearest.loss for width in mine]),
        _plus_minus([width.named(ADAROUND).loss for width in mine]),
        _plus_minus([width.qat.loss for width in mine]),
        ", ".join(str(_outside(mine, name)) for name in (None, ADAROUND, CONTROL, QAT)),
        ", ".join("never" if entry is None else str(entry) for entry in entries),
        _plus_minus([m for w in mine if (m := w.curve[0].deployed_cosine) is not None]),
        _plus_minus([m for w in mine if (m := w.curve[0].latent_cosine) is not None]),
        _plus_minus([a for w in mine if (a := w.qat.angle) is not None], digits=1),
        f"{sum(fall is not None and fall.before_latent for fall in falls)} of {len(falls)}",
        "; ".join(counts),
    ]


def _outside(widths: Sequence[Width], name: str | None) -> int:
    """In how many seeds a solution is outside the basin; None: RTN on the grid."""
    found = [width.nearest if name is None else width.named(name) for width in widths]
    return sum(not solution.inside for solution in found)


def _plus_minus(values: Sequence[float], digits: int = 3) -> str:
    return plus_minus(values, f".{digits}f") if values else "-"


def gain(gaps: Sequence[float]) -> str:
    """What paired differences say: "gain" or "loss" where the mean is more than two standard
    errors from 0, else "tie"; "one seed" tells nothing."""
    if len(gaps) < 2:
        return "one seed"
    mean, deviation = spread(gaps)
    error = deviation / math.sqrt(len(gaps))
    if abs(mean) <= 2 * error:
        return "tie"
    return "gain" if mean > 0 else "loss"


def claims(found: Sequence[Score]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows): QAT less AdaRound and less the control, the paper's beside ours."""
    rows = []
    for bits in dict.fromkeys(s.bits[0] for s in found):
        cells = []
        for place, name in ((0, ADAROUND), (2, CONTROL)):
            ours, theirs = (
                [s for s in found if s.bits[0] == bits and s.arm == arm] for arm in (QAT, name)
            )
            gaps = paired(ours, theirs)
            mean, deviation = spread(gaps)
            printed = PAPER.get(bits)
            paper = "-" if printed is None else f"{printed[1] - printed[place]:+.2f}"
            ours_text = f"{100 * mean:+.2f}"
            if len(gaps) > 1:
                ours_text += f"\n± {100 * deviation:.2f}"
            cells += [paper, ours_text, gain(gaps)]
        rows.append([f"W{bits}", *cells])
    columns = ["bits"]
    for name in (ADAROUND, CONTROL):
        columns += [f"QAT - {name},\npaper", "ours", "so"]
    return columns, rows


def write_study(
    base: TrainConfig,
    config: BasinConfig,
    reports: dict[int, BasinReport],
    out: Path,
    command: str,
) -> None:
    """report.md, study.png and, last, results.json.

    Args:
        command: what makes it again, for the report's last line.
    """
    found = scores(reports)
    shown = comparison(base.dataset)
    plot_study(out / PICTURE, shown, found)
    write_atomic(out / REPORT, report_text(base, config, reports, found, command).encode())
    results = {
        "study": shown.name,
        "scores": [asdict(score) for score in found],
        "verdicts": {str(seed): report.verdict for seed, report in reports.items()},
    }
    write_atomic(out / RESULTS, to_json(results))


def report_text(
    base: TrainConfig,
    config: BasinConfig,
    reports: dict[int, BasinReport],
    found: Sequence[Score],
    command: str,
) -> str:
    shown, schedule = comparison(base.dataset), config.schedule
    numbers = ", ".join(map(str, reports))
    return f"""# qtrain basin-study {base.dataset}

{base.model} {dict(base.model_options)}, {base.epochs} epochs in float; QAT and its control
{schedule.steps} steps of {schedule.optimizer} at {schedule.lr:g}; AdaRound
{config.adaround.iterations} iterations a layer; grid {config.grid}. Seeds {numbers}. Weights only;
mean ± standard deviation over seeds. Nothing was chosen by test score.

## Test accuracy, %

{markdown_grid(*accuracy_table(shown, found))}
Paired differences in points (same seed), and in how many seeds the arm was better.

{markdown_grid(*difference_table(shown, found), left=3)}
![accuracy by arm]({PICTURE})

## Beside the paper (ResNet-20, CIFAR-10, top-1, points)

{markdown_grid(*claims(found), left=1)}
so: "gain" or "loss" where the mean is more than two standard errors from 0, else "tie".

## Test loss

{markdown_grid(*loss_table(found), left=1)}
## Basins

{markdown_grid(*diagnosis_table(reports), left=1)}
f: the mean loss over the evaluation set. outside: in how many seeds. first entry: by seed, 0 where
RTN never left. Cosines: before the first step. angle: between the displacements of QAT and RTN, in
degrees. deployed first: in how many seeds the deployed loss had made half of its fall before the
latent loss moved. Each seed's report: seed*/basin/report.md.

Again: {command}.
"""
