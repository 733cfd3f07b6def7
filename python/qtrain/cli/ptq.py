"""ptq: quantize after training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .options import (
    BatchSize,
    Cpu,
    Dataset,
    Model,
    Out,
    Overwrite,
    Seed,
    Source,
    finish,
    whole_numbers,
)

# checked by QuantSpec and QConfig, whose errors are one line
Width = Annotated[int | None, typer.Option(help="For widths that differ; else 8.")]
SideMethod = Annotated[str | None, typer.Option(help="Instead of --method, for this one.")]


def _widths(
    bits: str | None, weight_bits: int | None, activation_bits: int | None
) -> list[tuple[int, int]]:
    """(weights, activations) of each model to make.

    Raises:
        ValueError: both ways of saying it at once; a bad list.
    """
    if bits is None:
        sides = (8 if side is None else side for side in (weight_bits, activation_bits))
        weight, activation = sides
        return [(weight, activation)]
    if weight_bits is not None or activation_bits is not None:
        raise ValueError(
            "--bits: it must stand alone, got --weight-bits or --activation-bits beside it"
        )
    return [(width, width) for width in whole_numbers("bits", bits, 1, 16)]


@app.command()
def ptq(
    source: Source,
    out: Out = Path("runs/ptq"),
    bits: Annotated[
        str | None,
        typer.Option(help="Widths of weights and inputs alike, e.g. 8,4,3,2; several share --out."),
    ] = None,
    weight_bits: Width = None,
    activation_bits: Width = None,
    method: Annotated[
        str, typer.Option(help="Ranges of weights and inputs: minmax, percentile or mse.")
    ] = "minmax",
    weight_method: SideMethod = None,
    activation_method: SideMethod = None,
    percentile: Annotated[float | None, typer.Option(help="For percentile: e.g. 99.9.")] = None,
    first_last_bits: Annotated[
        int, typer.Option(help="Bits of the first and last layer; 0: as the others.")
    ] = 8,
    fold: Annotated[bool, typer.Option(help="Fold BatchNorm into the layers first.")] = True,
    rounding: Annotated[
        str, typer.Option(help="Of weights: nearest, or adaround (learned, layer by layer).")
    ] = "nearest",
    adaround_iterations: Annotated[
        int | None, typer.Option(help="Steps for each layer; else 1000. The paper has 10000.")
    ] = None,
    calibration_images: Annotated[
        int | None, typer.Option(help="Random training images for ranges and AdaRound; else 512.")
    ] = None,
    batch_size: BatchSize = 64,
    seed: Seed = 0,
    dataset: Dataset = None,
    model: Model = None,
    overwrite: Overwrite = False,
    cpu: Cpu = False,
) -> None:
    """Quantize a float model after training, and evaluate it.

    With several widths in --bits, --out gets a run directory for each and a report of all.
    """
    from rich.console import Console

    from ..adaround import AdaRound
    from ..ptq import Rounding, as_rounding, ptq_qconfig
    from ..ptq_run import PtqOptions, run_ptq, run_ptq_widths
    from ..report import show
    from ..source import FloatSource

    qconfigs = [
        ptq_qconfig(
            method,
            *pair,
            weight_method=weight_method,
            activation_method=activation_method,
            percentile=percentile,
            first_last_bits=first_last_bits or None,
        )
        for pair in _widths(bits, weight_bits, activation_bits)
    ]
    how: Rounding = rounding
    if adaround_iterations is not None:
        if as_rounding(rounding) is None:
            raise ValueError(
                "--adaround-iterations: it must come with --rounding adaround, "
                f"got --rounding {rounding}"
            )
        how = AdaRound(iterations=adaround_iterations)
    options = PtqOptions(calibration_images, batch_size, seed, fold, how)
    start = FloatSource.load(source, dataset=dataset, model=model)
    if len(qconfigs) == 1:
        run_ptq(start, qconfigs[0], out, options, overwrite=overwrite, cpu=cpu)
        finish(out)
        return
    run_ptq_widths(start, qconfigs, out, options, overwrite=overwrite, cpu=cpu)
    show([out], Console())
    typer.echo(f"{out}/report.md")
