"""Options that commands share, and what every command ends with."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

Out = Annotated[Path, typer.Option(help="Run directory to write, or to go on with.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start the run afresh.")]
Cpu = Annotated[bool, typer.Option("--cpu", help="Stay on the CPU even if there is a GPU.")]
Seed = Annotated[int, typer.Option(help="Names all randomness of the run.")]
Bits = Annotated[int, typer.Option(min=1, max=16, help="Bits of the codes.")]
FirstLast = Annotated[
    int, typer.Option(min=0, max=16, help="Bits of the first and last layer; 0: as the others.")
]
Method = Annotated[
    str,
    typer.Option(
        help="minmax (straight-through), lsq (learned scales), lsq+ (and zero points), pact "
        "(learned clipping), dorefa, quant-noise or qdrop (a random share is quantized)."
    ),
]
Share = Annotated[
    float | None,
    typer.Option(help="quant-noise, qdrop: share that is quantized in training; usual: 0.5."),
]
AlphaDecay = Annotated[
    float | None,
    typer.Option(help="pact: weight decay of the clipping bounds; usual: that of weights."),
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
    from ..recipe import TrainConfig

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


def whole_numbers(name: str, text: str, least: int, most: int) -> tuple[int, ...]:
    """``"8,4,2"`` as numbers.

    Raises:
        ValueError: no list of whole numbers from ``least`` to ``most``, without repetition.
    """
    parts = [part.strip() for part in text.split(",")]
    numbers = tuple(int(part) for part in parts if part.isdecimal())
    sound = len(numbers) == len(parts) == len(set(numbers))
    if not sound or not all(least <= n <= most for n in numbers):
        raise ValueError(
            f"--{name}: it must be whole numbers from {least} to {most} with commas between, "
            f"each once, got {text!r}"
        )
    return numbers


def finish(out: Path) -> None:
    from accelerate import PartialState

    from ..report import show, write_run_report

    if PartialState().is_main_process:
        write_run_report(out)
        show([out], Console())
        typer.echo(f"{out}/report.md")
