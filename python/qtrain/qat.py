"""Quantization-aware training: a float checkpoint, fake quantizers, and the loop as it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from qkernels import Noise
from qkernels.nn import (
    FakeQuantize,
    PactFakeQuantize,
    PartialFakeQuantize,
    QConfig,
    calibrate,
    prepare,
)

from .data import Dataset, train_batches
from .recipe import Recipe, TrainConfig, decay_groups, require
from .source import FloatSource

_MAKERS: dict[str, Callable[..., QConfig]] = {
    "minmax": QConfig.minmax,
    "lsq": QConfig.lsq,
    "lsq+": QConfig.lsq_plus,
    "pact": QConfig.pact,
    "dorefa": QConfig.dorefa,
    "quant-noise": QConfig.quant_noise,
    "qdrop": QConfig.qdrop,
}
METHODS = tuple(_MAKERS)
# the methods that quantize a random share p of the elements
RANDOM = ("quant-noise", "qdrop")


def qat_qconfig(
    method: str,
    weight_bits: int,
    activation_bits: int,
    *,
    first_last_bits: int | None = 8,
    p: float | None = None,
) -> QConfig:
    """The usual config of a method, see docs/qat.md.

    Args:
        method: one of ``METHODS``.
        first_last_bits: see ``QConfig``.
        p: for quant-noise and qdrop, the share that is quantized in training; None: 0.5.

    Raises:
        ValueError: another method; bits; p out of range, or given for a method without one.
    """
    require(method in METHODS, "method", f"one of {', '.join(METHODS)}", repr(method), "qat")
    options: dict[str, Any] = {"first_last_bits": first_last_bits}
    if p is not None:
        rule = f"None unless method is {' or '.join(RANDOM)}"
        require(method in RANDOM, "p", rule, p, "qat")
        options["p"] = p
    return _MAKERS[method](weight_bits, activation_bits, **options)


class Qat(Recipe):
    """Train with fake-quantized weights and activations.

    Args:
        source: the float model to start from.
        qconfig: what is quantized, and how.
        calibration_batches: training batches that give the activations their first ranges.
        scale_lr_factor: learning rate of what the quantizers learn (scales, offsets, PACT's
            alphas), relative to that of the weights.
        alpha_decay: weight decay of PACT's alphas; None: that of the weights.
    """

    name = "qat"

    def __init__(
        self,
        source: FloatSource,
        qconfig: QConfig,
        *,
        calibration_batches: int = 8,
        scale_lr_factor: float = 1.0,
        alpha_decay: float | None = None,
    ) -> None:
        if alpha_decay is not None:
            rule = "at least 0 and finite, or None"
            require(0 <= alpha_decay < math.inf, "alpha_decay", rule, alpha_decay, "qat")
            configs = (qconfig, *(other for other in qconfig.overrides.values() if other))
            clipped = any(c.activation is not None and c.activation.kind == "pact" for c in configs)
            require(clipped, "alpha_decay", "None unless method is pact", alpha_decay, "qat")
        self.source, self.qconfig = source, qconfig
        self.calibration_batches, self.scale_lr_factor = calibration_batches, scale_lr_factor
        self.alpha_decay = alpha_decay
        self.noise: Noise | None = None

    def describe(self) -> dict[str, Any]:
        described = {
            "name": self.name,
            "source": self.source.digest,
            "qconfig": self.qconfig.to_dict(),
            "calibration_batches": self.calibration_batches,
            "scale_lr_factor": self.scale_lr_factor,
        }
        if self.alpha_decay is not None:
            described["alpha_decay"] = self.alpha_decay
        return described

    def setup(self, model: nn.Module) -> nn.Module:
        if self.qconfig.random:
            self.noise = Noise(self.config.seed)
        return prepare(self.source.fill(model), self.qconfig, inplace=True, noise=self.noise)

    def initialize(self, model: nn.Module, data: Dataset, config: TrainConfig) -> None:
        calibrate(model, calibration_batches(data, config, self.calibration_batches))

    def param_groups(self, model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
        learned = scale_parameters(model)
        weights = [(n, p) for n, p in model.named_parameters() if n not in learned]
        alphas = [m.alpha for m in model.modules() if isinstance(m, PactFakeQuantize)]
        of_alphas = {id(p) for p in alphas}
        scales = [p for p in learned.values() if id(p) not in of_alphas]
        decay = config.weight_decay if self.alpha_decay is None else self.alpha_decay
        factor = {"lr_factor": self.scale_lr_factor}
        return [
            *decay_groups(weights, config.weight_decay),
            {"params": alphas, "weight_decay": decay, **factor},
            # decay would pull a scale to zero, which is no regularisation of the weights
            {"params": scales, "weight_decay": 0.0, **factor},
        ]

    def perturbation(self, step: int) -> AbstractContextManager[Any]:
        if self.noise is not None:
            self.noise.step = step
        return nullcontext()

    def finish(self, model: nn.Module) -> nn.Module:
        # the BatchNorm statistics of an average are re-estimated in training mode
        for module in model.modules():
            if isinstance(module, PartialFakeQuantize):
                module.mask_enabled = False
        return model


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
