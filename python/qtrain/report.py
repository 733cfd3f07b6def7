"""Tables, plots and report.md of runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .rundir import CONFIG, METRICS, read_json, read_metrics, write_atomic

RESULTS, REPORT = "results.json", "report.md"
CURVES, ACCURACY = "curves.png", "accuracy.png"
COLUMNS = ("model", "bits", "accuracy", "loss", "s / step", "QAT step / float step")
# colours that colour-blind readers can tell apart (Okabe and Ito 2008)
PALETTE = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2")


@dataclass(frozen=True)
class Row:
    """One line of a table. ``bits`` is None for float; the timings are None if not measured."""

    method: str
    bits: tuple[int, int] | None
    accuracy: float
    loss: float
    step_seconds: float | None = None
    step_ratio: float | None = None

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Row:
        bits = value["bits"]
        return cls(**{**value, "bits": tuple(bits) if bits else None})

    def cells(self) -> tuple[str, ...]:
        """What stands in the table, in the order of ``COLUMNS``."""
        return (
            self.method,
            bits_name(self.bits),
            f"{100 * self.accuracy:.1f} %",
            f"{self.loss:.4f}",
            "-" if self.step_seconds is None else f"{self.step_seconds:.5f}",
            "-" if self.step_ratio is None else f"{self.step_ratio:.2f}",
        )


def bits_name(bits: tuple[int, int] | None) -> str:
    return "FP32" if bits is None else f"W{bits[0]}A{bits[1]}"


def rich_grid(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    title: str,
    *,
    left: int = 2,
    narrow: bool = False,
) -> Table:
    """A table for the screen; the first ``left`` columns are words, the others numbers. ``narrow``:
    without lines, and only the first column may be broken. Cells can have several lines."""
    lines = None if narrow else box.HEAVY_HEAD
    table = Table(title=title, box=lines, pad_edge=not narrow, collapse_padding=narrow)
    for number, column in enumerate(columns):
        whole = number > 0 and (narrow or number < 5)
        side: Any = "left" if number < left else "right"
        fold: Any = "ellipsis" if number else "fold"
        table.add_column(column, justify=side, no_wrap=whole, overflow=fold)
    for row in rows:
        table.add_row(*map(Text, row))  # a name in brackets is no markup
    return table


def broken(texts: Iterable[str], *marks: str) -> list[str]:
    """Texts that start a new line at each of the marks, for a screen: "a / b" at " / ", "a, b" at
    ", ". Spaces and commas that a mark starts with are dropped."""
    lines = list(texts)
    for mark in marks:
        lines = [text.replace(mark, "\n" + mark.lstrip(" ,")) for text in lines]
    return lines


def markdown_grid(columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 2) -> str:
    """The same in markdown, each cell on one line."""
    rule = "|" + "---|" * left + "---:|" * (len(columns) - left)
    clean = [
        [cell.replace("\n", " ").replace("|", "\\|") for cell in cells]
        for cells in (columns, *rows)
    ]
    lines = ["| " + " | ".join(cells) + " |" for cells in clean]
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def rich_table(rows: Iterable[Row], title: str) -> Table:
    return rich_grid(COLUMNS, [row.cells() for row in rows], title)


def markdown_table(rows: Iterable[Row]) -> str:
    return markdown_grid(COLUMNS, [row.cells() for row in rows])


@contextmanager
def reading_results(command: str, path: Path) -> Iterator[Any]:
    """What a results.json holds, while objects are made of it: a damaged one is a ValueError that
    names the file."""
    results = read_json(path)
    try:
        yield results
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{command}: {path} must hold the results of a finished run, got a file that brings up "
            f"{error!r}; start afresh with --overwrite"
        ) from error


def save_figure(figure: Any, path: Path) -> None:
    """Write a picture as PNG, all of it or nothing."""
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=120, format="png")
    part.replace(path)


def figure(
    columns: int, rows: int = 1, *, width: float = 5.2, height: float = 3.8
) -> tuple[Any, Any]:
    """A figure of columns x rows axes of that size each (inches), and the axes."""
    # the object interface needs no display and no global state
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(canvas)
    return canvas, canvas.subplots(rows, columns)


def colour(number: int) -> str:
    """The colour of the number-th kind, counted from 0; black is left to the float model."""
    return PALETTE[1:][number % (len(PALETTE) - 1)]


def plot_curves(path: Path, runs: Mapping[str, list[dict[str, Any]]]) -> None:
    """Training loss and test accuracy over steps, a line per run."""
    canvas, (left, right) = figure(2)
    for number, (name, records) in enumerate(runs.items()):
        shade = PALETTE[number % len(PALETTE)]
        train = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
        test = [(r["step"], 100 * r["test_accuracy"]) for r in records if "test_accuracy" in r]
        if train:
            left.plot(*zip(*train, strict=True), label=name, color=shade, linewidth=1.3)
        if test:
            right.plot(*zip(*test, strict=True), color=shade, linewidth=1.3, label=name)
    left.set(xlabel="step", ylabel="training loss", yscale="log")
    right.set(xlabel="step", ylabel="test accuracy, %")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    right.legend(fontsize="small")
    save_figure(canvas, path)


def plot_accuracy(path: Path, rows: list[Row]) -> None:
    """A bar per method at each bit width; the float model is a line."""
    canvas, axis = figure(1)
    quantized = [row for row in rows if row.bits is not None]
    widths = list(dict.fromkeys(row.bits for row in quantized))
    methods = list(dict.fromkeys(row.method for row in quantized))
    room = min(0.26, 0.86 / max(1, len(methods)))
    for number, method in enumerate(methods):
        mine = [row for row in quantized if row.method == method]
        offset = (number - (len(methods) - 1) / 2) * room
        places = [widths.index(row.bits) + offset for row in mine]
        heights = [100 * row.accuracy for row in mine]
        # a second round through the colours is hatched
        hatch = "//" if number >= len(PALETTE) - 1 else None
        look = {"color": colour(number), "hatch": hatch, "edgecolor": "white", "linewidth": 0}
        bars = axis.bar(places, heights, 0.92 * room, label=method, **look)
        if len(methods) <= 3:  # narrower bars have no room for a number
            axis.bar_label(bars, fmt="%.1f", fontsize="x-small", padding=-11)
    for row in rows:
        if row.bits is None:
            height = 100 * row.accuracy
            name = f"{row.method}, {height:.1f}"
            axis.axhline(height, color="black", linestyle="--", linewidth=1, label=name)
    axis.set_xticks(range(len(widths)), [bits_name(bits) for bits in widths])
    axis.set(ylabel="test accuracy, %", ylim=(0, 105), xlim=(-0.5, len(widths) - 0.5))
    axis.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    save_figure(canvas, path)


def _layer_bits(recipe: Mapping[str, Any]) -> tuple[int, int] | None:
    """Bits of weights and activations in a run's config; 32 where a side stays float."""
    qconfig = recipe.get("qconfig")
    if recipe.get("name") == "ghn" and recipe["training"]["bits"]:
        # of the networks that it is scored on
        least = min(recipe["training"]["bits"])
        return least, least
    if qconfig is None:
        return None
    weight, activation = (
        (qconfig[side] or {}).get("bits", 32) for side in ("weight", "activation")
    )
    return weight, activation


def read_rows(path: Path) -> list[Row]:
    """The table rows of a run directory: one, or those of a demo.

    Raises:
        FileNotFoundError: no run there.
        ValueError: a run without an evaluation yet; a damaged file.
    """
    if (path / RESULTS).exists():
        results = read_json(path / RESULTS)
        if "rows" not in results:
            raise ValueError(
                f"report: {path} must hold a run with a model, got other results; "
                f"read {path / REPORT}"
            )
        return [Row.from_dict(row) for row in results["rows"]]
    if not (path / CONFIG).exists():
        raise FileNotFoundError(f"report: {path} must be a run directory, got no {path / CONFIG}")
    config = read_json(path / CONFIG)
    records = read_metrics(path / METRICS) if (path / METRICS).exists() else []
    scores = [record for record in records if "test_accuracy" in record]
    if not scores or "recipe" not in config:
        raise ValueError(
            f"report: {path} must hold a run that was evaluated, got one that is not there yet; "
            "the command that started it goes on with it"
        )
    last = scores[-1]
    bits = _layer_bits(config["recipe"])
    return [Row(path.name, bits, last["test_accuracy"], last["test_loss"])]


def write_run_report(path: Path) -> None:
    """report.md and curves.png of a train, ptq or qat run."""
    rows = read_rows(path)
    config, records = read_json(path / CONFIG), read_metrics(path / METRICS)
    train = config["train"]
    last = records[-1]
    lines = [
        f"# {path.name}: {config['recipe']['name']} of {train['model']} on {train['dataset']}\n",
        markdown_table(rows),
    ]
    if any("loss" in record for record in records):
        plot_curves(path / CURVES, {path.name: records})
        lines.append(f"![training curves]({CURVES})\n")
    else:
        before = last["float_accuracy"]
        lines.append(f"The float model it starts from: {100 * before:.1f} % accuracy.\n")
        float_row = Row("float", None, before, last["float_loss"])
        plot_accuracy(path / ACCURACY, [float_row, *rows])
        lines.append(f"![accuracy]({ACCURACY})\n")
    lines.append("Settings: config.json. Every logged step: metrics.jsonl.\n")
    write_atomic(path / REPORT, "\n".join(lines).encode())


def show(paths: Iterable[str | Path], console: Console) -> list[Row]:
    """Print one table of all the runs."""
    folders = [Path(path) for path in paths]
    rows = [row for folder in folders for row in read_rows(folder)]
    console.print(rich_table(rows, ", ".join(str(folder) for folder in folders)))
    return rows


def row_dicts(rows: Iterable[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]
