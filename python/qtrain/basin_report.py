"""Tables and report.md of the basin report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from .basin_pictures import COSINES, CURVES, PROFILES, SLICES
from .basin_result import MOVED, RANGES, BasinReport, Solution, Width
from .report import RESULTS, Row, markdown_grid, rich_grid

SOLUTIONS = (
    "bits",
    "model",
    "loss",
    "basin",
    "accuracy",
    "test\nloss",
    "test\naccuracy",
    "distance",
    "relative",
    "angle",
)
ON_SCREEN = ("bits", "model", "loss", "basin", "test\naccuracy", "relative", "angle")
TRAINING = (
    "bits",
    "loss at start",
    "first entry",
    "loss at end",
    "half of the fall at",
    "fall by then",
    "latent change",
    "cosine at Q(w)",
    "cosine at w",
)
CAPTIONS = {
    CURVES: "loss of the latent and of the deployed weights during QAT",
    COSINES: "cosine between descent and the way back to the float model",
    PROFILES: "loss along the lines between the models",
    SLICES: "loss in the plane through the float model, RTN and QAT",
}


def solution_rows(report: BasinReport) -> list[list[str]]:
    """Rows of ``SOLUTIONS``: the float models, then those of each width."""
    rows = [["FP32", *_cells(s)] for s in (report.home, report.more_float)]
    for width in report.widths:
        rows += [[f"W{width.bits}", *_cells(s)] for s in width.solutions]
    return rows


def _cells(solution: Solution) -> list[str]:
    return [
        solution.name,
        number(solution.loss),
        "in" if solution.inside else "out",
        percent(solution.accuracy),
        number(solution.test_loss),
        percent(solution.test_accuracy),
        number(solution.distance),
        number(solution.relative_distance),
        "-" if solution.angle is None else f"{solution.angle:.1f}",
    ]


def training_rows(report: BasinReport) -> list[list[str]]:
    """Rows of ``TRAINING``: QAT at each width."""
    return [_training(width, report.limit) for width in report.widths]


def _training(width: Width, limit: float) -> list[str]:
    first, last, entry = width.curve[0], width.curve[-1], width.entry(limit)
    fall = width.half_fall
    middle = ["-"] * 3
    if fall is not None:
        middle = [str(fall.step), number(fall.fall), f"{fall.latent_change:+.3g}"]
    return [
        f"W{width.bits}",
        number(first.deployed_loss),
        "never" if entry is None else str(entry),
        number(last.deployed_loss),
        *middle,
        cosine(first.deployed_cosine),
        cosine(first.latent_cosine),
    ]


def number(value: float | None) -> str:
    """Three digits; a dash for what there is not."""
    return "-" if value is None else f"{value:.3g}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


def table_rows(report: BasinReport) -> list[Row]:
    """For `qtrain report`: what has a test score, or else a score on the evaluation set."""
    found = []
    pairs: list[tuple[tuple[int, int] | None, Sequence[Solution]]] = [(None, [report.home])]
    pairs += [((width.bits, 32), width.solutions) for width in report.widths]
    for bits, solutions in pairs:
        for s in solutions:
            tested = s.test_accuracy is not None and s.test_loss is not None
            accuracy, loss = (s.test_accuracy, s.test_loss) if tested else (s.accuracy, s.loss)
            if accuracy is not None and loss is not None:
                found.append(Row(s.name, bits, accuracy, loss))
    return found


def rich_tables(report: BasinReport) -> list[Table]:
    """For the screen, the first without the columns that do not fit."""
    kept = [place for place, name in enumerate(SOLUTIONS) if name in ON_SCREEN]
    solutions = [[row[place] for place in kept] for row in solution_rows(report)]
    training = training_rows(report)
    return [
        rich_grid(ON_SCREEN, solutions, "ways to a quantized model", narrow=True),
        rich_grid(_broken(TRAINING), training, "QAT on the frozen grid", left=1, narrow=True),
    ]


def _broken(columns: Sequence[str]) -> list[str]:
    """Heads on several lines, for the screen."""
    return [column.replace(" ", "\n", 1) for column in columns]


def report_text(
    name: str,
    described: Mapping[str, Any],
    report: BasinReport,
    pictures: Sequence[str],
    command: str,
) -> str:
    """report.md.

    Args:
        described: the settings, as in config.json under "recipe".
        command: what makes it again, for the last line.
    """
    schedule = described["schedule"]
    eps = report.limit - report.home.loss
    sentences = "\n".join(f"- {sentence}." for sentence in report.verdict)
    shown = "\n".join(f"![{CAPTIONS[picture]}]({picture})" for picture in pictures)
    falls = {f"W{width.bits}": width.half_fall for width in report.widths}
    early = [name for name, fall in falls.items() if fall is not None and fall.before_latent]
    statistics = "re-estimated" if described["reestimate_batchnorm"] else "those of the float model"
    halved = ", ".join(f"{share:g}" for share in schedule["halve_at"])
    every = schedule["record_every"]
    return f"""# {name}: basins

{sentences}

## Ways to a quantized model

{markdown_grid(SOLUTIONS, solution_rows(report))}
- loss: f, the mean over the evaluation set in eval mode. basin: "in" where f is at most
  {report.limit:.4g}, that is f(w_fp) {report.home.loss:.4g} + eps {eps:.4g}
  ({described["eps_relative"]:g} f(w_fp) + {described["eps_absolute"]:g}).
- Weights only, symmetric per output channel; first and last layer:
  {described["first_last_bits"] or "same"} bits. AdaRound and QAT share the grid of
  {RANGES[described["grid"]]} ranges of the float model, which is frozen; the other RTN has its own.
  "more float": the same number of steps on the same batches in float first, then PTQ with
  ranges of its own.
- distance: norm of the quantized weights less the float model's; relative: over the norm of those.
  angle: in degrees to the displacement of RTN on the shared grid.
- BatchNorm statistics of models that PTQ made: {statistics}. In training: {schedule["batchnorm"]}.

## QAT on the frozen grid

{markdown_grid(TRAINING, training_rows(report), left=1)}
- {schedule["steps"]} steps of {schedule["optimizer"]}, rate {schedule["lr"]:g}, halved at
  {halved or "none"} of the steps.
- first entry: the first step that was looked at (every {every}, and 1, 2, 4, ..) with the deployed
  loss inside the basin.
- half of the fall: the first look at which the deployed loss had made half of its way from start
  to end; latent change: that of f(w) by then. The deployed loss fell before the latent one moved
  (by less than {MOVED:g} of the fall) at: {", ".join(early) or "no width"}.
- cosine at Q(w): cos(-grad f(Q(w)), w_fp - Q(w)) before the first step; at w: the same with the
  gradient at w.

{shown}

Again: {command}. Settings: config.json. All figures and curves: {RESULTS}. Seed
{described["seed"]}.
"""
