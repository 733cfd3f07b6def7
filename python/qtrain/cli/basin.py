"""basin, basin-study, matrix-factorisation: where PTQ leaves the basin and QAT comes back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .app import app
from .options import (
    BatchSize,
    Cpu,
    Dataset,
    FirstLast,
    Model,
    Out,
    Overwrite,
    Seed,
    Set,
    Source,
    parse_settings,
    whole_numbers,
)

WeightBits = Annotated[str, typer.Option(help="Bit widths of the weights, e.g. 4,3,2.")]
Steps = Annotated[int, typer.Option(help="Of QAT, and of the float training that is its control.")]
QatRate = Annotated[float, typer.Option(help="Of both; halved after half and 0.8 of the steps.")]
Optimizer = Annotated[str, typer.Option(help="Of both: adamw or sgd.")]
Grid = Annotated[str, typer.Option(help="Where the frozen scales are from: minmax or mse.")]
BatchNorm = Annotated[
    str, typer.Option(help="In training: frozen, or train (batch statistics, as usual).")
]
Iterations = Annotated[int, typer.Option(help="Of AdaRound for each layer. The paper has 10000.")]
RecordEvery = Annotated[int, typer.Option(help="Steps between looks at the evaluation set.")]
SlicePoints = Annotated[
    int, typer.Option(help="Places along each side of the 2-D picture; 0: none.")
]
EvaluationImages = Annotated[
    int, typer.Option(help="Random training images that the loss is the mean over.")
]


@app.command()
def basin(
    source: Source,
    out: Out = Path("runs/basin"),
    bits: WeightBits = "4,3,2",
    steps: Steps = 300,
    lr: QatRate = 1e-3,
    optimizer: Optimizer = "adamw",
    batch_size: BatchSize = 64,
    grid: Grid = "minmax",
    first_last_bits: FirstLast = 8,
    batchnorm: BatchNorm = "frozen",
    reestimate_batchnorm: Annotated[
        bool,
        typer.Option(
            "--reestimate-batchnorm", help="Give PTQ's models BatchNorm statistics of their own."
        ),
    ] = False,
    adaround_iterations: Iterations = 1000,
    evaluation_images: EvaluationImages = 256,
    calibration_images: Annotated[
        int, typer.Option(help="Random training images for AdaRound.")
    ] = 512,
    eps_relative: Annotated[
        float, typer.Option(help="Inside the basin: loss at most f + this share of f ..")
    ] = 0.1,
    eps_absolute: Annotated[float, typer.Option(help=".. + this.")] = 0.05,
    record_every: RecordEvery = 10,
    slice_points: SlicePoints = 13,
    seed: Seed = 0,
    dataset: Dataset = None,
    model: Model = None,
    overwrite: Overwrite = False,
    cpu: Cpu = False,
) -> None:
    """Is PTQ enough at a bit width, or is QAT needed? Weights only, on a frozen grid.

    Rounds to nearest and by AdaRound, trains on the same grid (QAT), and trains as long in float
    before rounding (the control). Tells which of them stay in the low-loss basin of the float
    model, when QAT comes back, and where the gradients at w and at Q(w) lead; tables, curves,
    profiles and slices of the loss, and a sentence for each width.
    """
    from ..adaround import AdaRound
    from ..basin_measure import BasinConfig
    from ..basin_report import rich_tables
    from ..basin_run import BasinData, run_basin
    from ..basin_train import Schedule
    from ..source import FloatSource

    schedule = Schedule(
        steps=steps, lr=lr, optimizer=optimizer, record_every=record_every, batchnorm=batchnorm
    )
    config = BasinConfig(
        bits=whole_numbers("bits", bits, 1, 16),
        grid=grid,
        first_last_bits=first_last_bits or None,
        schedule=schedule,
        adaround=AdaRound(iterations=adaround_iterations),
        eps_relative=eps_relative,
        eps_absolute=eps_absolute,
        reestimate_batchnorm=reestimate_batchnorm,
        slice_points=slice_points,
        seed=seed,
    )
    report = run_basin(
        FloatSource.load(source, dataset=dataset, model=model),
        out,
        config,
        BasinData(evaluation_images, calibration_images, batch_size),
        overwrite=overwrite,
        cpu=cpu,
    )
    console = Console()
    for table in rich_tables(report):
        console.print(table)
    for sentence in report.verdict:
        typer.echo(sentence)
    typer.echo(f"{out}/report.md")


@app.command("matrix-factorisation")
def matrix_factorisation(
    out: Out = Path("runs/matrix-factorisation"),
    seeds: Annotated[int, typer.Option(help="How many: 0, 1, ..")] = 30,
    rho: Annotated[float, typer.Option(help="Distance of the grid's points.")] = 0.30,
    float_steps: Annotated[int, typer.Option(help="Of gradient descent in float.")] = 4000,
    qat_steps: Annotated[int, typer.Option(help="With the straight-through gradient.")] = 1500,
    overwrite: Overwrite = False,
) -> None:
    """PTQ and QAT on a matrix factorisation, whose minima are known, over seeds.

    The defaults are those of the paper, and seed 0 gives its numbers.
    """
    import torch

    from ..matrix_factorisation import FactorisationConfig, rich_table, run_factorisation

    config = FactorisationConfig(rho=rho, float_steps=float_steps, qat_steps=qat_steps, seeds=seeds)
    # too little work for two threads, and the last bits of a product depend on their number
    torch.set_num_threads(1)
    Console().print(rich_table(run_factorisation(config, out, overwrite=overwrite)))
    typer.echo(f"{out}/report.md")


@app.command("basin-study")
def basin_study(
    out: Annotated[
        Path | None, typer.Option(help="Directory of the runs; else runs/basin-study/DATASET.")
    ] = None,
    dataset: Annotated[str, typer.Option(help="digits or shapes.")] = "digits",
    seeds: Annotated[int, typer.Option(min=1, help="How many: 0, 1, ..")] = 5,
    bits: WeightBits = "4,3,2",
    steps: Steps = 300,
    lr: QatRate = 1e-3,
    grid: Grid = "minmax",
    batchnorm: BatchNorm = "frozen",
    adaround_iterations: Iterations = 300,
    epochs: Annotated[int | None, typer.Option(help="Of float training.")] = None,
    model: Annotated[str | None, typer.Option(help="Instead of the preset's.")] = None,
    set_: Set = None,
    jobs: Annotated[int, typer.Option(min=1, help="Seeds at a time, one thread each.")] = 2,
    overwrite: Overwrite = False,
) -> None:
    """Train float models from several seeds, and make a basin report of each: means, standard
    deviations, paired differences, and the paper's figures beside ours.

    Runs that are there already are read back, so that a study can be stopped and gone on with.
    """
    from ..adaround import AdaRound
    from ..basin_study import CONFIG, run_study, settings_for
    from ..basin_study_report import claims, comparison, scores
    from ..report import rich_grid
    from ..study import accuracy_table

    given = {"epochs": epochs, "model": model, **parse_settings(set_ or [])}
    if "seed" in given:
        raise ValueError("--set: seed must be left to --seeds in a study, got one")
    base = settings_for(dataset, **{k: v for k, v in given.items() if v is not None})
    config = replace(
        CONFIG,
        bits=whole_numbers("bits", bits, 1, 16),
        grid=grid,
        schedule=replace(CONFIG.schedule, steps=steps, lr=lr, batchnorm=batchnorm),
        adaround=AdaRound(iterations=adaround_iterations),
    )
    out = out or Path("runs/basin-study") / base.dataset
    found = scores(run_study(base, out, config, seeds=range(seeds), jobs=jobs, overwrite=overwrite))
    console = Console()
    table = accuracy_table(comparison(base.dataset), found)
    console.print(rich_grid(*table, f"{base.dataset}: test accuracy, %"))
    console.print(rich_grid(*claims(found), "QAT less PTQ, points", left=1, narrow=True))
    typer.echo(f"{out}/report.md")
