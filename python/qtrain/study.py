"""``qtrain dnq-study``: DNQ against its controls, over seeds, with paired differences.

Every arm of a study has the same budget, the same first weights and the same batches for a seed;
what differs is named by the arm. So the difference of two arms is taken seed by seed. A run that
two studies share is run once.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from .data import load_dataset
from .dnq import Dnq, DnqConfig
from .dnq_run import PtqPlan, run_dnq
from .progress import Track
from .recipe import TrainConfig
from .report import REPORT, RESULTS, Row, bits_name, colour, figure, markdown_grid, save_figure
from .rundir import RunDir, to_json, write_atomic

PICTURE = "study.png"
PLAN = PtqPlan(bits=(4, 3, 2), methods=("minmax", "mse"), folds=(True,), adaround=None)


@dataclass(frozen=True)
class Arm:
    """One treatment.

    Attributes:
        changed: fields of ``DnqConfig`` that it sets.
        swa: whether the weights are averaged.
        slug: names the directory of its runs.
    """

    name: str
    slug: str
    changed: dict[str, Any] = field(default_factory=dict)
    swa: bool = True

    @property
    def noisy(self) -> bool:
        """Whether a run depends on the bit width; without noise one serves all."""
        return self.changed.get("weight_noise") != "none" or (
            self.changed.get("activation_noise") != "none"
        )


OFF = {"weight_noise": "none", "activation_noise": "none"}
DIFFERENTIAL = Arm("differential (DNQ)", "differential")
SWA_ONLY = Arm("SWA only", "swa", OFF)


@dataclass(frozen=True)
class Study:
    """Arms, and those among them that the others are compared with."""

    arms: tuple[Arm, ...]
    references: tuple[Arm, ...]


_IID = Arm("i.i.d. N(0, 2 var)", "iid", {"weight_noise": "iid"})
_NONE = Arm("no noise", "none", OFF, swa=False)
_LINEAR, _GAUSSIAN = (replace(DIFFERENTIAL, name=name) for name in ("linear", "Gaussian"))
_IMAGES = tuple(
    Arm(f"{count} images", f"images{count}", {"calibration_images": count})
    for count in (16, 128, 1024)
)
STUDIES: dict[str, Study] = {
    "controls": Study(
        (
            _NONE,
            SWA_ONLY,
            Arm("naive N(mean, var)", "naive", {"weight_noise": "naive"}),
            _IID,
            DIFFERENTIAL,
        ),
        references=(_NONE, SWA_ONLY, _IID),
    ),
    "parts": Study(
        (
            SWA_ONLY,
            DIFFERENTIAL,
            Arm("weight noise only", "weights", {"activation_noise": "none"}),
            Arm("activation noise only", "activations", {"weight_noise": "none"}),
            Arm("differential, permanent", "permanent", {"permanent": True}),
        ),
        references=(SWA_ONLY, DIFFERENTIAL),
    ),
    "ramps": Study(
        (
            _LINEAR,
            Arm("cosine", "cosine", {"ramp": "cosine"}),
            Arm("constant", "constant", {"ramp": "constant"}),
        ),
        references=(_LINEAR,),
    ),
    "calibration": Study(_IMAGES, references=_IMAGES[:1]),
    "ranges": Study(
        (
            SWA_ONLY,
            replace(DIFFERENTIAL, name="noise of min-max"),
            Arm("noise of MSE", "mse", {"method": "mse"}),
        ),
        references=(SWA_ONLY,),
    ),
    "discrete": Study(
        (_GAUSSIAN, Arm("discrete", "discrete", {"weight_noise": "discrete"})),
        references=(_GAUSSIAN,),
    ),
}


@dataclass(frozen=True)
class Task:
    """One run of a study."""

    arm: Arm
    bits: tuple[int, ...]  # evaluated; the noise is that of the first
    seed: int
    config: TrainConfig
    dnq: DnqConfig
    plan: PtqPlan
    out: Path
    overwrite: bool = False


def tasks(
    arms: Sequence[Arm],
    base: TrainConfig,
    dnq: DnqConfig,
    plan: PtqPlan,
    *,
    seeds: Iterable[int],
    out: Path,
) -> list[Task]:
    """The runs of a study: by seed, by arm, and by bit width where that matters."""
    found = []
    for seed in seeds:
        for arm in arms:
            config = replace(base, seed=seed)
            if not arm.swa:
                config = replace(config, swa_start=None)
            for bits in [(b,) for b in plan.bits] if arm.noisy else [plan.bits]:
                of = {"weight_bits": bits[0], "activation_bits": bits[0], **arm.changed}
                if not arm.noisy:
                    del of["weight_bits"], of["activation_bits"]
                place = f"w{bits[0]}a{bits[0]}" if arm.noisy else "any"
                where = out / "runs" / arm.slug / place / f"seed{seed}"
                how = replace(plan, bits=bits)
                found.append(Task(arm, bits, seed, config, replace(dnq, **of), how, where))
    return found


def _one_thread() -> None:
    torch.set_num_threads(1)


def _run(task: Task) -> list[Row]:
    return run_dnq(
        task.config,
        task.dnq,
        task.out,
        plan=task.plan,
        overwrite=task.overwrite,
        cpu=True,
        quiet=True,
    )


def _check(todo: Sequence[Task], base: TrainConfig) -> None:
    """Raise what one of the runs would raise at its start, before the first is made."""
    data = load_dataset(base.dataset, base.data_options)
    for task in todo:
        recipe = Dnq(task.dnq)
        recipe.bind(task.config, data)
        described = {"train": asdict(task.config), "recipe": recipe.describe()}
        RunDir(task.out, described, overwrite=task.overwrite)


@dataclass(frozen=True)
class Score:
    """One arm, bit width, way of quantizing and seed; float: before it."""

    arm: str
    bits: int
    method: str
    seed: int
    accuracy: float
    loss: float
    float_accuracy: float


def run_study(
    name: str,
    base: TrainConfig,
    dnq: DnqConfig,
    out: str | Path,
    *,
    seeds: Iterable[int] = range(5),
    plan: PtqPlan = PLAN,
    jobs: int = 2,
    overwrite: bool = False,
) -> list[Score]:
    """Run what is not yet there, and write the tables.

    Args:
        name: of ``STUDIES``.
        base, dnq: what all arms share.
        plan: bit widths, and how the trained models are quantized.
        jobs: runs at a time, each in a process of its own on the CPU with one thread, so that the
            bits do not depend on it.
        overwrite: make the runs of this study afresh.

    Raises:
        ValueError: an unknown study; bad settings; ``out`` holds runs with other settings.
    """
    if name not in STUDIES:
        raise ValueError(f"dnq-study: study must be one of {', '.join(STUDIES)}, got {name!r}")
    if jobs < 1:
        raise ValueError(f"dnq-study: jobs must be at least 1, got {jobs}")
    study = STUDIES[name]
    todo = tasks(study.arms, base, dnq, plan, seeds=sorted(set(seeds)), out=Path(out))
    if not todo:
        raise ValueError("dnq-study: seeds must be at least one, got none")
    todo = [replace(task, overwrite=overwrite) for task in todo]
    _check(todo, base)
    scores: list[Score] = []
    # spawned, not forked: a fork of a process whose OpenMP has threads can hang
    context = get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_one_thread)
    with Track(len(todo), f"study {name}") as track, pool:
        running = {pool.submit(_run, task): task for task in todo}
        try:
            for future in as_completed(running):
                scores += _scores(running[future], future.result())
                track.advance()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    order = [arm.name for arm in study.arms]
    scores.sort(key=lambda s: (-s.bits, s.method, order.index(s.arm), s.seed))
    write_study(name, scores, Path(out) / name)
    return scores


def _scores(task: Task, rows: list[Row]) -> list[Score]:
    before = rows[0].accuracy
    return [
        Score(task.arm.name, row.bits[0], row.method, task.seed, row.accuracy, row.loss, before)
        for row in rows
        if row.bits is not None
    ]


def spread(values: Sequence[float]) -> tuple[float, float]:
    """(mean, standard deviation of one value); the latter is nan for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def paired(ours: Sequence[Score], theirs: Sequence[Score]) -> list[float]:
    """Differences of accuracy, seed by seed."""
    other = {score.seed: score.accuracy for score in theirs}
    return [score.accuracy - other[score.seed] for score in ours]


def accuracy_table(name: str, scores: Sequence[Score]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows): mean and standard deviation over seeds, by bit width and arm."""
    methods = list(dict.fromkeys(s.method for s in scores))
    rows = []
    for bits in dict.fromkeys(s.bits for s in scores):
        for arm in STUDIES[name].arms:
            mine = [s for s in scores if (s.bits, s.arm) == (bits, arm.name)]
            first = [s.float_accuracy for s in mine if s.method == methods[0]]
            cells = [[s.accuracy for s in mine if s.method == method] for method in methods]
            texts = [_percent(*spread(values)) for values in (first, *cells)]
            rows.append([bits_name((bits, bits)), arm.name, *texts])
    return ["bits", "arm", "float", *methods], rows


def difference_table(name: str, scores: Sequence[Score]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows): differences of accuracy to the references in points, seed by seed: mean,
    standard deviation, and in how many seeds the arm was better."""
    study = STUDIES[name]
    rows = []
    for bits, method in dict.fromkeys((s.bits, s.method) for s in scores):
        group = [s for s in scores if (s.bits, s.method) == (bits, method)]
        by_arm = {arm.name: [s for s in group if s.arm == arm.name] for arm in study.arms}
        for place, arm in enumerate(study.arms):
            cells = []
            for reference in study.references:
                gaps = paired(by_arm[arm.name], by_arm[reference.name])
                wins = f"{sum(gap > 0 for gap in gaps)} of {len(gaps)}"
                # a difference stands in the table once, with the later of the two
                later = place > study.arms.index(reference)
                cells.append(f"{_points(*spread(gaps))} ({wins})" if later else "")
            if any(cells):
                rows.append([bits_name((bits, bits)), method, arm.name, *cells])
    return ["bits", "quantized by", "arm", *(f"minus {r.name}" for r in study.references)], rows


def _percent(mean: float, sd: float) -> str:
    return f"{100 * mean:.2f} ± {100 * sd:.2f}"


def _points(mean: float, sd: float) -> str:
    return f"{100 * mean:+.2f} ± {100 * sd:.2f}"


def write_study(name: str, scores: Sequence[Score], out: Path) -> None:
    """report.md, study.png and results.json."""
    out.mkdir(parents=True, exist_ok=True)
    seeds = sorted({score.seed for score in scores})
    numbers = ", ".join(str(seed) for seed in seeds)
    text = f"""# qtrain dnq-study {name}

Test accuracy in %, mean ± standard deviation over {len(seeds)} seeds ({numbers}).
"float" is before quantization.

{markdown_grid(*accuracy_table(name, scores))}
Paired differences in points (same seed: same first weights, same batches): mean ± standard
deviation of one seed's difference, and in how many seeds the arm was better.

{markdown_grid(*difference_table(name, scores), left=3)}
![accuracy by arm]({PICTURE})
"""
    plot_study(out / PICTURE, name, scores)
    write_atomic(out / REPORT, text.encode())
    write_atomic(out / RESULTS, to_json({"study": name, "scores": [asdict(s) for s in scores]}))


def plot_study(path: Path, name: str, scores: Sequence[Score]) -> None:
    """A panel per bit width: each seed a dot, each arm's mean a line; colours are methods."""
    widths = list(dict.fromkeys(s.bits for s in scores))
    methods = list(dict.fromkeys(s.method for s in scores))
    arms = [arm.name for arm in STUDIES[name].arms]
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
        axis.set(title=bits_name((bits, bits)), ylabel="test accuracy, %")
        axis.grid(alpha=0.3, axis="y")
    canvas.legend(*axis.get_legend_handles_labels(), fontsize="small", loc="outside upper right")
    save_figure(canvas, path)
