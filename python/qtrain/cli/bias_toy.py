"""bias-toy: what kinds of training noise do to a known optimum."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .app import app
from .options import Out, Overwrite, Seed


@app.command()
def bias_toy(
    out: Out = Path("runs/bias-toy"),
    hessian: Annotated[str, typer.Option(help="dense or diagonal.")] = "dense",
    channels: Annotated[int, typer.Option(help="Channels of 64 elements, each its noise.")] = 8,
    mean: Annotated[float, typer.Option(help="Size of the noise's mean.")] = 0.1,
    std: Annotated[float, typer.Option(help="Size of the noise's deviation.")] = 0.2,
    lr: Annotated[float, typer.Option(help="Rate of gradient descent.")] = 0.5,
    steps: Annotated[int, typer.Option(help="Steps of gradient descent.")] = 800,
    late: Annotated[int, typer.Option(help="The last steps, over which is averaged.")] = 400,
    replicas: Annotated[int, typer.Option(help="Independent runs, for standard errors.")] = 32,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Naive, i.i.d. and differential noise on a quadratic whose optimum is known.

    Naive noise shifts where training ends by its mean, the other two do not; the table has what
    was measured beside the closed forms.
    """
    import torch

    from ..bias_toy import ToyConfig, rich_table, run_bias_toy

    config = ToyConfig(
        hessian=hessian,
        channels=channels,
        mean=mean,
        std=std,
        lr=lr,
        steps=steps,
        late=late,
        replicas=replicas,
        seed=seed,
    )
    # too little work for two: threads that wait for each other are slower, and the last bits of a
    # product depend on their number
    torch.set_num_threads(1)
    Console().print(rich_table(run_bias_toy(config, out, overwrite=overwrite)))
    typer.echo(f"{out}/report.md")
