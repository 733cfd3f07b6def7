"""`basin`: is PTQ enough for a model, or is QAT needed? The report, and its run directory."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .again import again, apart, flat, option_words
from .basin_measure import BasinConfig, Ground, measure
from .basin_pictures import draw
from .basin_report import report_text, table_rows
from .basin_result import BasinReport
from .basin_train import Batches, LoaderBatches, SplitBatches, as_pair, require_whole, take
from .data import Batch, Dataset, load_dataset
from .flatness import sample_batches
from .hessian import CrossEntropy, Loss, Objective, cross_entropy, standing_still
from .loop import evaluate
from .ptq import calibration_images
from .recipe import TrainConfig, new_model, require
from .report import REPORT, RESULTS, reading_results, row_dicts
from .rundir import RunDir, to_json, write_atomic
from .seeds import keeping_globals
from .source import FloatSource

# batches of the loader that are looked at, and that AdaRound learns from, unless others are given
EVALUATION, CALIBRATION = 4, 8
# options of the command, and the settings that they give
OPTIONS = {
    "bits": "bits",
    "steps": "schedule.steps",
    "lr": "schedule.lr",
    "optimizer": "schedule.optimizer",
    "batch-size": "batch_size",
    "grid": "grid",
    "first-last-bits": "first_last_bits",
    "batchnorm": "schedule.batchnorm",
    "reestimate-batchnorm": "reestimate_batchnorm",
    "adaround-iterations": "adaround.iterations",
    "evaluation-images": "evaluation_images",
    "calibration-images": "calibration_images",
    "eps-relative": "eps_relative",
    "eps-absolute": "eps_absolute",
    "record-every": "schedule.record_every",
    "slice-points": "slice_points",
    "seed": "seed",
}


def basin(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    bits: Sequence[int] | None = None,
    steps: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    config: BasinConfig | None = None,
    loss: Loss = cross_entropy,
    evaluation: Iterable[Any] | None = None,
    calibration: Iterable[Any] | None = None,
    test: Iterable[Any] | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> BasinReport:
    """Quantize the weights of a model after training and by training, and tell whether each way
    stays in the basin of the float model; see `qtrain.basin_probe` for what is measured.

    Li, Ma, Cui, arXiv 2606.09012. PTQ: rounding to nearest with min-max and with MSE ranges, and
    AdaRound. QAT: on the grid of AdaRound, its scales frozen. Control: the same number of steps on
    the same batches in float, then PTQ.

    Args:
        model: float, on any device; not changed. What requires grad in it is trained.
        loader: training batches (x, y), a DataLoader say; iterated several times. Shuffling and
            augmentation that draw from the global generators are the same in every run.
        bits: of the weights; None: 4, 3, 2.
        steps, lr: of QAT and of the control; None: the config's.
        seed: names all randomness.
        config: the rest of the settings.
        loss: of (model, (x, y)): the mean over the batch's examples, of training and of f.
        evaluation: batches that f is the mean over; None: the first 4 of the loader.
        calibration: batches that AdaRound learns from; None: the first 8 of the loader.
        test: batches for a test loss and, if ``loss`` is a `CrossEntropy`, an accuracy; None: none.
        out: run directory; None: nothing is written. A run that was killed goes on, to the same
            bits; a finished one is read back. It knows the state of the model, the evaluation, the
            calibration and the test set by their bytes, and ``loss`` by its qualified name (a
            `CrossEntropy` with its settings too). That the loader is the same is up to you, as is
            what a function of that name computes, and what the model's state does not tell:
            dropout, say, and which parameters require grad.
        overwrite: start afresh.
        quiet: no progress.

    Raises:
        TypeError: a loader that can be iterated only once, or does not yield pairs of tensors; a
            setting that must be a whole number and is not.
        ValueError: a setting out of its range; no batches; a model without a quantizable layer, or
            a quantized one, or one of which nothing requires grad; ``out`` holds another run, or a
            damaged one.
        FloatingPointError: a training loss is no longer finite.
    """
    settings = _changed(config or BasinConfig(), bits=bits, steps=steps, lr=lr, seed=seed)
    first = next(model.parameters(), None)
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    require(trained > 0, "model", "one with parameters that require grad", "none", "basin")
    device = torch.device("cpu") if first is None else first.device
    batches = LoaderBatches(loader, settings.seed, device)
    with keeping_globals():
        looked = _batches("evaluation", evaluation, batches, EVALUATION, device)
        learned = _batches("calibration", calibration, batches, CALIBRATION, device)
        held = None if test is None else [as_pair(batch, device) for batch in test]
    still = copy.deepcopy(model).eval()
    tested = None if held is None else _tester(loss, held)
    ground = Ground(still, batches, looked, learned, loss, tested)
    names = {
        "model": digest(model.state_dict().values()),
        "evaluation": digest(sum(looked, ())),
        "calibration": digest(sum(learned, ())),
        "test": None if held is None else digest(sum(held, ())),
        "loss": loss_name(loss),
    }
    described = {"recipe": {"name": "basin", **asdict(settings), **names}}
    return _report(ground, settings, described, out, overwrite, quiet, "`qtrain.basin(..)`")


def _changed(config: BasinConfig, **given: Any) -> BasinConfig:
    """The config with what is not None in place of its own."""
    asked = {key: value for key, value in given.items() if value is not None}
    own = {key: asked.pop(key) for key in ("bits", "seed") if key in asked}
    return replace(config, **own, schedule=replace(config.schedule, **asked))


def _batches(
    name: str, given: Iterable[Any] | None, batches: Batches, count: int, device: torch.device
) -> Sequence[Batch]:
    if given is not None:
        found: Sequence[Batch] = [as_pair(batch, device) for batch in given]
    else:
        found = take(batches.epoch(0, 0), count)
    named = name if given is not None else "loader"
    require(len(found) > 0, named, "one of at least one batch", "none", "basin")
    return found


def _tester(loss: Loss, batches: Sequence[Batch]) -> Callable[[nn.Module], Any]:
    require(len(batches) > 0, "test", "one of at least one batch", "none", "basin")
    return lambda model: Objective(model, batches, loss).scores()


def digest(tensors: Iterable[Tensor]) -> str:
    """First 16 hex digits of the SHA-256 of all bytes: names a model or a data set in a config."""
    total = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().flatten().contiguous()
        total.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(flat.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def loss_name(loss: Loss) -> str:
    """Names a loss in a config: the qualified name of a function, or of an object's class (a
    `CrossEntropy` as it is written)."""
    if isinstance(loss, CrossEntropy):
        return f"{type(loss).__module__}.{loss!r}"
    named = loss if hasattr(loss, "__qualname__") else type(loss)
    return f"{named.__module__}.{named.__qualname__}"


@dataclass(frozen=True)
class BasinData:
    """What of a dataset of ours is looked at, and how it is trained on.

    Attributes:
        evaluation_images: random training images that f is the mean over.
        calibration_images: random training images that AdaRound learns from.
        batch_size: of training.

    Raises:
        TypeError, ValueError: one that is no whole number, or below 1.
    """

    evaluation_images: int = 256
    calibration_images: int = 512
    batch_size: int = 64

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            require_whole(name, value, 1)


def run_basin(
    source: FloatSource,
    out: str | Path,
    config: BasinConfig | None = None,
    images: BasinData | None = None,
    *,
    overwrite: bool = False,
    data: Dataset | None = None,
    cpu: bool = False,
    quiet: bool = False,
) -> BasinReport:
    """`basin` for a checkpoint and a dataset of ours, with the whole test split as test set.

    Args:
        data: the dataset, if it is loaded already; the model goes to its device.
        cpu: stay on the CPU.

    Raises:
        ValueError: as `basin`; more images than there are.
    """
    config, images = config or BasinConfig(), images or BasinData()
    train = TrainConfig(**source.settings(), batch_size=images.batch_size, seed=config.seed)
    if data is None:
        device = "cuda" if torch.cuda.is_available() and not cpu else "cpu"
        data = load_dataset(train.dataset, train.data_options).to(torch.device(device))
    looked = sample_batches(
        data,
        "train",
        images.evaluation_images,
        seed=config.seed,
        batch_size=images.evaluation_images,
    )
    learned = calibration_images(data, train, images.calibration_images)
    model = source.fill(new_model(train, data)).eval().to(looked[0][0].device)

    def tested(model: nn.Module) -> tuple[float, float]:
        scores = evaluate(model, data.test)
        return scores["test_loss"], scores["test_accuracy"]

    batches = SplitBatches(data.train, images.batch_size, config.seed)
    loss = CrossEntropy(source.label_smoothing)
    ground = Ground(model, batches, looked, learned, loss, tested)
    described = describe(source, config, images)
    command = command_of(source, config, images, out, cpu=cpu)
    return _report(ground, config, described, out, overwrite, quiet, command)


def describe(source: FloatSource, config: BasinConfig, images: BasinData) -> dict[str, Any]:
    """The config of such a run's directory."""
    recipe = {"name": "basin", **asdict(config), **asdict(images), "source": source.digest}
    return {"train": source.settings(), "recipe": recipe}


def command_of(
    source: FloatSource,
    config: BasinConfig,
    images: BasinData,
    out: str | Path,
    *,
    cpu: bool = False,
) -> str:
    """The command that makes the run again, and what it has no option for."""
    settings = flat({**asdict(config), **asdict(images)})
    settings["first_last_bits"] = config.first_last_bits or 0
    default = flat({**asdict(BasinConfig()), **asdict(BasinData())})
    reached = {**default, **{name: settings[name] for name in OPTIONS.values()}}
    where = "CHECKPOINT" if source.path is None else str(source.path)
    named = ["--dataset", source.dataset, "--model", source.model]
    words = ["qtrain", "basin", where, *named, *option_words(OPTIONS, settings)]
    words += ["--out", str(out), *(["--cpu"] if cpu else [])]
    return again(words, apart(settings, reached))


def _report(
    ground: Ground,
    config: BasinConfig,
    described: Mapping[str, Any],
    out: str | Path | None,
    overwrite: bool,
    quiet: bool,
    command: str,
) -> BasinReport:
    """The figures: read back, or measured and written."""
    run = None if out is None else RunDir(out, described, overwrite=overwrite)
    if run is not None and run.file(RESULTS).exists() and not overwrite:
        report = read_report(run.file(RESULTS))
    else:
        with standing_still(ground.model):
            report = measure(ground, config, run, quiet=quiet)
    if run is not None:
        write_report(run, report, command)
    return report


def read_report(path: Path) -> BasinReport:
    """Raises: ValueError naming the file if it does not hold a finished basin report."""
    with reading_results("basin", path) as results:
        return BasinReport.from_dict(results["basin"])


def write_report(run: RunDir, report: BasinReport, command: str) -> None:
    """Pictures, report.md and, last, results.json."""
    pictures = draw(report, run.path)
    text = report_text(run.path.name, run.config["recipe"], report, pictures, command)
    write_atomic(run.file(REPORT), text.encode())
    results = {"rows": row_dicts(table_rows(report)), "basin": report.to_dict()}
    write_atomic(run.file(RESULTS), to_json(results))
