"""prepare a float model for quantization, and take the quantizers off again."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parameter import UninitializedParameter

from qkernels import numeric
from qkernels.nn.fake_quantize import FakeQuantize
from qkernels.nn.kinds import fake_quantizer
from qkernels.nn.layers import QUANT_CLASS, QuantLayer
from qkernels.nn.partial import PartialFakeQuantize
from qkernels.nn.qconfig import QConfig
from qkernels.nn.quant_spec import RANDOM, QuantSpec
from qkernels.noise_source import Noise

log = logging.getLogger("qkernels")

# modules whose eval-mode fast path reads the weights of its layers and never calls them, with the
# attribute that takes the ordinary path when it is false
FAST_PATHS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu"),
    (nn.TransformerEncoder, "use_nested_tensor"),
)


class Layer(NamedTuple):
    """A quantizable layer, under all its names (a shared one has several)."""

    module: Any  # a Conv, ConvTranspose or Linear
    names: list[str]


def prepare(
    model: nn.Module, qconfig: QConfig, *, inplace: bool = False, noise: Noise | None = None
) -> nn.Module:
    """Make the Conv, ConvTranspose and Linear layers of a model fake-quantize weight and input.

    Each such layer changes its class, in place, to the quantized one (`QuantConv2d` is an
    `nn.Conv2d`) and gets the submodules `weight_fake_quant` and `input_fake_quant`. Parameters and
    their names stay: the float model's checkpoint loads with strict=True, before or after training
    (quantizers it has no entries for start anew), and `float_state_dict` gives one back.

    Layers left float, with the reason logged: subclasses of these layers (their forward is their
    own; among them the output projection of nn.MultiheadAttention, which is never called), layers
    with a parametrization or another computed weight, lazy layers. The eval-mode fast path of
    nn.TransformerEncoder, which reads the weights and calls no layer, is closed until `remove`.

    Per output channel (axis=0) the weight of a ConvTranspose, [in, out / groups, ...], has a scale
    for each of its out / groups entries of dim 1, which the groups share; a depthwise one
    (groups = in) has a scale per group, dim 0.

    Args:
        model: a float model on any device, meta too.
        qconfig: see `QConfig`.
        inplace: change the model itself and not a copy. Parameters are the same objects then, so an
            optimizer made before goes on (learned scales are new parameters).
        noise: seed and step of the masks of Quant-Noise and QDrop, for a qconfig with these. The
            caller advances it once per optimizer step.

    Returns:
        The prepared model. Learned weight scales are set; ranges and learned scales of activations
        are set by `calibrate` or by the first training step.

    Raises:
        TypeError: model is no Module, qconfig no QConfig, or noise no Noise where one is needed.
        ValueError: no quantizable layer; a model that is prepared already; an override pattern that
            matches no layer; axis or group_size that does not fit a layer (which is named).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"prepare: model must be a Module, got {type(model).__name__}")
    if not isinstance(qconfig, QConfig):
        raise TypeError(f"prepare: qconfig must be a QConfig, got {type(qconfig).__name__}")
    if not isinstance(noise, Noise) and (noise is not None or qconfig.random):
        kinds = f" for {' and '.join(RANDOM)}" if noise is None else " or None"
        raise TypeError(f"prepare: noise must be a Noise{kinds}, got {noise!r}")
    require_float("prepare", model)
    if not inplace:
        model = copy.deepcopy(model)
    plan = [
        (layer, quantizers(layer, config, noise))
        for layer, config in assign(quantizable_layers(model), qconfig)
        if config is not None and not (config.weight is None and config.activation is None)
    ]
    if not plan:
        raise ValueError("prepare: qconfig must quantize at least one layer, got none")
    for layer, (weight, activation) in plan:
        layer.module.__class__ = QUANT_CLASS[type(layer.module)]
        layer.module.weight_fake_quant = weight
        layer.module.input_fake_quant = activation
        layer.module.initialize_weight()
    _close_fast_paths(model)
    return model


def quantizable_layers(model: nn.Module, op: str = "prepare") -> list[Layer]:
    """The layers that `prepare` can quantize, in the order of their registration.

    `op` is what errors and log lines begin with, here and below.

    Raises:
        ValueError: there are none.
    """
    found: dict[int, Layer] = {}
    left: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        reason = _why_float(module)
        if reason == "":
            found.setdefault(id(module), Layer(module, [])).names.append(name)
        elif reason is not None:
            left.append(f"{name!r}: {reason}")
            log.warning("%s: layer %r stays float: %s", op, name, reason)
    if not found:
        tail = f" (left float: {'; '.join(left[:5])})" if left else ""
        raise ValueError(
            f"{op}: model must have a Conv, ConvTranspose or Linear layer, "
            f"got {type(model).__name__} without any{tail}"
        )
    return list(found.values())


def _why_float(module: nn.Module) -> str | None:
    """ "" if the module can be quantized, why not if it is a layer of ours, None if it is not."""
    if not isinstance(module, tuple(QUANT_CLASS)):
        return None
    if type(module) not in QUANT_CLASS:
        return f"{type(module).__name__} is a subclass with a forward or a weight of its own"
    weight = module._parameters.get("weight")
    if weight is None or isinstance(weight, UninitializedParameter):
        return "its weight is not a plain parameter"
    return ""


def assign(layers: list[Layer], qconfig: QConfig) -> list[tuple[Layer, QConfig | None]]:
    """Each layer with its config: the first override that matches, else first_last_bits' or all's.

    Raises:
        ValueError: a pattern that matches no layer.
    """
    names = [name for layer in layers for name in layer.names]
    for pattern in qconfig.overrides:
        if not qconfig.matches(pattern, names):
            raise ValueError(
                f"prepare: overrides must have patterns that match a quantizable layer, got "
                f"{pattern!r} (layers: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''})"
            )
    result: list[tuple[Layer, QConfig | None]] = []
    for index, layer in enumerate(layers):
        own = [c for p, c in qconfig.overrides.items() if qconfig.matches(p, layer.names)]
        if own:
            result.append((layer, own[0]))
        elif index in (0, len(layers) - 1):
            result.append((layer, qconfig.widened()))
        else:
            result.append((layer, qconfig))
    return result


def quantizers(
    layer: Layer, config: QConfig, noise: Noise | None = None
) -> tuple[FakeQuantize | None, FakeQuantize | None]:
    """(weight's, input's) quantizer for a layer, on its device.

    Raises:
        ValueError: axis or group_size does not fit the layer.
    """
    name, module = layer.names[0], layer.module
    weight = activation = None
    if config.weight is not None:
        spec = weight_spec(name, module, config.weight)
        shape = module.weight.shape
        weight = fake_quantizer(spec, numeric.channel_count(shape, spec.axis, spec.group_size))
        weight.label = f"{name}.weight_fake_quant".lstrip(".")
        # every rank has the same weight
        weight.sync_ranks = False
    if config.activation is not None:
        channels = input_channels(name, module, config.activation)
        activation = fake_quantizer(config.activation, channels)
        activation.label = f"{name}.input_fake_quant".lstrip(".")
        if isinstance(activation, PartialFakeQuantize):
            activation.per_rank = True
    dtype = numeric.compute_dtype(module.weight.dtype)
    for quantizer in (weight, activation):
        if isinstance(quantizer, PartialFakeQuantize):
            quantizer.noise = noise
        if quantizer is not None:
            quantizer.to(device=module.weight.device, dtype=dtype).train(module.training)
    return weight, activation


def weight_spec(name: str, module: Any, spec: QuantSpec, op: str = "prepare") -> QuantSpec:
    """spec with the axis of this layer's weight, counted from the front."""
    shape = module.weight.shape
    axis = spec.axis
    if axis is not None:
        if not -len(shape) <= axis < len(shape):
            _misfit(name, "weight axis", f"in {-len(shape)}..{len(shape) - 1}", axis, op)
        axis %= len(shape)
        if getattr(module, "transposed", False) and axis < 2:
            depthwise = module.groups == module.in_channels
            axis = 0 if depthwise else 1 - axis
    if spec.group_size is not None and shape[1:].numel() % spec.group_size:
        rule = f"a divisor of {shape[1:].numel()} (elements of one weight[0])"
        _misfit(name, "weight group_size", rule, spec.group_size, op)
    return replace(spec, axis=axis)


def input_channels(name: str, module: Any, spec: QuantSpec) -> int:
    """How many scales the input's quantizer keeps; only the channels' number is known ahead."""
    if spec.dynamic or not spec.per_channel:
        return 1
    if spec.group_size is not None:
        _misfit(name, "activation group_size", "None for a range that is kept", spec.group_size)
    if isinstance(module, nn.Linear):
        known, channels = (-1, 1), module.in_features
    else:
        known, channels = (1, -1 - len(module.kernel_size)), module.in_channels
    if spec.axis not in known:
        rule = f"{known[0]} or {known[1]} (its channels) for a range that is kept"
        _misfit(name, "activation axis", rule, spec.axis)
    return channels


def _misfit(name: str, argument: str, rule: str, value: Any, op: str = "prepare") -> None:
    raise ValueError(f"{op}: {argument} must be {rule} for layer {name!r}, got {value}")


def remove(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Take the quantizers off: the float layers again, with the weights as they are (not rounded).

    Raises:
        ValueError: the model is not prepared.
    """
    require_prepared("remove", model)
    if not inplace:
        model = copy.deepcopy(model)
    layers: list[Any] = [module for module in model.modules() if isinstance(module, QuantLayer)]
    for layer in layers:
        del layer.weight_fake_quant, layer.input_fake_quant
        layer.__class__ = layer.float_class
    _reopen_fast_paths(model)
    return model


def float_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state_dict without the quantizers' entries: loads into the float model, strictly."""
    state = model.state_dict()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, FakeQuantize):
            for key in module.entries(f"{name}." if name else "", state):
                del state[key]
    return state


def set_quantization(model: nn.Module, enabled: bool) -> None:
    """Switch all fake quantization of a prepared model on or off (ranges are kept either way).

    Raises:
        ValueError: the model has no fake quantizers.
    """
    require_prepared("set_quantization", model)
    for module in model.modules():
        if isinstance(module, FakeQuantize):
            module.fake_quant_enabled = bool(enabled)


def require_float(op: str, model: nn.Module) -> None:
    """Raise if the model has fake quantizers."""
    for name, module in model.named_modules():
        if isinstance(module, (FakeQuantize, QuantLayer)):
            raise ValueError(
                f"{op}: model must be a float model, got one that is prepared already "
                f"({type(module).__name__} at {name!r}); see remove()"
            )


def require_prepared(op: str, model: nn.Module) -> None:
    """Raise if the model has no fake quantizers."""
    if not any(isinstance(module, FakeQuantize) for module in model.modules()):
        raise ValueError(
            f"{op}: model must be a prepared one, got {type(model).__name__} without fake "
            "quantizers; see prepare()"
        )


def _close_fast_paths(model: nn.Module) -> None:
    for module in model.modules():
        for kind, attribute in FAST_PATHS:
            if isinstance(module, kind) and getattr(module, attribute, False):
                module._qkernels_fast_path = getattr(module, attribute)
                setattr(module, attribute, False)


def _reopen_fast_paths(model: nn.Module) -> None:
    for module in model.modules():
        for kind, attribute in FAST_PATHS:
            if isinstance(module, kind) and hasattr(module, "_qkernels_fast_path"):
                setattr(module, attribute, module._qkernels_fast_path)
                del module._qkernels_fast_path
