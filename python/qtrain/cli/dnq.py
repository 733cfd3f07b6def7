"""dnq and dnq-study."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .app import app
from .options import Bits, Cpu, FirstLast, Out, Overwrite, Seed, Set, parse_settings, whole_numbers

Dataset = Annotated[
    str | None,
    typer.Option(help="digits (default), shapes, cifar10, cifar100, imagefolder; with its preset."),
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="Settings to start from: a dataset's name, or paper (400 epochs, CIFAR-100)."
    ),
]
Model = Annotated[
    str | None, typer.Option(help="Instead of the preset's: ours, torchvision's, timm's.")
]
Epochs = Annotated[
    int | None, typer.Option(min=1, help="Times through the data; else the preset's.")
]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Instead of the preset's.")]
Rate = Annotated[float | None, typer.Option(help="Peak learning rate, instead of the preset's.")]
Images = Annotated[
    int, typer.Option(min=1, help="Random training images: for the simulation, and for PTQ.")
]
PtqBits = Annotated[str, typer.Option(help="Bit widths (W and A) to quantize to, e.g. 8,4,3,2.")]


def _settings(
    dataset: str | None, preset: str | None, swa: bool, set_: list[str] | None, **given: Any
) -> Any:
    """The run's TrainConfig: the preset, then what was given, then --set."""
    from ..dnq_run import settings_for

    given["dataset"] = dataset
    changed = {key: value for key, value in given.items() if value is not None}
    if not swa:
        changed["swa_start"] = None
    start = preset or dataset or "digits"
    return settings_for(start, **{**changed, **parse_settings(set_ or [])})


@app.command()
def dnq(
    out: Out = Path("runs/dnq"),
    dataset: Dataset = None,
    preset: Preset = None,
    model: Model = None,
    weight_bits: Bits = 4,
    activation_bits: Bits = 4,
    first_last_bits: FirstLast = 8,
    method: Annotated[
        str, typer.Option(help="Ranges of the simulated PTQ: minmax, percentile or mse.")
    ] = "minmax",
    percentile: Annotated[float | None, typer.Option(help="For percentile: e.g. 99.9.")] = None,
    weight_noise: Annotated[
        str, typer.Option(help="differential, iid, naive, discrete or none.")
    ] = "differential",
    activation_noise: Annotated[str, typer.Option(help="drop_in or none.")] = "drop_in",
    p: Annotated[float, typer.Option(help="Share of an activation's elements with noise.")] = 0.5,
    permanent: Annotated[
        bool, typer.Option("--permanent/--temporary", help="Does weight noise stay in the weights?")
    ] = False,
    warmup_epochs: Annotated[
        int | None, typer.Option(min=0, help="Without noise; else half of all.")
    ] = None,
    ramp_epochs: Annotated[
        int | None, typer.Option(min=0, help="In which the noise grows; else a quarter of all.")
    ] = None,
    ramp: Annotated[str, typer.Option(help="linear, cosine or constant.")] = "linear",
    decay: Annotated[float, typer.Option(help="Of the moving averages of the errors.")] = 0.9,
    calibration_images: Images = 100,
    swa: Annotated[bool, typer.Option(help="Average the weights of the last quarter.")] = True,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Rate = None,
    seed: Seed = 0,
    set_: Set = None,
    ptq_bits: PtqBits = "8,4,3,2",
    adaround_iterations: Annotated[
        int, typer.Option(min=0, help="AdaRound beside rounding to nearest; 0: not.")
    ] = 1000,
    overwrite: Overwrite = False,
    cpu: Cpu = False,
) -> None:
    """Train in float under the noise of quantization (DNQ), then quantize in every usual way."""
    from accelerate import PartialState

    from ..adaround import AdaRound
    from ..dnq import DnqConfig
    from ..dnq_run import PtqPlan, phases, run_dnq
    from ..report import show

    given = {"model": model, "epochs": epochs, "batch_size": batch_size, "lr": lr}
    config = _settings(dataset, preset, swa, set_, seed=seed, **given)
    length = {"warmup_epochs": warmup_epochs, "ramp_epochs": ramp_epochs}
    asked = {key: value for key, value in length.items() if value is not None}
    noise = DnqConfig(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        first_last_bits=first_last_bits or None,
        method=method,
        percentile=percentile,
        weight_noise=weight_noise,
        activation_noise=activation_noise,
        p=p,
        permanent=permanent,
        ramp=ramp,
        decay=decay,
        calibration_images=calibration_images,
        **phases(config.epochs, **asked),
    )
    adaround = AdaRound(iterations=adaround_iterations) if adaround_iterations else None
    plan = PtqPlan(
        bits=whole_numbers("ptq-bits", ptq_bits, 1, 16),
        images=calibration_images,
        first_last_bits=first_last_bits or None,
        adaround=adaround,
    )
    run_dnq(config, noise, out, plan=plan, overwrite=overwrite, cpu=cpu)
    if PartialState().is_main_process:
        show([out], Console())
        typer.echo(f"{out}/report.md")


@app.command("dnq-study")
def dnq_study(
    study: Annotated[
        str, typer.Argument(help="controls, parts, ramps, calibration, ranges or discrete.")
    ] = "controls",
    out: Annotated[Path, typer.Option(help="Directory of the runs; studies share it.")] = Path(
        "runs/dnq-study"
    ),
    dataset: Dataset = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many: 0, 1, ..")] = 5,
    bits: PtqBits = "4,3,2",
    adaround_iterations: Annotated[
        int, typer.Option(min=0, help="AdaRound too, with so many steps a layer; 0: not.")
    ] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, one thread each.")] = 2,
    preset: Preset = None,
    model: Model = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Rate = None,
    set_: Set = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Make the runs of this study afresh.")
    ] = False,
) -> None:
    """Run DNQ and its controls over seeds, on the CPU: mean, standard deviation, paired
    differences.

    Runs that are there already are read back, so that a study can be stopped and gone on with.
    """
    from ..adaround import AdaRound
    from ..dnq import DnqConfig
    from ..dnq_run import phases
    from ..dnq_study import PLAN, comparison, run_study
    from ..report import rich_grid
    from ..study import accuracy_table, difference_table

    if any(item.startswith("seed=") for item in set_ or []):
        raise ValueError("--set: seed must be left to --seeds in a study, got one")

    given = {"model": model, "epochs": epochs, "batch_size": batch_size, "lr": lr}
    config = _settings(dataset, preset, True, set_, **given)
    plan = replace(
        PLAN,
        bits=whole_numbers("bits", bits, 1, 16),
        adaround=AdaRound(iterations=adaround_iterations) if adaround_iterations else None,
    )
    noise = DnqConfig(**phases(config.epochs))
    how: dict[str, Any] = {"plan": plan, "jobs": jobs, "overwrite": overwrite}
    scores = run_study(study, config, noise, out, seeds=range(seeds), **how)
    console, shown = Console(), comparison(study)
    console.print(rich_grid(*accuracy_table(shown, scores), f"{study}: test accuracy, %"))
    console.print(rich_grid(*difference_table(shown, scores), "paired differences, points", left=3))
    typer.echo(f"{out}/{study}/report.md")
