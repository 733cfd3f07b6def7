"""Studies: arms over seeds, in processes of their own, and the tables of paired differences.

Every arm of a study has, for a seed, the same first weights and the same batches; what differs is
named by the arm. So the difference of two arms is taken seed by seed.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread
from typing import TypeVar

import torch

from .progress import Track
from .report import REPORT, RESULTS, bits_name, colour, figure, markdown_grid, save_figure
from .rundir import to_json, write_atomic

PICTURE = "study.png"
Job = TypeVar("Job")
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Score:
    """One arm, bit width, way of quantizing and seed; float: before it.

    Attributes:
        bits: of (weights, activations); 32 where a side stays float.
    """

    arm: str
    bits: tuple[int, int]
    method: str
    seed: int
    accuracy: float
    loss: float
    float_accuracy: float


@dataclass(frozen=True)
class Comparison:
    """What the tables of a study show.

    Attributes:
        command, name: the study's, for the title: "qtrain dnq-study controls".
        arms: in the order of the tables.
        references: those among them that the others are compared with.
    """

    command: str
    name: str
    arms: tuple[str, ...]
    references: tuple[str, ...]


def run_all(
    jobs: Sequence[Job], work: Callable[[Job], Outcome], *, label: str, processes: int
) -> Iterator[tuple[Job, Outcome]]:
    """Do the jobs on the CPU, each process with one thread, so that the bits do not depend on how
    many there are; in the order in which they end. ``work`` must be a module's function.

    Raises:
        ValueError: ``processes`` below 1.
        Exception: the first that a job raised; those that have not begun are dropped.
    """
    if processes < 1:
        raise ValueError(f"{label}: jobs must be at least 1, got {processes}")
    # spawned, not forked: a fork of a process whose OpenMP has threads can hang
    context = get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_begin_worker)
    with Track(len(jobs), label) as track, pool:
        running = {pool.submit(work, job): job for job in jobs}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
                track.advance()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _begin_worker() -> None:
    torch.set_num_threads(1)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A study that is killed leaves no worker behind: it would go on writing to a run directory
    that the next call of the study writes to."""
    parent = parent_process()
    assert parent is not None, "a worker has a parent"
    wait([parent.sentinel])
    os._exit(1)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """(mean, standard deviation of one value); the latter is nan for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def plus_minus(values: Sequence[float], form: str) -> str:
    """Mean ± standard deviation, each in this format; of a single value that alone."""
    mean, sd = spread(values)
    text = f"{mean:{form}}"
    return text if len(values) == 1 else f"{text} ± {sd:{form.lstrip('+')}}"


def percent(fractions: Sequence[float], form: str) -> str:
    """`plus_minus` of 100 times the values."""
    return plus_minus([100 * value for value in fractions], form)


def paired(ours: Sequence[Score], theirs: Sequence[Score]) -> list[float]:
    """Differences of accuracy, seed by seed."""
    other = {score.seed: score.accuracy for score in theirs}
    return [score.accuracy - other[score.seed] for score in ours]


def accuracy_table(
    comparison: Comparison, scores: Sequence[Score]
) -> tuple[list[str], list[list[str]]]:
    """(columns, rows): mean and standard deviation over seeds, by bit width and arm."""
    methods = list(dict.fromkeys(s.method for s in scores))
    rows = []
    for bits in dict.fromkeys(s.bits for s in scores):
        for arm in comparison.arms:
            mine = [s for s in scores if (s.bits, s.arm) == (bits, arm)]
            first = [s.float_accuracy for s in mine if s.method == methods[0]]
            cells = [[s.accuracy for s in mine if s.method == method] for method in methods]
            texts = [percent(values, ".2f") for values in (first, *cells)]
            rows.append([bits_name(bits), arm, *texts])
    return ["bits", "arm", "float", *methods], rows


def difference_table(
    comparison: Comparison, scores: Sequence[Score]
) -> tuple[list[str], list[list[str]]]:
    """(columns, rows): differences of accuracy to the references in points, seed by seed: mean,
    standard deviation, and in how many seeds the arm was better."""
    arms, references = comparison.arms, comparison.references
    rows = []
    for bits, method in dict.fromkeys((s.bits, s.method) for s in scores):
        group = [s for s in scores if (s.bits, s.method) == (bits, method)]
        by_arm = {arm: [s for s in group if s.arm == arm] for arm in arms}
        for place, arm in enumerate(arms):
            cells = []
            for reference in references:
                gaps = paired(by_arm[arm], by_arm[reference])
                wins = f"{sum(gap > 0 for gap in gaps)} of {len(gaps)}"
                # a difference stands in the table once, with the later of the two
                later = place > arms.index(reference)
                cells.append(f"{percent(gaps, '+.2f')} ({wins})" if later else "")
            if any(cells):
                rows.append([bits_name(bits), method, arm, *cells])
    return ["bits", "quantized by", "arm", *(f"minus {r}" for r in references)], rows


def write_study(comparison: Comparison, scores: Sequence[Score], out: Path) -> None:
    """report.md, study.png and results.json; bits, methods, arms and seeds in the scores' order."""
    out.mkdir(parents=True, exist_ok=True)
    seeds = sorted({score.seed for score in scores})
    numbers = ", ".join(str(seed) for seed in seeds)
    text = f"""# qtrain {comparison.command} {comparison.name}

Test accuracy in %, mean ± standard deviation over {len(seeds)} seeds ({numbers}).
"float" is before quantization.

{markdown_grid(*accuracy_table(comparison, scores))}
Paired differences in points (same seed: same first weights, same batches): mean ± standard
deviation of one seed's difference, and in how many seeds the arm was better.

{markdown_grid(*difference_table(comparison, scores), left=3)}
![accuracy by arm]({PICTURE})
"""
    plot_study(out / PICTURE, comparison, scores)
    write_atomic(out / REPORT, text.encode())
    results = {"study": comparison.name, "scores": [asdict(s) for s in scores]}
    write_atomic(out / RESULTS, to_json(results))


def plot_study(path: Path, comparison: Comparison, scores: Sequence[Score]) -> None:
    """A panel per bit width: each seed a dot, each arm's mean a line; colours are methods."""
    widths = list(dict.fromkeys(s.bits for s in scores))
    methods = list(dict.fromkeys(s.method for s in scores))
    arms = comparison.arms
    canvas, axes = figure(len(widths), width=3.6)
    for axis, bits in zip([axes] if len(widths) == 1 else axes, widths, strict=True):
        for number, method in enumerate(methods):
            for place, arm in enumerate(arms):
                mine = [
                    100 * s.accuracy
                    for s in scores
                    if (s.bits, s.method, s.arm) == (bits, method, arm)
                ]
                at = place + 0.24 * (number - (len(methods) - 1) / 2)
                axis.plot(
                    [at] * len(mine), mine, "o", color=colour(number), markersize=3, alpha=0.6
                )
                label = method if place == 0 else None
                line = {"color": colour(number), "label": label}
                axis.hlines(statistics.fmean(mine), at - 0.1, at + 0.1, **line)
        axis.set_xticks(range(len(arms)), arms, rotation=30, ha="right", fontsize="small")
        axis.set(title=bits_name(bits), ylabel="test accuracy, %")
        axis.grid(alpha=0.3, axis="y")
    canvas.legend(*axis.get_legend_handles_labels(), fontsize="small", loc="outside upper right")
    save_figure(canvas, path)
