"""PTQ of a checkpoint: run directories with the quantized model, its scores and a report."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qkernels.nn import QConfig, fold_batchnorm, prepare

from .data import Batch, Dataset, load_dataset
from .loop import TrainResult, evaluate
from .progress import Track
from .ptq import Rounding, Within, as_rounding, calibration_images, quantize, row_name
from .recipe import TrainConfig, new_model
from .report import (
    ACCURACY,
    REPORT,
    RESULTS,
    Row,
    bits_name,
    markdown_table,
    plot_accuracy,
    read_rows,
    row_dicts,
    write_run_report,
)
from .rundir import MODEL, RunDir, to_json, write_atomic
from .source import FloatSource

# of the calibration set, unless there are fewer training images
IMAGES = 512


@dataclass(frozen=True)
class PtqOptions:
    """How a checkpoint is quantized, besides the QConfig.

    Attributes:
        calibration_images: random training images for the ranges of activations, and for AdaRound;
            None: 512, or all if there are fewer.
        batch_size: of these images: a range by percentile or mse is the mean over the batches.
        seed: names the images, and AdaRound's minibatches.
        fold: fold BatchNorm into the layers first.
        rounding: "nearest", "adaround", or AdaRound's settings.

    Raises:
        ValueError: unknown rounding.
    """

    calibration_images: int | None = None
    batch_size: int = 64
    seed: int = 0
    fold: bool = True
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        as_rounding(self.rounding)

    def describe(self) -> dict[str, Any]:
        """What of it decides the result, save the number of images; JSON-able."""
        settings = as_rounding(self.rounding)
        rounding = "nearest" if settings is None else {"adaround": asdict(settings)}
        return {"fold_batchnorm": self.fold, "rounding": rounding}


class Job:
    """A checkpoint that is ready to be quantized: all that can be refused has been.

    Args:
        data: the dataset, if it is loaded already; the model goes to its device.
        cpu: stay on the CPU.

    Raises:
        ValueError: more calibration images than there are; weights of another model; a model that
            cannot be folded.
    """

    def __init__(
        self, source: FloatSource, options: PtqOptions, *, data: Dataset | None, cpu: bool
    ) -> None:
        self.source, self.options = source, options
        settings = source.settings()
        self.config = TrainConfig(**settings, batch_size=options.batch_size, seed=options.seed)
        if data is None:
            device = "cuda" if torch.cuda.is_available() and not cpu else "cpu"
            data = load_dataset(self.config.dataset, self.config.data_options)
            data = data.to(torch.device(device))
        self.data = data
        asked = options.calibration_images
        self.images = min(IMAGES, len(data.train)) if asked is None else asked
        self.model: nn.Module = source.fill(new_model(self.config, data)).eval()
        self.batches: list[Batch] = calibration_images(data, self.config, self.images)
        self.model.to(self.batches[0][0].device)
        self.base = fold_batchnorm(self.model) if options.fold else self.model
        # cuDNN's autotuner may choose another algorithm the next time, and with it other bits
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True

    def describe(self, **more: Any) -> dict[str, Any]:
        """The config of a run directory."""
        recipe = {"name": "ptq", "source": self.source.digest, **self.options.describe(), **more}
        recipe["calibration_images"] = self.images
        return {"train": asdict(self.config), "recipe": recipe}

    def float_scores(self) -> dict[str, float]:
        scores = evaluate(self.model, self.data.test)
        names = {"test_loss": "float_loss", "test_accuracy": "float_accuracy"}
        return {names[key]: value for key, value in scores.items()}

    def run(
        self, qconfig: QConfig, run: RunDir, before: dict[str, float], track: Track | None
    ) -> TrainResult:
        """Quantize, evaluate, and write the run directory."""
        options = self.options
        model, rounded = quantize(
            self.base,
            qconfig,
            self.batches,
            fold=False,
            rounding=options.rounding,
            seed=options.seed,
            track=track,
        )
        after = evaluate(model, self.data.test)
        run.create()
        # nothing here is worth a checkpoint: a second call does the work again, to the same bits
        run.load_checkpoint()
        for layer in rounded:
            run.append(layer._asdict())
        run.append({"step": 0, "epoch": 0, **after, **before})
        run.save_model(model.state_dict(), run.config)
        return TrainResult(model, self.data, run, steps=0, **after)


def run_ptq(
    source: FloatSource,
    qconfig: QConfig,
    out: str | Path,
    options: PtqOptions | None = None,
    *,
    overwrite: bool = False,
    data: Dataset | None = None,
    cpu: bool = False,
    track: Track | None = None,
) -> TrainResult:
    """Quantize a checkpoint, evaluate it, and leave a run directory.

    Args:
        options: None: `PtqOptions()`.
        data: the dataset, if it is loaded already; the model goes to its device.
        cpu: stay on the CPU.
        track: a progress bar for AdaRound; None: one of its own.

    Raises:
        ValueError: ``out`` holds another config; the model cannot be folded or quantized; more
            calibration images than there are.
    """
    job = Job(source, options or PtqOptions(), data=data, cpu=cpu)
    run = RunDir(out, job.describe(qconfig=qconfig.to_dict()), overwrite=overwrite)
    return job.run(qconfig, run, job.float_scores(), track)


def run_ptq_widths(
    source: FloatSource,
    qconfigs: Sequence[QConfig],
    out: str | Path,
    options: PtqOptions | None = None,
    *,
    overwrite: bool = False,
    data: Dataset | None = None,
    cpu: bool = False,
    track: Track | None = None,
) -> list[Row]:
    """`run_ptq` for several bit widths, each with a run directory in ``out``; one report of all.

    A call that was stopped goes on with the width it was at; a finished one is read back.

    Args:
        qconfigs: of different bits, for weights and activations.
        track: a progress bar to advance by 1 for each width; None: one of our own.

    Returns:
        The rows: the float model, then one for each config.

    Raises:
        ValueError: as `run_ptq`; two configs of the same bits.
    """
    pairs = [_bits(qconfig) for qconfig in qconfigs]
    if not pairs or len(set(pairs)) < len(pairs):
        raise ValueError(f"ptq: qconfigs must be some, of different bits, got {pairs}")
    job = Job(source, options or PtqOptions(), data=data, cpu=cpu)
    described = job.describe(qconfigs=[qconfig.to_dict() for qconfig in qconfigs])
    run = RunDir(out, described, overwrite=overwrite)
    if run.file(RESULTS).exists() and not overwrite:
        return read_rows(run.path)
    for qconfig in qconfigs:
        prepare(job.base, qconfig)  # refuses here, before anything is written
    before = job.float_scores()
    run.create()
    rows = [Row("float", None, before["float_accuracy"], before["float_loss"])]
    ours = Track(len(pairs), "PTQ")
    with ours if track is None else nullcontext(track) as bar:
        for qconfig, (weight, activation) in zip(qconfigs, pairs, strict=True):
            bar.relabel(f"PTQ {bits_name((weight, activation))}")
            inner = run.file(f"ptq_w{weight}a{activation}")
            rows.append(_row_of(job, qconfig, inner, before, Within(bar)))
            bar.advance()
    _write_report(job, run, rows)
    return rows


def _bits(qconfig: QConfig) -> tuple[int, int]:
    """Of weights and activations; 32 where a side stays float."""
    weight, activation = (s.bits if s else 32 for s in (qconfig.weight, qconfig.activation))
    return weight, activation


def _row_of(job: Job, qconfig: QConfig, out: Path, before: dict[str, float], track: Track) -> Row:
    """Of a run that is there already, or of one made now."""
    run = RunDir(out, job.describe(qconfig=qconfig.to_dict()))
    # the model is what a run writes last
    if not run.file(MODEL).exists():
        job.run(qconfig, run, before, track)
    write_run_report(out)
    (row,) = read_rows(out)
    name = row_name(qconfig, fold=job.options.fold, rounding=job.options.rounding)
    return replace(row, method=name)


def _write_report(job: Job, run: RunDir, rows: list[Row]) -> None:
    """accuracy.png, report.md and, last, results.json."""
    plot_accuracy(run.file(ACCURACY), rows)
    data, options = job.data, job.options
    settings = as_rounding(options.rounding)
    learned = "to nearest"
    if settings is not None:
        learned = f"by AdaRound, {settings.iterations} iterations a layer"
    folded = "folded into the layers" if options.fold else "not folded"
    text = f"""# {run.path.name}: PTQ of {job.config.model} on {data.name}

{markdown_table(rows)}
- WnAm: weights of n bits (symmetric, per channel), layer inputs of m bits (affine, per tensor).
  Biases stay float. BatchNorm: {folded}. Weights are rounded {learned}.
- Calibrated on {job.images} training images, seed {options.seed}.
- One test picture is {100 / len(data.test):.2f} points.

![accuracy]({ACCURACY})

Each width is a run directory of its own beside this file. Settings: config.json.
"""
    write_atomic(run.file(REPORT), text.encode())
    write_atomic(run.file(RESULTS), to_json({"rows": row_dicts(rows)}))
