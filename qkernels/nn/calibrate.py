"""calibrate: ranges of a prepared model's activations from a few batches, without training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.nn.fake_quantize import FakeQuantize
from qkernels.nn.layers import QuantLayer
from qkernels.nn.prepare import log, require_prepared


def calibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    batches: int | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> None:
    """Set every kept range and learned scale of a prepared model anew.

    The batches run in eval mode, without gradients and with all fake quantization off, so that the
    ranges are those of the float model. A quantizer then takes, over all that it saw,
        running range, method "minmax": the least and the greatest value;
        running range, other methods: the mean of the batches' bounds;
        learned: the mean of the batches' scales, and the zero point of the mean range.
    What a weight's quantizer keeps comes from the weight. Dynamic ranges need no calibration.
    Afterwards `model.eval()` evaluates the model quantized after training (PTQ), and training moves
    on from these values. Nothing is exchanged between ranks: give all the same batches.

    Args:
        model: from `prepare`.
        loader: yields x, a tuple or list whose first entry is x, or a mapping whose first value is
            x; x is moved to the model's device. None of this applies with `forward`.
        batches: how many to take at most; None: all.
        forward: called as forward(model, batch) instead of model(x).

    Raises:
        ValueError: the model has no fake quantizers; batches is not positive; the loader is empty;
            an input holds NaN or inf.
    """
    require_prepared("calibrate", model)
    if isinstance(loader, Tensor):  # it would be taken apart row by row
        raise TypeError("calibrate: loader must be an iterable of batches, got a Tensor; use [x]")
    if batches is not None and (type(batches) is not int or batches < 1):
        raise ValueError(f"calibrate: batches must be a positive int or None, got {batches!r}")
    inputs = _kept_inputs(model)
    for quantizer in inputs.values():
        quantizer.begin_collecting()
    try:
        with _floating(model), torch.no_grad():
            count = 0
            for batch in islice(loader, batches):
                _run(model, batch, forward)
                count += 1
        if count == 0:
            raise ValueError("calibrate: loader must yield at least one batch, got none")
        _take(inputs)
        for module in model.modules():
            if isinstance(module, QuantLayer):
                module.initialize_weight()
    finally:
        for quantizer in inputs.values():
            quantizer.end_collecting()


def _kept_inputs(model: nn.Module) -> dict[str, FakeQuantize]:
    """The quantizers that keep something and are not a weight's, by name."""
    layers = [module for module in model.modules() if isinstance(module, QuantLayer)]
    weights = {id(layer.weight_fake_quant) for layer in layers}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, FakeQuantize)
        and id(module) not in weights
        and not module.spec.dynamic
    }


@contextmanager
def _floating(model: nn.Module) -> Iterator[None]:
    """Eval mode, no fake quantization; each module's own setting is put back."""
    training = {module: module.training for module in model.modules()}
    enabled = {m: m.fake_quant_enabled for m in training if isinstance(m, FakeQuantize)}
    model.eval()
    for quantizer in enabled:
        quantizer.fake_quant_enabled = False
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for quantizer, flag in enabled.items():
            quantizer.fake_quant_enabled = flag


def _run(model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Any] | None) -> None:
    if forward is not None:
        forward(model, batch)
        return
    x = batch
    if isinstance(batch, Mapping):
        x = next(iter(batch.values()), None)
    elif isinstance(batch, (tuple, list)):
        x = batch[0] if batch else None
    if not isinstance(x, Tensor):
        raise TypeError(
            "calibrate: loader must yield a Tensor, or a tuple, list or mapping that starts with "
            f"one, got {type(x).__name__} (use forward=)"
        )
    parameter = next(model.parameters(), None)
    model(x if parameter is None else x.to(parameter.device))


def _take(inputs: dict[str, FakeQuantize]) -> None:
    """Make what the quantizers saw their value; none changes if one saw NaN or inf."""
    totals = {name: quantizer.collected() for name, quantizer in inputs.items()}
    for name, total in totals.items():
        if total is None:
            log.warning("calibrate: %s saw no input and keeps what it had", name)
        elif not bool(total.isfinite().all()):
            raise ValueError(f"calibrate: inputs must be finite, got NaN or inf at {name!r}")
    for name, total in totals.items():
        if total is not None:
            inputs[name].store(total)
