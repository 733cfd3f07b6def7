"""Quantization-aware training: a float checkpoint, fake quantizers, and the loop as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from qkernels.nn import FakeQuantize, QConfig, calibrate, prepare

from .data import Dataset, train_batches
from .recipe import Recipe, TrainConfig, decay_groups
from .source import FloatSource

METHODS = ("minmax", "lsq")


def qat_qconfig(
    method: str, weight_bits: int, activation_bits: int, *, first_last_bits: int | None = 8
) -> QConfig:
    """The usual config of a method: "minmax" (range of the tensor at hand, straight-through
    gradient) or "lsq" (learned scales)."""
    makers = {"minmax": QConfig.minmax, "lsq": QConfig.lsq}
    if method not in makers:
        raise ValueError(f"qat: method must be one of {', '.join(METHODS)}, got {method!r}")
    return makers[method](weight_bits, activation_bits, first_last_bits=first_last_bits)


class Qat(Recipe):
    """Train with fake-quantized weights and activations.

    Args:
        source: the float model to start from.
        qconfig: what is quantized, and how.
        calibration_batches: training batches that give the activations their first ranges.
        scale_lr_factor: learning rate of learned scales, relative to that of the weights.
    """

    name = "qat"

    def __init__(
        self,
        source: FloatSource,
        qconfig: QConfig,
        *,
        calibration_batches: int = 8,
        scale_lr_factor: float = 1.0,
    ) -> None:
        self.source, self.qconfig = source, qconfig
        self.calibration_batches, self.scale_lr_factor = calibration_batches, scale_lr_factor

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "source": self.source.digest,
            "qconfig": self.qconfig.to_dict(),
            "calibration_batches": self.calibration_batches,
            "scale_lr_factor": self.scale_lr_factor,
        }

    def setup(self, model: nn.Module) -> nn.Module:
        return prepare(self.source.fill(model), self.qconfig, inplace=True)

    def initialize(self, model: nn.Module, data: Dataset, config: TrainConfig) -> None:
        calibrate(model, calibration_batches(data, config, self.calibration_batches))

    def param_groups(self, model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
        scales = scale_parameters(model)
        weights = [(n, p) for n, p in model.named_parameters() if n not in scales]
        groups = decay_groups(weights, config.weight_decay)
        # decay would pull a scale to zero, which is no regularisation of the weights
        learned = {"weight_decay": 0.0, "lr_factor": self.scale_lr_factor}
        return [*groups, {"params": list(scales.values()), **learned}]


def scale_parameters(model: nn.Module) -> Mapping[str, nn.Parameter]:
    """The learned parameters of the fake quantizers, by name."""
    return {
        f"{name}.{key}" if name else key: parameter
        for name, module in model.named_modules()
        if isinstance(module, FakeQuantize)
        for key, parameter in module.named_parameters(recurse=False)
    }


def calibration_batches(data: Dataset, config: TrainConfig, count: int) -> list:
    """The first training batches of a stream of their own; the same on every rank."""
    return list(
        train_batches(
            data.train,
            min(config.batch_size, len(data.train)),
            seed=config.seed,
            epoch=0,
            stop=count,
            stream="calibration",
        )
    )
