"""demo, train, qat and report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .app import app
from .options import (
    AlphaDecay,
    BatchSize,
    Bits,
    Cpu,
    Dataset,
    Epochs,
    FirstLast,
    Method,
    Model,
    Out,
    Overwrite,
    Rate,
    Seed,
    Set,
    Share,
    Source,
    finish,
    parse_settings,
)


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A few epochs only: do all parts work here?")
    ] = False,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    cpu: Cpu = False,
) -> None:
    """A small CNN on handwritten digits, quantized by every method, in one table.

    PTQ at W8A8, W4A4 and W2A2; QAT (min-max STE and LSQ), BWRF, DNQ and QAT from weights that a
    hypernetwork predicted (GHN-QAT) at W4A4 and W2A2.
    """
    from ..demo import DemoConfig, run_demo
    from ..report import RESULTS, show

    if (out / RESULTS).exists() and not overwrite:
        typer.echo(f"{out} holds a finished demo; this is its table (--overwrite runs it afresh).")
    run_demo(
        DemoConfig.quick(seed) if quick else DemoConfig.usual(seed),
        out,
        overwrite=overwrite,
        cpu=cpu,
    )
    show([out], Console())
    typer.echo(f"{out}/report.md")


@app.command()
def train(
    out: Out = Path("runs/float"),
    dataset: Annotated[
        str, typer.Option(help="digits, shapes, cifar10, cifar100 or imagefolder.")
    ] = "digits",
    model: Annotated[
        str,
        typer.Option(help="cnn, resnet8, resnet20, mobile, vit_tiny; or torchvision's, timm's."),
    ] = "cnn",
    epochs: Epochs = 20,
    batch_size: BatchSize = 64,
    lr: Rate = 5e-3,
    seed: Seed = 0,
    set_: Set = None,
    overwrite: Overwrite = False,
    cpu: Cpu = False,
) -> None:
    """Train a float model, the starting point of ptq and qat."""
    from ..loop import train as run
    from ..recipe import Recipe, TrainConfig

    config = TrainConfig(
        dataset=dataset, model=model, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed
    )
    run(replace(config, **parse_settings(set_ or [])), Recipe(), out, overwrite=overwrite, cpu=cpu)
    finish(out)


@app.command()
def qat(
    source: Source,
    out: Out = Path("runs/qat"),
    method: Method = "lsq",
    weight_bits: Bits = 4,
    activation_bits: Bits = 4,
    first_last_bits: FirstLast = 8,
    p: Share = None,
    alpha_decay: AlphaDecay = None,
    epochs: Epochs = 20,
    batch_size: BatchSize = 64,
    lr: Rate = 3e-3,
    seed: Seed = 0,
    set_: Set = None,
    dataset: Dataset = None,
    model: Model = None,
    overwrite: Overwrite = False,
    cpu: Cpu = False,
) -> None:
    """Train a float model on with fake-quantized weights and layer inputs."""
    from ..loop import train as run
    from ..qat import Qat, qat_qconfig
    from ..recipe import TrainConfig
    from ..source import FloatSource

    start = FloatSource.load(source, dataset=dataset, model=model)
    config = TrainConfig(**start.settings(), epochs=epochs, batch_size=batch_size, lr=lr, seed=seed)
    qconfig = qat_qconfig(
        method, weight_bits, activation_bits, first_last_bits=first_last_bits or None, p=p
    )
    config = replace(config, **parse_settings(set_ or []))
    recipe = Qat(start, qconfig, alpha_decay=alpha_decay)
    run(config, recipe, out, overwrite=overwrite, cpu=cpu)
    finish(out)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, to stand in one table.")],
) -> None:
    """Print the table of finished runs."""
    from ..report import show

    show(runs, Console())
