"""bwrf and bwrf-study."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

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
    whole_numbers,
)

Blocks = Annotated[
    str | None,
    typer.Option(help="Modules that end the blocks, with commas: layer1,layer2,..; else found."),
]
Temperature = Annotated[float, typer.Option(help="Of distillation.")]
Alpha = Annotated[float, typer.Option(help="Weight of distillation from the teacher.")]
Beta = Annotated[float, typer.Option(help="Weight of the mixed networks; 0: none are run.")]


def block_names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name.strip() for name in text.split(","))


@app.command()
def bwrf(
    source: Source,
    out: Out = Path("runs/bwrf"),
    teacher: Annotated[
        Path | None,
        typer.Option(
            help="Another float model of the same architecture; else the one to start from."
        ),
    ] = None,
    method: Method = "lsq",
    weight_bits: Bits = 4,
    activation_bits: Bits = 4,
    first_last_bits: FirstLast = 8,
    p: Share = None,
    alpha_decay: AlphaDecay = None,
    mode: Annotated[
        str,
        typer.Option(
            help="prefix (all mixed networks), sampled (one of them a step) or single (one block)."
        ),
    ] = "prefix",
    block: Annotated[
        int | None, typer.Option(min=1, help="For mode single: this block; else all, one by one.")
    ] = None,
    blocks: Blocks = None,
    temperature: Temperature = 4.0,
    alpha: Alpha = 1.0,
    beta: Beta = 1.0,
    schedule: Annotated[
        str | None,
        typer.Option(help="linear or exponential: mixed networks join in over the run."),
    ] = None,
    effect: Annotated[
        str, typer.Option(help="both, forward (no gradient through the teacher) or backward.")
    ] = "both",
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
    """Train a float model on with fake quantization, beside mixed-precision networks (BWRF).

    Blocks of a frozen float teacher are replaced by quantized ones; the mixed networks distil from
    the teacher too.
    """
    from ..bwrf_config import BwrfConfig
    from ..bwrf_run import Bwrf
    from ..loop import train as run
    from ..qat import qat_qconfig
    from ..recipe import TrainConfig
    from ..source import FloatSource

    start = FloatSource.load(source, dataset=dataset, model=model)
    other = None if teacher is None else FloatSource.load(teacher, dataset=dataset, model=model)
    config = TrainConfig(**start.settings(), epochs=epochs, batch_size=batch_size, lr=lr, seed=seed)
    qconfig = qat_qconfig(
        method, weight_bits, activation_bits, first_last_bits=first_last_bits or None, p=p
    )
    replacement = BwrfConfig(
        blocks=block_names(blocks),
        mode=mode,
        block=block,
        temperature=temperature,
        alpha=alpha,
        beta=beta,
        schedule=schedule,
        effect=effect,
    )
    config = replace(config, **parse_settings(set_ or []))
    recipe = Bwrf(start, qconfig, replacement, teacher=other, alpha_decay=alpha_decay)
    run(config, recipe, out, overwrite=overwrite, cpu=cpu)
    finish(out)


@app.command("bwrf-study")
def bwrf_study(
    study: Annotated[str, typer.Argument(help="modes, depths, schedules or effects.")] = "modes",
    out: Annotated[Path, typer.Option(help="Directory of the runs; studies share it.")] = Path(
        "runs/bwrf-study"
    ),
    dataset: Annotated[
        str, typer.Option(help="digits, shapes, cifar10, cifar100 or imagefolder.")
    ] = "shapes",
    model: Annotated[
        str | None, typer.Option(help="resnet8 (for shapes), mobile, ..; torchvision's, timm's.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many: 0, 1, ..")] = 5,
    bits: Annotated[str, typer.Option(help="Bit widths (W and A), e.g. 4,3,2.")] = "4,3,2",
    method: Method = "lsq",
    float_epochs: Annotated[int, typer.Option(min=1, help="Of the models to start from.")] = 20,
    float_lr: Annotated[float, typer.Option(help="Peak learning rate of these.")] = 5e-3,
    epochs: Epochs = 10,
    batch_size: BatchSize = 64,
    lr: Rate = 3e-3,
    time_factor: Annotated[
        float | None,
        typer.Option(help="Time of a step of mode prefix over one of plain QAT; else measured."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, one thread each.")] = 2,
    set_: Set = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Make the runs of this study afresh.")
    ] = False,
) -> None:
    """Run BWRF, plain QAT and distillation over seeds, on the CPU: mean, standard deviation, paired
    differences.

    Runs that are there already are read back, so that a study can be stopped and gone on with.
    """
    from ..bwrf_study import Plan, run_study, settings_for
    from ..report import rich_grid
    from ..study import accuracy_table, difference_table

    settings = parse_settings(set_ or [])
    if "seed" in settings:
        raise ValueError("--set: seed must be left to --seeds in a study, got one")
    given: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "lr": lr}
    if model is not None:
        given["model"] = model
    plan = Plan(
        settings_for(dataset, **{**given, **settings}),
        float_epochs=float_epochs,
        float_lr=float_lr,
        method=method,
        bits=whole_numbers("bits", bits, 1, 16),
        time_factor=time_factor,
    )
    shown, scores = run_study(study, plan, out, seeds=range(seeds), jobs=jobs, overwrite=overwrite)
    console = Console()
    console.print(rich_grid(*accuracy_table(shown, scores), f"{study}: test accuracy, %"))
    console.print(rich_grid(*difference_table(shown, scores), "paired differences, points", left=3))
    typer.echo(f"{out}/{study}/report.md")
