"""``qtrain bwrf-study``: BWRF against plain QAT and distillation, with paired differences.

All arms of a seed start from one float model, which is trained first, and have the same batches.
Every arm has the same steps, but for one: plain QAT for as long as mode prefix takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .blocks import find_blocks
from .bwrf_config import BwrfConfig
from .bwrf_run import Bwrf
from .data import load_dataset
from .dnq_run import DEEP_CNN
from .loop import TrainResult, train
from .progress import Track
from .qat import Qat, qat_qconfig
from .recipe import Recipe, TrainConfig, changed_settings, new_model, require
from .report import bits_name
from .rundir import RunDir, read_json, to_json, write_atomic
from .source import FloatSource
from .study import Comparison, Score, run_all, write_study
from .timing import median_step_seconds

NAMES = ("modes", "depths", "schedules", "effects")
TIME = "time.json"
# hard pictures and a narrow net: where QAT loses nothing there is nothing to win
HARD = {"difficulty": 0.7, "train_size": 2560}
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {"model": "cnn", "model_options": DEEP_CNN},
    "shapes": {"model": "resnet8", "model_options": {"width": 8}, "data_options": HARD},
}


@dataclass(frozen=True)
class Arm:
    """One treatment.

    Attributes:
        slug: names the directory of its runs.
        changed: fields of `BwrfConfig` that it sets; None: plain QAT.
        longer: whether it has the time of mode prefix, and not its steps.
    """

    name: str
    slug: str
    changed: Mapping[str, Any] | None
    longer: bool = False


PLAIN = Arm("plain QAT", "qat", None)
DISTILLED = Arm("distillation only", "distill", {"beta": 0.0})
PREFIX = Arm("prefix", "prefix", {})


def arms_of(name: str, blocks: int) -> tuple[tuple[Arm, ...], tuple[Arm, ...]]:
    """(arms, those among them that the others are compared with) of a study, for a model with so
    many blocks."""
    longer = Arm("longer QAT", "qat-time", None, longer=True)
    single = Arm("single", "single", {"mode": "single"})
    sampled = Arm("sampled", "sampled", {"mode": "sampled"})
    if name == "modes":
        references = (PLAIN, longer, DISTILLED)
        return (*references, PREFIX, single, sampled), references
    if name == "depths":
        depths = (
            Arm(f"block {k} of {blocks}", f"block{k}", {"mode": "single", "block": k})
            for k in range(1, blocks + 1)
        )
        return (PLAIN, DISTILLED, *depths), (PLAIN, DISTILLED)
    if name == "schedules":
        always = replace(PREFIX, name="no schedule")
        kinds = (Arm(kind, kind, {"schedule": kind}) for kind in ("linear", "exponential"))
        return (DISTILLED, always, *kinds), (DISTILLED, always)
    both = replace(PREFIX, name="both effects")
    apart = (Arm(f"{kind} only", kind, {"effect": kind}) for kind in ("forward", "backward"))
    return (DISTILLED, both, *apart), (DISTILLED, both)


@dataclass(frozen=True)
class Plan:
    """What all arms share.

    Attributes:
        qat: settings of the quantized runs; their seed is replaced.
        float_epochs, float_lr: what differs in the float runs.
        method: see `qat_qconfig`.
        time_factor: how many times a step of plain QAT one of mode prefix takes; None: measured
            once for a directory, and kept there in time.json.
    """

    qat: TrainConfig
    float_epochs: int = 20
    float_lr: float = 5e-3
    method: str = "lsq"
    bits: tuple[int, ...] = (4, 3, 2)
    first_last_bits: int | None = 8
    time_factor: float | None = None

    def __post_init__(self) -> None:
        require(bool(self.bits), "bits", "at least one", "none", "bwrf-study")
        factor = self.time_factor
        positive = factor is None or factor > 0
        require(positive, "time_factor", "positive", factor, "bwrf-study")
        for bits in self.bits:
            self.qconfig(bits)

    def qconfig(self, bits: int) -> Any:
        return qat_qconfig(self.method, bits, bits, first_last_bits=self.first_last_bits)

    def float_config(self, seed: int) -> TrainConfig:
        return replace(self.qat, epochs=self.float_epochs, lr=self.float_lr, seed=seed)


@dataclass(frozen=True)
class Task:
    """One run: of an arm, or the float model of a seed (arm is None)."""

    arm: Arm | None
    bits: int
    seed: int
    config: TrainConfig
    plan: Plan
    out: Path
    source: Path | None = None
    overwrite: bool = False

    def recipe(self) -> Recipe:
        if self.arm is None or self.source is None:
            return Recipe()
        start, qconfig = FloatSource.load(self.source), self.plan.qconfig(self.bits)
        if self.arm.changed is None:
            return Qat(start, qconfig)
        return Bwrf(start, qconfig, BwrfConfig(**self.arm.changed))

    def check(self) -> None:
        """Raise what the run would raise at its start."""
        described = {"train": asdict(self.config), "recipe": self.recipe().describe()}
        RunDir(self.out, described, overwrite=self.overwrite)

    def run(self) -> TrainResult:
        quiet = Track(0, "", quiet=True)
        how: dict[str, Any] = {"overwrite": self.overwrite, "cpu": True, "track": quiet}
        return train(self.config, self.recipe(), self.out, **how)


def _scores(task: Task) -> tuple[float, float]:
    result = task.run()
    return result.test_accuracy, result.test_loss


def settings_for(dataset: str, **changed: Any) -> TrainConfig:
    """Settings of the quantized runs on a dataset: a preset's, and what differs. Another model
    starts without the preset's options for its own.

    Raises:
        ValueError: a bad setting.
    """
    settings = {"dataset": dataset, "epochs": 10, "lr": 3e-3, **PRESETS.get(dataset, {})}
    return changed_settings(settings, changed)


def count_blocks(config: TrainConfig) -> int:
    """Of the config's model. Raises: ValueError if there are none to be found."""
    return len(find_blocks(new_model(config, load_dataset(config.dataset, config.data_options))))


def run_study(
    name: str,
    plan: Plan,
    out: str | Path,
    *,
    seeds: Iterable[int] = range(5),
    jobs: int = 2,
    overwrite: bool = False,
) -> tuple[Comparison, list[Score]]:
    """Run what is not yet there, and write the tables.

    Args:
        name: of ``NAMES``.
        jobs: runs at a time, each in a process of its own on the CPU with one thread, so that the
            bits do not depend on it.
        overwrite: make the runs of this study afresh, and its float models.

    Raises:
        ValueError: an unknown study; bad settings; ``out`` holds runs with other settings.
    """
    require(name in NAMES, "study", f"one of {', '.join(NAMES)}", repr(name), "bwrf-study")
    out, numbers = Path(out), sorted(set(seeds))
    require(bool(numbers), "seeds", "at least one", "none", "bwrf-study")
    arms, references = arms_of(name, count_blocks(plan.qat))
    floats = [
        Task(None, 32, seed, plan.float_config(seed), plan, _float_dir(out, seed))
        for seed in numbers
    ]
    before = _run_tasks(floats, "float models", jobs, overwrite)
    longer = 1.0
    if any(arm.longer for arm in arms):
        longer = time_factor(plan, _float_dir(out, numbers[0]), out)
    todo = tasks(arms, plan, out, numbers, longer)
    done = _run_tasks(todo, f"study {name}", jobs, overwrite)
    scores = []
    for task in todo:
        assert task.arm is not None, "the float models are not among them"
        accuracy, loss = done[task.out]
        label = arm_name(task.arm, plan, longer)
        bits, first = (task.bits, task.bits), before[_float_dir(out, task.seed)][0]
        scores.append(Score(label, bits, plan.method, task.seed, accuracy, loss, first))
    names = [tuple(arm_name(a, plan, longer) for a in some) for some in (arms, references)]
    shown = Comparison("bwrf-study", name, *names)
    scores.sort(key=lambda s: (-s.bits[0], shown.arms.index(s.arm), s.seed))
    write_study(shown, scores, out / name)
    return shown, scores


def _float_dir(out: Path, seed: int) -> Path:
    return out / "runs" / "float" / f"seed{seed}"


def arm_name(arm: Arm, plan: Plan, longer: float) -> str:
    """With the number of epochs, where they are not those of the others."""
    return f"{arm.name}, {_epochs(plan, longer)} epochs" if arm.longer else arm.name


def _epochs(plan: Plan, longer: float) -> int:
    return max(1, round(plan.qat.epochs * longer))


def tasks(
    arms: Sequence[Arm], plan: Plan, out: Path, seeds: Sequence[int], longer: float
) -> list[Task]:
    """The quantized runs: by seed, arm and bit width."""
    found = []
    for seed in seeds:
        for arm in arms:
            epochs = _epochs(plan, longer) if arm.longer else plan.qat.epochs
            config = replace(plan.qat, seed=seed, epochs=epochs)
            for bits in plan.bits:
                place = bits_name((bits, bits)).lower()
                where = out / "runs" / arm.slug / place / f"seed{seed}"
                found.append(Task(arm, bits, seed, config, plan, where, _float_dir(out, seed)))
    return found


def _run_tasks(
    todo: Sequence[Task], label: str, jobs: int, overwrite: bool
) -> dict[Path, tuple[float, float]]:
    """(accuracy, loss) by directory; all are checked before the first is run."""
    todo = [replace(task, overwrite=overwrite) for task in todo]
    for task in todo:
        task.check()
    return {
        task.out: scores for task, scores in run_all(todo, _scores, label=label, processes=jobs)
    }


def time_factor(plan: Plan, source: Path, out: Path) -> float:
    """The plan's, or that of the directory's time.json, or measured now and written there."""
    if plan.time_factor is not None:
        return plan.time_factor
    shared = ("qat", "method", "first_last_bits")
    settings = {name: value for name, value in asdict(plan).items() if name in shared}
    file = out / TIME
    if file.exists():
        kept = read_json(file)
        if isinstance(kept, dict) and to_json(kept.get("settings")) == to_json(settings):
            return float(kept["time_factor"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the runs have
    try:
        factor = measured(plan, source)
    finally:
        torch.set_num_threads(threads)
    write_atomic(file, to_json({"settings": settings, "time_factor": factor}))
    return factor


def measured(plan: Plan, source: Path, rounds: int = 40) -> float:
    """Median time of a step of mode prefix over that of plain QAT, taking turns."""
    data = load_dataset(plan.qat.dataset, plan.qat.data_options)
    candidates: dict[str, tuple[torch.nn.Module, Recipe]] = {}
    for arm in (PLAIN, PREFIX):
        recipe = Task(arm, plan.bits[0], 0, plan.qat, plan, source, source).recipe()
        recipe.bind(plan.qat, data)
        model = recipe.setup(new_model(plan.qat, data))
        recipe.initialize(model, data, plan.qat)
        candidates[arm.name] = model, recipe
    with Track(rounds, "time of a step") as track:
        seconds = median_step_seconds(candidates, data, plan.qat, rounds=rounds, track=track)
    return round(seconds[PREFIX.name] / seconds[PLAIN.name], 2)
