"""error-model: what the quantization errors of a float model look like."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .app import app
from .options import Dataset, FirstLast, Model, Out, Overwrite, Seed, Source, whole_numbers


@app.command()
def error_model(
    source: Source,
    out: Out = Path("runs/error-model"),
    bits: Annotated[str, typer.Option(help="Bit widths of weights and inputs.")] = "8,4,2",
    calibration_images: Annotated[
        int, typer.Option(min=1, help="Random training images for ranges and errors.")
    ] = 100,
    method: Annotated[
        str, typer.Option(help="Range of weights and inputs: minmax, percentile or mse.")
    ] = "minmax",
    percentile: Annotated[float | None, typer.Option(help="For percentile: e.g. 99.9.")] = None,
    first_last_bits: FirstLast = 8,
    fold: Annotated[bool, typer.Option(help="Fold BatchNorm into the layers first.")] = True,
    seed: Seed = 0,
    dataset: Dataset = None,
    model: Model = None,
    overwrite: Overwrite = False,
) -> None:
    """Quantize a float model at some bit widths, and hold each layer's errors against the laws that
    training noise takes for them.

    Weight errors and input errors of each layer: how far from the fitted Gaussian (DNQ's noise) and
    from the uniform law (pseudo quantization noise), their moments, and how one compares with the
    other; tables, histograms and plots.
    """
    from ..error_report import rich_table, run_error_model
    from ..source import FloatSource

    layers = run_error_model(
        FloatSource.load(source, dataset=dataset, model=model),
        out,
        bits=whole_numbers("bits", bits, 1, 16),
        first_last_bits=first_last_bits or None,
        method=method,
        percentile=percentile,
        fold=fold,
        images=calibration_images,
        seed=seed,
        overwrite=overwrite,
    )
    Console().print(rich_table(layers, f"quantization errors, {out}"))
    typer.echo(f"{out}/report.md")
