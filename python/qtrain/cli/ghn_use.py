"""ghn-eval and ghn-predict: what a graph hypernetwork's weights are worth, and how to have them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .app import app
from .options import Cpu, FirstLast, Out, Overwrite, Seed, parse_settings, whole_numbers

Images = Annotated[
    int | None,
    typer.Option(help="Random training images for BatchNorm's statistics; else 1024 at most."),
]


def words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


@app.command("ghn-eval")
def ghn_eval(
    source: Annotated[
        Path, typer.Argument(help="The GHN: a run directory, or its model.safetensors.")
    ],
    out: Out = Path("runs/ghn-eval"),
    split: Annotated[
        str, typer.Option(help="Of id, wide, deep, dense, bn-free, train, with commas; or all.")
    ] = "all",
    nets: Annotated[
        int | None,
        typer.Option(help="Networks of each split; else 50, or all that --space-file has."),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Names the networks, the images, and the widths of --mixed.")
    ] = 1,
    dataset: Annotated[str | None, typer.Option(help="Else the one it was trained on.")] = None,
    space: Annotated[str | None, typer.Option(help="Else the one it was trained on.")] = None,
    space_file: Annotated[
        Path | None, typer.Option(help="Networks of ghn-space, instead of drawing some.")
    ] = None,
    bits: Annotated[
        str, typer.Option(help="Widths of weights and inputs alike, beside float.")
    ] = "8,4,2",
    methods: Annotated[
        str, typer.Option(help="Ranges: minmax, percentile, mse.")
    ] = "minmax,percentile",
    percentile: Annotated[float, typer.Option(help="For ranges of inputs by percentile.")] = 99.0,
    per_tensor: Annotated[
        bool, typer.Option("--per-tensor", help="Ranges of weights per tensor, not per channel.")
    ] = False,
    mixed: Annotated[
        bool, typer.Option("--mixed", help="Mixed precision too: each layer draws one of --bits.")
    ] = False,
    first_last_bits: FirstLast = 8,
    batchnorm_images: Images = None,
    range_images: Annotated[
        int | None, typer.Option(help="Of these, for ranges of layer inputs; else 512 at most.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Of these images.")] = 256,
    jobs: Annotated[int, typer.Option(min=1, help="Networks at a time, on the CPU.")] = 1,
    overwrite: Overwrite = False,
    cpu: Cpu = False,
) -> None:
    """Predict the weights of unseen networks, and evaluate them in float and quantized.

    Nothing of the networks is trained; BatchNorm's statistics come from training images, and it is
    folded before quantization. A GHN with bit widths is told each width.
    """
    from ..ghn.evaluate import EvalPlan
    from ..ghn.evaluate_report import table
    from ..ghn.evaluate_run import GhnSource, drawn, from_file, run_evaluation
    from ..report import rich_grid

    widths = whole_numbers("bits", bits, 1, 16)
    plan = EvalPlan(
        bits=widths,
        methods=words(methods),
        mixed=tuple(sorted(widths)) if mixed else (),
        first_last_bits=first_last_bits or None,
        percentile=percentile,
        per_channel=not per_tensor,
        batchnorm_images=batchnorm_images,
        range_images=range_images,
        batch_size=batch_size,
        seed=seed,
    )
    if space is not None and space_file is not None:
        raise ValueError(f"--space-file: it must stand without --space, got --space {space}")
    start = GhnSource.load(source, dataset=dataset, space=space)
    splits = None if split == "all" else words(split)
    if space_file is None:
        chosen = drawn(start.space, splits, count=nets, seed=seed)
    else:
        chosen = from_file(space_file, splits, count=nets)
    scores = run_evaluation(start, chosen, out, plan, jobs=jobs, overwrite=overwrite, cpu=cpu)
    title = f"{len(chosen.nets)} networks on {start.dataset}: test accuracy, %"
    Console().print(rich_grid(*table(scores), title, left=3, narrow=True))
    typer.echo(f"{out}/report.md")


@app.command("ghn-predict")
def ghn_predict(
    model: Annotated[
        str,
        typer.Option(help="torchvision:resnet18, timm:NAME, or one of ours (cnn, resnet20, ..)."),
    ],
    out: Annotated[Path, typer.Option(help="File to write, e.g. runs/resnet18.safetensors.")],
    ghn: Annotated[
        Path, typer.Option(help="The GHN: a run directory, or its model.safetensors.")
    ] = Path("runs/ghn"),
    dataset: Annotated[
        str | None,
        typer.Option(help="Build the model for it; else for 3x224x224 images and 1000 classes."),
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="Tell the GHN this bit width, if it knows any; else float.")
    ] = None,
    noise: Annotated[
        float, typer.Option(help="Of each weight's deviation, to part equal channels: e.g. 0.05.")
    ] = 0.0,
    rescale: Annotated[
        bool, typer.Option("--rescale", help="Give each weight He's standard deviation.")
    ] = False,
    batchnorm_images: Images = None,
    seed: Seed = 0,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="model_options.NAME or data_options.NAME. Can be repeated.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file if there is one.")
    ] = False,
    cpu: Cpu = False,
) -> None:
    """Predict the weights of a model, and write them to a file that qat and ptq start from.

    With --dataset BatchNorm's statistics are taken from its training images, and the model is
    evaluated; without, they are those of a new model.
    """
    from ..ghn.prediction_file import ModelToPredict, write_prediction

    options = parse_settings(set_ or [])
    strangers = sorted(set(options) - {"model_options", "data_options"})
    if strangers:
        raise ValueError(
            f"--set: it must be of model_options or data_options here, got {', '.join(strangers)}"
        )
    wanted = ModelToPredict(model.replace(":", "/", 1), dataset=dataset, **options)
    made = write_prediction(
        wanted,
        out,
        ghn,
        bits=bits,
        noise=noise,
        rescale=rescale,
        seed=seed,
        batchnorm_images=batchnorm_images,
        overwrite=overwrite,
        cpu=cpu,
    )
    found = made.coverage
    typer.echo(f"predicted: {len(found.predicted)} parameters of {wanted.model}")
    channels = " x ".join(map(str, made.channels))
    for what, names in {
        f"tiled (channels repeat from {channels} on)": found.tiled,
        f"interpolated (kernels above {made.kernel} x {made.kernel})": found.interpolated,
        "not predicted, new values": found.undecoded,
    }.items():
        if names:
            typer.echo(f"{what}: {listed(names)}")
    if made.scores is None:
        typer.echo("BatchNorm: statistics of a new model; no dataset was named")
    else:
        typer.echo(f"BatchNorm: statistics of {made.images} training images of {dataset}")
        accuracy = 100 * made.scores["test_accuracy"]
        typer.echo(f"float test accuracy: {accuracy:.1f} %, loss {made.scores['test_loss']:.4f}")
    typer.echo(str(out))


def listed(names: Sequence[str], most: int = 4) -> str:
    """How many, and the first of them."""
    rest = ", .." if len(names) > most else ""
    return f"{len(names)} ({', '.join(names[:most])}{rest})"
