"""The command line: ``qtrain --help``."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

# what a user can mend; everything else is a defect of ours and keeps its traceback
USER_ERRORS = (ValueError, OSError, FloatingPointError, NotImplementedError, ImportError)


class FriendlyGroup(TyperGroup):
    """Shows an error that the user can mend as one red line, and exits with 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except USER_ERRORS as error:
            if ctx.params.get("debug"):
                raise
            console = Console(stderr=True, soft_wrap=True)
            console.print(f"error: {error}", style="red", markup=False, highlight=False)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=FriendlyGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
) -> None:
    """Train, quantize and compare models with qkernels.

    Every command leaves a run directory. Killed at any moment, the same command goes on where the
    run stopped, to the same bits.
    """


Out = Annotated[Path, typer.Option(help="Run directory to write, or to go on with.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start the run afresh.")]
Cpu = Annotated[bool, typer.Option("--cpu", help="Stay on the CPU even if there is a GPU.")]
Seed = Annotated[int, typer.Option(help="Names all randomness of the run.")]
Bits = Annotated[int, typer.Option(min=1, max=16, help="Bits of the codes.")]
FirstLast = Annotated[
    int, typer.Option(min=0, max=16, help="Bits of the first and last layer; 0: as the others.")
]
Source = Annotated[
    Path, typer.Argument(help="The float model: a run directory, or its model.safetensors.")
]
Dataset = Annotated[
    str | None, typer.Option(help="For weights that qtrain did not write: their dataset.")
]
Model = Annotated[
    str | None, typer.Option(help="For weights that qtrain did not write: their model.")
]
Epochs = Annotated[int, typer.Option(min=1, help="Times through the training data.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Examples in a step, over all devices.")]
Rate = Annotated[float, typer.Option(help="Peak learning rate.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Any other setting, e.g. optimizer=sgd, clip=1.0, mixed_precision=bf16, "
        "data_options.difficulty=0.8, model_options.img_size=32. Can be repeated.",
    ),
]


def parse_settings(items: list[str]) -> dict[str, Any]:
    """``["clip=1.0", "data_options.seed=3"]`` as fields of ``TrainConfig``.

    Raises:
        ValueError: no "=", or a name that is no setting (the known ones are listed).
    """
    from .recipe import TrainConfig

    known = [field.name for field in fields(TrainConfig)]
    settings: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        top, _, key = name.partition(".")
        if not equals or top not in known or bool(key) != top.endswith("_options"):
            raise ValueError(
                f"--set: it must be NAME=VALUE with a NAME of {', '.join(known)} (the _options "
                f"with a dot and the option's name), got {item!r}"
            )
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        if key:
            settings.setdefault(top, {})[key] = value
        else:
            settings[top] = value
    return settings


def _finish(out: Path) -> None:
    from accelerate import PartialState

    from .report import show, write_run_report

    if PartialState().is_main_process:
        write_run_report(out)
        show([out], Console())
        typer.echo(f"{out}/report.md")


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
    """Float training, PTQ and QAT of a small CNN on handwritten digits, in one table.

    PTQ at W8A8, W4A4 and W2A2; QAT (min-max STE and LSQ) at W4A4 and W2A2.
    """
    from .demo import DemoConfig, run_demo
    from .report import RESULTS, show

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
    from .loop import train as run
    from .recipe import Recipe, TrainConfig

    config = TrainConfig(
        dataset=dataset, model=model, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed
    )
    run(replace(config, **parse_settings(set_ or [])), Recipe(), out, overwrite=overwrite, cpu=cpu)
    _finish(out)


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
    from .ptq import ptq_qconfig, run_ptq
    from .source import FloatSource

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
    _finish(out)


@app.command()
def qat(
    source: Source,
    out: Out = Path("runs/qat"),
    method: Annotated[
        str, typer.Option(help="minmax (straight-through) or lsq (learned scales).")
    ] = "lsq",
    weight_bits: Bits = 4,
    activation_bits: Bits = 4,
    first_last_bits: FirstLast = 8,
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
    from .loop import train as run
    from .qat import Qat, qat_qconfig
    from .recipe import TrainConfig
    from .source import FloatSource

    start = FloatSource.load(source, dataset=dataset, model=model)
    config = TrainConfig(**start.settings(), epochs=epochs, batch_size=batch_size, lr=lr, seed=seed)
    qconfig = qat_qconfig(
        method, weight_bits, activation_bits, first_last_bits=first_last_bits or None
    )
    config = replace(config, **parse_settings(set_ or []))
    run(config, Qat(start, qconfig), out, overwrite=overwrite, cpu=cpu)
    _finish(out)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, to stand in one table.")],
) -> None:
    """Print the table of finished runs."""
    from .report import show

    show(runs, Console())


def main() -> None:
    app()


if __name__ == "__main__":
    main()
