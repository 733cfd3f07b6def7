"""ptq: quantize after training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .options import (
    BatchSize,
    Bits,
    Dataset,
    FirstLast,
    Model,
    Out,
    Overwrite,
    Seed,
    Source,
    finish,
)


@app.command()
def ptq(
    source: Source,
    out: Out = Path("runs/ptq"),
    weight_bits: Bits = 8,
    activation_bits: Bits = 8,
    method: Annotated[
        str, typer.Option(help="Range of weights and inputs: minmax, percentile or mse.")
    ] = "minmax",
    percentile: Annotated[float | None, typer.Option(help="For percentile: e.g. 99.9.")] = None,
    first_last_bits: FirstLast = 8,
    fold: Annotated[bool, typer.Option(help="Fold BatchNorm into the layers first.")] = True,
    calibration_batches: Annotated[
        int, typer.Option(min=1, help="Training batches for the ranges of the inputs.")
    ] = 8,
    batch_size: BatchSize = 64,
    seed: Seed = 0,
    dataset: Dataset = None,
    model: Model = None,
    overwrite: Overwrite = False,
) -> None:
    """Quantize a float model after training, and evaluate it."""
    from ..ptq import ptq_qconfig, run_ptq
    from ..source import FloatSource

    qconfig = ptq_qconfig(
        method,
        weight_bits,
        activation_bits,
        percentile=percentile,
        first_last_bits=first_last_bits or None,
    )
    run_ptq(
        FloatSource.load(source, dataset=dataset, model=model),
        qconfig,
        out,
        calibration=calibration_batches,
        batch_size=batch_size,
        seed=seed,
        fold=fold,
        overwrite=overwrite,
    )
    finish(out)
