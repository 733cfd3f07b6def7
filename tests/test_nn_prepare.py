"""prepare and remove: which layers, with which spec, and what a prepared layer computes."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qkernels
from qkernels.nn import (
    FakeQuantize,
    QConfig,
    QuantLayer,
    QuantSpec,
    prepare,
    remove,
    set_quantization,
)

DYNAMIC = QConfig(QuantSpec(4, axis=0, symmetric=True), QuantSpec(4), first_last_bits=None)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.body = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.ReLU())
        self.mid = nn.Linear(4, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mid(self.body(self.stem(x)).mean((2, 3))))


def weight_bits(model: nn.Module) -> dict[str, int | None]:
    return {
        name: m.weight_fake_quant and m.weight_fake_quant.spec.bits
        for name, m in model.named_modules()
        if isinstance(m, QuantLayer)
    }


LAYERS: list[tuple[nn.Module, tuple[int, ...], Any, int]] = [
    (nn.Linear(6, 5), (3, 6), F.linear, 0),
    (nn.Conv1d(4, 6, 3, stride=2, groups=2), (2, 4, 9), F.conv1d, 0),
    (nn.Conv2d(4, 6, 3, padding=1, dilation=2), (2, 4, 7, 7), F.conv2d, 0),
    (nn.Conv3d(2, 4, 2), (1, 2, 4, 4, 4), F.conv3d, 0),
    (nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5), F.conv_transpose1d, 1),
    (nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5), F.conv_transpose2d, 1),
    (nn.ConvTranspose2d(4, 8, 3, groups=4), (2, 4, 5, 5), F.conv_transpose2d, 0),
    (nn.ConvTranspose3d(2, 3, 2, padding=1), (1, 2, 4, 4, 4), F.conv_transpose3d, 1),
]


@pytest.mark.parametrize(("layer", "shape", "function", "axis"), LAYERS)
def test_a_prepared_layer_is_the_float_one_on_quantized_tensors(
    layer: Any, shape: tuple[int, ...], function: Any, axis: int
) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    prepared = prepare(layer, DYNAMIC)
    assert isinstance(prepared, type(layer)) and isinstance(prepared, QuantLayer)
    weight = qkernels.fake_quant(layer.weight, bits=4, axis=axis, symmetric=True)
    args = [qkernels.fake_quant(x, bits=4), weight, layer.bias]
    if not isinstance(layer, nn.Linear):
        rest = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}
        expected = function(*args, dilation=layer.dilation, **rest)
    else:
        expected = function(*args)
    assert torch.equal(prepared(x), expected)
    assert not torch.equal(expected, layer(x))


def test_circular_padding_and_output_size_are_kept() -> None:
    x = torch.randn(2, 3, 5, 5)
    conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")
    transposed = nn.ConvTranspose2d(3, 4, 3, stride=2)
    for layer, args in ((conv, ()), (transposed, ([12, 12],))):
        prepared = prepare(layer, DYNAMIC)
        set_quantization(prepared, False)
        assert torch.equal(prepared(x, *args), layer(x, *args))


def test_first_and_last_layer_get_eight_bits_and_overrides_win() -> None:
    assert weight_bits(prepare(Net(), QConfig.minmax(2, 2))) == {
        "stem": 8,
        "body.1": 2,
        "mid": 2,
        "head": 8,
    }
    overrides = {"head": QConfig.lsq(3, 3), "body.*": None, "*": QConfig.minmax(6, None)}
    model = prepare(Net(), QConfig.minmax(2, 2, overrides=overrides))
    assert weight_bits(model) == {"stem": 6, "mid": 6, "head": 3}
    assert type(model.body[1]) is nn.Conv2d
    assert model.mid.input_fake_quant is None
    assert model.head.weight_fake_quant.spec.learned
    only = {"stem": QConfig.minmax(4, 4)}
    model = prepare(Net(), QConfig.minmax(2, 2, overrides=only))
    assert weight_bits(model) == {"stem": 4, "body.1": 2, "mid": 2, "head": 8}
    wide = prepare(Net(), QConfig.minmax(16, 16))
    assert set(weight_bits(wide).values()) == {16}
    plain = prepare(Net(), QConfig.minmax(2, 2, first_last_bits=None))
    assert set(weight_bits(plain).values()) == {2}


def test_learned_weight_scales_start_from_the_weight() -> None:
    net = Net()
    model = prepare(net, QConfig.lsq(2, 2))
    for name in ("stem", "body.1", "mid", "head"):
        weight = net.get_submodule(name).weight
        quantizer = model.get_submodule(name).weight_fake_quant
        bits = quantizer.spec.bits
        scale = qkernels.quant_range(weight, bits=bits, axis=0, symmetric=True, method="lsq").scale
        assert torch.equal(quantizer.scale, scale)
        assert int(quantizer.initialized) == 1
        assert int(model.get_submodule(name).input_fake_quant.initialized) == 0


def test_group_wise_weights() -> None:
    config = QConfig(QuantSpec(4, group_size=3, symmetric=True, learned=True), None)
    layer = nn.Linear(6, 5)
    prepared = prepare(layer, config)
    assert prepared.weight_fake_quant.scale.shape == (10,)
    x = torch.randn(2, 6)
    rounded = qkernels.fake_quant(layer.weight, bits=8, group_size=3, symmetric=True)
    # the effective scale adds the smallest normal number, which no fp32 scale of a weight notices
    assert torch.equal(prepared(x), F.linear(x, rounded, layer.bias))


@pytest.mark.parametrize("axis", [1, -3])
def test_activations_per_channel(axis: int) -> None:
    config = QConfig(None, QuantSpec(4, axis=axis, ema=0.9), first_last_bits=None)
    prepared = prepare(nn.Conv2d(3, 4, 1), config)
    prepared(torch.randn(2, 3, 5, 5))
    assert prepared.input_fake_quant.range.shape == (2, 3)


def test_inplace_keeps_the_very_parameters() -> None:
    net = Net()
    parameters = dict(net.named_parameters())
    assert prepare(net, DYNAMIC, inplace=True) is net
    assert all(net.get_parameter(name) is p for name, p in parameters.items())
    assert remove(net, inplace=True) is net
    other = prepare(net, DYNAMIC)
    assert other is not net and type(net.stem) is nn.Conv2d


@pytest.mark.parametrize("config", [DYNAMIC, QConfig.minmax(2, 2), QConfig.lsq(2, 2)])
def test_remove_gives_the_float_model_back(config: QConfig) -> None:
    net, x = Net(), torch.randn(4, 3, 8, 8)
    model = prepare(net, config)
    model(x)
    plain = remove(model)
    assert torch.equal(plain(x), net(x))
    assert [type(m) for m in plain.modules()] == [type(m) for m in net.modules()]
    assert list(plain.state_dict()) == list(net.state_dict())
    assert repr(plain) == repr(net)


def test_set_quantization_switches_everything() -> None:
    net, x = Net().eval(), torch.randn(4, 3, 8, 8)
    model = prepare(net, QConfig.lsq(2, 2))
    model.train()(x)
    model.eval()
    quantized = model(x)
    set_quantization(model, False)
    assert torch.equal(model(x), net(x))
    set_quantization(model, True)
    assert torch.equal(model(x), quantized)
    assert not torch.equal(quantized, net(x))


def test_shared_modules_and_weights() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.again = self.a
            self.tied = nn.Linear(4, 4)
            self.tied.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.tied(self.again(self.a(x)))

    net = Shared()
    model = prepare(net, QConfig.lsq(4, 4, first_last_bits=None, overrides={"again": DYNAMIC}))
    assert model.a is model.again
    assert model.a.weight_fake_quant.spec.dynamic
    assert model.tied.weight is model.a.weight
    assert model.tied.weight_fake_quant.spec.learned
    model(torch.randn(3, 4)).square().sum().backward()
    assert model.a.weight.grad.abs().sum() > 0
    plain = remove(model)
    assert plain.a is plain.again and plain.tied.weight is plain.a.weight
    assert type(plain.a) is nn.Linear


def test_what_is_not_called_as_a_layer_stays_float(caplog: pytest.LogCaptureFixture) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
            self.lazy = nn.LazyLinear(8)
            self.head = nn.Linear(8, 8)

    with caplog.at_level(logging.WARNING, logger="qkernels"):
        model = prepare(Mixed(), DYNAMIC)
    assert [n for n, m in model.named_modules() if isinstance(m, QuantLayer)] == ["head"]
    text = caplog.text
    for name in ("attention.out_proj", "normed", "lazy"):
        assert f"layer '{name}' stays float" in text


def test_old_weight_norm_stays_float(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.warns(FutureWarning):
        old = nn.utils.weight_norm(nn.Linear(4, 4))
    with caplog.at_level(logging.WARNING, logger="qkernels"):
        # in place, for torch cannot copy such a model
        model = prepare(nn.Sequential(nn.Linear(4, 4), old), DYNAMIC, inplace=True)
    assert type(model[1]) is nn.Linear
    assert "its weight is not a plain parameter" in caplog.text


def test_transformer_layers_do_not_slip_past_their_quantizers() -> None:
    """In eval mode torch's fast path would read the weights and never call the layers."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    net = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 8)
    model = prepare(net, DYNAMIC).eval()
    with torch.no_grad():
        fast = model(x)
        slow = model.train()(x)  # dropout is 0
        assert not torch.allclose(fast, net(x), atol=1e-3)
    torch.testing.assert_close(fast, slow)
    back = remove(model)
    assert back.layers[0].activation_relu_or_gelu == net.layers[0].activation_relu_or_gelu
    assert back.use_nested_tensor == net.use_nested_tensor


def test_meta_and_double_models() -> None:
    with torch.device("meta"):
        net = Net()
    model = prepare(net, QConfig.lsq(4, 4))
    assert all(t.is_meta for t in model.state_dict().values())
    model = prepare(Net().double(), QConfig.minmax(4, 4))
    model(torch.randn(2, 3, 8, 8, dtype=torch.float64)).sum().backward()
    assert model.stem.input_fake_quant.range.dtype is torch.float64


BAD: list[tuple[Any, Any, type[Exception], str]] = [
    (nn.Sequential(nn.ReLU()), DYNAMIC, ValueError, "prepare: model must have a Conv, ConvTr"),
    ("net", DYNAMIC, TypeError, "prepare: model must be a Module, got str"),
    (Net(), 4, TypeError, "prepare: qconfig must be a QConfig, got int"),
    (Net(), QConfig(None, None), ValueError, "qconfig must quantize at least one layer, got none"),
    (
        Net(),
        QConfig.lsq(2, 2, overrides={"stem": None, "boddy.*": None}),
        ValueError,
        r"overrides must have patterns that match a quantizable layer, got 'boddy.\*' "
        r"\(layers: stem, body.1, mid, head\)",
    ),
    (
        Net(),
        QConfig(QuantSpec(4, group_size=9), None),
        ValueError,
        r"prepare: weight group_size must be a divisor of 4 .* for layer 'mid', got 9",
    ),
    (
        Net(),
        QConfig(QuantSpec(4, axis=2), None),
        ValueError,
        r"prepare: weight axis must be in -2..1 for layer 'mid', got 2",
    ),
    (
        Net(),
        QConfig(None, QuantSpec(4, axis=0, ema=0.9)),
        ValueError,
        r"activation axis must be 1 or -3 \(its channels\) .* for layer 'stem', got 0",
    ),
    (
        Net(),
        QConfig(None, QuantSpec(4, group_size=4, learned=True)),
        ValueError,
        "activation group_size must be None for a range that is kept for layer 'stem', got 4",
    ),
]


@pytest.mark.parametrize(("model", "config", "error", "text"), BAD)
def test_prepare_refuses_and_writes_nothing(
    model: Any, config: Any, error: type[Exception], text: str
) -> None:
    before = repr(model)
    with pytest.raises(error, match=text):
        prepare(model, config, inplace=True)
    assert repr(model) == before


def test_prepared_twice_or_not_at_all() -> None:
    model = prepare(Net(), DYNAMIC)
    with pytest.raises(ValueError, match="prepare: model must be a float model, got one that is"):
        prepare(model, DYNAMIC)
    with pytest.raises(ValueError, match="remove: model must be a prepared one, got Net without"):
        remove(Net())
    with pytest.raises(ValueError, match="set_quantization: model must be a prepared one"):
        set_quantization(Net(), False)
    assert isinstance(prepare(remove(model), DYNAMIC).stem.weight_fake_quant, FakeQuantize)


def test_left_float_is_told_when_nothing_remains() -> None:
    class Own(nn.Linear):
        pass

    with pytest.raises(ValueError, match=r"without any \(left float: '0': Own is a subclass"):
        prepare(nn.Sequential(Own(2, 2)), DYNAMIC)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [QConfig.minmax(4, 4), QConfig.lsq(4, 4)])
def test_narrow_models_train(config: QConfig, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    for model in (prepare(Net(), config).to(dtype), prepare(Net().to(dtype), config)):
        y = model(x.to(dtype))
        y.float().square().mean().backward()
        assert y.dtype is dtype
        assert all(p.grad.isfinite().all() for p in model.parameters())
        assert model.eval()(x.to(dtype)).isfinite().all()


@pytest.mark.parametrize("config", [QConfig.minmax(4, 4), QConfig.lsq(4, 4)])
def test_autocast(config: QConfig) -> None:
    torch.manual_seed(0)
    model, x = prepare(Net(), config), torch.randn(4, 3, 8, 8)
    exact = copy.deepcopy(model)(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.1, atol=0.1)
    y.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_config_of_a_layer_is_not_shared_by_reference() -> None:
    config = QConfig.minmax(4, 4)
    model = prepare(Net(), config)
    assert model.mid.weight_fake_quant.spec == config.weight
    assert model.stem.weight_fake_quant.spec == replace(config.weight, bits=8)
