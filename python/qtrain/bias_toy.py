"""A problem with a known optimum, to see what noise in training does to where it ends.

    f(w) = 1/2 (w - w*)^T H (w - w*),    v_t = w_t - w*,    a = 1 - lr h for an eigenvalue h of H

by gradient descent under noise p_t, one step after the other:

    temporary (DNQ): the gradient is taken at w + p, the step is made on w,
                     v_{t+1} = v_t - lr H (v_t + p_t)         = a v_t + b p_t with b = -lr h
    permanent:       the noise stays in w,
                     v_{t+1} = (v_t + p_t) - lr H (v_t + p_t) = a v_t + b p_t with b = a

and three kinds of it (mu != 0 and sigma per channel), all from public operations:

    naive         p_t = mu + sigma eps_t              drop_in_noise with p = 1
    differential  p_t = delta_t - delta_{t-1}         differential_noise; delta_t = mu + sigma eps_t
    iid           p_t = delta_{2t} - delta_{2t-1}     differential_noise with its step advanced by 2
                                                      each training step: no two steps share a delta
                                                      then, so the p_t are independent, with law
                                                      N(0, 2 sigma^2)

What it must come to (each line follows from the recursion; the mean is exact for any H):

    mean of v     naive: temporary -mu, permanent ((lr H)^{-1} - I) mu; the others: 0
    variance of v in an eigendirection with noise variance s^2 = sigma^2 there, at large t:
                  naive         b^2 s^2 / (1 - a^2)       (sum of a^2k)
                  iid         2 b^2 s^2 / (1 - a^2)
                  differential  b^2 s^2 (1 + (1 - a)^2 / (1 - a^2)) = 2 b^2 s^2 / (1 + a)

The last: delta_{t-k} enters v_{t+1} with weight b at k = 0 and b (a^k - a^{k-1}) after. It is the
i.i.d. one times 1 - a = lr h: what a step adds the next one takes back, most of all where the loss
is flat. Permanent differential noise is temporary naive noise seen from u_t = v_t - delta_{t-1}:
u_{t+1} = a u_t - lr h delta_t, so u drifts to -mu, and v = u + delta stays without bias.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

import qkernels

from .progress import Track
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
from .seeds import generator, stream_seed

MODES = ("temporary", "permanent")
NOISES = ("naive", "iid", "differential")
PICTURE = "bias_toy.png"
COLUMNS = ("mode", "noise", "bias / mu", "theory", "rms distance", "theory")
# what is left of the start when the late steps begin: exp(-18), 1.5e-8
SETTLED = 18.0
# elements of w with a dense H, which is a matrix of its square
MOST_DENSE = 4096


@dataclass(frozen=True)
class ToyConfig:
    """The problem and how it is solved.

    Attributes:
        channels, width: w has ``channels`` rows of ``width`` elements (``MOST_DENSE`` in all, if H
            is dense); mu and sigma are per row.
        hessian: "dense" (a random basis) or "diagonal"; eigenvalues in [least, greatest], evenly in
            the logarithm.
        mean, std: size of mu (its sign is random) and of sigma; each times a factor of 0.5 .. 1.5.
        late: the last steps, over which is averaged.
        replicas: independent runs side by side; standard errors come from them.
    """

    channels: int = 8
    width: int = 64
    hessian: str = "dense"
    least: float = 0.1
    greatest: float = 1.0
    lr: float = 0.5
    mean: float = 0.1
    std: float = 0.2
    steps: int = 800
    late: int = 400
    replicas: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        def require(holds: bool, name: str, rule: str) -> None:
            if not holds:
                raise ValueError(f"bias-toy: {name} must be {rule}, got {getattr(self, name)}")

        for name in ("channels", "width", "late"):
            require(getattr(self, name) >= 1, name, "at least 1")
        require(self.replicas >= 2, "replicas", "at least 2 (they give the standard errors)")
        require(self.hessian in ("dense", "diagonal"), "hessian", "dense or diagonal")
        dense = self.hessian == "dense"
        rule = f"at most {MOST_DENSE // self.width} with a dense hessian and width {self.width}"
        require(not dense or self.channels * self.width <= MOST_DENSE, "channels", rule)
        require(self.least > 0, "least", "positive")
        require(self.least <= self.greatest, "greatest", f"at least {self.least}")
        limit = 2 / self.greatest
        require(0 < self.lr < limit, "lr", f"in (0, {limit:g}), where descent is stable")
        for name in ("mean", "std"):
            require(0 < getattr(self, name) < math.inf, name, "positive")
        slowest = max(abs(1 - self.lr * self.least), abs(1 - self.lr * self.greatest))
        before = 1 if slowest == 0 else math.ceil(SETTLED / -math.log(slowest))
        rule = f"at least {before + self.late}: {before} to forget the start, {self.late} late ones"
        require(self.steps >= before + self.late, "steps", rule)


@dataclass(frozen=True)
class Problem:
    """H = basis diag(values) basis^T, the optimum, the start, and the noise; all float64.

    Attributes:
        values: [d] eigenvalues, d = channels * width.
        basis: [d, d] of eigenvectors in its columns; None: the identity.
        optimum, start: [d].
        mean, std: [channels].
    """

    values: Tensor
    basis: Tensor | None
    optimum: Tensor
    start: Tensor
    mean: Tensor
    std: Tensor

    @classmethod
    def make(cls, config: ToyConfig) -> Problem:
        """The problem of this config; the same for the same seed."""
        rng = generator(config.seed, 0, "bias_toy/problem")
        d = config.channels * config.width
        real: dict[str, Any] = {"dtype": torch.float64, "generator": rng}
        low, high = math.log(config.least), math.log(config.greatest)
        values = torch.linspace(low, high, d, dtype=torch.float64).exp()
        # a channel gets eigenvalues of all sizes
        values = values[torch.randperm(d, generator=rng)]
        basis = None
        if config.hessian == "dense":
            basis = torch.linalg.qr(torch.randn(d, d, **real)).Q
        sign = 1 - 2 * torch.randint(2, (config.channels,), generator=rng).double()
        mean = config.mean * sign * (0.5 + torch.rand(config.channels, **real))
        std = config.std * (0.5 + torch.rand(config.channels, **real))
        optimum, start = torch.randn(d, **real), torch.randn(d, **real)
        return cls(values, basis, optimum, optimum + start, mean, std)

    def per_element(self, channel: Tensor) -> Tensor:
        """[channels] -> [d]."""
        return channel.repeat_interleave(len(self.values) // len(channel))

    def function_of_h(self, factor: Tensor, v: Tensor) -> Tensor:
        """A function of H (its values at the eigenvalues: ``factor`` [d]) times v [..., d]."""
        if self.basis is None:
            return v * factor
        return (v @ self.basis * factor) @ self.basis.T

    def hessian(self) -> Tensor:
        """H itself [d, d], or its diagonal [d]."""
        if self.basis is None:
            return self.values
        return (self.basis * self.values) @ self.basis.T


def add_noise(kind: str, w: Tensor, problem: Problem, seed: int, step: int) -> Tensor:
    """w [replicas, d] with the noise p_t of this kind; replicas differ, for their indices do."""
    stats = (problem.mean.repeat(len(w)), problem.std.repeat(len(w)))
    rows = w.reshape(len(stats[0]), -1)
    if kind == "naive":
        noisy = qkernels.drop_in_noise(rows, stats, p=1.0, seed=seed, step=step, axis=0)
    elif kind in ("iid", "differential"):
        at = 2 * step if kind == "iid" else step
        noisy = qkernels.differential_noise(rows, stats, seed=seed, step=at, axis=0)
    else:
        raise ValueError(f"bias-toy: noise must be one of {', '.join(NOISES)}, got {kind!r}")
    return noisy.reshape(w.shape)


def expected_mean(problem: Problem, lr: float, kind: str, mode: str) -> Tensor:
    """[d]: the mean of v at large t; see the module's docstring."""
    mu = problem.per_element(problem.mean)
    if kind != "naive":
        return torch.zeros_like(mu)
    if mode == "temporary":
        return -mu
    return problem.function_of_h(1 / (lr * problem.values) - 1, mu)


def expected_variance(problem: Problem, lr: float, kind: str, mode: str) -> Tensor:
    """[d]: the variance of v at large t in each eigendirection; see the module's docstring."""
    a = 1 - lr * problem.values
    b = a - 1 if mode == "temporary" else a
    power = problem.per_element(problem.std) ** 2
    if problem.basis is not None:
        power = power @ problem.basis**2
    gain = {"naive": 1 / (1 - a * a), "iid": 2 / (1 - a * a), "differential": 2 / (1 + a)}[kind]
    return b * b * gain * power


@dataclass(frozen=True)
class ToyRow:
    """One kind of noise in one mode.

    Attributes:
        bias: of the mean of w - w* over replicas and late steps, the part along mu, in units of mu
            (<bias, mu> / <mu, mu>); ``bias_error``: its standard error over replicas.
        distance: root mean square of an element of w - w*, over replicas and late steps.
        bias_expected, distance_expected: the closed forms.
        curve: (step, distance, bias) on the way, over replicas.
    """

    mode: str
    noise: str
    bias: float
    bias_error: float
    bias_expected: float
    distance: float
    distance_error: float
    distance_expected: float
    curve: list[tuple[int, float, float]]

    def cells(self) -> tuple[str, ...]:
        """What stands in the table, in the order of ``COLUMNS``."""
        bias = _measured(self.bias, self.bias_error, self.bias_expected, "+")
        distance = _measured(self.distance, self.distance_error, self.distance_expected)
        return (self.mode, self.noise, *bias, *distance)


def _measured(value: float, error: float, expected: float, sign: str = "") -> tuple[str, str]:
    """(value ± error, expected), with as many decimals as the error's first digit has."""
    first = float(f"{error:.0e}")
    decimals = 4 if first == 0 else max(0, -math.floor(math.log10(first)))
    form = f"{sign}.{decimals}f"
    return f"{value:{form}} ± {first:.{decimals}f}", f"{expected:{form}}"


def descend(
    problem: Problem, config: ToyConfig, kind: str, mode: str, track: Track | None = None
) -> ToyRow:
    """Gradient descent under one kind of noise.

    Args:
        problem: of ``Problem.make(config)``.
        kind, mode: of ``NOISES`` and ``MODES``.
        track: advanced by the steps made.
    """
    if mode not in MODES:
        raise ValueError(f"bias-toy: mode must be one of {', '.join(MODES)}, got {mode!r}")
    seed, hessian = stream_seed(config.seed, 0, "bias_toy/noise"), problem.hessian()
    mu = problem.per_element(problem.mean)
    unit = mu / (mu @ mu)
    w = problem.start.expand(config.replicas, -1).clone()
    total, square, curve = torch.zeros_like(w), torch.zeros(len(w), dtype=w.dtype), []
    every = max(1, config.steps // 200)
    for step in range(config.steps + 1):
        v = w - problem.optimum
        if step % every == 0:
            curve.append((step, v.square().mean().sqrt().item(), (v @ unit).mean().item()))
        if step > config.steps - config.late:
            total += v
            square += v.square().mean(1)
        noisy = add_noise(kind, w, problem, seed, step)
        away = noisy - problem.optimum
        gradient = away * hessian if hessian.ndim == 1 else away @ hessian
        w = (w if mode == "temporary" else noisy) - config.lr * gradient
        if track is not None:
            track.advance()
    bias = total @ unit / config.late
    figures = _figures(problem, config, kind, mode, bias, square / config.late)
    return ToyRow(mode=mode, noise=kind, curve=curve, **figures)


def _figures(
    problem: Problem, config: ToyConfig, kind: str, mode: str, bias: Tensor, square: Tensor
) -> dict[str, Any]:
    """Those of `ToyRow`. ``bias`` and ``square`` [replicas]: along mu in units of mu, and mean
    (w - w*)^2."""
    mu = problem.per_element(problem.mean)
    mean = expected_mean(problem, config.lr, kind, mode)
    variance = expected_variance(problem, config.lr, kind, mode)
    distance = square.mean().sqrt()
    root = math.sqrt(config.replicas)
    return {
        "bias": bias.mean().item(),
        "bias_error": bias.std().item() / root,
        "bias_expected": (mean @ mu / (mu @ mu)).item(),
        "distance": distance.item(),
        # d sqrt(s) = ds / (2 sqrt(s))
        "distance_error": (square.std() / (2 * root * distance)).item(),
        "distance_expected": (mean.square() + variance).mean().sqrt().item(),
    }


def bias_toy(config: ToyConfig, *, quiet: bool = False) -> list[ToyRow]:
    """All kinds of noise in both modes, from the same start and the same seed."""
    problem = Problem.make(config)
    pairs = [(mode, kind) for mode in MODES for kind in NOISES]
    with Track(len(pairs) * (config.steps + 1), "bias toy", quiet=quiet) as track:
        rows = []
        for mode, kind in pairs:
            track.relabel(f"{mode} {kind}")
            rows.append(descend(problem, config, kind, mode, track))
    return rows


def run_bias_toy(config: ToyConfig, out: str | Path, *, overwrite: bool = False) -> list[ToyRow]:
    """``bias_toy`` with results.json, report.md and a picture in ``out``; a finished run is read
    back.

    Raises:
        ValueError: ``out`` holds another config, or results that are damaged.
    """
    described = {"recipe": {"name": "bias-toy"}, "toy": asdict(config)}
    run = RunDir(out, described, overwrite=overwrite)
    if run.file(RESULTS).exists() and not overwrite:
        rows = read_results(run.file(RESULTS))
    else:
        rows = bias_toy(config)
        run.create()
    plot(run.file(PICTURE), rows)
    write_atomic(run.file(REPORT), report_text(config, rows).encode())
    write_atomic(run.file(RESULTS), to_json({"noises": [asdict(row) for row in rows]}))
    return rows


def read_results(path: Path) -> list[ToyRow]:
    """Raises: ValueError naming the file if it does not hold such results."""
    with reading_results("bias-toy", path) as results:
        return [
            ToyRow(**{**row, "curve": [tuple(point) for point in row["curve"]]})
            for row in results["noises"]
        ]


def rich_table(rows: list[ToyRow]) -> Table:
    title = "noise in training, and where it ends"
    return rich_grid(COLUMNS, [row.cells() for row in rows], title, narrow=True)


def plot(path: Path, rows: list[ToyRow]) -> None:
    """Distance to the optimum and bias over the steps; dotted: the closed forms."""
    canvas, axes = figure(2, 2, height=3.2)
    for row in rows:
        colour = PALETTE[1 + NOISES.index(row.noise)]
        column = MODES.index(row.mode)
        steps, distance, bias = zip(*row.curve, strict=True)
        ends = (row.distance_expected, row.bias_expected)
        for axis, values, end in zip(axes[:, column], (distance, bias), ends, strict=True):
            axis.plot(steps, values, color=colour, linewidth=1.2, label=row.noise)
            axis.axhline(end, color=colour, linestyle=":", linewidth=1)
    for column, mode in enumerate(MODES):
        axes[0, column].set(title=f"{mode} noise", yscale="log")
        axes[1, column].set(xlabel="step")
        for axis in axes[:, column]:
            axis.grid(alpha=0.3)
    axes[0, 0].set(ylabel="rms distance to w*")
    axes[1, 0].set(ylabel="bias along mu, in units of mu")
    axes[0, 0].legend(fontsize="small")
    save_figure(canvas, path)


def report_text(config: ToyConfig, rows: list[ToyRow]) -> str:
    return f"""# Noise in training, and where it ends: a quadratic with a known optimum

{markdown_grid(COLUMNS, [row.cells() for row in rows])}
- f(w) = 1/2 (w - w*)^T H (w - w*), {config.channels} channels of {config.width} elements, H
  {config.hessian} with eigenvalues {config.least:g} .. {config.greatest:g}; gradient descent, rate
  {config.lr:g}, {config.steps} steps. Noise of mean mu (about {config.mean:g}, signs differ) and
  deviation sigma (about {config.std:g}) per channel.
- Temporary: the gradient is taken at w + noise, the step is made on w. Permanent: the noise stays.
- naive: N(mu, sigma^2). iid: N(0, 2 sigma^2). differential: delta_t - delta_(t-1) with
  delta ~ N(mu, sigma^2).
- bias: mean of w - w* over {config.replicas} replicas and the last {config.late} steps, the part
  along mu in units of mu, ± its standard error. rms distance: root mean square of an element of
  w - w*. theory: the closed forms.
- Closed forms, a = 1 - lr h: mean -mu (naive, temporary), ((lr H)^-1 - I) mu (naive, permanent), 0
  else; variance b^2 s^2 / (1 - a^2) for naive, twice that for iid, 2 b^2 s^2 / (1 + a) for
  differential (lr h times that of iid), with b = a - 1 (temporary) or a (permanent), for an
  eigenvalue h and noise variance s^2 in its direction.

![distance to the optimum and bias over the steps]({PICTURE})

Settings: config.json. All figures and the curves: {RESULTS}. Seed {config.seed}.
"""
