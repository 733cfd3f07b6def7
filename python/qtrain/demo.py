"""``qtrain demo``: a small CNN on real digits, quantized by every method, in one table."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .bwrf_config import BwrfConfig
from .bwrf_run import Bwrf
from .data import Dataset, batch_count, load_dataset
from .dnq import Dnq, DnqConfig
from .dnq_run import phases, settings_for
from .ghn.prediction_file import ModelToPredict, write_prediction
from .ghn.quantizers import Quantizer
from .ghn.run import run_ghn
from .ghn.run import settings_for as ghn_settings
from .loop import TrainResult, train
from .progress import Track
from .ptq import ptq_qconfig
from .ptq_run import PtqOptions, run_ptq
from .qat import Qat, qat_qconfig
from .recipe import Recipe, TrainConfig
from .report import (
    ACCURACY,
    CURVES,
    REPORT,
    RESULTS,
    Row,
    bits_name,
    markdown_table,
    plot_accuracy,
    plot_curves,
    read_rows,
    row_dicts,
)
from .rundir import METRICS, MODEL, RunDir, read_metrics, to_json, write_atomic
from .source import FloatSource
from .timing import WARM_UP, median_step_seconds

# breaks the symmetry of predicted channels
NOISE = 0.05
QAT_NAMES = {"minmax": "QAT min-max STE", "lsq": "QAT LSQ"}


@dataclass(frozen=True)
class DemoConfig:
    """What the demo runs; ``quick`` is the same in little, to see that all parts work."""

    float_run: TrainConfig
    qat_run: TrainConfig
    dnq_epochs: int = 40
    ghn_epochs: int = 6
    ghn_nets: int = 64
    ghn_meta_batch: int = 8
    ptq_bits: tuple[int, ...] = (8, 4, 2)
    qat_bits: tuple[int, ...] = (4, 2)
    timing_rounds: int = 200

    @classmethod
    def usual(cls, seed: int = 0) -> DemoConfig:
        # narrow and deep on purpose: a wide net of 4 layers is so much more than the digits need
        # that 2 bits hardly hurt it
        model = {"widths": [8, 8, 8, 16, 16, 16, 32, 32], "strides": [1, 1, 1, 2, 1, 1, 2, 1]}
        base = TrainConfig(dataset="digits", model="cnn", model_options=model, lr=5e-3, seed=seed)
        return cls(float_run=replace(base, epochs=20), qat_run=replace(base, epochs=40, lr=2e-2))

    @classmethod
    def quick(cls, seed: int = 0) -> DemoConfig:
        usual = cls.usual(seed)
        return cls(
            float_run=replace(usual.float_run, epochs=6),
            qat_run=replace(usual.qat_run, epochs=4),
            dnq_epochs=4,
            ghn_epochs=1,
            timing_rounds=10,
        )


def run_demo(
    config: DemoConfig, out: str | Path, *, overwrite: bool = False, cpu: bool = False
) -> list[Row]:
    """Run all stages, or go on with those that ``out`` has begun; write the report.

    Args:
        out: run directory; each stage is a run directory in it.
        overwrite: start afresh.
        cpu: stay on the CPU.

    Returns:
        The rows of the table.

    Raises:
        ValueError: ``out`` holds another config; a damaged checkpoint.
    """
    run = RunDir(out, {"demo": asdict(config)}, overwrite=overwrite)
    if run.file(RESULTS).exists() and not overwrite:
        return read_rows(run.path)
    data = load_dataset(config.float_run.dataset, config.float_run.data_options)
    run.create()
    with _one_thread(), Track(_work(config, data), "demo") as track:
        stages = list(Stages(config, run.path, cpu, track).all())
        seconds = _time_steps(config, stages, track)
        rows = [_row(stage, seconds) for stage in stages]
        write_report(config, run, rows, stages)
    return rows


@contextmanager
def _one_thread() -> Iterator[None]:
    """8x8 pictures leave no work for a second thread, and on a busy machine (or in a container
    that may use fewer cores than it sees) threads that wait for each other cost tenfold. The bits
    do not depend on the number of cores either."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Stage:
    """One run of the demo: its directory's name, and what the table calls it."""

    name: str
    title: str
    bits: int | None
    recipe: Recipe | None
    result: TrainResult


def _work(config: DemoConfig, data: Dataset) -> int:
    """Steps of all stages: what the progress bar counts."""
    per_epoch = batch_count(data.train, config.float_run.batch_size)
    # BWRF and the start from a GHN beside those of QAT_NAMES
    qat_epochs = len(config.qat_bits) * (len(QAT_NAMES) + 2) * config.qat_run.epochs
    others = len(config.qat_bits) * config.dnq_epochs + config.ghn_epochs
    training = per_epoch * (config.float_run.epochs + qat_epochs + others)
    ptq = len(config.ptq_bits) + len(config.qat_bits)
    return training + ptq + WARM_UP + config.timing_rounds


@dataclass(frozen=True)
class Stages:
    """The demo's runs, each in a directory of its own in ``out``."""

    config: DemoConfig
    out: Path
    cpu: bool
    track: Track

    def all(self) -> Iterator[Stage]:
        recipe = Recipe()
        trained = self._train("float", "float training", self.config.float_run, recipe)
        yield Stage("float", "float", None, recipe, trained)
        source = FloatSource.load(self.out / "float")
        for bits in self.config.ptq_bits:
            yield self._ptq(f"ptq_w{bits}a{bits}", "PTQ", bits, source)
        for bits in self.config.qat_bits:
            for method, title in QAT_NAMES.items():
                yield self._qat(f"qat_{method}_w{bits}a{bits}", title, bits, source, method)
        for bits in self.config.qat_bits:
            yield self._bwrf(bits, source)
        for bits in self.config.qat_bits:
            yield self._dnq(bits)
        yield from self._from_ghn()

    def _train(self, name: str, title: str, config: TrainConfig, recipe: Recipe) -> TrainResult:
        self.track.relabel(title)
        return train(config, recipe, self.out / name, cpu=self.cpu, track=self.track)

    def _ptq(self, name: str, title: str, bits: int, source: FloatSource) -> Stage:
        self.track.relabel(f"{title} {bits_name((bits, bits))}")
        how = PtqOptions(batch_size=self.config.qat_run.batch_size, seed=self.config.qat_run.seed)
        quantizer = ptq_qconfig("minmax", bits, bits)
        result = run_ptq(source, quantizer, self.out / name, how, cpu=self.cpu)
        self.track.advance()
        return Stage(name, title, bits, None, result)

    def _qat(self, name: str, title: str, bits: int, source: FloatSource, method: str) -> Stage:
        recipe = Qat(source, qat_qconfig(method, bits, bits))
        label = f"{title} {bits_name((bits, bits))}"
        return Stage(
            name, title, bits, recipe, self._train(name, label, self.config.qat_run, recipe)
        )

    def _bwrf(self, bits: int, source: FloatSource) -> Stage:
        name, recipe = (
            f"bwrf_w{bits}a{bits}",
            Bwrf(source, qat_qconfig("lsq", bits, bits), BwrfConfig()),
        )
        label = f"BWRF {bits_name((bits, bits))}"
        result = self._train(name, label, self.config.qat_run, recipe)
        return Stage(name, "BWRF LSQ", bits, None, result)

    def _dnq(self, bits: int) -> Stage:
        """Float training under the noise of this width, then PTQ."""
        config, epochs = self.config.float_run, self.config.dnq_epochs
        shape = {"model": config.model, "model_options": config.model_options}
        run = settings_for("digits", **shape, epochs=epochs, eval_every=epochs, seed=config.seed)
        recipe = Dnq(DnqConfig(weight_bits=bits, activation_bits=bits, **phases(epochs)))
        name = f"dnq_w{bits}a{bits}"
        self._train(f"{name}_float", f"DNQ {bits_name((bits, bits))}", run, recipe)
        return self._ptq(name, "DNQ, PTQ", bits, FloatSource.load(self.out / f"{name}_float"))

    def _from_ghn(self) -> Iterator[Stage]:
        """LSQ from weights that a GHN predicted, which has seen other networks of the width."""
        config, how = self.config.float_run, self.config
        bits = tuple(sorted(how.qat_bits))
        run, training = ghn_settings(
            "digits",
            train={"epochs": how.ghn_epochs, "eval_every": how.ghn_epochs, "seed": config.seed},
            ghn={"bit_widths": True},
            training={
                "quantizer": Quantizer("paper"),
                "bits": bits,
                "nets": how.ghn_nets,
                "meta_batch": how.ghn_meta_batch,
                "held_out": 2,
            },
        )
        self.track.relabel("GHN-QAT")
        run_ghn(run, training, self.out / "ghn", cpu=self.cpu, track=self.track)
        wanted = ModelToPredict(config.model, config.model_options, "digits")
        for width in how.qat_bits:
            name = f"ghn_w{width}a{width}"
            file = self.out / f"{name}_start.safetensors"
            options: dict[str, Any] = {"bits": width, "noise": NOISE, "seed": config.seed}
            write_prediction(
                wanted, file, self.out / "ghn", **options, overwrite=True, cpu=self.cpu
            )
            yield self._qat(name, "LSQ, GHN-QAT start", width, FloatSource.load(file), "lsq")


def _time_steps(config: DemoConfig, stages: list[Stage], track: Track) -> dict[str, float]:
    """Median seconds a step of the float and the QAT stages, which take turns."""
    track.relabel("timing the steps")
    candidates = {s.name: (s.result.model, s.recipe) for s in stages if s.recipe is not None}
    return median_step_seconds(
        candidates, stages[0].result.data, config.qat_run, rounds=config.timing_rounds, track=track
    )


def _row(stage: Stage, seconds: dict[str, float]) -> Row:
    taken = seconds.get(stage.name)
    return Row(
        stage.title,
        None if stage.bits is None else (stage.bits, stage.bits),
        stage.result.test_accuracy,
        stage.result.test_loss,
        taken,
        None if taken is None or stage.bits is None else taken / seconds["float"],
    )


def write_report(config: DemoConfig, run: RunDir, rows: list[Row], stages: list[Stage]) -> None:
    """report.md, the plots, the stages' metrics in one file, and, last, results.json."""
    curves, lines = {}, []
    for stage in stages:
        folder = stage.result.run.path
        records = read_metrics(folder / METRICS)
        lines += [json.dumps({"run": stage.name, **record}) + "\n" for record in records]
        if stage.recipe is not None:
            curves[stage.name] = records
        write_atomic(run.file(f"{stage.name}.safetensors"), (folder / MODEL).read_bytes())
    write_atomic(run.file(METRICS), "".join(lines).encode())
    plot_curves(run.file(CURVES), curves)
    plot_accuracy(run.file(ACCURACY), rows)
    text = _report_text(config, rows, stages[0].result.data)
    write_atomic(run.file(REPORT), text.encode())
    write_atomic(run.file(RESULTS), to_json({"rows": row_dicts(rows), "machine": machine()}))


def machine() -> dict[str, Any]:
    """What the timings depend on."""
    import qkernels

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "qkernels": qkernels.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def _report_text(config: DemoConfig, rows: list[Row], data: Dataset) -> str:
    one = 100 / len(data.test)
    about = ", ".join(f"{key} {value}" for key, value in machine().items())
    start, then = config.float_run, config.qat_run
    return f"""# qtrain demo: a small CNN on handwritten digits, quantized

{markdown_table(rows)}
- Data: {data.name}, {len(data.train)} pictures to train on and {len(data.test)} to test on; one
  test picture is {one:.1f} points of accuracy. One seed ({start.seed}); the last epoch's weights,
  none chosen by test score. The learning rates were chosen on seeds 1 to 3, by the same test
  pictures.
- The net is narrow and deep on purpose: one of 4 layers of 32 to 128 channels is so much more than
  these digits need that PTQ at W2A2 still gave 97.6 % (float 99.0 %).
- WnAm: n-bit weights (symmetric, per channel), m-bit layer inputs (affine, per tensor). First and
  last layer have 8 bits.
- PTQ: BatchNorm folded, min-max ranges from 8 batches, no training. QAT: {then.epochs} epochs from
  the float model ({start.epochs} epochs). Min-max STE takes the range of the weights at hand and a
  moving average of the inputs' range; LSQ learns its scales.
- BWRF: LSQ as above, beside mixed networks whose blocks are the float model's (docs/bwrf.md).
- DNQ: {config.dnq_epochs} epochs of float training under the noise of that width, then PTQ as above
  (docs/dnq.md).
- GHN-QAT start: LSQ as above, from weights that a hypernetwork predicted for this net, which it has
  not seen, after {config.ghn_epochs} epochs of training on {config.ghn_nets} other nets
  (docs/ghn.md). There is no float training before it.
- s / step: median of {config.timing_rounds} training steps (forward, backward, optimizer; batch of
  {then.batch_size}), float and QAT steps taking turns in one run. PTQ does not train. The net is
  tiny, so its ratio is largely the fixed cost of a call; larger layers have a smaller one.
- Machine: {about}.

![accuracy]({ACCURACY})
![training curves]({CURVES})

Each stage is a run directory of its own beside this file; `<stage>.safetensors` is its model, and
metrics.jsonl holds all stages' logged steps.
"""
