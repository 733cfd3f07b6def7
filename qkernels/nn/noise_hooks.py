"""How noise is tied to layers and to BatchNorm, and how it is taken off again."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from qkernels.nn.noise_modules import InputNoise, NoiseControl, WeightNoise, add_input_noise

ORIGINAL = "parametrizations.weight.original"


class Attachment:
    """What was done to a module, kept by the module itself so that copies know it too."""

    def __init__(self, control: NoiseControl) -> None:
        self.controls = [control]  # of a norm, those of all noise on its model
        self.hooks: list[Any] = []
        self.parameters: list[str] = []  # names in their order of before
        self.held = False  # a norm's statistics, for the time of a forward


def attachment(module: nn.Module) -> Attachment | None:
    """A module's attachment, or None."""
    return module.__dict__.get("_qkernels_noise")


def attach(
    layer: Any, weight: WeightNoise | None, input: InputNoise | None, control: NoiseControl
) -> None:
    """Tie noise to a layer."""
    record = layer._qkernels_noise = Attachment(control)
    if weight is not None:
        record.parameters = list(layer._parameters)
        parametrize.register_parametrization(layer, "weight", weight)
        _make_portable(layer)
        record.hooks.append(layer.register_state_dict_post_hook(_to_plain_keys))
        record.hooks.append(layer.register_load_state_dict_pre_hook(_from_plain_keys))
    if input is not None:
        layer.input_noise = input
        record.hooks.append(layer.register_forward_pre_hook(add_input_noise, with_kwargs=True))


def attach_norm(norm: Any, control: NoiseControl) -> None:
    """Keep a BatchNorm's running statistics while there is noise."""
    record = attachment(norm)
    if record is not None:
        record.controls.append(control)
        return
    record = norm._qkernels_noise = Attachment(control)
    record.hooks.append(norm.register_forward_pre_hook(_hold_statistics))
    record.hooks.append(norm.register_forward_hook(_release_statistics, always_call=True))


def detach(module: Any, control: NoiseControl) -> None:
    """Undo `attach` or `attach_norm`."""
    record = attachment(module)
    assert record is not None, "only a module with an attachment is detached"
    record.controls = [c for c in record.controls if c is not control]
    if record.controls:
        return
    for hook in record.hooks:
        hook.remove()
    if record.parameters:
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
        _reorder(module._parameters, record.parameters)
    if "input_noise" in module._modules:
        del module.input_noise
    del module._qkernels_noise


def _hold_statistics(norm: Any, args: Any) -> None:
    record = norm._qkernels_noise
    if norm.track_running_stats and norm.training and any(c.active(norm) for c in record.controls):
        # the batch's own statistics are used all the same, the running ones neither read nor moved
        norm.track_running_stats = False
        record.held = True


def _release_statistics(norm: Any, args: Any, output: Any) -> None:
    record = norm._qkernels_noise
    if record.held:
        norm.track_running_stats = True
        record.held = False


def _reorder(entries: dict[str, Any], names: list[str]) -> None:
    for name in names:
        entries[name] = entries.pop(name)


def _to_plain_keys(
    layer: nn.Module, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    """state_dict hook: the weight under its own name, in its own place, which is the first."""
    own: dict[str, Any] = {}
    while state and (key := next(reversed(state))).startswith(prefix):
        own[key] = state.pop(key)
    own[prefix + "weight"] = own.pop(prefix + ORIGINAL)
    for key in reversed(own):
        state[key] = own[key]


def _from_plain_keys(
    layer: nn.Module, state: dict[str, Any], prefix: str, *rest: Any, **options: Any
) -> None:
    """load_state_dict hook: the weight under the name that the parametrization gives it."""
    weight: Tensor | None = state.pop(prefix + "weight", None)
    if weight is not None:
        state[prefix + ORIGINAL] = weight


def _make_portable(layer: Any) -> None:
    """Let a parametrized layer be copied and pickled.

    torch gives it a class of its own, which pickle cannot find, and which a deep copy would share:
    taking the parametrization off one of the two would break the other.
    """
    kind: Any = type(layer)
    if "__deepcopy__" in vars(kind):
        del kind.__deepcopy__
    kind.__reduce_ex__ = _reduce


def _reduce(layer: Any, protocol: int) -> tuple[Any, ...]:
    """The layer as it is without parametrizations, and what to register again."""
    state = dict(layer.__dict__)
    lists = layer.parametrizations
    state["_modules"] = {k: m for k, m in layer._modules.items() if k != "parametrizations"}
    state["_parameters"] = {**layer._parameters, **{k: v.original for k, v in lists.items()}}
    registered = {name: list(entries) for name, entries in lists.items()}
    order = list(layer._modules)
    return _blank, (parametrize.type_before_parametrizations(layer),), (state, registered, order)


def _blank(kind: type[nn.Module]) -> nn.Module:
    """A layer without anything, for `_restore`."""
    blank: Any = type(kind.__name__, (kind,), {"__setstate__": _restore})
    return blank.__new__(blank)


def _restore(layer: Any, found: tuple[dict[str, Any], dict[str, Any], list[str]]) -> None:
    state, registered, order = found
    layer.__class__ = type(layer).__bases__[0]
    layer.__dict__.update(state)
    for name, entries in registered.items():
        for entry in entries:
            # unsafe only means that it is not tried out, which would draw noise
            parametrize.register_parametrization(layer, name, entry, unsafe=True)
    _reorder(layer._modules, order)
    _make_portable(layer)
