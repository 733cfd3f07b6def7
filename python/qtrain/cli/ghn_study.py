"""ghn-study, ghn-start and ghn-weights: a GHN and its variants over seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .app import app
from .options import Set, parse_settings, whole_numbers

Out = Annotated[Path, typer.Option(help="Directory of the runs; these commands share it.")]
Preset = Annotated[str, typer.Option(help="digits, shapes or paper.")]
Seeds = Annotated[int, typer.Option(min=1, help="How many: 0, 1, ..")]
Epochs = Annotated[
    int | None, typer.Option(min=1, help="Of a GHN with fresh weights; else the preset's.")
]
Tuning = Annotated[
    int | None, typer.Option(min=1, help="Of a GHN that starts from another; else half of that.")
]
Rate = Annotated[float | None, typer.Option(help="Peak learning rate; else the preset's.")]
Jobs = Annotated[int, typer.Option(min=1, help="Runs at a time, one thread each.")]


def _plan(
    preset: str, epochs: int | None, tuning: int | None, lr: float | None, set_: list[str] | None
) -> Any:
    from ..ghn.run import settings_for
    from ..ghn.study import Plan

    train = parse_settings(set_ or [])
    own = {"epochs": "--epochs", "lr": "--lr", "seed": "--seeds"}
    for name in own.keys() & train:
        raise ValueError(f"--set: {name} must be left to {own[name]} in a study, got one")
    epochs = epochs or settings_for(preset)[0].epochs
    tuned = tuning or max(1, epochs // 2)
    return Plan(preset, epochs, tuned, lr, train=train)


@app.command("ghn-study")
def ghn_study(
    study: Annotated[
        str, typer.Argument(help="quantized, quantizers, bn-free, heads or widths.")
    ] = "quantized",
    out: Out = Path("runs/ghn-study"),
    preset: Preset = "digits",
    seeds: Seeds = 3,
    epochs: Epochs = None,
    tuning_epochs: Tuning = None,
    lr: Rate = None,
    nets: Annotated[int, typer.Option(min=1, help="Networks of each split to evaluate on.")] = 20,
    bits: Annotated[str, typer.Option(help="Widths to evaluate at.")] = "8,4,2",
    set_: Set = None,
    jobs: Jobs = 2,
) -> None:
    """Train GHN-Q, GHN-QAT and variants of them over seeds, and evaluate each on every split.

    Runs that are there already are read back, so that a study can be stopped and gone on with.
    """
    from dataclasses import replace

    from ..ghn.evaluate import EvalPlan
    from ..ghn.study import run_study
    from ..ghn.study_report import screen_tables

    widths = whole_numbers("bits", bits, 1, 16)
    evaluation = EvalPlan(bits=widths, mixed=widths if len(widths) > 1 else ())
    plan = _plan(preset, epochs, tuning_epochs, lr, set_)
    plan = replace(plan, nets=nets, evaluation=evaluation)
    outcomes = run_study(study, plan, out, seeds=range(seeds), jobs=jobs)
    console = Console()
    for table in screen_tables(study, outcomes):
        console.print(table)
    typer.echo(f"{out}/{study}/report.md")


@app.command("ghn-start")
def ghn_start(
    out: Out = Path("runs/ghn-study"),
    preset: Preset = "digits",
    seeds: Seeds = 3,
    epochs: Epochs = None,
    tuning_epochs: Tuning = None,
    lr: Rate = None,
    bits: Annotated[str, typer.Option(help="Widths of QAT: of 8, 4, 2.")] = "4,2",
    noise: Annotated[
        float, typer.Option(help="Breaks the symmetry of tiled channels; relative.")
    ] = 0.05,
    qat_epochs: Annotated[int, typer.Option(min=1, help="Of QAT.")] = 20,
    set_: Set = None,
    jobs: Jobs = 2,
) -> None:
    """QAT of a network from weights of GHN-Q, of GHN-QAT and from random ones: steps to an
    accuracy."""
    from dataclasses import replace

    from ..ghn.run import settings_for
    from ..ghn.start_study import StartPlan, default_qat, run_starts, screen_table

    config = settings_for(preset, train=parse_settings(set_ or []))[0]
    qat = replace(default_qat(config.dataset, config.data_options), epochs=qat_epochs)
    ghn = _plan(preset, epochs, tuning_epochs, lr, set_)
    plan = StartPlan(ghn, qat, whole_numbers("bits", bits, 1, 16), noise=noise)
    curves = run_starts(plan, out, seeds=range(seeds), jobs=jobs)
    Console().print(screen_table(curves, plan.goals))
    typer.echo(f"{out}/start/report.md")


@app.command("ghn-weights")
def ghn_weights(
    out: Out = Path("runs/ghn-study"),
    preset: Preset = "digits",
    seeds: Seeds = 3,
    epochs: Epochs = None,
    tuning_epochs: Tuning = None,
    lr: Rate = None,
    nets: Annotated[int, typer.Option(min=1, help="Networks of the id split.")] = 20,
    set_: Set = None,
    jobs: Jobs = 2,
) -> None:
    """How weights of GHN-Q and GHN-QAT are distributed, beside random ones."""
    from dataclasses import replace

    from ..ghn.weights_study import run_weights, screen_table

    plan = replace(_plan(preset, epochs, tuning_epochs, lr, set_), nets=nets)
    shapes = run_weights(plan, out, seeds=range(seeds), jobs=jobs)
    Console().print(screen_table(shapes))
    typer.echo(f"{out}/weights/report.md")
