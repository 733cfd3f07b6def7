"""Quantizers around predicted weights, against the ops for one tensor."""

import pytest
import torch
from qtrain.ghn.nets import prepare_net
from qtrain.ghn.quantizers import (
    FLOAT_BITS,
    InputQuantizer,
    Place,
    Quantizer,
    layer_bits,
    quantize_weights,
)
from qtrain.seeds import stream_seed
from torch import nn

import qkernels

PLACES = [Place(7, 3, 11), Place(7, 3, 12)]


def predictions():
    torch.manual_seed(0)
    shapes = [{"a.weight": (6, 3, 3, 3), "b.weight": (4, 6)}, {"a.weight": (5, 1, 3, 3)}]
    made = [{name: torch.randn(shape) for name, shape in net.items()} for net in shapes]
    made[0]["a.bias"] = torch.randn(6)
    return [{name: w.requires_grad_() for name, w in net.items()} for net in made]


@pytest.mark.parametrize("per_channel", [True, False])
def test_simquant_is_fake_quant_with_its_gradient(per_channel):
    nets, widths = predictions(), [{"a": 4, "b": 2}, {"a": 3}]
    quantizer = Quantizer("sim", per_channel=per_channel)
    quantized = quantize_weights(nets, widths, quantizer, PLACES)
    assert quantized[0]["a.bias"] is nets[0]["a.bias"]
    axis = 0 if per_channel else None
    for net, results, layers in zip(nets, quantized, widths, strict=True):
        for layer, bits in layers.items():
            w = net[f"{layer}.weight"].detach().clone().requires_grad_()
            expected = qkernels.fake_quant(w, bits=bits, axis=axis, symmetric=True)
            result = results[f"{layer}.weight"]
            assert torch.equal(result, expected)
            upstream = torch.randn_like(w)
            (ours,) = torch.autograd.grad(result, net[f"{layer}.weight"], upstream, True)
            (theirs,) = torch.autograd.grad(expected, w, upstream)
            assert torch.equal(ours, theirs)


def test_noisequant_is_uniform_noise_of_its_own_for_each_layer():
    nets, widths = predictions(), [{"a": 2, "b": 2}, {"a": 2}]
    quantized = quantize_weights(nets, widths, Quantizer("noise"), PLACES)
    for net, results, layers, place in zip(nets, quantized, widths, PLACES, strict=True):
        for layer in layers:
            w = net[f"{layer}.weight"].detach()
            scale = qkernels.quant_range(w, bits=2, axis=0, symmetric=True).scale
            seed = stream_seed(7, 3, f"noise/{place.net}/{layer}/weight")
            expected = qkernels.uniform_noise(w, scale, seed=seed, step=3, axis=0)
            assert torch.equal(results[f"{layer}.weight"], expected)
            (gradient,) = torch.autograd.grad(
                results[f"{layer}.weight"].sum(), net[f"{layer}.weight"], retain_graph=True
            )
            assert torch.equal(gradient, torch.ones_like(w))


def test_float_layers_and_no_quantizer_leave_weights_alone():
    nets = predictions()
    for quantizer, widths in (
        (Quantizer("sim"), [{"a": FLOAT_BITS}, {}]),
        (Quantizer("none"), [{"a": 2}, {"a": 2}]),
    ):
        for net, result in zip(
            nets, quantize_weights(nets, widths, quantizer, PLACES), strict=True
        ):
            assert all(result[name] is w for name, w in net.items())


def test_the_paper_turns_to_noise_at_two_bits():
    nets = predictions()
    mixed = quantize_weights(nets, [{"a": 4, "b": 2}, {"a": 1}], Quantizer("paper"), PLACES)
    sim = quantize_weights(nets, [{"a": 4}, {}], Quantizer("sim"), PLACES)
    noise = quantize_weights(nets, [{"b": 2}, {"a": 1}], Quantizer("noise"), PLACES)
    assert torch.equal(mixed[0]["a.weight"], sim[0]["a.weight"])
    assert torch.equal(mixed[0]["b.weight"], noise[0]["b.weight"])
    assert torch.equal(mixed[1]["a.weight"], noise[1]["a.weight"])


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_the_hook_quantizes_the_input(method):
    percentile = 99.0 if method == "percentile" else None
    hook = InputQuantizer(Quantizer("sim", method, percentile), "layer")
    x, layer = torch.randn(4, 3, 5, 5), nn.Conv2d(3, 2, 1)
    assert hook(layer, (x,))[0] is x
    hook.set(3, PLACES[0])
    expected = qkernels.fake_quant(x, bits=3, method=method, percentile=percentile)
    assert torch.equal(hook(layer, (x,))[0], expected)


def test_noise_on_inputs_is_named_by_seed_step_network_and_layer():
    x, layer = torch.randn(4, 3), nn.Linear(3, 2)
    scale = qkernels.quant_range(x, bits=2).scale

    def noise(name, place):
        hook = InputQuantizer(Quantizer("noise"), name)
        hook.set(2, place)
        return hook(layer, (x,))[0] - x

    first = noise("one", PLACES[0])
    assert torch.equal(first, noise("one", PLACES[0]))
    assert 0.3 * scale < first.abs().max() <= 0.5001 * scale
    others = [("two", PLACES[0]), ("one", PLACES[1]), ("one", Place(7, 4, 11))]
    for name, place in [*others, ("one", Place(8, 3, 11))]:
        assert not torch.equal(first, noise(name, place))


def test_layer_bits():
    layers = ["stem", "middle", "head"]
    assert layer_bits(layers, 4) == {"stem": 8, "middle": 4, "head": 8}
    assert layer_bits(layers, 4, None) == {"stem": 4, "middle": 4, "head": 4}
    assert layer_bits(layers, [2, 3, 16]) == {"stem": 8, "middle": 3, "head": 16}
    assert layer_bits(layers, FLOAT_BITS) == dict.fromkeys(layers, FLOAT_BITS)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.bn(self.conv(x)).relu().mean((2, 3)))


def test_a_skeleton_runs_as_the_network_does_with_the_gradients_of_setattr():
    """Quantized by hand in a real network in training mode, whose parameters are set."""
    torch.manual_seed(0)
    with torch.device("meta"):
        net = prepare_net(Small(), Quantizer("sim"))
    real = Small().train()
    weights = {name: p.detach().clone().requires_grad_() for name, p in real.named_parameters()}
    x = torch.randn(8, 1, 6, 6)
    net.inputs["conv"].set(4, PLACES[0])
    net.inputs["head"].set(FLOAT_BITS, PLACES[0])
    out = net.run(weights, x)
    expected = real(qkernels.fake_quant(x, bits=4))
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    upstream = torch.randn_like(out)
    ours = torch.autograd.grad(out, list(weights.values()), upstream)
    theirs = torch.autograd.grad(expected, list(real.parameters()), upstream)
    for left, right in zip(ours, theirs, strict=True):
        assert torch.equal(left, right)
    assert all(p.is_meta for p in net.skeleton.parameters()) and not list(net.skeleton.buffers())


def test_a_parameter_that_no_graph_holds_is_refused():
    class Scaled(Small):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return super().forward(x) * self.gain

    with torch.device("meta"):
        model = Scaled()
    with pytest.raises(ValueError, match=r"^ghn: network must be one .*, got gain$"):
        prepare_net(model, Quantizer())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "ste"}, "ghn: kind must be one of none, sim, noise, paper, got 'ste'"),
        ({"method": "mse"}, "ghn: method must be one of minmax, percentile, got 'mse'"),
        ({"percentile": 99.0}, "ghn: percentile must be None unless .*, got 99.0"),
        (
            {"method": "percentile", "percentile": 40.0},
            r"ghn: percentile must be in \(50, 100\], got 40.0",
        ),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Quantizer(**settings)
