"""flatness: the curvature of float models, and their loss under weight noise."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .app import app
from .options import Cpu, Dataset, Model, Out, Overwrite, Seed


@app.command()
def flatness(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(help="Float models of one dataset: run directories or model.safetensors."),
    ],
    out: Out = Path("runs/flatness"),
    examples: Annotated[int, typer.Option(help="Examples that the loss is the mean of.")] = 512,
    split: Annotated[str, typer.Option(help="Where they are from: train or test.")] = "train",
    batch_size: Annotated[int, typer.Option(help="At once; bounds the memory.")] = 64,
    label_smoothing: Annotated[
        float | None,
        typer.Option(help="Of the loss; else as in training, 0 where checkpoints differ in it."),
    ] = None,
    probes: Annotated[int, typer.Option(help="Random vectors for the Hessian's trace.")] = 32,
    iterations: Annotated[int, typer.Option(help="Of Lanczos, at most.")] = 40,
    tolerance: Annotated[
        float, typer.Option(help="Of the top eigenvalue: residual over value.")
    ] = 1e-3,
    sizes: Annotated[
        str, typer.Option(help="Noise relative to the weights, with commas.")
    ] = "0,0.02,0.05,0.1,0.2,0.3,0.5",
    draws: Annotated[int, typer.Option(help="Draws of the noise at each size.")] = 5,
    seed: Seed = 0,
    dataset: Dataset = None,
    model: Model = None,
    overwrite: Overwrite = False,
    cpu: Cpu = False,
) -> None:
    """Compare how flat float models are: Hessian trace, top eigenvalue, loss under weight noise."""
    import torch

    from ..flatness import Probing
    from ..flatness_report import rich_tables, run_flatness
    from ..source import FloatSource

    found = run_flatness(
        {
            name: FloatSource.load(path, dataset=dataset, model=model)
            for name, path in names_of(checkpoints).items()
        },
        out,
        Probing(probes, iterations, tolerance, parse_sizes(sizes), draws, seed),
        split=split,
        examples=examples,
        batch_size=batch_size,
        label_smoothing=label_smoothing,
        device="cuda" if torch.cuda.is_available() and not cpu else "cpu",
        overwrite=overwrite,
    )
    for table in rich_tables(found):
        Console().print(table)
    typer.echo(f"{out}/report.md")


def parse_sizes(text: str) -> tuple[float, ...]:
    """Raises: ValueError if the text is not numbers with commas between them."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(
            f"--sizes: it must be numbers with commas between them, got {text!r}"
        ) from error


def names_of(paths: Iterable[Path]) -> dict[str, Path]:
    """A name for each checkpoint: its run directory's, or the whole path where two would be alike.

    Raises:
        ValueError: a path twice.
    """
    paths = list(paths)
    if len(set(paths)) < len(paths):
        given = ", ".join(str(path) for path in paths)
        raise ValueError(f"flatness: checkpoints must be different paths, got {given}")
    short = [path.parent.name if path.name == "model.safetensors" else path.name for path in paths]
    return {
        name if name and short.count(name) == 1 else str(path): path
        for name, path in zip(short, paths, strict=True)
    }
