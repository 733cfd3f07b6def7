"""Where PTQ and QAT end on a problem whose minima are known: factorising a matrix.

    f(X) = |X X^T - M*|_F^2,    X [d, r],    Q(X) = rho round(X / rho)

M* has rank r and r eigenvalues 1, so the minima f = 0 are a manifold: all X with X X^T = M*. Some
are nearer to the grid than others. PTQ rounds the one that gradient descent found; QAT goes on from
there with the straight-through gradient, that of f at Q(X), and may end near another.

The experiment of Li, Ma, Cui, arXiv 2606.09012: d = 100, r = 5, M* = U D U^T with D = I,
X0 = 0.30 N(0, I); 4000 steps of gradient descent at 0.02; then rho = 0.30 and 1500 steps at
0.010 (1 + cos) / 2. What follows is not in the summary that we had. It is what reproduces the
paper's five numbers for numpy's default_rng(0) to the last digit:

- U is the first r unit vectors, so M* is diagonal (with U from the QR of a Gaussian draw the PTQ
  loss is about 6, whether U or X0 is drawn first; every X is then too small for this grid);
- the gradient is 4 (X X^T - M*) X, f not divided by anything (with factors 1 and 2 the PTQ loss is
  0.5306);
- step t of T has cos(pi t / T), t = 0 .. T - 1, and the last iterate counts (the best would be
  0.1760);
- distances are |Q(X) - X_fp| for PTQ and QAT, and the angle is that between the two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

import qkernels

from .again import again, apart, option_words
from .basin_probe import angle, inward_cosine
from .progress import Track
from .recipe import require
from .report import (
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
from .study import spread

PICTURE = "matrix_factorisation.png"
# codes of the grid: wide enough that nothing is clipped
CODE_BITS = 8
CURVE_EVERY = 10
# the paper's figures for seed 0, with its digits
PRINTED = {
    "ptq_loss": ".7502",
    "qat_loss": ".2543",
    "ptq_distance": ".474",
    "qat_distance": ".594",
    "angle": "95.3",
}
NAMES = {
    "ptq_loss": "f, PTQ",
    "qat_loss": "f, QAT",
    "ptq_distance": "distance, PTQ",
    "qat_distance": "distance, QAT",
    "angle": "angle, degrees",
    "inward": "cosine(-grad f(Q(X)), X - Q(X)), PTQ",
}
# options of the command, and the settings that they give
OPTIONS = {
    "seeds": "seeds",
    "rho": "rho",
    "float-steps": "float_steps",
    "qat-steps": "qat_steps",
}
COLUMNS = ("figure", "paper, seed 0", "ours, seed {seed}", "ours, {count} seeds")


@dataclass(frozen=True)
class FactorisationConfig:
    """The problem and how it is solved.

    Attributes:
        d, rank: X is [d, rank].
        start: standard deviation of X0.
        rho: distance of the grid's points.
        float_lr, float_steps, qat_lr, qat_steps: of gradient descent.
        seeds: 0, 1, .. so many.
    """

    d: int = 100
    rank: int = 5
    start: float = 0.30
    rho: float = 0.30
    float_lr: float = 0.02
    float_steps: int = 4000
    qat_lr: float = 0.010
    qat_steps: int = 1500
    seeds: int = 30

    def __post_init__(self) -> None:
        def check(name: str, holds: bool, rule: str) -> None:
            require(holds, name, rule, getattr(self, name), "matrix-factorisation")

        for name in ("d", "rank", "float_steps", "qat_steps", "seeds"):
            check(name, getattr(self, name) >= 1, "at least 1")
        check("rank", self.rank <= self.d, f"at most d, {self.d}")
        for name in ("start", "rho", "float_lr", "qat_lr"):
            check(name, 0 < getattr(self, name) < math.inf, "positive and finite")


@dataclass(frozen=True)
class Factorisation:
    """One seed.

    Attributes:
        float_loss: f where float training ended.
        inward: cos(-grad f(Q(X)), X - Q(X)) at the PTQ solution.
        curve: (step, f(X), f(Q(X))) during QAT.
    """

    seed: int
    float_loss: float
    ptq_loss: float
    qat_loss: float
    ptq_distance: float
    qat_distance: float
    angle: float | None
    inward: float | None
    curve: tuple[tuple[int, float, float], ...]


class Problem:
    """f, its gradient and the grid, in fp64."""

    def __init__(self, config: FactorisationConfig) -> None:
        self.rank = config.rank
        self.rho = torch.tensor(config.rho, dtype=torch.float64)
        eigenvalues = torch.zeros(config.d, dtype=torch.float64)
        eigenvalues[: config.rank] = 1
        self.target = torch.diag(eigenvalues)

    def loss(self, x: Tensor) -> float:  # [d, r]
        return float((x @ x.T - self.target).square().sum())

    def gradient(self, x: Tensor) -> Tensor:  # [d, r]
        pull = torch.zeros_like(x)
        pull[: self.rank] = x[: self.rank]
        return 4 * (x @ (x.T @ x) - pull)

    def rounded(self, x: Tensor) -> Tensor:  # [d, r]
        return qkernels.fake_quant(x, self.rho, bits=CODE_BITS, symmetric=True)


def factorise(config: FactorisationConfig, seed: int, track: Track | None = None) -> Factorisation:
    """Train in float, round, and train on with the straight-through gradient.

    Args:
        seed: of numpy's default_rng, which X0 is drawn from.
        track: advanced by the steps made.

    Raises:
        FloatingPointError: descent diverged.
    """
    bar = track if track is not None else Track(0, "", quiet=True)
    problem = Problem(config)
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(config.start * rng.standard_normal((config.d, config.rank)))
    for _ in range(config.float_steps):
        x = x - config.float_lr * problem.gradient(x)
    bar.advance(config.float_steps)
    if not bool(x.isfinite().all()):
        raise FloatingPointError(
            f"matrix-factorisation: X must stay finite, got seed {seed}; try a smaller float_lr"
        )
    w, curve = x, []
    for step in range(config.qat_steps):
        on_grid = problem.rounded(w)
        if step % CURVE_EVERY == 0:
            curve.append((step, problem.loss(w), problem.loss(on_grid)))
        rate = config.qat_lr * (1 + math.cos(math.pi * step / config.qat_steps)) / 2
        w = w - rate * problem.gradient(on_grid)
    bar.advance(config.qat_steps)
    ptq, qat = problem.rounded(x), problem.rounded(w)
    curve.append((config.qat_steps, problem.loss(w), problem.loss(qat)))
    here, there, home = (t.flatten() for t in (ptq, qat, x))
    return Factorisation(
        seed,
        float_loss=problem.loss(x),
        ptq_loss=problem.loss(ptq),
        qat_loss=problem.loss(qat),
        ptq_distance=float((here - home).norm()),
        qat_distance=float((there - home).norm()),
        angle=angle(here - home, there - home),
        inward=inward_cosine(problem.gradient(ptq).flatten(), here, home),
        curve=tuple(curve),
    )


def factorise_all(config: FactorisationConfig, *, quiet: bool = False) -> list[Factorisation]:
    """Seeds 0, 1, .. each."""
    each = config.float_steps + config.qat_steps
    with Track(config.seeds * each, "matrix factorisation", quiet=quiet) as track:
        return [factorise(config, seed, track) for seed in range(config.seeds)]


def run_factorisation(
    config: FactorisationConfig, out: str | Path, *, overwrite: bool = False, quiet: bool = False
) -> list[Factorisation]:
    """`factorise_all` with results.json, report.md and a picture in ``out``; a finished run is read
    back.

    Raises:
        ValueError: ``out`` holds another config, or results that are damaged.
    """
    described = {"recipe": {"name": "matrix-factorisation", **asdict(config)}}
    run = RunDir(out, described, overwrite=overwrite)
    if run.file(RESULTS).exists() and not overwrite:
        found = read_results(run.file(RESULTS))
    else:
        found = factorise_all(config, quiet=quiet)
        run.create()
    plot(run.file(PICTURE), found)
    write_atomic(run.file(REPORT), report_text(config, found).encode())
    write_atomic(run.file(RESULTS), to_json({"seeds": [asdict(one) for one in found]}))
    return found


def read_results(path: Path) -> list[Factorisation]:
    """Raises: ValueError naming the file if it does not hold such results."""
    with reading_results("matrix-factorisation", path) as results:
        return [
            Factorisation(**{**one, "curve": tuple(tuple(point) for point in one["curve"])})
            for one in results["seeds"]
        ]


def better(found: Sequence[Factorisation]) -> int:
    """In how many seeds QAT ended lower."""
    return sum(one.qat_loss < one.ptq_loss for one in found)


def table(found: Sequence[Factorisation]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows): the figures of the first seed, and of all: mean ± standard deviation."""
    columns = [name.format(seed=found[0].seed, count=len(found)) for name in COLUMNS]
    rows = []
    for field in fields(Factorisation):
        if field.name not in NAMES:
            continue
        values = [getattr(one, field.name) for one in found]
        known = [value for value in values if value is not None]
        printed = PRINTED.get(field.name, "-")
        digits = len(printed.partition(".")[2]) if printed != "-" else 3
        mean, deviation = spread(known) if known else (math.nan, math.nan)
        first = "-" if values[0] is None else f"{values[0]:.{digits}f}"
        rows.append([NAMES[field.name], printed, first, f"{mean:.3f} ± {deviation:.3f}"])
    rows.append(["QAT lower than PTQ", "-", "-", f"{better(found)} of {len(found)}"])
    return columns, rows


def rich_table(found: Sequence[Factorisation]) -> Table:
    return rich_grid(*table(found), "matrix factorisation: PTQ and QAT", left=1)


def plot(path: Path, found: Sequence[Factorisation]) -> None:
    """The losses of the first seed during QAT, and PTQ against QAT, a dot for each seed."""
    canvas, (left, right) = figure(2)
    steps, latent, deployed = zip(*found[0].curve, strict=True)
    left.plot(steps, deployed, color=colour(4), label="deployed, f(Q(X))")
    left.plot(steps, latent, color=colour(1), label="latent, f(X)")
    left.set(xlabel="QAT step", ylabel="loss", title=f"seed {found[0].seed}")
    left.legend(fontsize="small")
    ptq, qat = ([getattr(one, name) for one in found] for name in ("ptq_loss", "qat_loss"))
    right.plot(ptq, qat, "o", color=colour(4), alpha=0.7)
    end = 1.05 * max(*ptq, *qat)
    right.plot([0, end], [0, end], color="black", linewidth=1)
    right.set(xlabel="f, PTQ", ylabel="f, QAT", title=f"{len(found)} seeds", aspect="equal")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    save_figure(canvas, path)


def command_of(config: FactorisationConfig) -> str:
    """The command that makes the run again, and what it has no option for."""
    settings = asdict(config)
    given = {name: settings[name] for name in OPTIONS.values()}
    reached = {**asdict(FactorisationConfig()), **given}
    words = ["qtrain", "matrix-factorisation", *option_words(OPTIONS, settings)]
    return again(words, apart(settings, reached))


def report_text(config: FactorisationConfig, found: Sequence[Factorisation]) -> str:
    settings: dict[str, Any] = asdict(config)
    same = settings == {**asdict(FactorisationConfig()), "seeds": config.seeds}
    source = "The paper's settings." if same else "Not the paper's settings: do not compare."
    return f"""# Matrix factorisation: where PTQ and QAT end

{markdown_grid(*table(found), left=1)}
- f(X) = |X X^T - M*|^2, X [{config.d}, {config.rank}], M* diagonal with {config.rank} ones.
  Gradient descent: {config.float_steps} steps at {config.float_lr:g}. Grid of {config.rho:g}.
  Straight-through QAT: {config.qat_steps} steps from {config.qat_lr:g} by half a cosine wave.
  {source}
- Paper, 30 seeds (arXiv 2606.09012): PTQ .50 ± .18, QAT .24 ± .07, QAT lower in 28.
- distance: |Q(X) - X| from the float solution X; angle: between the two displacements.

![losses during QAT, and PTQ against QAT over seeds]({PICTURE})

Again: {command_of(config)}. Settings: config.json. All figures and curves:
{RESULTS}.
"""
