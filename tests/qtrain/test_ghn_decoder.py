"""The heads against their formulas, one weight at a time."""

import logging
import math

import pytest
import torch
from qtrain.ghn.config import GhnConfig
from qtrain.ghn.decoder import LowRankHead, Target, TiledHead, bounded, fan_in_gain
from torch.nn import functional as F

WIDTH, CHANNELS, SIZE, CLASSES = 8, 8, 5, 3
SETTINGS = {
    "width": WIDTH,
    "heads": 2,
    "max_shape": (CHANNELS, CHANNELS, SIZE, SIZE),
    "classes": CLASSES,
}
EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64, sums in another order
WEIGHTS = [(3, 5, 3, 3), (8, 8, 5, 5), (20, 9, 1, 1), (6, 1, 3, 3), (4, 19, 1, 3), (5, 3, 2, 4)]


def make_head(head="tiled", encoder="graphormer", **settings):
    torch.manual_seed(0)
    config = GhnConfig(**{**SETTINGS, "head": head, "encoder": encoder, **settings})
    made = (TiledHead if head == "tiled" else LowRankHead)(config).double()
    for parameter in made.parameters():
        # the graphormer's start gives no bias, and a formula without its bias would pass
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def features(count):
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(1)).double()


def naive_block(head, x, kernel):
    """GHN-2 and 3 for one node: the whole [C, C] weight at every place, then the crop."""
    k_h, k_w = kernel
    start_h, start_w = (SIZE // 2 - k // 2 if head.centred else 0 for k in kernel)
    hidden = head.spread(x).relu().view(4 * WIDTH, SIZE, SIZE)
    hidden = hidden[:, start_h : start_h + k_h, start_w : start_w + k_w]
    hidden = F.conv2d(hidden, head.hidden.weight[:, :, None, None], head.hidden.bias).relu()
    block = F.conv2d(hidden, head.block.weight[:, :, None, None], head.block.bias)
    return block.view(CHANNELS, CHANNELS, k_h, k_w)


def naive_tiled(block, shape):
    out = torch.arange(shape[0]) % block.shape[0]
    inputs = torch.arange(shape[1]) % block.shape[1]
    return block[out][:, inputs]


@pytest.mark.parametrize("encoder", ["graphormer", "gated"])
def test_weights_of_the_naive_decoder(encoder):
    """Buckets, shared kernels and cropped layers change nothing; the encoder decides the crop."""
    head, x = make_head(encoder=encoder), features(2 * len(WEIGHTS))
    targets = {Target("weight", s, 0.5 + i): [i, i + len(WEIGHTS)] for i, s in enumerate(WEIGHTS)}
    decoded = head(x, targets)
    for target, rows in targets.items():
        for row, value in zip(rows, decoded[target], strict=True):
            block = naive_block(head, x[row], target.shape[2:])
            expected = target.gain * naive_tiled(block, target.shape)
            torch.testing.assert_close(value, expected, **EXACT)


def test_last_layer_and_vectors_of_the_naive_decoder():
    head, x = make_head(), features(4)
    weight = Target("classifier", (CLASSES, 19, 1, 1), 0.25)
    bias, vector = Target("class_bias", (CLASSES, 1, 1, 1)), Target("vector", (11, 1, 1, 1))
    decoded = head(x, {weight: [2], bias: [0], vector: [3, 1]})

    block = naive_block(head, x[2], (1, 1))[:, :, 0, 0].relu()
    rows = head.classes.weight @ block + head.classes.bias[:, None]
    expected = 0.25 * naive_tiled(rows, (CLASSES, 19))
    torch.testing.assert_close(decoded[weight][0, :, :, 0, 0], expected, **EXACT)

    both = head.class_bias(head.vectors(x[0]).view(2, CHANNELS).relu())
    torch.testing.assert_close(decoded[bias][0, 1], torch.tanh(0.2 * both[1]), **EXACT)
    for row, value in zip((3, 1), decoded[vector], strict=True):
        raw = head.vectors(x[row]).view(2, CHANNELS)[:, torch.arange(11) % CHANNELS]
        torch.testing.assert_close(value[0], 2 * torch.sigmoid(raw[0] / 2), **EXACT)
        torch.testing.assert_close(value[1], torch.tanh(0.2 * raw[1]), **EXACT)


def test_channels_repeat_with_the_period_of_the_head():
    target = Target("weight", (3 * CHANNELS, 2 * CHANNELS + 1, 3, 3))
    weight = make_head()(features(1), {target: [0]})[target][0]
    assert torch.equal(weight[CHANNELS:], weight[:-CHANNELS])
    assert torch.equal(weight[:, CHANNELS:], weight[:, :-CHANNELS])
    first = weight[:CHANNELS, :CHANNELS].flatten(1)
    assert (torch.cdist(first, first) > 0.1).sum() == CHANNELS * (CHANNELS - 1)


def test_four_times_the_fan_in_halves_the_deviation():
    narrow, wide = (6, CHANNELS, 3, 3), (6, 4 * CHANNELS, 3, 3)
    targets = {Target("weight", s, fan_in_gain(s, depthwise=False)): [0, 1] for s in (narrow, wide)}
    small, large = make_head()(features(2), targets).values()
    ratio = large.std(correction=0) / small.std(correction=0)
    assert ratio.item() == pytest.approx(0.5, rel=1e-12)


def test_gain():
    assert fan_in_gain((64, 32, 3, 3), depthwise=False) == math.sqrt(2 / 288)
    assert fan_in_gain((64, 1, 3, 3), depthwise=True) == math.sqrt(1 / 9)
    assert fan_in_gain((64, 1, 3, 3), depthwise=False) == math.sqrt(2 / 9)
    assert fan_in_gain((64, 32, 1, 7), depthwise=False) == math.sqrt(1 / 224)
    assert fan_in_gain((64, 32, 7, 1), depthwise=False) == math.sqrt(2 / 224)


def test_vectors_lie_in_their_ranges():
    raw = torch.arange(-50, 51).double() * 0.8
    weight, bias = bounded(torch.stack((raw, raw))[None])[0]
    assert (weight > 0).all() and (weight < 2).all() and weight[50] == 1
    assert (bias > -1).all() and (bias < 1).all() and bias[50] == 0
    assert (weight.diff() > 0).all() and (bias.diff() > 0).all()


def test_a_kernel_larger_than_the_heads_is_interpolated_and_said_once(caplog):
    head, x = make_head(), features(2)
    large, wide = Target("weight", (4, 3, 9, 9)), Target("weight", (4, 3, 3, 9))
    with caplog.at_level(logging.WARNING, "qtrain"):
        decoded = head(x, {large: [0], wide: [1]})
        head(x, {large: [1]})
    for target, kernel in ((large, (SIZE, SIZE)), (wide, (3, SIZE))):
        row = 0 if target == large else 1
        block = naive_block(head, x[row], kernel)[:4, :3]
        expected = F.interpolate(block, target.shape[2:], mode="bilinear")
        torch.testing.assert_close(decoded[target][0], expected, **EXACT)
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "ghn: a kernel of 9 x 9 is interpolated",
        "ghn: a kernel of 3 x 9 is interpolated",
    ]


def test_low_rank_weights_are_products():
    head, x = make_head("low_rank", rank=2, factor_size=60), features(3)
    weight, vector = Target("weight", (12, 10, 2, 3), 0.5), Target("vector", (11, 1, 1, 1))
    decoded = head(x, {weight: [2, 0], vector: [1]})
    for row, value in zip((2, 0), decoded[weight], strict=True):
        left, right = head.factor(head.core(x[row]).view(2, 2, 2).relu())  # [rank, 60] each
        for place in ((0, 0, 0, 0), (11, 9, 1, 2), (3, 7, 1, 0)):
            a, b, p, q = place
            expected = 0.5 * (left[:, 2 * a + p] * right[:, 3 * b + q]).sum() / math.sqrt(2)
            torch.testing.assert_close(value[place], expected, **EXACT)
        matrix = value.transpose(1, 2).flatten(2).flatten(0, 1)
        assert torch.linalg.matrix_rank(matrix) == 2
        assert not torch.allclose(value[CHANNELS:], value[:-CHANNELS], rtol=1e-2)
    left, right = head.factor(head.core(x[1]).view(2, 2, 2).relu())
    product = (left[:, :11, None] * right[:, None, :2]).sum(0).T / math.sqrt(2)
    torch.testing.assert_close(decoded[vector], bounded(product[None]), **EXACT)


def test_a_weight_too_large_for_the_factors():
    head = make_head("low_rank", factor_size=60)
    with pytest.raises(
        ValueError, match=r"weight of \(31, 4, 2, 1\) must be .* at most 60 .* got 62"
    ):
        head(features(1), {Target("weight", (31, 4, 2, 1)): [0]})


@pytest.mark.parametrize("head", ["tiled", "low_rank"])
def test_weights_of_nearly_the_same_size_do_not_mix(head):
    """The gradient of one node's weight is of that node alone."""
    x = features(6).requires_grad_()
    targets = {Target("weight", (5, 5 + i, 3, 3)): [i, i + 3] for i in range(3)}
    decoded = make_head(head)(x, targets)
    value = decoded[Target("weight", (5, 6, 3, 3))][1]
    grad = torch.autograd.grad(value.square().mean(), x)[0]
    assert grad.abs().amax(1).nonzero().flatten().tolist() == [4]
