"""flatness: the curvature of float models, and their loss under weight noise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .app import app
from .options import Cpu, Dataset, Model, Out, Overwrite, Seed

if TYPE_CHECKING:
    from ..flatness import Flatness
    from ..source import FloatSource

PICTURE = "flatness.png"
NOTES = """\
The loss is the mean over the examples, the model in eval mode; n is the number of parameters.
Trace: Hutchinson's estimate with its standard error. Top eigenvalue: the largest one, by Lanczos
iteration; the residual is the norm of Hv - value v, and an eigenvalue lies that close. Noise:
Gaussian, on each Conv and Linear weight, its standard deviation r times the root mean square of the
weight's output channel; mean ± standard deviation over the draws, which are the same for all
checkpoints whose layers have equal names and shapes.

Trace and eigenvalue depend on the scale of the weights: with BatchNorm behind it a layer can be
multiplied by c, which changes no output and divides its part of the Hessian by c². Compare them
between models trained alike. The loss under relative noise does not change.

Every value, of each probe and draw: results.json.
"""


@app.command()
def flatness(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(help="Float models of one dataset: run directories or model.safetensors."),
    ],
    out: Out = Path("runs/flatness"),
    examples: Annotated[int, typer.Option(help="Examples that the loss is the mean of.")] = 512,
    split: Annotated[str, typer.Option(help="Where they are from: train or test.")] = "train",
    batch_size: Annotated[int, typer.Option(help="At once; bounds the memory.")] = 256,
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

    from ..flatness import Probing, flatness_of
    from ..rundir import RunDir
    from ..source import FloatSource

    probing = Probing(probes, iterations, tolerance, parse_sizes(sizes), draws, seed)
    sources = {
        name: FloatSource.load(path, dataset=dataset, model=model)
        for name, path in names_of(checkpoints).items()
    }
    how: dict[str, Any] = {"split": split, "examples": examples, "batch_size": batch_size}
    digests = {name: source.digest for name, source in sources.items()}
    settings = {**how, "probing": vars(probing), "checkpoints": digests}
    run = RunDir(out, {"flatness": settings}, overwrite=overwrite)
    device = "cuda" if torch.cuda.is_available() and not cpu else "cpu"
    found = flatness_of(sources, probing=probing, device=device, **how)
    run.create()
    write_results(run.path, sources, found, run.config)
    for title, rows in tables(found).items():
        Console().print(rich_table(title, rows))
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


def tables(found: Mapping[str, Flatness]) -> dict[str, list[list[str]]]:
    """Two tables by title, each a head and a row per checkpoint."""
    curvature = [["model", "n", "trace", "trace / n", "top eigenvalue", "residual"]]
    sizes = [noisy.size for noisy in next(iter(found.values())).noise if noisy.size]
    noise = [["model", "loss", *(f"r={size:g}" for size in sizes)]]
    for name, result in found.items():
        trace, top = result.trace, result.top
        curvature.append(
            [
                name,
                str(result.parameters),
                spread(trace.mean, trace.standard_error),
                f"{result.trace_per_parameter:.3g}",
                f"{top.value:.4g}" + ("" if top.converged else " (not converged)"),
                f"{top.residual:.2g}",
            ]
        )
        noisy = [spread(n.loss, n.loss_std) for n in result.noise if n.size]
        noise.append([name, spread(result.loss, None), *noisy])
    return {"Hessian": curvature, "Loss under weight noise of relative size r": noise}


def spread(mean: float, deviation: float | None) -> str:
    return f"{mean:.3g}" if deviation is None else f"{mean:.3g} ± {deviation:.2g}"


def rich_table(title: str, rows: list[list[str]]) -> Table:
    # narrow enough for a terminal of 80 columns, down to the second line in a cell
    table = Table(title=title, collapse_padding=True, pad_edge=False)
    for number, column in enumerate(rows[0]):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows[1:]:
        table.add_row(*(Text(cell.replace(" ± ", "\n± ")) for cell in row))
    return table


def markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(rows[0]) - 1), *lines[1:]]) + "\n"


def write_results(
    path: Path,
    sources: Mapping[str, FloatSource],
    found: Mapping[str, Flatness],
    config: Mapping[str, Any],
) -> None:
    """results.json, the picture and report.md."""
    from ..report import REPORT, RESULTS
    from ..rundir import to_json, write_atomic

    results = {
        name: {**sources[name].settings(), "digest": sources[name].digest, **result.to_dict()}
        for name, result in found.items()
    }
    write_atomic(path / RESULTS, to_json({**config, "results": results}))
    plot_noise(path / PICTURE, found)
    asked, dataset = config["flatness"], next(iter(sources.values())).dataset
    probing = asked["probing"]
    lines = [
        f"# {path.name}: flatness on {dataset}\n",
        f"{asked['examples']} examples of the {asked['split']} split, {probing['probes']} probes, "
        f"{probing['draws']} draws, seed {probing['seed']}.\n",
        *(f"## {title}\n\n{markdown(rows)}" for title, rows in tables(found).items()),
        f"![loss and accuracy under weight noise]({PICTURE})\n",
        NOTES,
    ]
    write_atomic(path / REPORT, "\n".join(lines).encode())


def plot_noise(path: Path, found: Mapping[str, Flatness]) -> None:
    """Loss and accuracy over the size of the noise: mean, and a band of a standard deviation."""
    from ..report import PALETTE, figure, save_figure

    canvas, (left, right) = figure(2)
    for number, (name, result) in enumerate(found.items()):
        style = {
            "color": PALETTE[number % len(PALETTE)],
            "linestyle": ("-", "--", ":", "-.")[number // len(PALETTE) % 4],
            "label": name,
        }
        noise = sorted(result.noise, key=lambda noisy: noisy.size)
        sizes = [noisy.size for noisy in noise]
        _band(left, sizes, [(n.loss, n.loss_std, n.losses) for n in noise], style)
        _band(right, sizes, [(n.accuracy, n.accuracy_std, n.accuracies) for n in noise], style)
    left.set(xlabel="r: noise / weights", ylabel="loss", yscale="log")
    right.set(xlabel="r: noise / weights", ylabel="accuracy")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    left.legend(fontsize="small")
    save_figure(canvas, path)


def _band(axis: Any, sizes: list[float], points: list[Any], style: dict[str, Any]) -> None:
    axis.plot(sizes, [mean for mean, _, _ in points], marker=".", **style)
    # a mean less its deviation can be below 0, where a log scale ends; no draw was
    low = [max(mean - (std or 0), min(values)) for mean, std, values in points]
    high = [min(mean + (std or 0), max(values)) for mean, std, values in points]
    axis.fill_between(sizes, low, high, color=style["color"], alpha=0.2, linewidth=0)
