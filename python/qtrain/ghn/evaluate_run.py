"""``qtrain ghn-eval``: a checkpoint on networks of its space, in a run directory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..data import Dataset, load_dataset
from ..progress import Track
from ..recipe import require
from ..report import REPORT, RESULTS, markdown_grid, reading_results
from ..rundir import METRICS, MODEL, RunDir, file_digest, load_model_file, to_json, write_atomic
from ..study import run_all
from .evaluate import EvalPlan, Ground, NetScore, score_net
from .evaluate_report import HISTOGRAMS, notes, plot_histograms, table
from .model import Ghn
from .prediction import PUBLIC_SUFFIXES, as_ghn
from .space import Net, draw_nets, read_nets, space_named

# of each split, unless the caller says how many
NETS = 50


@dataclass(frozen=True)
class GhnSource:
    """A trained GHN, and what it was trained for.

    Attributes:
        digest: names the file in a run's config; its path does not, for a run may be moved.
        space: that it was trained on; "digits" if the file does not say.
    """

    path: Path
    digest: str
    dataset: str
    data_options: Mapping[str, Any] = field(default_factory=dict)
    space: str = "digits"

    @classmethod
    def load(
        cls, path: str | Path, *, dataset: str | None = None, space: str | None = None
    ) -> GhnSource:
        """Read what a checkpoint says of itself.

        Args:
            dataset, space: instead of its own.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a damaged file; one that does not say its dataset.
        """
        path = Path(path)
        meta: Mapping[str, Any] = {}
        if path.suffix not in PUBLIC_SUFFIXES:
            meta = load_model_file(path)[1]
        train = meta.get("train", {})
        named = dataset or train.get("dataset")
        if named is None:
            raise ValueError(
                f"checkpoint: {path} must say its dataset, got a file that does not; name it with "
                "--dataset"
            )
        own = named == train.get("dataset")
        options = train.get("data_options", {}) if own else {}
        known = meta.get("recipe", {}).get("training", {}).get("space", "digits")
        return cls(path, ghn_digest(path), named, options, space or known)


@dataclass(frozen=True)
class Nets:
    """Networks to evaluate.

    Attributes:
        described: where they are from, JSON-able.
    """

    nets: tuple[Net, ...]
    described: Mapping[str, Any]


def ghn_digest(path: Path) -> str:
    return file_digest(path / MODEL if path.is_dir() else path)


def drawn(
    space: str,
    splits: Sequence[str] | None = None,
    *,
    count: int | None = None,
    seed: int = 1,
    quiet: bool = False,
) -> Nets:
    """``count`` (None: 50) networks of each split of a space.

    Args:
        splits: None: all that the space has, but for train.

    Raises:
        ValueError: no such space, or split in it; ``count`` below 1.
    """
    known = space_named(space).splits
    splits = [split for split in known if split != "train"] if splits is None else list(splits)
    _check_splits(splits, known, space)
    count = NETS if count is None else count
    require(count >= 1, "nets", "at least 1", count, "ghn-eval")
    nets = [net for split in splits for net in draw_nets(space, split, seed, count, quiet=quiet)]
    return Nets(tuple(nets), {"space": space, "splits": splits, "count": count, "seed": seed})


def from_file(
    path: str | Path, splits: Sequence[str] | None = None, *, count: int | None = None
) -> Nets:
    """The networks of a file of `qtrain ghn-space`.

    Args:
        splits: only these; None: all.
        count: the first so many of each split; None: all.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is no network (it is named); a split that the file does not have;
            ``count`` below 1.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"ghn-eval: space file must be a file of ghn-space, got no {path}")
    require(count is None or count >= 1, "nets", "at least 1", count, "ghn-eval")
    by_split: dict[str, list[Net]] = {}
    for net in read_nets(path):
        by_split.setdefault(net.split, []).append(net)
    chosen = list(by_split) if splits is None else list(splits)
    _check_splits(chosen, by_split, str(path))
    nets = [net for split in chosen for net in by_split[split][:count]]
    described = {"file": file_digest(Path(path)), "splits": chosen, "count": count}
    return Nets(tuple(nets), described)


def _check_splits(splits: Sequence[str], known: Iterable[str], where: str) -> None:
    for split in splits:
        require(split in known, "split", f"one of {', '.join(known)} in {where}", split, "ghn-eval")
    require(len(set(splits)) == len(splits), "split", "each once", ", ".join(splits), "ghn-eval")


def _check_sizes(nets: Sequence[Net], data: Dataset) -> None:
    """Raises: ValueError if a kind of network cannot be built for images of this size."""
    with torch.device("meta"):
        for net in {type(net.spec): net for net in nets}.values():
            net.build(data.channels, data.classes, data.size)


@dataclass(frozen=True)
class Job:
    """A network to evaluate, with all that a process of its own needs for it."""

    number: int
    net: Net
    source: str
    dataset: str
    data_options: str  # as JSON
    plan: EvalPlan


@lru_cache(maxsize=1)
def _read(source: str, dataset: str, data_options: str, plan: EvalPlan) -> tuple[Ghn, Ground]:
    """Once in a process, for all of its networks."""
    data = load_dataset(dataset, json.loads(data_options))
    return as_ghn(source), Ground.of(data, plan)


def _work(job: Job) -> list[NetScore]:
    ghn, ground = _read(job.source, job.dataset, job.data_options, job.plan)
    return score_net(ghn, job.net, ground, job.plan)


def run_evaluation(
    source: GhnSource,
    nets: Nets,
    out: str | Path,
    plan: EvalPlan | None = None,
    *,
    jobs: int = 1,
    overwrite: bool = False,
    cpu: bool = False,
    quiet: bool = False,
) -> list[NetScore]:
    """Evaluate a GHN on networks, and leave config, metrics, results, picture and report in
    ``out``.

    A call that was stopped goes on with the networks that are missing; a finished one is read back.
    On the CPU each network has one thread, so that the scores do not depend on ``jobs``.

    Args:
        jobs: networks at a time, in processes of their own on the CPU; 1: in this one.
        cpu: stay on the CPU.
        quiet: show no progress.

    Raises:
        ValueError: ``out`` holds another config; a damaged checkpoint; bits that the GHN does not
            know; not so many training images.
    """
    plan = plan or EvalPlan()
    require(jobs >= 1, "jobs", "at least 1", jobs, "ghn-eval")
    device = "cuda" if torch.cuda.is_available() and not cpu and jobs == 1 else "cpu"
    # all that can be refused is refused here, before anything is written
    data = load_dataset(source.dataset, source.data_options).to(torch.device(device))
    ghn, ground = as_ghn(source.path).to(device), Ground.of(data, plan)
    plan.check(ghn)
    _check_sizes(nets.nets, data)
    described = {
        "recipe": {"name": "ghn-eval", "source": source.digest, **plan.describe()},
        "nets": nets.described,
        "dataset": source.dataset,
        "data_options": source.data_options,
    }
    run = RunDir(out, described, overwrite=overwrite)
    if run.file(RESULTS).exists() and not overwrite:
        return read_scores(run.path)
    run.create()
    done = _finished(run)
    options = json.dumps(dict(source.data_options), sort_keys=True)
    given = str(source.path), source.dataset, options, plan
    todo = [Job(n, net, *given) for n, net in enumerate(nets.nets) if n not in done]
    for job, scores in _here(todo, ghn, ground, quiet) if jobs == 1 else _elsewhere(todo, jobs):
        done[job.number] = scores
        run.append({"net": job.number, "scores": [asdict(score) for score in scores]})
    found = [score for number in sorted(done) for score in done[number]]
    _write(run, source, ghn, ground, plan, found)
    return found


def read_scores(path: str | Path) -> list[NetScore]:
    """The scores of a finished run. Raises: FileNotFoundError, ValueError: none there."""
    with reading_results("ghn-eval", Path(path) / RESULTS) as results:
        return [NetScore(**score) for score in results["scores"]]


def _finished(run: RunDir) -> dict[int, list[NetScore]]:
    """The networks that a stopped run had done. A line that was cut off goes."""
    records = run.metrics()
    lines = [json.dumps(record).encode() + b"\n" for record in records]
    write_atomic(run.file(METRICS), b"".join(lines))
    return {r["net"]: [NetScore(**score) for score in r["scores"]] for r in records}


Done = Iterator[tuple[Job, list[NetScore]]]


def _elsewhere(todo: Sequence[Job], jobs: int) -> Done:
    return run_all(todo, _work, label="networks", processes=max(1, min(jobs, len(todo))))


def _here(todo: Sequence[Job], ghn: Ghn, ground: Ground, quiet: bool) -> Done:
    # cuDNN's autotuner may choose another algorithm the next time, and with it other bits
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes of `run_all`
    try:
        with Track(len(todo), "networks", quiet=quiet) as track:
            for job in todo:
                yield job, score_net(ghn, job.net, ground, job.plan)
                track.advance(note=f"{job.net.split} {job.net.index}")
    finally:
        torch.set_num_threads(before)


def _write(
    run: RunDir, source: GhnSource, ghn: Ghn, ground: Ground, plan: EvalPlan, scores: list[NetScore]
) -> None:
    """accuracy.png, report.md and, last, results.json."""
    plot_histograms(run.file(HISTOGRAMS), scores)
    origin = ", ".join(f"{k} {v}" for k, v in run.config["nets"].items() if k != "splits")
    about = notes(ghn, ground, plan, scores)
    text = f"""# {run.path.name}: networks with predicted weights on {source.dataset}

Test accuracy in % over the networks of a split. Nothing of them was trained.

{markdown_grid(*table(scores), left=3)}
{"".join(f"- {line}{chr(10)}" for line in about)}- Networks: {origin}. GHN: {source.digest}.

![histograms of accuracy]({HISTOGRAMS})

Settings: config.json. Each network: metrics.jsonl, results.json.
"""
    write_atomic(run.file(REPORT), text.encode())
    write_atomic(run.file(RESULTS), to_json({"scores": [asdict(score) for score in scores]}))
