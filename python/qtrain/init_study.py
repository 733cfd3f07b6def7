"""``qtrain init-study``: building blocks x initialisers x BatchNorm, quantized after training.

The question of Yun and Wong (arXiv 2506.10463 and 2011.14578): does the law of the first weights
decide how much a trained net loses by quantization, and is it by the ranges it leaves?
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from .data import Dataset, load_dataset
from .init_blocks import BLOCKS
from .init_outcome import METHODS, Combination, Outcome, layer_ranges
from .initialisers import INITIALISERS, Initialised
from .loop import TrainResult, train
from .progress import Track
from .ptq import calibration_images, ptq_qconfig, sweep
from .ptq_run import IMAGES
from .recipe import TrainConfig, changed_settings, new_model, require
from .report import RESULTS, Row, reading_results
from .rundir import RunDir, to_json, write_atomic
from .study import run_all

GRANULARITIES = tuple(METHODS)
# the other side's width where one side alone is quantized: its rounding is not seen
FINE = 16
# small nets, for the paper's are on CIFAR-10; rates and lengths are the same for all combinations
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {
        "epochs": 12,
        "model_options": {"widths": [16, 16, 32], "strides": [2, 1, 2]},
    },
    "shapes": {
        "epochs": 12,
        "model_options": {"widths": [16, 32, 64], "strides": [2, 2, 2]},
        "data_options": {"difficulty": 0.5, "train_size": 2560},
    },
}


@dataclass(frozen=True)
class Plan:
    """How trained nets are quantized: min-max ranges, BatchNorm folded.

    Attributes:
        bits: of weights and inputs, together and each alone (the other with 16 bits).
        granularities: scales of weights: "channel", "tensor" or both.
        images: random training images for the ranges of inputs; None: 512, or all if fewer.
    """

    bits: tuple[int, ...] = (8, 4, 2)
    granularities: tuple[str, ...] = GRANULARITIES
    first_last_bits: int | None = 8
    images: int | None = None

    def __post_init__(self) -> None:
        require(bool(self.bits), "bits", "at least one", "none", "init-study")
        for name in ("bits", "granularities"):
            values = getattr(self, name)
            once = len(set(values)) == len(values)
            require(once, name, "different ones", ", ".join(map(str, values)), "init-study")
        known = ", ".join(GRANULARITIES)
        good = bool(self.granularities) and set(self.granularities) <= set(GRANULARITIES)
        require(good, "granularities", f"of {known}", self.granularities, "init-study")
        for bits in self.bits:
            ptq_qconfig("minmax", bits, bits, first_last_bits=self.first_last_bits)

    def widths(self) -> tuple[tuple[int, int], ...]:
        """(weights, inputs) of each model that is evaluated."""
        return tuple(
            pair for b in self.bits for pair in dict.fromkeys(((b, b), (b, FINE), (FINE, b)))
        )

    def count_images(self, data: Dataset) -> int:
        return min(IMAGES, len(data.train)) if self.images is None else self.images


@dataclass(frozen=True)
class Task:
    """One run."""

    combination: Combination
    config: TrainConfig
    plan: Plan
    out: Path
    overwrite: bool = False

    def recipe(self) -> Initialised:
        return Initialised(self.combination.initialiser)

    def check(self) -> None:
        """Raise what the run would raise at its start."""
        described = {"train": asdict(self.config), "recipe": self.recipe().describe()}
        RunDir(self.out, described, overwrite=self.overwrite)


def settings_for(dataset: str, **changed: Any) -> TrainConfig:
    """Settings of the runs on a dataset: a preset's, and what differs; the block and whether it has
    BatchNorm are left to the study.

    Raises:
        ValueError: a bad setting; another model than blocknet.
    """
    shared = {"dataset": dataset, "model": "blocknet", "lr": 1e-2, "epochs": 12}
    # one evaluation and one checkpoint at the end: a run takes seconds
    rare = {"eval_every": 10**6, "checkpoint_every": 10**6}
    config = changed_settings({**shared, **rare, **PRESETS.get(dataset, {})}, changed)
    require(config.model == "blocknet", "model", "blocknet", config.model, "init-study")
    for name in ("block", "batchnorm"):
        free = name not in config.model_options
        require(free, f"model_options.{name}", "left to the study", "one", "init-study")
    return config


def tasks(
    base: TrainConfig,
    plan: Plan,
    out: Path,
    combinations: Iterable[Combination],
    seeds: Sequence[int],
    *,
    overwrite: bool = False,
) -> list[Task]:
    """The runs: by seed and combination."""
    found = []
    for seed, one in product(seeds, combinations):
        options = {**base.model_options, "block": one.block, "batchnorm": one.batchnorm}
        config = replace(base, seed=seed, model_options=options)
        where = out / "runs" / one.slug / f"seed{seed}"
        found.append(Task(one, config, plan, where, overwrite))
    return found


def combinations_of(
    blocks: Sequence[str], batchnorm: Sequence[bool], initialisers: Sequence[str]
) -> list[Combination]:
    """All of them, in the order given.

    Raises:
        ValueError: an unknown block or initialiser; one twice, or none.
    """
    for what, asked, known in (
        ("blocks", blocks, tuple(BLOCKS)),
        ("batchnorm", batchnorm, (True, False)),
        ("initialisers", initialisers, tuple(INITIALISERS)),
    ):
        good = bool(asked) and set(asked) <= set(known) and len(set(asked)) == len(asked)
        rule = f"some of {', '.join(map(str, known))}, each once"
        require(good, what, rule, ", ".join(map(str, asked)) or "none", "init-study")
    return [Combination(*one) for one in product(blocks, batchnorm, initialisers)]


def run_study(
    base: TrainConfig,
    plan: Plan,
    out: str | Path,
    *,
    blocks: Sequence[str] = tuple(BLOCKS),
    batchnorm: Sequence[bool] = (True, False),
    initialisers: Sequence[str] = tuple(INITIALISERS),
    seeds: Iterable[int] = range(3),
    jobs: int = 2,
    overwrite: bool = False,
) -> list[Outcome]:
    """Run what is not yet there, and write report.md, study.png and results.json.

    Args:
        base: what all combinations share; from `settings_for`.
        blocks, initialisers: of `init_blocks.BLOCKS` and `initialisers.INITIALISERS`.
        batchnorm: with, without or both.
        jobs: runs at a time, each in a process of its own on the CPU with one thread, so that the
            bits do not depend on it.
        overwrite: make the runs afresh.

    Returns:
        The outcomes, by combination and seed. A run that does not train is one of them.

    Raises:
        ValueError: an unknown block or initialiser; bad settings; ``out`` holds runs with other
            settings.
    """
    from .init_report import write_study

    combinations = combinations_of(blocks, batchnorm, initialisers)
    numbers = sorted(set(seeds))
    require(bool(numbers), "seeds", "at least one", "none", "init-study")
    todo = tasks(base, plan, Path(out), combinations, numbers, overwrite=overwrite)
    _check(todo)
    found = {}
    for task, outcome in run_all(todo, run_task, label="init-study", processes=jobs):
        found[task.combination, task.config.seed] = outcome
    outcomes = [found[place] for place in product(combinations, numbers)]
    write_study(base, plan, outcomes, Path(out))
    return outcomes


def _check(todo: Sequence[Task]) -> None:
    """Raise what one of the runs would raise at its start, before the first is made."""
    base = todo[0].config
    data = load_dataset(base.dataset, base.data_options)
    calibration_images(data, base, todo[0].plan.count_images(data))
    for task in todo:
        if task.config.seed == base.seed:
            new_model(task.config, data)
        task.check()


def run_task(task: Task) -> Outcome:
    """Train, quantize and write results.json into the run directory; or read that back."""
    task.check()
    file = task.out / RESULTS
    settings = asdict(task.plan)
    if file.exists() and not task.overwrite:
        with reading_results("init-study", file) as results:
            # another plan quantizes again; what was trained stays
            if to_json(results["settings"]) == to_json(settings):
                return Outcome.from_dict(results)
    outcome = _outcome(task)
    write_atomic(file, to_json({"settings": settings, **asdict(outcome)}))
    return outcome


def _outcome(task: Task) -> Outcome:
    quiet = Track(0, "", quiet=True)
    seed = task.config.seed
    try:
        how: dict[str, Any] = {"overwrite": task.overwrite, "cpu": True, "track": quiet}
        result = train(task.config, task.recipe(), task.out, **how)
    except FloatingPointError:
        return Outcome(task.combination, seed, "loss not finite")
    if not math.isfinite(result.test_loss):
        return Outcome(task.combination, seed, "loss not finite")
    return measured(task, result)


def measured(task: Task, result: TrainResult) -> Outcome:
    """What the trained net loses, and its ranges."""
    plan, data = task.plan, result.data
    batches = calibration_images(data, task.config, plan.count_images(data))
    rows = [Row("float", None, result.test_accuracy, result.test_loss)]
    for granularity in plan.granularities:
        rows += sweep(
            result.model,
            data.test,
            batches,
            bits=plan.widths(),
            methods=("minmax",),
            folds=(True,),
            first_last_bits=plan.first_last_bits,
            per_tensor=granularity == "tensor",
            track=Track(0, "", quiet=True),
        )
    halfway = (1 + 1 / data.classes) / 2
    short = f"accuracy below {100 * halfway:.0f} %" if result.test_accuracy < halfway else None
    layers = layer_ranges(result.model, batches)
    return Outcome(task.combination, task.config.seed, short, tuple(rows), layers)
