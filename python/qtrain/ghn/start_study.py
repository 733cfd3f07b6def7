"""``qtrain ghn-start``: ordinary QAT from predicted weights against QAT from random ones.

The question that the papers leave open: what a GHN's weights are worth as a start. All arms of a
seed have the same network, batches and settings; what is counted is the steps to an accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table
from torch.optim.swa_utils import update_bn

from ..data import load_dataset
from ..dnq_run import DEEP_CNN
from ..loop import train
from ..progress import Track
from ..qat import Qat, qat_qconfig
from ..recipe import TrainConfig, new_model, require
from ..report import (
    REPORT,
    RESULTS,
    bits_name,
    broken,
    colour,
    figure,
    markdown_grid,
    rich_grid,
    save_figure,
)
from ..rundir import METRICS, read_metrics, to_json, write_atomic, write_model_file
from ..seeds import keeping_globals, seed_globals
from ..source import FloatSource
from ..study import percent, plus_minus, run_all
from .evaluate import EvalPlan, Ground
from .prediction_file import ModelToPredict, write_prediction
from .study import Job, Plan, train_variants

PICTURE = "start.png"
DASHES = "-", "--", ":"


@dataclass(frozen=True)
class Arm:
    """What QAT starts from.

    Attributes:
        variant: of the GHN, a slug of `qtrain.ghn.study.VARIANTS`; None: random weights.
        noise: relative, breaks the symmetry of tiled channels; see `qtrain.ghn.predict`.
        rescale: likewise.
    """

    name: str
    variant: str | None = None
    noise: float = 0.0
    rescale: bool = False


def arms_of(bits: int, noise: float) -> tuple[Arm, ...]:
    """For QAT at this width; the GHN-QAT is the one trained for it."""
    return (
        Arm("random"),
        Arm("GHN-Q", "q"),
        Arm("GHN-Q, noise", "q", noise),
        Arm("GHN-Q, rescaled", "q", rescale=True),
        Arm("GHN-QAT", f"w{bits}"),
        Arm("GHN-QAT, noise", f"w{bits}", noise),
        Arm("GHN-QAT, rescaled", f"w{bits}", rescale=True),
    )


@dataclass(frozen=True)
class StartPlan:
    """What all arms share.

    Attributes:
        ghn: how the GHNs are trained; their runs are shared with `qtrain ghn-study`.
        qat: settings of QAT; the seed is replaced.
        noise: of the arms that have it.
        goals: accuracies whose steps are counted.
    """

    ghn: Plan
    qat: TrainConfig
    bits: tuple[int, ...] = (4, 2)
    method: str = "lsq"
    noise: float = 0.05
    goals: tuple[float, ...] = (0.9, 0.95)

    def __post_init__(self) -> None:
        known = all(bits in (8, 4, 2) for bits in self.bits) and bool(self.bits)
        require(known, "bits", "of 8, 4 and 2", self.bits, "ghn-start")
        inside = all(0 < goal <= 1 for goal in self.goals) and bool(self.goals)
        require(inside, "goals", "in (0, 1]", self.goals, "ghn-start")


def default_qat(dataset: str, data_options: Any) -> TrainConfig:
    """QAT of the narrow net that the other studies have, evaluated in each epoch."""
    shape: dict[str, Any] = {"model": "cnn", "model_options": DEEP_CNN}
    return TrainConfig(dataset, data_options, epochs=20, lr=3e-3, log_every=10**6, **shape)


@dataclass(frozen=True)
class StartJob:
    arm: Arm
    bits: int
    seed: int
    plan: StartPlan
    out: Path

    @property
    def folder(self) -> Path:
        kind = "-rescaled" if self.arm.rescale else ""
        name = f"{self.arm.variant or 'random'}-{self.arm.noise:g}{kind}"
        return self.out / "start" / bits_name((self.bits, self.bits)).lower() / name

    @property
    def run(self) -> Path:
        return self.folder / f"seed{self.seed}"


@dataclass(frozen=True)
class Curve:
    """An arm's test accuracy by steps of QAT.

    Attributes:
        points: (steps, accuracy), rising.
    """

    arm: str
    bits: int
    seed: int
    points: tuple[tuple[int, float], ...]

    def steps_to(self, goal: float) -> float:
        """The first evaluation at the goal; inf if there is none."""
        return min((step for step, accuracy in self.points if accuracy >= goal), default=math.inf)


def _run(job: StartJob) -> Curve:
    config = replace(job.plan.qat, seed=job.seed)
    start = job.folder / f"start{job.seed}.safetensors"
    start.parent.mkdir(parents=True, exist_ok=True)
    _write_start(job, config, start)
    recipe = Qat(FloatSource.load(start), qat_qconfig(job.plan.method, job.bits, job.bits))
    train(config, recipe, job.run, cpu=True, track=Track(0, "", quiet=True))
    records = [r for r in read_metrics(job.run / METRICS) if "test_accuracy" in r]
    points = tuple((r["step"], r["test_accuracy"]) for r in records)
    return Curve(job.arm.name, job.bits, job.seed, points)


def _write_start(job: StartJob, config: TrainConfig, path: Path) -> None:
    """The float model that QAT starts from; the same bytes whenever it is written."""
    if job.arm.variant is not None:
        wanted = ModelToPredict(
            config.model, config.model_options, config.dataset, config.data_options
        )
        ghn = Job(job.arm.variant, job.seed, job.plan.ghn, job.out).folder()
        how: dict[str, Any] = {"noise": job.arm.noise, "rescale": job.arm.rescale}
        write_prediction(wanted, path, ghn, seed=job.seed, cpu=True, overwrite=True, **how)
        return
    data = load_dataset(config.dataset, config.data_options)
    with keeping_globals():
        seed_globals(job.seed, 0, "init")
        model = new_model(config, data)
        # as that of predicted weights: what LSQ's first scales are taken from
        update_bn(Ground.of(data, EvalPlan(seed=job.seed)).batchnorm, model)
    meta = {"train": {k: v for k, v in asdict(config).items() if k in _KEPT}}
    write_model_file(path, model.state_dict(), {**meta, "recipe": {"name": "float"}})


_KEPT = ("dataset", "data_options", "model", "model_options")


def run_starts(
    plan: StartPlan, out: str | Path, *, seeds: Iterable[int] = range(3), jobs: int = 2
) -> list[Curve]:
    """Train what is not yet there, and write start/report.md, results.json and a picture.

    Args:
        out: shared with `qtrain ghn-study`.
        jobs: runs at a time, each in a process of its own on the CPU with one thread.

    Raises:
        ValueError: bad settings; ``out`` holds runs with other settings.
    """
    numbers, out = sorted(set(seeds)), Path(out)
    require(bool(numbers), "seeds", "at least one", "none", "ghn-start")
    arms = [(arm, bits) for bits in plan.bits for arm in arms_of(bits, plan.noise)]
    slugs = list(dict.fromkeys(arm.variant for arm, _ in arms if arm.variant is not None))
    train_variants(slugs, plan.ghn, out, numbers, jobs)
    todo = [StartJob(arm, bits, seed, plan, out) for arm, bits in arms for seed in numbers]
    runs = run_all(todo, _run, label="QAT from each start", processes=jobs)
    found = {job.run: curve for job, curve in runs}
    curves = [found[job.run] for job in todo]
    _write(out / "start", curves, plan)
    return curves


def table(curves: Sequence[Curve], goals: Sequence[float]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows): steps to each goal, the mean over the seeds that come to it and how many
    do not; and the last accuracy."""
    rows = []
    for bits, arm in dict.fromkeys((c.bits, c.arm) for c in curves):
        mine = [c for c in curves if (c.bits, c.arm) == (bits, arm)]
        cells = [_steps([curve.steps_to(goal) for curve in mine]) for goal in goals]
        texts = [percent([c.points[end][1] for c in mine], ".1f") for end in (0, -1)]
        rows.append([bits_name((bits, bits)), arm, *cells, *texts])
    first = curves[0].points[0][0]
    named = [f"steps to {100 * goal:g} %" for goal in goals]
    return ["bits", "start", *named, f"after {first} steps, %", "at the end, %"], rows


def screen_table(curves: Sequence[Curve], goals: Sequence[float]) -> Table:
    """The same for a terminal."""
    columns, rows = table(curves, goals)
    cells = [[*row[:2], *broken(row[2:], ", ")] for row in rows]
    return rich_grid(broken(columns, " to"), cells, "QAT by its start", narrow=True)


def _steps(steps: Sequence[float]) -> str:
    reached = [step for step in steps if math.isfinite(step)]
    if not reached:
        return "never"
    missing = len(steps) - len(reached)
    return plus_minus(reached, ".0f") + (f", {missing} never" if missing else "")


def _write(out: Path, curves: Sequence[Curve], plan: StartPlan) -> None:
    seeds = sorted({curve.seed for curve in curves})
    plot(out / PICTURE, curves)
    text = f"""# QAT from predicted weights: {plan.qat.model} on {plan.qat.dataset}, {plan.method}

Seeds {", ".join(map(str, seeds))}; evaluated every {curves[0].points[0][0]} steps.
Noise: {plan.noise:g} of each weight's standard deviation. Rescaled: each weight to He's.

{markdown_grid(*table(curves, plan.goals), left=2)}
![test accuracy by steps]({PICTURE})
"""
    write_atomic(out / REPORT, text.encode())
    write_atomic(out / RESULTS, to_json({"curves": [asdict(c) for c in curves]}))


def plot(path: Path, curves: Sequence[Curve]) -> None:
    """A panel per width, a line per seed: a colour per origin of the weights, dashes by what was
    done to them."""
    widths = list(dict.fromkeys(curve.bits for curve in curves))
    arms = list(dict.fromkeys(curve.arm for curve in curves))
    origins, deeds = ([*dict.fromkeys(a.partition(", ")[end] for a in arms)] for end in (0, 2))
    canvas, axes = figure(len(widths), width=4.8)
    for axis, bits in zip([axes] if len(widths) == 1 else axes, widths, strict=True):
        for arm in arms:
            origin, _, deed = arm.partition(", ")
            look = {"color": colour(origins.index(origin)), "ls": DASHES[deeds.index(deed)]}
            mine = [c for c in curves if (c.bits, c.arm) == (bits, arm)]
            for place, curve in enumerate(mine):
                steps, accuracies = zip(*curve.points, strict=True)
                label = arm if place == 0 else None
                shown = [100 * value for value in accuracies]
                axis.plot(steps, shown, **look, alpha=0.7, label=label)
        axis.set(title=bits_name((bits, bits)), xlabel="steps of QAT", ylabel="test accuracy, %")
        axis.grid(alpha=0.3)
    canvas.legend(*axis.get_legend_handles_labels(), fontsize="small", loc="outside right upper")
    save_figure(canvas, path)
