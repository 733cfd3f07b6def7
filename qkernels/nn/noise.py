"""attach_noise: train a float model under the noise of quantization, and take the noise off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qkernels import numeric
from qkernels.nn import noise_hooks
from qkernels.nn.noise_modules import (
    LIST_OPS,
    InputNoise,
    NoiseControl,
    NoiseSpec,
    TensorNoise,
    WeightNoise,
)
from qkernels.nn.prepare import Layer, quantizable_layers, require_float, weight_spec
from qkernels.nn.quant_spec import QuantSpec
from qkernels.noise_source import Noise
from qkernels.ops.error_stats import ErrorStats

OP = "attach_noise"
NORMS: Any = nn.modules.batchnorm._BatchNorm


def attach_noise(
    model: nn.Module,
    *,
    noise: Noise,
    weights: NoiseSpec | int | None = None,
    activations: NoiseSpec | int | None = None,
    layers: Sequence[str] | None = None,
    skip: Sequence[str] = (),
    ramp: float = 1.0,
    in_eval: bool = False,
    clean_batchnorm: bool = False,
) -> NoiseHandle:
    """Add noise to the weights and inputs of a model's Conv, ConvTranspose and Linear layers.

    noise = qkernels.Noise(seed=0)
    handle = attach_noise(model, noise=noise, weights=4, activations=4)
    for x, y in loader:
        handle.ramp = ...
        loss(model(x), y).backward()
        optimizer.step()
        noise.advance()  # without it every step draws the same noise
    handle.remove()

    The noise is temporary: forward and backward run at W + noise, the gradient passes unchanged,
    and the optimizer moves W. It is there in training mode only (each layer's own mode counts). The
    layers are those that `prepare` quantizes, and like there it is a layer's input that counts as
    activation. The defaults are those of DNQ (Xia et al., arXiv 2511.01462) where it says, and ours
    where it does not: see `NoiseSpec`.

    Streams (see `qkernels.Noise`): the weight of layer NAME draws at `noise.at("NAME.weight",
    kind=spec.kind)`, the same on all ranks and in all calls of a step; a tied weight goes by its
    first name. The input draws at `noise.at("NAME.input", kind=spec.kind, per_rank=True)`; in the
    k-th call of a step (k from 0) at step + k 2^40, so that a layer called twice, and the forwards
    of an accumulated gradient, have noise of their own. Statistics move at most once a step.

    While attached, a weight is `torch.nn.utils.parametrize`d: `layer.weight` is the noisy one,
    assigning to it sets the clean one, and in `named_parameters` it is called
    "NAME.parametrizations.weight.original" and comes after the bias (the Parameter itself is the
    same: an optimizer made before goes on). The keys of `state_dict` are the plain model's and, in
    addition, those of the statistics; a plain checkpoint loads strictly. Deep copies and pickles
    have noise of their own: see `noise_handles`.

    A compiled model takes step and ramp from tensors, so that neither compiles it anew. An
    nn.TransformerEncoderLayer with noise on inputs takes its ordinary path in eval mode.

    Args:
        model: a float model; changed in place.
        noise: seed and step. The caller advances it once per optimizer step.
        weights: a `NoiseSpec`, or bits: NoiseSpec("differential", QuantSpec(bits, axis=0,
            symmetric=True)). None: no noise on weights. axis is as in `prepare` for ConvTranspose.
        activations: a `NoiseSpec` of kind drop_in or uniform, or bits: NoiseSpec("drop_in",
            QuantSpec(bits)), p = 0.5. None: no noise on inputs.
        layers: fnmatch patterns of the dotted names of the layers that get noise; None: all.
        skip: patterns of those that do not.
        ramp: see `NoiseHandle.ramp`.
        in_eval: noise in eval mode too (the statistics do not move there).
        clean_batchnorm: while there is noise, no BatchNorm of the model (in training mode) updates
            running_mean, running_var and num_batches_tracked; it normalizes by the batch as ever.
            The running statistics stay those of the last forward without noise: before evaluation,
            `with handle.off(): torch.optim.swa_utils.update_bn(loader, model)`.

    Returns:
        The handle, switched on.

    Raises:
        TypeError, ValueError: arguments of the wrong kind; no layer; a pattern that matches none; a
            layer that has noise already; a prepared model. Nothing is attached then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{OP}: model must be a Module, got {type(model).__name__}")
    if not isinstance(noise, Noise):
        raise TypeError(f"{OP}: noise must be a Noise, got {type(noise).__name__}")
    require_float(OP, model)
    weight_noise = _as_spec("weights", weights, "differential", {"axis": 0, "symmetric": True})
    input_noise = _as_spec("activations", activations, "drop_in", {})
    if weight_noise is None and input_noise is None:
        raise ValueError(f"{OP}: weights or activations must be given, got neither")
    if input_noise is not None and input_noise.kind == "differential":
        raise ValueError(f"{OP}: activations must be drop_in or uniform, got differential")
    control = NoiseControl(noise, bool(in_eval))
    control.set_ramp(ramp)
    plan = []
    tied: dict[int, WeightNoise] = {}
    for layer in _select(model, layers, skip):
        plan.append((layer.module, *_noises(layer, weight_noise, input_noise, control, tied)))
    for module, weight, input in plan:
        noise_hooks.attach(module, weight, input, control)
    if clean_batchnorm:
        for module in model.modules():
            if isinstance(module, NORMS):
                noise_hooks.attach_norm(module, control)
    control.enabled = True
    return NoiseHandle(model, control)


def _as_spec(name: str, value: Any, kind: str, options: dict[str, Any]) -> NoiseSpec | None:
    if value is None or isinstance(value, NoiseSpec):
        return value
    if type(value) is not int:
        raise TypeError(f"{OP}: {name} must be a NoiseSpec, bits or None, got {value!r}")
    return NoiseSpec(kind, QuantSpec(value, **options))


def _select(model: nn.Module, layers: Any, skip: Any) -> list[Layer]:
    """The layers that get noise."""

    def chosen(names: list[str]) -> bool:
        return (layers is None or _match(layers, names)) and not _match(skip, names)

    for argument, patterns in (("layers", layers), ("skip", skip)):
        _check_patterns(argument, patterns)
    noisy = [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if noise_hooks.attachment(module) is not None and not isinstance(module, NORMS)
    ]
    for name in noisy:
        if chosen([name]):
            raise ValueError(f"{OP}: layers must be without noise, got {name!r} with it")
    free = quantizable_layers(model, OP)
    names = noisy + [name for layer in free for name in layer.names]
    for argument, patterns in (("layers", layers), ("skip", skip)):
        for pattern in patterns or ():
            if not _match([pattern], names):
                raise ValueError(
                    f"{OP}: {argument} must have patterns that match a layer, got {pattern!r} "
                    f"(layers: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''})"
                )
    found = [layer for layer in free if chosen(layer.names)]
    if not found:
        raise ValueError(f"{OP}: layers and skip must leave at least one layer, got none")
    return found


def _match(patterns: Sequence[str], names: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)


def _check_patterns(argument: str, patterns: Any) -> None:
    known = isinstance(patterns, (list, tuple)) and all(isinstance(p, str) for p in patterns)
    if not known and not (argument == "layers" and patterns is None):
        raise TypeError(f"{OP}: {argument} must be a list of str, got {patterns!r}")


def _noises(
    layer: Layer,
    weights: NoiseSpec | None,
    activations: NoiseSpec | None,
    control: NoiseControl,
    tied: dict[int, WeightNoise],
) -> tuple[WeightNoise | None, InputNoise | None]:
    """(weight's, input's) noise for a layer, on its device."""
    name, module = layer.names[0], layer.module
    prefix = f"{name}." if name else ""
    weight = input = None
    if weights is not None:
        weight = tied.get(id(module.weight))
        if weight is None:
            quant = weight_spec(name, module, weights.quant, OP)
            channels = numeric.channel_count(module.weight.shape, quant.axis, quant.group_size)
            spec = replace(weights, quant=quant)
            weight = WeightNoise(f"{prefix}weight", spec, control, channels)
            tied[id(module.weight)] = weight
    if activations is not None:
        channels_known = None if activations.quant.per_channel else 1
        input = InputNoise(f"{prefix}input", activations, control, channels_known)
    dtype = numeric.compute_dtype(module.weight.dtype)
    for noise in (weight, input):
        if noise is not None:
            noise.to(device=module.weight.device, dtype=dtype).train(module.training)
    return weight, input


def noise_handles(model: nn.Module) -> list[NoiseHandle]:
    """The handles of the noise that a model carries: one for each `attach_noise`.

    For a deep copy (torch.optim.swa_utils.AveragedModel makes one) or an unpickled model, whose
    noise is its own: its own switches, statistics, seed and step, as they were in the original.
    """
    found: dict[int, NoiseControl] = {}
    for module in model.modules():
        record = noise_hooks.attachment(module)
        for control in record.controls if record is not None else ():
            found.setdefault(id(control), control)
    return [NoiseHandle(model, control) for control in found.values()]


class NoiseHandle:
    """Switches the noise of a model, and takes it off. From `attach_noise` or `noise_handles`."""

    def __init__(self, model: nn.Module, control: NoiseControl) -> None:
        self._model = model
        self._control = control

    @property
    def noise(self) -> Noise:
        """Seed and step; `noise.advance()` once per optimizer step. Can be set."""
        return self._control.noise

    @noise.setter
    def noise(self, noise: Noise) -> None:
        if not isinstance(noise, Noise):
            raise TypeError(f"{OP}: noise must be a Noise, got {type(noise).__name__}")
        self._control.noise = noise

    @property
    def enabled(self) -> bool:
        """The switch. Off: the model computes what it did without noise, bit for bit."""
        return self._control.enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self._control.enabled = bool(enabled)

    @property
    def ramp(self) -> float:
        """Factor of all noise, at least 0. A compiled model reads it anew in each call."""
        return self._control.ramp

    @ramp.setter
    def ramp(self, ramp: float) -> None:
        self._control.set_ramp(ramp)

    @property
    def frozen(self) -> bool:
        """True: the statistics do not move in training; `measuring` moves them."""
        return self._control.frozen

    @frozen.setter
    def frozen(self, frozen: bool) -> None:
        self._control.frozen = bool(frozen)

    @contextmanager
    def off(self) -> Iterator[None]:
        """`with handle.off():` no noise in the block."""
        before, self._control.enabled = self._control.enabled, False
        try:
            yield
        finally:
            self._control.enabled = before

    @contextmanager
    def on(self) -> Iterator[None]:
        """`with handle.on():` noise in the block."""
        before, self._control.enabled = self._control.enabled, True
        try:
            yield
        finally:
            self._control.enabled = before

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """`with handle.measuring(): model(x)`: no noise, and every forward moves the statistics.

        In training and eval mode, each batch those of the inputs, the first one those of the
        weights. With `frozen`, this is how DNQ takes statistics: once an epoch, from a calibration
        set. Do it after `noise.advance()`, so that the statistics of the step before are kept.
        """
        control = self._control
        before, control.measuring = control.measuring, True
        control.measurements += not before
        try:
            yield
        finally:
            control.measuring = before

    @property
    def stats(self) -> dict[str, ErrorStats]:
        """The statistics that noise is drawn from, by name: "conv1.weight", "conv1.input"."""
        return {
            module.name: module.errors.stats
            for module in self._noises()
            if module.errors is not None and module.errors.ema is not None
        }

    @torch.no_grad()
    def perturb_(self) -> None:
        """Add this step's differential noise to the weights that have it permanently, in place.

        Call it once per step, after the optimizer's. Does nothing while `enabled` is False.

        Raises:
            ValueError: no weight has permanent noise (NoiseSpec(..., permanent=True)).
        """
        found: dict[int, tuple[WeightNoise, Tensor]] = {}
        for module in self._modules():
            if parametrize.is_parametrized(module, "weight"):
                entries: Any = module.parametrizations.weight
                if entries[0].spec.permanent:
                    found[id(entries[0])] = (entries[0], entries.original)
        if not found:
            raise ValueError(f"{OP}: weights must have permanent noise for perturb_, got none")
        if not self.enabled:
            return
        calls: dict[tuple[str, torch.device], list[tuple[Any, dict[str, Any]]]] = {}
        for noise, weight in found.values():
            place = noise.place(weight)
            args, options = noise.arguments(weight, place["step"])
            group = calls.setdefault((noise.spec.kind, weight.device), [])
            group.append((args, {**options, **place}))
        for (kind, _), group in calls.items():  # the weights of a device in one call
            columns = (list(column) for column in zip(*(args for args, _ in group), strict=True))
            keywords = {name: [kw[name] for _, kw in group] for name in group[0][1]}
            LIST_OPS[kind](*columns, inplace=True, **keywords)

    def model_state_dict(self) -> dict[str, Any]:
        """The model's state_dict without the entries of any noise: loads into the plain model,
        strictly."""
        state = self._model.state_dict()
        for name, module in self._model.named_modules(remove_duplicate=False):
            if isinstance(module, TensorNoise):
                for key in module.state_dict(prefix=f"{name}."):
                    state.pop(key, None)
        return state

    def remove(self) -> None:
        """Take the noise off: the model as it was, with the weights it has now.

        The Parameters stay the same objects, in their old order. A second call does nothing.

        Raises:
            RuntimeError: a weight got another parametrization on top; nothing is changed.
        """
        modules = self._modules()
        for module in modules:
            if parametrize.is_parametrized(module, "weight"):
                entries: Any = module.parametrizations.weight
                if len(entries) != 1:
                    raise RuntimeError(
                        f"{OP}: weight of {entries[0].name!r} must have no parametrization on top "
                        f"of the noise when it is removed, got {len(entries) - 1}"
                    )
        for module in modules:
            noise_hooks.detach(module, self._control)

    def _modules(self) -> list[Any]:
        """The layers and norms that this handle's noise is tied to."""
        found = []
        for module in self._model.modules():
            record = noise_hooks.attachment(module)
            if record is not None and any(c is self._control for c in record.controls):
                found.append(module)
        return found

    def _noises(self) -> list[TensorNoise]:
        return [
            module
            for module in self._model.modules()
            if isinstance(module, TensorNoise) and module.control is self._control
        ]
