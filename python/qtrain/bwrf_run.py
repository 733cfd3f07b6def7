"""BWRF as a recipe for the loop: QAT from a float checkpoint, beside a frozen float teacher."""

from __future__ import annotations

import copy
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qkernels.nn import QConfig

from .bwrf import BlockReplacement
from .bwrf_config import BwrfConfig
from .data import Batch, Dataset, batch_count
from .qat import Qat
from .recipe import TrainConfig, autocast, require
from .source import FloatSource


class Bwrf(Qat):
    """Train with fake-quantized weights and activations, beside mixed-precision networks.

    The model that is saved is that of `Qat`. The teacher is not in the checkpoint: the config names
    it by its file's digest. The logged loss comes with its parts: task, distill, replaced.

    Args:
        source: the float model to start from.
        qconfig: what is quantized, and how.
        config: blocks, mode, weights of the loss.
        teacher: the full-precision partner; None: the source.
        others: as `Qat`'s.
    """

    name = "bwrf"
    parts = ("task", "distill", "replaced")

    def __init__(
        self,
        source: FloatSource,
        qconfig: QConfig,
        config: BwrfConfig | None = None,
        *,
        teacher: FloatSource | None = None,
        **others: Any,
    ) -> None:
        super().__init__(source, qconfig, **others)
        self.replacement = config or BwrfConfig()
        self.teacher = teacher or source
        ours, theirs = ((s.model, dict(s.model_options)) for s in (source, self.teacher))
        rule = f"of the student's architecture, {ours[0]} with options {ours[1]}"
        require(ours == theirs, "teacher", rule, f"{theirs[0]} with {theirs[1]}", "bwrf")

    def describe(self) -> dict[str, Any]:
        described = {"teacher": self.teacher.digest, "replacement": asdict(self.replacement)}
        return {**super().describe(), **described}

    def bind(self, config: TrainConfig, data: Dataset) -> None:
        super().bind(config, data)
        self.steps = config.epochs * batch_count(data.train, config.batch_size)

    def setup(self, model: nn.Module) -> nn.Module:
        teacher = self.teacher.fill(copy.deepcopy(model))
        student = super().setup(model)
        options = asdict(self.replacement)
        self.bwrf = BlockReplacement(
            student,
            teacher,
            options.pop("blocks"),
            seed=self.config.seed,
            task_loss=partial(F.cross_entropy, label_smoothing=self.config.label_smoothing),
            **options,
        )
        self.placed: torch.device | None = None
        return student

    def loss(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        x, y = batch
        if x.device != self.placed:
            self.bwrf.teacher.to(x.device)
            self.placed = x.device
        with autocast(self.config.mixed_precision, x.device):
            loss, parts = self.bwrf.loss(x, y, step=step, progress=step / self.steps, model=model)
        self.part_values = [parts[name] for name in self.parts]
        return loss
