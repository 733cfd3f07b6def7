"""What init-study is made of: the initialisers' laws, the blocks, ranges by hand."""

import math

import pytest
import torch
from qtrain.init_blocks import BLOCKS, BlockNet
from qtrain.init_outcome import layer_ranges
from qtrain.initialisers import INITIALISERS, fans, initialise
from qtrain.ptq import ptq_qconfig, quantize_after_training
from scipy.stats import kstest
from torch import nn

from qkernels import fake_quant
from qkernels.nn import QuantLayer

NET = {"widths": [4, 8], "strides": [2, 2]}
# standard deviations for a 3x3 convolution of 64 to 32 channels: fan-in 576, fan-out 288
STDS = {"small": 0.01, "medium": 0.1, "large": 1.0, "he": 0.0589256, "glorot": 0.0481125}


@pytest.mark.parametrize("size", STDS)
@pytest.mark.parametrize("law", ["normal", "uniform"])
def test_laws(law, size):
    name = f"{size}_{law}" if size in ("he", "glorot") else f"{law}_{size}"
    layer = nn.Conv2d(64, 32, 3)
    initialise(layer, name, seed=0)
    values, std = layer.weight.detach().flatten().double(), STDS[size]
    assert values.std().item() == pytest.approx(std, rel=0.02)
    assert abs(values.mean().item()) < 4 * std / math.sqrt(len(values))
    bound = math.sqrt(3) * std
    if law == "uniform":
        assert 0.999 * bound < values.abs().max().item() <= bound * (1 + 1e-6)
        assert kstest(values.numpy(), "uniform", (-bound, 2 * bound)).pvalue > 1e-3
    else:
        assert values.abs().max().item() > 3.5 * std
        assert kstest(values.numpy(), "norm", (0, std)).pvalue > 1e-3
    assert not layer.bias.any()


def test_there_are_ten_initialisers():
    assert len(INITIALISERS) == 10 == 2 * len(STDS)


def test_fans_know_of_groups():
    assert fans(nn.Conv2d(64, 32, 3)) == (576, 288)
    assert fans(nn.Conv2d(64, 64, 3, groups=64)) == (9, 9)
    assert fans(nn.Conv2d(8, 16, 5, groups=2)) == (100, 200)
    assert fans(nn.Linear(30, 20)) == (30, 20)
    # of 9 + 9 and of 9: what torch.nn.init gives the depthwise one is 0.055 and 0.471
    depthwise = nn.Conv2d(2048, 2048, 3, groups=2048)
    initialise(depthwise, "glorot_normal", seed=0)
    assert depthwise.weight.std().item() == pytest.approx(math.sqrt(2 / 18), rel=0.02)


def test_streams_are_named_by_seed_and_layer():
    def weights(name, seed):
        torch.manual_seed(3)  # nothing depends on it
        net = BlockNet(1, 10, "separable")
        initialise(net, name, seed)
        assert all((n.weight == 1).all() for n in net.modules() if isinstance(n, nn.BatchNorm2d))
        return {
            n: m.weight for n, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))
        }

    small, large, other = (
        weights(*of) for of in (("normal_small", 1), ("normal_large", 1), ("normal_small", 2))
    )
    assert len(small) == 8
    for name, weight in small.items():
        torch.testing.assert_close(100 * weight, large[name])
        assert not torch.equal(weight, other[name])
    # two layers of one shape
    pair = weights("normal_small", 1)
    assert not torch.equal(pair["blocks.1.depthwise.0"], pair["blocks.2.depthwise.0"])


def convolutions(module):
    return [m for m in module.modules() if isinstance(m, nn.Conv2d)]


def shapes_of(block):
    return [
        (c.kernel_size[0], c.in_channels, c.out_channels, c.groups, c.stride[0])
        for c in convolutions(block)
    ]


def test_blocks_are_what_they_are_named_for():
    made = {name: make(8, 16, 2, True) for name, make in BLOCKS.items()}
    assert shapes_of(made["conv"]) == [(3, 8, 16, 1, 2)]
    assert shapes_of(made["separable"]) == [(3, 8, 8, 8, 2), (1, 8, 16, 1, 1)]
    shortcut = (1, 8, 16, 1, 2)
    assert shapes_of(made["residual"]) == [(3, 8, 16, 1, 2), (3, 16, 16, 1, 1), shortcut]
    # the inner width is a quarter of the outputs
    inside = [(1, 8, 4, 1, 1), (3, 4, 4, 1, 2), (1, 4, 16, 1, 1)]
    assert shapes_of(made["bottleneck"]) == [*inside, shortcut]


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("batchnorm", [True, False])
def test_blocks_have_batchnorm_or_biases(name, batchnorm):
    block = BLOCKS[name](8, 16, 2, batchnorm)
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == (len(convolutions(block)) if batchnorm else 0)
    assert all((c.bias is None) == batchnorm for c in convolutions(block))


@pytest.mark.parametrize("name", BLOCKS)
def test_shortcuts(name):
    block = BLOCKS[name](8, 8, 1, False)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
    x = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    kept = x.relu() if name in ("residual", "bottleneck") else torch.zeros_like(x)
    assert torch.equal(block(x), kept)


def worn_net(block, batchnorm):
    """A net whose BatchNorm has statistics and factors of its own."""
    net = BlockNet(1, 10, block, batchnorm, **NET)
    initialise(net, "he_normal", seed=0)
    random = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data.uniform_(0.2, 2.0, generator=random)
    return net.eval()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("batchnorm", [True, False])
def test_ranges_are_those_by_hand(block, batchnorm):
    net = worn_net(block, batchnorm)
    x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    layers = {n: m for n, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    inputs = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0]))
    with torch.no_grad():
        net(x)
    seen = {name: torch.cat(some) for name, some in inputs.items()}
    found = layer_ranges(net, [x[:5], x[5:]])
    assert [layer.layer for layer in found] == list(layers)
    for layer in found:
        module = layers[layer.layer]
        weight = module.weight.detach().double()
        if batchnorm and isinstance(module, nn.Conv2d):
            norm = net.get_submodule(layer.layer.removesuffix("0") + "1")
            factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            weight = weight * factor.detach()[:, None, None, None]
        channels = weight.abs().flatten(1).amax(1)
        entered = seen[layer.layer].double()
        by_hand = {
            "weight": channels.max(),
            "input": entered.abs().max(),
            "share": (channels / channels.max()).mean(),
            "weight_peak": channels.max() / weight.square().mean().sqrt(),
            "input_peak": entered.abs().max() / entered.square().mean().sqrt(),
        }
        measured = {name: getattr(layer, name) for name in by_hand}
        assert measured == pytest.approx({k: v.item() for k, v in by_hand.items()}, rel=1e-5)


def test_layers_of_zeros_have_ranges():
    net = worn_net("conv", False)
    nn.init.zeros_(net.blocks[0].conv[0].weight)
    nn.init.zeros_(net.blocks[0].conv[0].bias)
    dead, after = layer_ranges(net, [torch.ones(2, 1, 8, 8)])[1:3]
    assert (dead.weight, dead.share, dead.weight_peak) == (0.0, 1.0, 1.0)
    assert (after.input, after.input_peak) == (0.0, 1.0)


def test_scales_of_weights_per_tensor():
    net = worn_net("separable", True)
    x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    for coarse, axis in ((True, None), (False, 0)):
        config = ptq_qconfig("minmax", 4, 4, first_last_bits=None, per_tensor=coarse)
        layers = [
            m
            for m in quantize_after_training(net, config, [x]).modules()
            if isinstance(m, QuantLayer)
        ]
        assert len(layers) == 6
        for layer in layers:
            quantized = layer.weight_fake_quant(layer.weight)
            assert torch.equal(
                quantized, fake_quant(layer.weight, bits=4, axis=axis, symmetric=True)
            )


def test_unknown_names():
    with pytest.raises(ValueError, match=r"initialiser must be one of normal_small, .*got 'lecun'"):
        initialise(nn.Linear(2, 2), "lecun", seed=0)
    with pytest.raises(ValueError, match=r"models: block must be one of conv, .*got 'dense'"):
        BlockNet(1, 10, "dense")
