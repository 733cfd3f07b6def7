"""What a run of the initialiser study leaves: accuracies, and the ranges of each layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from qkernels.nn import QuantLayer, calibrate, fold_batchnorm, prepare

from .data import Batch
from .ptq import ptq_qconfig, row_name
from .report import Row

# scales of weights: one for each output channel or one for each tensor, and what a row calls it
METHODS = {
    name: row_name(ptq_qconfig("minmax", 8, 8, per_tensor=name == "tensor"))
    for name in ("channel", "tensor")
}


@dataclass(frozen=True)
class Combination:
    """What differs between the runs of a seed."""

    block: str
    batchnorm: bool
    initialiser: str

    @property
    def slug(self) -> str:
        return f"{self.block}-{'bn' if self.batchnorm else 'plain'}/{self.initialiser}"


@dataclass(frozen=True)
class LayerRange:
    """Of one Conv or Linear layer of the trained net, BatchNorm folded.

    Attributes:
        weight: max |w|.
        input: max |x| over the calibration images.
        share: mean over output channels of max |w| in the channel / max |w|: what a scale for each
            channel makes of the step of one scale for all.
        weight_peak, input_peak: max |w| / root mean square of w, and so for x: how much wider than
            its bulk a range is.
    """

    layer: str
    weight: float
    input: float
    share: float
    weight_peak: float
    input_peak: float


@dataclass(frozen=True)
class Outcome:
    """A run: the float net, its ranges, and what is left of it after quantization.

    Attributes:
        failure: why it did not train; None if it did. A net counts as trained from halfway between
            chance and 100 % accuracy on (our choice): one at chance has nothing to lose.
        rows: the float net, then the quantized ones by granularity (`METHODS`) and bits; none if
            the loss was not finite.
        layers: in the order of the modules.
    """

    combination: Combination
    seed: int
    failure: str | None = None
    rows: tuple[Row, ...] = ()
    layers: tuple[LayerRange, ...] = ()

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Outcome:
        return cls(
            Combination(**value["combination"]),
            value["seed"],
            value["failure"],
            tuple(Row.from_dict(row) for row in value["rows"]),
            tuple(LayerRange(**layer) for layer in value["layers"]),
        )

    @property
    def accuracy(self) -> float | None:
        """Of the float net on the test split; None if its loss was not finite."""
        return self.rows[0].accuracy if self.rows else None

    def loss(self, granularity: str, bits: tuple[int, int]) -> float:
        """Of accuracy, in points: float less quantized. Only where the loss was finite."""
        sought = METHODS[granularity], bits
        (row,) = (row for row in self.rows if (row.method, row.bits) == sought)
        return 100 * (self.rows[0].accuracy - row.accuracy)

    def widest(self, figure: str) -> float:
        """The largest of a figure of `LayerRange` over layers; of share, the least."""
        values = [getattr(layer, figure) for layer in self.layers]
        return min(values) if figure == "share" else max(values)


def layer_ranges(model: nn.Module, batches: Sequence[Batch]) -> tuple[LayerRange, ...]:
    """Of each Conv and Linear layer of a float model, BatchNorm folded: what PTQ by min-max ranges
    sees, over these batches."""
    quantized = prepare(fold_batchnorm(model), ptq_qconfig("minmax", 8, 8)).eval()
    layers = {n: layer for n, layer in quantized.named_modules() if isinstance(layer, QuantLayer)}
    with _watched(layers) as squares:
        calibrate(quantized, batches)
    return tuple(_range_of(name, layer, squares[name]) for name, layer in layers.items())


@contextmanager
def _watched(layers: Mapping[str, QuantLayer]) -> Iterator[dict[str, list[tuple[float, int]]]]:
    """Of each input that a layer gets meanwhile: (sum of squares, elements)."""
    seen: dict[str, list[tuple[float, int]]] = {name: [] for name in layers}

    def watch(name: str) -> Any:
        def note(layer: nn.Module, inputs: Any) -> None:
            seen[name].append((inputs[0].double().square().sum().item(), inputs[0].numel()))

        return note

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _range_of(name: str, layer: QuantLayer, squares: Sequence[tuple[float, int]]) -> LayerRange:
    weights, inputs = layer.weight_fake_quant, layer.input_fake_quant
    assert weights is not None and inputs is not None, "both sides have 8 bits"
    assert weights.range is not None and inputs.range is not None, "PTQ keeps both ranges"
    channels = weights.range.abs().amax(0)  # [C]
    largest, input = channels.max().item(), inputs.range.abs().max().item()
    # a layer that is all 0 gains nothing by scales for each channel
    share = channels.mean().item() / largest if largest > 0 else 1.0
    bulk = layer.weight.double().square().mean().sqrt().item()
    input_bulk = math.sqrt(sum(s for s, _ in squares) / sum(n for _, n in squares))
    peaks = _ratio(largest, bulk), _ratio(input, input_bulk)
    return LayerRange(name, largest, input, share, *peaks)


def _ratio(largest: float, bulk: float) -> float:
    # where all is 0, no value is larger than another
    return largest / bulk if bulk > 0 else 1.0
