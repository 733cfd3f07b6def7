"""``qtrain basin-study``: float training and a basin report for each seed, and what they say
together.

The experiment of Li, Ma, Cui, arXiv 2606.09012, at our size. There QAT and its control leave float
training before its end (at epoch 180 of 200); here both go on from the trained model, as a user
would.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .adaround import AdaRound
from .again import again, apart, flat, option_words, set_words
from .basin_measure import BasinConfig
from .basin_result import BasinReport
from .basin_run import BasinData, describe, run_basin
from .basin_study_report import write_study
from .basin_train import Schedule
from .data import load_dataset
from .loop import train
from .progress import Track
from .recipe import Recipe, TrainConfig, require
from .rundir import MODEL, RunDir
from .source import FloatSource
from .study import run_all

# the paper's recipe, for less data: batch 64 and a rate of 0.05 for its 128 and 0.1
SHARED: dict[str, Any] = {
    "optimizer": "sgd",
    "momentum": 0.9,
    "weight_decay": 2e-4,
    "lr": 0.05,
    "batch_size": 64,
    "eval_every": 5,
    "model_options": {"width": 8},
}
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {"model": "resnet20", "epochs": 20},
    "shapes": {
        "model": "resnet20",
        "epochs": 20,
        "data_options": {"difficulty": 0.7, "train_size": 2560},
    },
}
# fewer iterations, looks and places than by default, so that a seed takes minutes
CONFIG = BasinConfig(
    schedule=Schedule(record_every=20),
    adaround=AdaRound(iterations=300),
    profile_points=11,
    slice_points=9,
)
# options of the command, and the settings of `BasinConfig` that they give
OPTIONS = {
    "bits": "bits",
    "steps": "schedule.steps",
    "lr": "schedule.lr",
    "grid": "grid",
    "batchnorm": "schedule.batchnorm",
    "adaround-iterations": "adaround.iterations",
}


@dataclass(frozen=True)
class Job:
    """A seed: what is trained, and how it is looked at."""

    seed: int
    train: TrainConfig
    config: BasinConfig
    images: BasinData
    out: Path
    overwrite: bool = False


def settings_for(dataset: str, **changed: Any) -> TrainConfig:
    """The float training of a preset.

    Args:
        dataset: "digits" or "shapes".
        changed: fields of ``TrainConfig``; another model starts without the preset's options.

    Raises:
        ValueError: no such preset; a bad setting.
    """
    known = ", ".join(PRESETS)
    require(dataset in PRESETS, "dataset", f"one of {known}", repr(dataset), "basin-study")
    settings = {**SHARED, "dataset": dataset, **PRESETS[dataset]}
    if changed.get("model", settings["model"]) != settings["model"]:
        del settings["model_options"]
    for name in ("model_options", "data_options"):
        if name in changed:
            changed[name] = {**settings.get(name, {}), **changed[name]}
    return TrainConfig(**{**settings, **changed})


def run_study(
    base: TrainConfig,
    out: str | Path,
    config: BasinConfig = CONFIG,
    images: BasinData | None = None,
    *,
    seeds: Iterable[int] = range(5),
    jobs: int = 2,
    overwrite: bool = False,
) -> dict[int, BasinReport]:
    """Run what is not yet there, and write the tables.

    Args:
        base: of the float training; its seed, and that of ``config``, are replaced.
        jobs: seeds at a time, each in a process of its own with one thread.
        overwrite: make the runs afresh.

    Returns:
        The reports by seed.

    Raises:
        ValueError: bad settings; ``out`` holds runs with other settings.
    """
    out, images = Path(out), images or BasinData()
    todo = [
        Job(
            seed,
            replace(base, seed=seed),
            replace(config, seed=seed),
            replace(images, batch_size=base.batch_size),
            out / f"seed{seed}",
            overwrite,
        )
        for seed in sorted(set(seeds))
    ]
    require(bool(todo), "seeds", "at least one", "none", "basin-study")
    _check(todo)
    label = f"basin-study {base.dataset}"
    found = {job.seed: report for job, report in run_all(todo, _run, label=label, processes=jobs)}
    reports = {seed: found[seed] for seed in sorted(found)}
    write_study(base, config, reports, out, command_of(base, config, images, list(reports)))
    return reports


def _check(todo: Sequence[Job]) -> None:
    """Raise what a run would raise at its start, before the first is made. Where the float model is
    not there yet, a report that is there is looked at when its turn comes: it starts from the
    model's bytes."""
    train_set = load_dataset(todo[0].train.dataset, todo[0].train.data_options).train
    have, images = len(train_set), todo[0].images
    for name in ("evaluation_images", "calibration_images", "batch_size"):
        value = getattr(images, name)
        require(1 <= value <= have, name, f"in 1..{have}", value, "basin-study")
    for job in todo:
        described = {"train": asdict(job.train), "recipe": Recipe().describe()}
        trained = RunDir(job.out / "float", described, overwrite=job.overwrite)
        where = job.out / "basin"
        if job.overwrite:
            RunDir(where, {"recipe": {"name": "basin"}}, overwrite=True)
        elif trained.file(MODEL).exists():
            RunDir(where, describe(FloatSource.load(trained.path), job.config, job.images))


def _run(job: Job) -> BasinReport:
    silent = Track(0, "", quiet=True)
    where = job.out / "float"
    train(job.train, Recipe(), where, overwrite=job.overwrite, cpu=True, track=silent)
    how: dict[str, Any] = {"overwrite": job.overwrite, "cpu": True, "quiet": True}
    return run_basin(FloatSource.load(where), job.out / "basin", job.config, job.images, **how)


def command_of(
    base: TrainConfig, config: BasinConfig, images: BasinData, seeds: Sequence[int]
) -> str:
    """The command that makes the study again, and what it has no option for."""
    # without a preset for the dataset there is no command: another's, and the dataset is missing
    preset = base.dataset if base.dataset in PRESETS else next(iter(PRESETS))
    start = flat(asdict(settings_for(preset, epochs=base.epochs, model=base.model)))
    wanted = {**flat(asdict(base)), "seed": start["seed"]}
    changed = {
        name: value
        for name, value in wanted.items()
        if name != "dataset" and value is not None and (name not in start or start[name] != value)
    }
    settings, default = flat(asdict(config)), flat(asdict(replace(CONFIG, seed=config.seed)))
    reached = {**default, **{name: settings[name] for name in OPTIONS.values()}}
    missing = apart(wanted, {**start, **changed}) + apart(settings, reached)
    missing += apart(asdict(images), asdict(BasinData(batch_size=images.batch_size)))
    if list(seeds) != list(range(len(seeds))):
        missing.append(f"the seeds {', '.join(map(str, seeds))} alone")
    words = ["qtrain", "basin-study", "--dataset", preset, "--seeds", str(max(seeds) + 1)]
    words += [*option_words(OPTIONS, settings), "--epochs", str(base.epochs), "--model", base.model]
    return again([*words, *set_words(changed)], missing)
