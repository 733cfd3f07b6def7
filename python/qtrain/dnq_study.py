"""``qtrain dnq-study``: DNQ against its controls, over seeds, with paired differences.

Every arm has the same budget. A run that two studies share is run once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .data import load_dataset
from .dnq import Dnq, DnqConfig
from .dnq_run import PtqPlan, run_dnq
from .recipe import TrainConfig
from .report import Row
from .rundir import RunDir
from .study import Comparison, Score, run_all, write_study

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
    study = STUDIES[name]
    todo = tasks(study.arms, base, dnq, plan, seeds=sorted(set(seeds)), out=Path(out))
    if not todo:
        raise ValueError("dnq-study: seeds must be at least one, got none")
    todo = [replace(task, overwrite=overwrite) for task in todo]
    _check(todo, base)
    scores: list[Score] = []
    for task, rows in run_all(todo, _run, label=f"study {name}", processes=jobs):
        scores += _scores(task, rows)
    shown = comparison(name)
    scores.sort(key=lambda s: (-s.bits[0], s.method, shown.arms.index(s.arm), s.seed))
    write_study(shown, scores, Path(out) / name)
    return scores


def comparison(name: str) -> Comparison:
    """How the tables of a study are laid out."""
    study = STUDIES[name]
    arms, references = (tuple(a.name for a in some) for some in (study.arms, study.references))
    return Comparison("dnq-study", name, arms, references)


def _scores(task: Task, rows: list[Row]) -> list[Score]:
    before = rows[0].accuracy
    return [
        Score(task.arm.name, row.bits, row.method, task.seed, row.accuracy, row.loss, before)
        for row in rows
        if row.bits is not None
    ]
