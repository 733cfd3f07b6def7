"""``qtrain flatness``: the tables, the picture and the run directory of `flatness_of`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from .flatness import Flatness, Probing, flatness_of
from .hessian import mean_and_std, require
from .report import (
    PALETTE,
    REPORT,
    RESULTS,
    figure,
    markdown_grid,
    reading_results,
    rich_grid,
    save_figure,
)
from .rundir import RunDir, to_json, write_atomic
from .source import FloatSource

PICTURE = "flatness.png"
NOTES = """\
The loss is the mean over the examples, the model in eval mode; n is the number of parameters.
Trace: Hutchinson's estimate ± its standard error. Top eigenvalue: the largest one, by Lanczos
iteration; the residual is the norm of Hv - value v, and an eigenvalue lies that close (that it is
the largest is likely, and not proved by it). Smallest: the smallest value that came up on the way,
never below the smallest eigenvalue; if it is clearly negative, the model is not at a minimum of
this loss.

Noise: Gaussian, on the weights of Conv, Linear and attention layers, its standard deviation r times
the root mean square of the weight's output channel; mean ± standard deviation over the draws, which
are the same for all checkpoints whose layers have equal names and shapes. Rise: the loss under
noise less the loss without. Not finite: the loss of a draw is infinite or NaN.

Trace and eigenvalue depend on the scale of the weights: with BatchNorm behind it a layer can be
multiplied by c, which changes no output and divides its part of the Hessian by c². Compare them
between models trained alike. The loss under relative noise does not change.
"""


def run_flatness(
    sources: Mapping[str, FloatSource],
    out: str | Path,
    probing: Probing | None = None,
    *,
    split: str = "train",
    examples: int = 512,
    batch_size: int = 64,
    label_smoothing: float | None = None,
    device: str = "cpu",
    overwrite: bool = False,
) -> dict[str, Flatness]:
    """`flatness_of` checkpoints by name, with results.json, report.md and a picture in ``out``. A
    finished run is read back.

    Args:
        label_smoothing: of the loss; None: what the checkpoints were trained with, 0 where they
            differ in it.
        device: is not part of the run's config.

    Raises:
        ValueError: as `flatness_of`; a checkpoint twice; ``out`` holds another config, or results
            that are damaged. Nothing is written then.
    """
    probing = probing or Probing()
    digests = {name: source.digest for name, source in sources.items()}
    _require_different(digests)
    trained = {source.label_smoothing for source in sources.values()}
    if label_smoothing is None:
        label_smoothing = trained.pop() if len(trained) == 1 else 0.0
    how: dict[str, Any] = {
        "split": split,
        "examples": examples,
        "batch_size": batch_size,
        "label_smoothing": label_smoothing,
    }
    settings = {**how, "probing": asdict(probing), "checkpoints": digests}
    run = RunDir(out, {"flatness": settings}, overwrite=overwrite)
    if run.file(RESULTS).exists() and not overwrite:
        found = read_results(run.file(RESULTS), sources)
    else:
        found = flatness_of(sources, probing=probing, device=device, **how)
        run.create()
    write_report(run, sources, found)
    return found


def _require_different(digests: Mapping[str, str]) -> None:
    first: dict[str, str] = {}
    for name, digest in digests.items():
        other = first.setdefault(digest, name)
        rule = "different models"
        require(other == name, "checkpoints", rule, f"the same in {other} and {name}")


def read_results(path: Path, names: Mapping[str, Any]) -> dict[str, Flatness]:
    """Raises: ValueError naming the file if it does not hold the results of these names."""
    with reading_results("flatness", path) as results:
        return {name: Flatness.from_dict(results["results"][name]) for name in names}


def write_report(
    run: RunDir, sources: Mapping[str, FloatSource], found: Mapping[str, Flatness]
) -> None:
    """The picture, report.md and, last, results.json."""
    plot_noise(run.file(PICTURE), found)
    write_atomic(run.file(REPORT), report_text(run, sources, found).encode())
    results = {
        name: {
            **sources[name].settings(),
            "digest": sources[name].digest,
            "trained_label_smoothing": sources[name].label_smoothing,
            **result.to_dict(),
        }
        for name, result in found.items()
    }
    write_atomic(run.file(RESULTS), to_json({**run.config, "results": results}))


def report_text(
    run: RunDir, sources: Mapping[str, FloatSource], found: Mapping[str, Flatness]
) -> str:
    asked, dataset = run.config["flatness"], next(iter(sources.values())).dataset
    probing = asked["probing"]
    parts = [
        f"# {run.path.name}: flatness on {dataset}\n",
        f"{asked['examples']} examples of the {asked['split']} split, {probing['probes']} probes, "
        f"{probing['draws']} draws, seed {probing['seed']}. "
        f"{_loss_name(asked['label_smoothing'], sources)}\n",
    ]
    for title, rows in tables(found).items():
        parts.append(f"## {title}\n\n{markdown_grid(rows[0], rows[1:], left=1)}")
    parts += [
        f"![rise of the loss, and accuracy, under weight noise]({PICTURE})\n",
        NOTES,
        f"Every value, of each probe and draw: {RESULTS}.\n",
    ]
    return "\n".join(parts)


def _loss_name(smoothing: float, sources: Mapping[str, FloatSource]) -> str:
    trained = {name: source.label_smoothing for name, source in sources.items()}
    text = f"Loss: cross entropy with label smoothing {smoothing:g}"
    if set(trained.values()) == {smoothing}:
        return f"{text}, as in training."
    each = ", ".join(f"{name} {value:g}" for name, value in trained.items())
    return f"{text} for all; trained with: {each}."


def tables(found: Mapping[str, Flatness]) -> dict[str, list[list[str]]]:
    """Tables by title, each a head and a row per checkpoint."""
    curvature = [["model", "n", "trace", "trace\n/ n", "top\neigenvalue", "residual", "smallest"]]
    sizes = [f"r={noisy.size:g}" for noisy in next(iter(found.values())).noise if noisy.size]
    rise = [["model", "clean\nloss", *sizes]]
    accuracy = [["model", "clean", *sizes]]
    for name, result in found.items():
        trace, top = result.trace, result.top
        curvature.append(
            [
                name,
                str(result.parameters),
                spread(trace.mean, trace.standard_error),
                f"{result.trace_per_parameter:.3g}",
                f"{top.value:.4g}" + ("" if top.converged else "\n(not converged)"),
                f"{top.residual:.2g}",
                f"{top.smallest:.3g}",
            ]
        )
        noise = [noisy for noisy in result.noise if noisy.size]
        rises = (n.loss if n.loss is None else n.loss - result.loss for n in noise)
        cells = (spread(*pair) for pair in zip(rises, (n.loss_std for n in noise), strict=True))
        rise.append([name, f"{result.loss:.4g}", *cells])
        if result.accuracy is not None:
            shares = (_percent(n.accuracy, n.accuracy_std) for n in noise)
            accuracy.append([name, _percent(result.accuracy, None), *shares])
    every = {
        "Hessian": curvature,
        "Rise of the loss under weight noise of relative size r": rise,
        "Accuracy under weight noise of relative size r, %": accuracy,
    }
    return {title: rows for title, rows in every.items() if len(rows) > 1}


def spread(mean: float | None, deviation: float | None) -> str:
    if mean is None:
        return "not\nfinite"
    return f"{mean:.3g}" if deviation is None else f"{mean:.3g}\n± {deviation:.2g}"


def _percent(share: float | None, deviation: float | None) -> str:
    if share is None:
        return "-"
    text = f"{100 * share:.1f}"
    return text if deviation is None else f"{text}\n± {100 * deviation:.1f}"


def rich_tables(found: Mapping[str, Flatness]) -> list[Table]:
    return [
        rich_grid(rows[0], rows[1:], title, left=1, narrow=True)
        for title, rows in tables(found).items()
    ]


def plot_noise(path: Path, found: Mapping[str, Flatness]) -> None:
    """Rise of the loss and accuracy over the size of the noise: mean, and a band of a standard
    deviation."""
    canvas, (left, right) = figure(2, height=3.8 + 0.1 * len(found))
    for number, (name, result) in enumerate(found.items()):
        rises: list[tuple[float, list[float]]] = []
        shares: list[tuple[float, list[float]]] = []
        style = {
            "color": PALETTE[number % len(PALETTE)],
            "linestyle": ("-", "--", ":", "-.")[number // len(PALETTE) % 4],
            "label": f"{name}, clean loss {result.loss:.3g}",
        }
        for n in sorted(result.noise, key=lambda noisy: noisy.size):
            if n.loss is not None:
                rises.append((n.size, [v - result.loss for v in n.losses if v is not None]))
            if n.accuracies:
                shares.append((n.size, [100 * v for v in n.accuracies]))
        _band(left, rises, style)
        _band(right, shares, style)
    # a rise can be negative, and spans decades
    left.set_yscale("symlog", linthresh=1e-2)
    left.set(xlabel="r: noise / weights", ylabel="loss under noise - clean loss")
    right.set(xlabel="r: noise / weights", ylabel="accuracy, %")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    # below the axes, where any number of models finds room
    lines = left.get_legend_handles_labels()
    canvas.legend(*lines, fontsize="small", loc="outside lower center", ncols=2)
    save_figure(canvas, path)


def _band(axis: Any, points: list[tuple[float, list[float]]], style: Any) -> None:
    sizes = [size for size, _ in points]
    middle, low, high = [], [], []
    for _, values in points:
        mean, std = mean_and_std(values)
        middle.append(mean)
        # not beyond the draws: no accuracy is above 1
        low.append(max(mean - (std or 0), min(values)))
        high.append(min(mean + (std or 0), max(values)))
    axis.plot(sizes, middle, marker=".", **style)
    axis.fill_between(sizes, low, high, color=style["color"], alpha=0.2, linewidth=0)
