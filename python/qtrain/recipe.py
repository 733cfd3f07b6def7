"""What a run is told: its settings, and what a trainer changes in the loop."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data import Batch, Dataset
from .models import build_model

# a setting's annotation -> what it may be, and how to say so
_KINDS: dict[str, tuple[Any, str]] = {
    "str": (str, "a word"),
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "float | None": ((int, float, type(None)), "a number or null"),
    "bool": (bool, "true or false"),
    "Mapping[str, Any]": (Mapping, "a mapping"),
}


# schedule "steps": shares of the steps after which the rate falls to a tenth
DROPS = (2 / 3, 5 / 6)


@dataclass(frozen=True)
class TrainConfig:
    """All that decides a run's result, save the recipe.

    Attributes:
        lr: peak learning rate; ``warmup`` is the share of steps in which it rises to that.
        schedule: after the warm-up "cosine" (to 0), "constant", or "steps" (a tenth after two
            thirds and after five sixths of the steps).
        momentum, nesterov: of SGD; AdamW has its usual betas.
        label_smoothing: share of the target that is spread over all classes, in training.
        clip: largest norm of the gradient; None: as it comes.
        eval_every: epochs between evaluations on the test split.
        log_every, checkpoint_every: in steps.
        swa_start: share of the steps after which the weights are averaged at each epoch's end
            (stochastic weight averaging), with the constant rate ``swa_lr``; None: not.
    """

    dataset: str = "digits"
    data_options: Mapping[str, Any] = field(default_factory=dict)
    model: str = "cnn"
    model_options: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 20
    batch_size: int = 64
    optimizer: str = "adamw"
    lr: float = 3e-3
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-2
    warmup: float = 0.05
    schedule: str = "cosine"
    clip: float | None = None
    label_smoothing: float = 0.0
    mixed_precision: str = "no"
    seed: int = 0
    workers: int = 0
    eval_every: int = 1
    log_every: int = 20
    checkpoint_every: int = 100
    swa_start: float | None = None
    swa_lr: float | None = None

    def __post_init__(self) -> None:
        for setting in fields(self):
            kinds, rule = _KINDS[str(setting.type)]
            value = getattr(self, setting.name)
            holds = isinstance(value, kinds) and isinstance(value, bool) == (kinds is bool)
            require(holds, setting.name, rule, repr(value))
        for name in ("epochs", "batch_size", "eval_every", "log_every", "checkpoint_every"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("lr", "swa_lr"):
            rate = getattr(self, name)
            require(rate is None or 0 < rate < math.inf, name, "positive and finite", rate)
        decay = self.weight_decay
        require(0 <= decay < math.inf, "weight_decay", "at least 0 and finite", decay)
        require(0 <= self.momentum < 1, "momentum", "in [0, 1)", self.momentum)
        require(self.workers >= 0, "workers", "at least 0", self.workers)
        require(0 <= self.warmup < 1, "warmup", "in [0, 1)", self.warmup)
        require(self.clip is None or self.clip > 0, "clip", "positive", self.clip)
        require(0 <= self.label_smoothing < 1, "label_smoothing", "in [0, 1)", self.label_smoothing)
        plain = self.optimizer == "sgd" and self.momentum > 0
        require(plain or not self.nesterov, "nesterov", "false without SGD and momentum", True)
        swa = self.swa_start
        require(swa is None or 0 <= swa < 1, "swa_start", "in [0, 1)", swa)
        for name, known in (
            ("optimizer", ("sgd", "adamw")),
            ("schedule", ("cosine", "constant", "steps")),
            ("mixed_precision", ("no", "fp16", "bf16")),
        ):
            value = getattr(self, name)
            require(value in known, name, f"one of {', '.join(known)}", repr(value))


def require(holds: bool, name: str, rule: str, value: Any, op: str = "train") -> None:
    """Raise a ValueError about a setting unless its rule holds."""
    if not holds:
        raise ValueError(f"{op}: {name} must be {rule}, got {value}")


def changed_settings(preset: Mapping[str, Any], changed: Mapping[str, Any]) -> TrainConfig:
    """Settings of a preset, and what differs. Another model or dataset starts without the preset's
    options for its own; other options are added to those.

    Raises:
        ValueError: a bad setting.
    """
    settings = {**preset, **changed}
    for name, options in (("model", "model_options"), ("dataset", "data_options")):
        kept = preset.get(options, {}) if settings.get(name) == preset.get(name) else {}
        settings[options] = {**kept, **changed.get(options, {})}
    return TrainConfig(**settings)


def new_model(config: TrainConfig, data: Dataset) -> nn.Module:
    """The config's model, made for the dataset, with fresh weights."""
    return build_model(
        config.model,
        channels=data.channels,
        classes=data.classes,
        size=data.size,
        options=config.model_options,
    )


class Recipe:
    """Float training; a trainer overrides what it changes."""

    name = "float"
    # what the loss consists of, logged beside it; `loss` then leaves the detached values behind
    parts: tuple[str, ...] = ()
    part_values: Sequence[Tensor] = ()
    # whether a step may leave some parameters without a gradient
    sparse = False
    # until a run binds the recipe to its own
    config = TrainConfig()

    def bind(self, config: TrainConfig, data: Dataset) -> None:
        """The run's settings and data, before anything else; also on resume.

        Raises:
            ValueError: they do not go with the recipe. Nothing has been written then.
        """
        self.config, self.data = config, data

    def describe(self) -> dict[str, Any]:
        """What of the recipe decides the result: JSON-able, becomes part of the run's config."""
        return {"name": self.name}

    def build(self, config: TrainConfig, data: Dataset) -> nn.Module:
        """The float model, with fresh weights from the global generators; also on resume."""
        return new_model(config, data)

    def setup(self, model: nn.Module) -> nn.Module:
        """The structure to train, made from the fresh float model; also on resume."""
        return model

    def initialize(self, model: nn.Module, data: Dataset, config: TrainConfig) -> None:
        """First values, on the device; not on resume, where the checkpoint holds them."""

    def param_groups(self, model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
        """Groups for the optimizer; a group's "lr_factor" multiplies the learning rate."""
        return decay_groups(model.named_parameters(), config.weight_decay)

    def on_epoch_start(self, model: nn.Module, epoch: int) -> None:
        """Before an epoch's first step; not when a run goes on in the middle of the epoch. Here and
        below ``model`` is the unwrapped one, but for ``loss``."""

    def perturbation(self, step: int) -> AbstractContextManager[Any]:
        """Around forward and backward; what it changes, it puts back before the optimizer moves."""
        return nullcontext()

    def loss(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(x), y, label_smoothing=self.config.label_smoothing)

    def accepts(self, loss: Tensor, norm: Tensor | None) -> bool:
        """Whether the optimizer may move after this loss and norm of the gradient (None where the
        config does not clip); the same on all ranks."""
        return True

    def on_step_end(self, model: nn.Module, step: int) -> None:
        """After the optimizer's step."""

    def before_evaluation(self, model: nn.Module, step: int) -> None:
        """Before the model is evaluated in training, after ``step`` steps."""

    def scores(self, model: nn.Module, step: int) -> Mapping[str, float] | None:
        """test_loss and test_accuracy after ``step`` steps, the same on all ranks; None: those of
        the model on the test split."""
        return None

    def counts(self) -> Mapping[str, int]:
        """What is logged beside the loss, the same on all ranks."""
        return {}

    def finish(self, model: nn.Module) -> nn.Module:
        """The trained model (with SWA the average) as it is to be saved."""
        return model

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers of the recipe's own that a resumed run needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes what ``state_dict`` gave."""


def decay_groups(
    named: Iterable[tuple[str, nn.Parameter]], weight_decay: float
) -> list[dict[str, Any]]:
    """Weight decay for matrices and filters, none for biases and norms."""
    params = [p for _, p in named if p.requires_grad]
    return [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]


def make_optimizer(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    groups = [{"lr_factor": 1.0, **group} for group in groups if group["params"]]
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov
        )
    return torch.optim.AdamW(groups, lr=config.lr)


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """A function of the step alone, so that a resumed run has no scheduler to restore."""
    if config.swa_start is not None and step >= config.swa_start * total:
        return config.swa_lr if config.swa_lr is not None else 0.1 * config.lr
    warm = config.warmup * total
    if step < warm:
        return config.lr * (step + 1) / math.ceil(warm)
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "steps":
        return config.lr * 0.1 ** sum(step >= share * total for share in DROPS)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))


def autocast(mixed_precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """What Accelerate puts round a model's forward, for what a recipe runs outside of it."""
    if mixed_precision == "no":
        return nullcontext()
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision]
    return torch.autocast(device.type, dtype)
