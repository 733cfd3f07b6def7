"""init-study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .app import app
from .options import BatchSize, Set, parse_settings, whole_numbers


@app.command("init-study")
def init_study(
    out: Annotated[Path, typer.Option(help="Directory of the runs and tables.")] = Path(
        "runs/init-study"
    ),
    dataset: Annotated[
        str, typer.Option(help="digits, shapes, cifar10, cifar100 or imagefolder.")
    ] = "digits",
    blocks: Annotated[
        str, typer.Option(help="conv, separable, residual, bottleneck, with commas; else all.")
    ] = "all",
    initialisers: Annotated[
        str,
        typer.Option(
            help="normal_ and uniform_ with small, medium, large; glorot_ and he_ with normal, "
            "uniform; with commas; else all ten."
        ),
    ] = "all",
    batchnorm: Annotated[
        bool | None,
        typer.Option("--batchnorm/--no-batchnorm", help="With or without alone; else both."),
    ] = None,
    per_tensor: Annotated[
        bool | None,
        typer.Option(
            "--per-tensor/--per-channel", help="Scales of weights: the one or the other; else both."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many: 0, 1, ..")] = 3,
    bits: Annotated[str, typer.Option(help="Bit widths (W and A), e.g. 8,4,2.")] = "8,4,2",
    first_last_bits: Annotated[
        int, typer.Option(min=0, max=16, help="Bits of first and last layer; 0: as the others.")
    ] = 8,
    calibration_images: Annotated[
        int | None, typer.Option(min=1, help="Random training images for ranges; else 512.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Times through the data.")] = None,
    batch_size: BatchSize = 64,
    lr: Annotated[float, typer.Option(help="Peak learning rate, of all combinations.")] = 1e-2,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, one thread each.")] = 2,
    set_: Set = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Make the runs afresh.")] = False,
) -> None:
    """Train small nets of building blocks from ten laws of first weights, quantize them, and
    compare losses of accuracy and ranges, on the CPU.

    Runs that are there already are read back, so that a study can be stopped and gone on with.
    """
    from ..init_blocks import BLOCKS
    from ..init_report import short_table
    from ..init_study import GRANULARITIES, Plan, run_study, settings_for
    from ..initialisers import INITIALISERS
    from ..report import rich_grid

    settings = parse_settings(set_ or [])
    if "seed" in settings:
        raise ValueError("--set: seed must be left to --seeds in a study, got one")
    given: dict[str, Any] = {"batch_size": batch_size, "lr": lr}
    if epochs is not None:
        given["epochs"] = epochs
    one_kind = {None: GRANULARITIES, True: ("tensor",), False: ("channel",)}
    plan = Plan(
        bits=whole_numbers("bits", bits, 1, 16),
        granularities=one_kind[per_tensor],
        first_last_bits=first_last_bits or None,
        images=calibration_images,
    )
    outcomes = run_study(
        settings_for(dataset, **{**given, **settings}),
        plan,
        out,
        blocks=names(blocks, tuple(BLOCKS)),
        batchnorm=(True, False) if batchnorm is None else (batchnorm,),
        initialisers=names(initialisers, tuple(INITIALISERS)),
        seeds=range(seeds),
        jobs=jobs,
        overwrite=overwrite,
    )
    title = "float accuracy, %, and its loss in points; scales per channel (ch), per tensor (t)"
    columns, rows = short_table(plan, outcomes)
    Console().print(rich_grid(columns, rows, title, left=1, narrow=True))
    typer.echo(f"{out}/report.md")


def names(text: str, every: tuple[str, ...]) -> tuple[str, ...]:
    """ "conv,separable" as names; "all": every one."""
    return every if text == "all" else tuple(part.strip() for part in text.split(","))
