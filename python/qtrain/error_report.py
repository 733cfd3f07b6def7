"""``qtrain error-model``: the tables, the pictures and the run directory of `error_model`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from qkernels.numeric import DEFAULT_PERCENTILE

from .data import load_dataset
from .error_model import SAMPLES, Errors, LayerErrors, error_model, error_qconfigs, work
from .progress import Track
from .ptq import calibration_images
from .recipe import TrainConfig, new_model
from .report import (
    PALETTE,
    REPORT,
    RESULTS,
    colour,
    figure,
    markdown_grid,
    reading_results,
    rich_grid,
    save_figure,
)
from .rundir import RunDir, to_json, write_atomic
from .source import FloatSource

RATIOS, DISTANCES = "ratio.png", "distance.png"
# rows in a picture of histograms; beyond that the first, some middle and the last layers
MOST_ROWS = 12
# distance of uniform errors from the Gaussian of their mean and deviation:
# |x / (2 sqrt 3) + 1/2 - Phi(x)| is largest where the densities meet, x = 0.804
UNIFORM_FROM_GAUSS = 0.0572


@dataclass(frozen=True)
class Column:
    """A figure of the main table; the name's lines stand one below the other on a screen."""

    name: str
    form: str
    value: Callable[[LayerErrors], float | None]


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _of_weight(name: str) -> Callable[[LayerErrors], float | None]:
    return lambda row: getattr(row.weight, name)


def _of_input(name: str) -> Callable[[LayerErrors], float | None]:
    return lambda row: None if row.activation is None else getattr(row.activation, name)


COLUMNS = (
    Column("SQNR\nW, dB", "{:.1f}", _of_weight("sqnr")),
    Column("SQNR\nA, dB", "{:.1f}", _of_input("sqnr")),
    Column("|AQE| /\n|WQE|", "{:.3g}", lambda row: row.ratio),
    Column("KS W\nGauss", "{:.3f}", _of_weight("gauss")),
    Column("KS W\nchannel", "{:.3f}", _of_weight("gauss_channels")),
    Column("KS W\nuniform", "{:.3f}", _of_weight("uniform")),
    Column("KS A\nGauss", "{:.3f}", _of_input("gauss")),
    Column("KS A\nuniform", "{:.3f}", _of_input("uniform")),
)
HEAD = ("layer", "bits", *(column.name for column in COLUMNS))
DETAIL_HEAD = (
    "layer",
    "of",
    "bits",
    "mean",
    "std",
    "least",
    "greatest",
    "mean abs",
    "excess kurtosis",
    "zeros",
    "clipped",
    "KS rest Gauss",
    "KS rest uniform",
    "sample",
)


def run_error_model(
    source: FloatSource,
    out: str | Path,
    *,
    bits: Sequence[int] = (8, 4, 2),
    first_last_bits: int | None = 8,
    method: str = "minmax",
    percentile: float | None = None,
    fold: bool = True,
    images: int = 100,
    seed: int = 0,
    overwrite: bool = False,
) -> list[LayerErrors]:
    """`error_model` of a checkpoint on random training images, with results.json, report.md and
    pictures in ``out``. A finished run is read back.

    Args:
        images: how many training images the calibration batches hold.

    Raises:
        ValueError: a bad argument; more images than there are; ``out`` holds another config, or
            results that are damaged; the model cannot be folded or quantized. Nothing is written
            then.
    """
    error_qconfigs(bits, method, percentile, first_last_bits)
    options: dict[str, Any] = {
        "bits": list(bits),
        "first_last_bits": first_last_bits,
        "method": method,
        "percentile": percentile,
        "fold": fold,
    }
    config = TrainConfig(**source.settings(), seed=seed)
    recipe = {"name": "error-model", "source": source.digest, "images": images, **options}
    run = RunDir(out, {"train": asdict(config), "recipe": recipe}, overwrite=overwrite)
    if run.file(RESULTS).exists() and not overwrite:
        with reading_results("error-model", run.file(RESULTS)) as results:
            layers = [LayerErrors.from_dict(row) for row in results["layers"]]
    else:
        data = load_dataset(config.dataset, config.data_options)
        model = source.fill(new_model(config, data))
        batches = calibration_images(data, config, images)
        with Track(work(batches, bits), "error model") as track:
            layers = error_model(model, batches, **options, seed=seed, track=track)
        run.create()
    write_report(run, layers)
    return layers


def write_report(run: RunDir, layers: list[LayerErrors]) -> None:
    """The pictures, report.md and, last, results.json."""
    plot_ratios(run.file(RATIOS), layers)
    plot_distances(run.file(DISTANCES), layers)
    pictures = {}
    for width in widths(layers):
        pictures[width] = f"errors_{width}_bits.png"
        plot_histograms(run.file(pictures[width]), at_width(layers, width))
    text = report_text(run.config, layers, pictures)
    write_atomic(run.file(REPORT), text.encode())
    write_atomic(run.file(RESULTS), to_json({"layers": [asdict(row) for row in layers]}))


def widths(layers: Sequence[LayerErrors]) -> list[int]:
    return list(dict.fromkeys(row.bits for row in layers))


def at_width(layers: Sequence[LayerErrors], width: int) -> list[LayerErrors]:
    return [row for row in layers if row.bits == width]


def median(column: Column, rows: Sequence[LayerErrors]) -> float | None:
    """Of a figure, over the layers that have it."""
    known = [value for value in map(column.value, rows) if value is not None]
    return statistics.median(known) if known else None


def cells(rows: Sequence[LayerErrors]) -> list[list[str]]:
    """The main table at one width, a line for each layer, the medians in the last."""
    lines = [
        [row.layer, str(row.weight.bits), *(_text(c.value(row), c.form) for c in COLUMNS)]
        for row in rows
    ]
    return [*lines, ["median", "", *(_text(median(c, rows), c.form) for c in COLUMNS)]]


def detail_cells(rows: Sequence[LayerErrors]) -> Iterator[list[str]]:
    """The second table: two lines for each layer."""
    for row in rows:
        for side, e in (("W", row.weight), ("A", row.activation)):
            if e is not None:
                yield [row.layer, side, str(e.bits), *_moments(e)]


def _moments(e: Errors) -> list[str]:
    return [
        f"{e.mean:+.3g}",
        f"{e.std:.3g}",
        f"{e.least:+.3g}",
        f"{e.greatest:+.3g}",
        f"{e.mean_abs:.3g}",
        _text(e.kurtosis, "{:+.2f}"),
        f"{100 * e.zeros:.1f} %",
        f"{100 * e.clip_rate:.2f} %",
        _text(e.gauss_rest, "{:.3f}"),
        _text(e.uniform_rest, "{:.3f}"),
        str(e.count) if e.sampled == e.count else f"{e.sampled} of {e.count}",
    ]


def rich_table(layers: Sequence[LayerErrors], title: str) -> Table:
    """The main table of all widths, an empty line between them."""
    lines: list[list[str]] = []
    for width in widths(layers):
        lines += [*cells(at_width(layers, width)), []]
    return rich_grid(HEAD, lines, title, left=1, narrow=True)


def chosen(count: int) -> list[int]:
    """Which layers a picture shows: all, or the first, some in the middle and the last."""
    if count <= MOST_ROWS:
        return list(range(count))
    third = MOST_ROWS // 3
    middle = (count - third) // 2
    return [*range(third), *range(middle, middle + third), *range(count - third, count)]


def plot_histograms(path: Path, rows: Sequence[LayerErrors]) -> None:
    """A row for each layer: weight errors, standardized per channel, on the left, input errors,
    standardized, on the right, and N(0, 1) over both."""
    shown = [rows[index] for index in chosen(len(rows))]
    canvas, axes = figure(2, len(shown), width=4.6, height=1.5)
    for row, (left, right) in zip(shown, np.reshape(axes, (-1, 2)), strict=True):
        _histogram(left, row.weight, f"{row.layer}: W, {row.weight.bits} bits")
        if row.activation is None:
            right.set_axis_off()
        else:
            _histogram(right, row.activation, f"{row.layer}: A, {row.activation.bits} bits")
    save_figure(canvas, path)


def _histogram(axis: Any, e: Errors, title: str) -> None:
    axis.set_yticks([])
    axis.tick_params(labelsize="xx-small")
    if not e.histogram:
        axis.set_title(f"{title}, no spread", fontsize="x-small")
        return
    distance = e.gauss if e.gauss_channels is None else e.gauss_channels
    zeros = f", {100 * e.zeros:.0f} % zeros" if e.zeros > 0.01 else ""
    axis.set_title(f"{title}, KS {_text(distance, '{:.3f}')}{zeros}", fontsize="x-small")
    low, high = e.span
    edges = np.linspace(low, high, len(e.histogram) + 1)
    density = np.array(e.histogram) / (sum(e.histogram) * (edges[1] - edges[0]))
    axis.stairs(density, edges, fill=True, color=PALETTE[2])
    x = np.linspace(low, high, 200)
    peak = 1 / math.sqrt(2 * math.pi)
    axis.plot(x, peak * np.exp(-0.5 * x**2), color=PALETTE[4], linewidth=1)
    # a peak of exact zeros would leave nothing to be seen of the rest
    axis.set_ylim(0, 1.1 * min(max(density.max(), peak), 2 * peak))


def plot_ratios(path: Path, layers: Sequence[LayerErrors]) -> None:
    """mean |AQE| / mean |WQE| of each layer, a line for each width."""
    canvas, axis = figure(1, width=7.0)
    for number, width in enumerate(widths(layers)):
        values = [row.ratio for row in at_width(layers, width)]
        _line(axis, values, colour(number), label=f"{width} bits")
    axis.set(yscale="log", ylabel="mean |AQE| / mean |WQE| (different units)")
    axis.legend(fontsize="small")
    _name_layers(axis, layers)
    save_figure(canvas, path)


def plot_distances(path: Path, layers: Sequence[LayerErrors]) -> None:
    """Distance from the Gaussian of each layer's errors, weights and inputs side by side."""
    canvas, axes = figure(2, width=6.0)
    weights, inputs = axes
    sides = (
        (weights, _of_weight("gauss"), "-"),
        (weights, _of_weight("gauss_channels"), "--"),
        (inputs, _of_input("gauss"), "-"),
    )
    most = UNIFORM_FROM_GAUSS
    for axis, value, style in sides:
        for number, width in enumerate(widths(layers)):
            values = [value(row) for row in at_width(layers, width)]
            most = max(most, *(v for v in values if v is not None), 0.0)
            what = "per channel" if style == "--" else "per tensor"
            _line(
                axis,
                values,
                colour(number),
                linestyle=style,
                label=f"{width} bits, {what}" if axis is weights else None,
            )
    for axis, title in ((weights, "weights"), (inputs, "inputs")):
        axis.axhline(UNIFORM_FROM_GAUSS, color="black", linestyle=":", linewidth=1)
        # one scale for both, with room above
        axis.set(title=title, ylabel="KS distance from the fitted Gaussian", ylim=(0, 1.1 * most))
        _name_layers(axis, layers)
    canvas.legend(fontsize="x-small", loc="outside right upper")
    save_figure(canvas, path)


def _line(axis: Any, values: Sequence[float | None], colour: str, **how: Any) -> None:
    # matplotlib leaves a gap at NaN
    drawn = [math.nan if value is None else value for value in values]
    axis.plot(drawn, color=colour, marker=".", linewidth=1.2, **how)


def _name_layers(axis: Any, layers: Sequence[LayerErrors]) -> None:
    names = list(dict.fromkeys(row.layer for row in layers))
    axis.grid(alpha=0.3)
    if len(names) > 2 * MOST_ROWS:
        axis.set(xlabel="layer, in the order of registration")
        return
    axis.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize="x-small")


def _how(config: Any) -> str:
    """The first lines of report.md: what was done, and what the columns mean."""
    train, recipe = config["train"], config["recipe"]
    range_of, first_last = recipe["method"], recipe["first_last_bits"]
    if range_of == "percentile":
        range_of += f" {recipe['percentile'] or DEFAULT_PERCENTILE}"
    folded = "folded" if recipe["fold"] else "not folded"
    ends = "has the bits of the others" if first_last is None else f"at least {first_last} bits"
    return f"""# Quantization errors of {train["model"]} on {train["dataset"]}

Weights symmetric per output channel, inputs affine per tensor, ranges by {range_of} over
{recipe["images"]} training images; BatchNorm {folded}. First and last layer: {ends}.
Seed {train["seed"]}.

- WQE = Q(W) - W. AQE = Q(x) - x of each layer's input x as it arrives in the quantized model, over
  the same images. At most {SAMPLES} elements of each, drawn at random.
- SQNR: 10 log10(sum x^2 / sum e^2), of weights (W) and inputs (A). |AQE| / |WQE|: mean |AQE| / mean
  |WQE|, which have different units; it changes when layers are rescaled or BatchNorm is folded;
  compare SQNR. A dash: no errors.
- KS: Kolmogorov-Smirnov distance, from the Gaussian of the same mean and deviation; for weights
  also with each channel's errors standardized by their own, from N(0, 1) (channel: the model of
  DNQ); and from the uniform law over one quantization step. 0 is the law itself, uniform errors are
  {UNIFORM_FROM_GAUSS} from their Gaussian. Noise floor, what n draws from the law itself have:
  about 0.63 / sqrt(n) from the Gaussian, 0.87 / sqrt(n) from the uniform law.
- Channel: those without variance are left out; short ones (fewer than 25 elements) come out
  slightly non-Gaussian by being standardized with their own mean and deviation.
- Rest: the errors that are not exactly 0 alone (half of what a ReLU gives is 0, and has no error).
"""


def report_text(config: Any, layers: Sequence[LayerErrors], pictures: dict[int, str]) -> str:
    """report.md; ``pictures`` of histograms by width."""
    count, third = len({row.layer for row in layers}), MOST_ROWS // 3
    which = "All layers. "
    if count > MOST_ROWS:
        which = (
            f"{MOST_ROWS} of {count} layers: the first {third}, {third} in the middle, the last "
            f"{third}. "
        )
    parts = [_how(config)]
    for width, picture in pictures.items():
        rows = at_width(layers, width)
        parts.append(f"## {width} bits\n\n{markdown_grid(HEAD, cells(rows), left=1)}")
        parts.append(
            f"{which}Errors less their mean over their deviation, of weights (W) per channel, of "
            "inputs (A) over the tensor. Line: N(0, 1). Peaks of more than twice its height, as of "
            "exact zeros, are cut off.\n"
        )
        parts.append(f"![errors at {width} bits]({picture})\n")
        parts.append(markdown_grid(DETAIL_HEAD, detail_cells(rows)))
    parts.append("## Layer by layer\n")
    parts.append(f"![mean |AQE| / mean |WQE|]({RATIOS})\n")
    parts.append(f"Dotted: {UNIFORM_FROM_GAUSS}, what uniform errors would have.\n")
    parts.append(f"![distance from the Gaussian]({DISTANCES})\n")
    parts.append(f"Settings: config.json. All figures, with the histograms: {RESULTS}.\n")
    return "\n".join(parts)
