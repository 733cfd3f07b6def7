"""Quantization errors against the laws they are modelled by: known errors, samples, the command."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from qtrain.error_model import (
    LayerErrors,
    Reservoir,
    error_model,
    from_gauss,
    summarize_inputs,
    summarize_weight,
    summary,
)
from qtrain.error_report import UNIFORM_FROM_GAUSS, plot_histograms, rich_table
from qtrain.models import Cnn
from qtrain.progress import Track
from qtrain.ptq import ptq_qconfig, quantize_after_training
from rich.console import Console
from torch import nn

from qkernels import error_stats
from qkernels.nn import QConfig, QuantSpec, calibrate, prepare

# no bar, and all layers alike
PLAIN = {"track": Track(1, "", quiet=True), "first_last_bits": None}


def rng(seed=0):
    return np.random.default_rng(seed)


def a_model(seed=0):
    torch.manual_seed(seed)
    return Cnn(widths=(8, 16), strides=(1, 2))


def some_batches(seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 1, 8, 8, generator=g), torch.zeros(n)) for n in (40, 24)]


# the figures, where the errors are known


def test_uniform_weights_have_uniform_errors():
    torch.manual_seed(0)
    # long channels: the greatest weight of each has an error of half a step by construction
    layer = nn.Linear(4096, 4)
    nn.init.uniform_(layer.weight, -1, 1)
    model = nn.Sequential(layer)
    (found,) = error_model(model, [torch.randn(4, 4096)], bits=[4], **PLAIN)
    e, n = found.weight, 4 * 4096
    assert (e.count, e.sampled, e.bits) == (n, n, 4)
    assert e.uniform < 1.6 / math.sqrt(n)
    assert e.gauss == pytest.approx(UNIFORM_FROM_GAUSS, abs=0.008)
    assert e.gauss_channels == pytest.approx(UNIFORM_FROM_GAUSS, abs=0.008)
    assert e.kurtosis == pytest.approx(-1.2, abs=0.03)
    # 15 steps in [-1, 1]: signal 1/3, noise (2/15)^2 / 12
    assert e.sqnr == pytest.approx(10 * math.log10(15**2), abs=0.1)
    assert e.zeros == 0 and sum(e.histogram) == n
    # Gaussian inputs over 16 steps: nothing clipped, and uniform too
    assert found.activation.uniform < 0.03 and found.activation.clip_rate == 0


def test_the_constant_is_the_distance():
    x = np.linspace(-0.5, 0.5, 20001)
    assert from_gauss(x) == pytest.approx(UNIFORM_FROM_GAUSS, abs=1e-4)


def test_weights_on_the_grid_have_no_errors():
    """Zeros, and no NaN anywhere, in the figures, the tables and the pictures."""
    layer = nn.Linear(16, 4, bias=False)
    codes = torch.arange(64).reshape(4, 16) % 15 - 7
    with torch.no_grad():
        layer.weight.copy_(codes / 8)
    spec = QuantSpec(4, axis=0, symmetric=True, narrow_range=True)
    model = prepare(nn.Sequential(layer), QConfig(spec, None, first_last_bits=None))
    e = summarize_weight(model[0], 1000, rng())
    assert (e.mean, e.std, e.least, e.greatest, e.mean_abs, e.zeros) == (0, 0, 0, 0, 0, 1)
    nothing = (e.gauss, e.gauss_channels, e.uniform, e.gauss_rest, e.uniform_rest, e.kurtosis)
    assert nothing == (None,) * 6 and e.sqnr is None and e.histogram == []
    assert e.clip_rate == 0
    # and with one weight off the grid there are figures again
    with torch.no_grad():
        layer.weight[0, 3] += 0.03
    model = prepare(nn.Sequential(layer), QConfig(spec, None, first_last_bits=None))
    e = summarize_weight(model[0], 1000, rng())
    assert e.zeros == 63 / 64 and e.mean_abs == pytest.approx(0.03 / 64) and e.gauss > 0.4


def test_weights_of_dorefa_are_refused():
    spec = QuantSpec(2, kind="dorefa_weight")
    model = prepare(nn.Sequential(nn.Linear(4, 3)), QConfig(spec, None, first_last_bits=None))
    with pytest.raises(ValueError, match="weight quantizer must be of kind plain, got dorefa_w"):
        summarize_weight(model[0], 1000, rng())


def test_a_layer_of_zeros(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    found = error_model(model, [torch.randn(8, 4)], bits=[2], **PLAIN)
    assert [row.ratio for row in found] == [None, None]
    assert found[1].activation.zeros == 1 and found[1].activation.uniform is None
    assert "NaN" not in json.dumps([asdict(row) for row in found])
    plot_histograms(tmp_path / "x.png", found)
    console = Console(record=True, width=100, quiet=True)
    console.print(rich_table(found, "zeros"))


def test_gaussian_errors_are_near_the_gaussian():
    n = 40000
    e = 0.1 + 0.02 * rng().standard_normal(n)
    found = summary(np.ones(n), e, np.array(1.0), 0.0, 4, n)
    assert found.gauss < 1.0 / math.sqrt(n) and abs(found.kurtosis) < 0.1
    assert found.uniform > 0.4
    assert found.mean == pytest.approx(0.1, abs=5e-4) and found.std == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("transposed", [False, True])
def test_channels_are_standardized_one_by_one(transposed):
    """Channels of sizes 1 and 100: together far from any Gaussian, each uniform. Those of a
    transposed convolution are in dim 1."""
    torch.manual_seed(2)
    layer = nn.ConvTranspose1d(2048, 4, 2) if transposed else nn.Linear(4096, 4)
    nn.init.uniform_(layer.weight, -1, 1)
    with torch.no_grad():
        layer.weight.movedim(1 if transposed else 0, 0)[2:] *= 100
    x = torch.randn(2, 2048, 3) if transposed else torch.randn(4, 4096)
    (found,) = error_model(nn.Sequential(layer), [x], bits=[4], **PLAIN)
    assert found.weight.gauss > 0.2
    assert found.weight.gauss_channels == pytest.approx(UNIFORM_FROM_GAUSS, abs=0.01)
    assert found.weight.uniform < 0.015


def test_channels_are_centred():
    """Weights that lie beside the grid: one channel's errors are -0.25 and a little, the other's
    0.25. Each less its mean is uniform, and Gaussian models of both must be shifted."""
    torch.manual_seed(0)
    codes = torch.arange(4096) % 13 - 6.0
    layer = nn.Linear(4096, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(codes + 0.2 * (torch.rand(2, 4096) - 0.5))
        layer.weight[0] += 0.25
        layer.weight[1] -= 0.25
        layer.weight[:, 0] = 7  # the step is 1
    spec = QuantSpec(4, axis=0, symmetric=True, narrow_range=True)
    model = prepare(nn.Sequential(layer), QConfig(spec, None, first_last_bits=None))
    e = summarize_weight(model[0], 10**6, rng())
    assert e.mean == pytest.approx(0, abs=1e-3) and e.std == pytest.approx(0.257, abs=0.002)
    assert e.gauss > 0.2 and e.gauss_channels == pytest.approx(UNIFORM_FROM_GAUSS, abs=0.015)
    # drawn so, too: one hill of standardized errors, but for the two weights of 7
    assert sum(e.histogram) == e.sampled
    inner = np.array(e.histogram)[np.linspace(*e.span, len(e.histogram)) ** 2 < 3.5]
    assert inner.sum() == e.sampled - 2


def test_channels_without_variance_are_left_out():
    spec = QuantSpec(4, axis=0, symmetric=True, narrow_range=True)
    layer = nn.Linear(64, 2, bias=False)
    with torch.no_grad():
        layer.weight[0] = torch.arange(64) % 15 - 7.0
    model = prepare(nn.Sequential(layer), QConfig(spec, None, first_last_bits=None))
    e = summarize_weight(model[0], 10**6, rng())
    assert e.sampled == 128 and sum(e.histogram) == 64


def test_rest_leaves_out_exact_zeros():
    """Behind a ReLU half of the inputs is 0 and has no error."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    found = error_model(model, [torch.randn(512, 64)], bits=[8], **PLAIN)
    behind = found[1].activation
    assert behind.zeros == pytest.approx(0.5, abs=0.05)
    assert behind.uniform == pytest.approx(behind.zeros / 2, abs=0.03)
    assert behind.uniform_rest < 0.02
    assert behind.gauss > 0.2 and behind.gauss_rest == pytest.approx(UNIFORM_FROM_GAUSS, abs=0.015)


# agreement with qkernels


def all_errors(model, batches, name):
    """(stats of the layer's inputs, of its weight) by error_stats over everything."""
    layer = model.get_submodule(name)
    inputs = []
    hook = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        for x, _ in batches:
            model(x)
    hook.remove()
    x = torch.cat([part.flatten() for part in inputs])
    quantizer, weight = layer.input_fake_quant, layer.weight.detach()
    of_input = error_stats(x, *quantizer.qparams(), bits=quantizer.spec.bits)
    spec = layer.weight_fake_quant.spec
    rows = error_stats(weight, bits=spec.bits, axis=0, symmetric=True, method=spec.method)
    return of_input, rows, x.numel()


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("fold", [True, False])
def test_agreement_with_error_stats(method, fold):
    batches = some_batches()
    how = {"method": method, "fold": fold, "bits": [3], "samples": 10**6}
    found = error_model(a_model(), batches, **how, **PLAIN)
    few = error_model(a_model(), batches, **{**how, "samples": 500}, **PLAIN)
    qconfig = ptq_qconfig(method, 3, 3, first_last_bits=None)
    quantized = quantize_after_training(a_model(), qconfig, batches, fold=fold)
    assert [row.layer for row in found] == ["features.0.0", "features.1.0", "head"]
    for row, part in zip(found, few, strict=True):
        of_input, of_weight, count = all_errors(quantized, batches, row.layer)
        a, w = row.activation, row.weight
        assert a.count == a.sampled == count and w.count == w.sampled
        assert a.mean == pytest.approx(of_input.mean.item(), abs=1e-6)
        assert a.std == pytest.approx(of_input.std.item(), rel=1e-4)
        assert a.clip_rate == pytest.approx(of_input.clip_rate.item())
        assert w.mean == pytest.approx(of_weight.mean.mean().item(), abs=1e-6)
        second = of_weight.mean_square.mean().item()
        assert w.std == pytest.approx(math.sqrt(second - w.mean**2), rel=1e-4)
        assert w.clip_rate == pytest.approx(of_weight.clip_rate.mean().item())
        # a sample of 500: the same within its error
        for whole, sample in ((a, part.activation), (w, part.weight)):
            assert (sample.sampled, sample.count) == (min(500, whole.count), whole.count)
            assert abs(sample.mean - whole.mean) < 4 * whole.std / math.sqrt(500)
            assert sample.std == pytest.approx(whole.std, rel=0.2)


def test_inputs_are_those_of_the_quantized_model():
    batches = some_batches()
    qconfig = ptq_qconfig("minmax", 2, 2, first_last_bits=None)
    quantized = quantize_after_training(a_model(), qconfig, batches)
    seen = Reservoir(10**6, rng())
    float_model = a_model().eval()
    float_model.head.register_forward_pre_hook(lambda module, args: seen.add(args[0]))
    with torch.no_grad():
        for x, _ in batches:
            float_model(x)
    float_inputs = summarize_inputs(quantized.head, seen)
    found = error_model(a_model(), batches, bits=[2], samples=10**6, **PLAIN)[-1].activation
    of_input, _, _ = all_errors(quantized, batches, "head")
    assert found.std == pytest.approx(of_input.std.item(), rel=1e-4)
    assert abs(found.std / float_inputs.std - 1) > 0.01


def test_other_kinds_of_layers_and_ranges():
    """A transposed convolution has its channels in dim 1; weights' ranges may be dynamic."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3))
    x = torch.randn(8, 4, 5, 5)
    (found,) = error_model(model, [x], bits=[4], **PLAIN)
    weight = model[0].weight.detach()
    stats = error_stats(weight, bits=4, axis=1, symmetric=True)
    assert found.weight.mean == pytest.approx(stats.mean.mean().item(), abs=1e-7)
    prepared = prepare(model, QConfig.minmax(4, 4, first_last_bits=None))
    calibrate(prepared, [x])
    assert prepared[0].weight_fake_quant.spec.dynamic
    assert summarize_weight(prepared[0], 10**6, rng()) == found.weight


# the function's arguments


def test_same_seed_same_figures_and_the_model_is_left_alone():
    model, batches = a_model().train(), some_batches()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    how = {"bits": (4, 2), "samples": 300, **PLAIN}
    first = error_model(model, batches, **how)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert first == error_model(model, iter(batches), **how)
    assert first != error_model(model, batches, seed=1, **how)
    # a width alone gives what it gives beside others
    assert first[3:] == error_model(model, batches, **{**how, "bits": (2,)})
    assert [row.bits for row in first] == [4, 4, 4, 2, 2, 2]
    assert LayerErrors.from_dict(json.loads(json.dumps(asdict(first[0])))) == first[0]


def test_batches_of_any_form():
    x, y = some_batches()[0]
    forms = [(x, y), [x], x, {"x": x, "y": y}]
    found = [error_model(a_model(), [form], bits=[4], **PLAIN) for form in forms]
    assert all(rows == found[0] for rows in found)


def test_first_last_bits_and_a_layer_that_is_never_called(tmp_path):
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.idle, self.two = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.two(self.one(x))

    found = error_model(Lazy(), [torch.randn(16, 8)], bits=[2], **{**PLAIN, "first_last_bits": 6})
    assert [row.weight.bits for row in found] == [6, 2, 6]
    assert found[1].activation is None and found[1].ratio is None
    default = error_model(Lazy(), [torch.randn(16, 8)], bits=[2], track=PLAIN["track"])
    assert [row.weight.bits for row in default] == [8, 2, 8]
    assert found[0].ratio == found[0].activation.mean_abs / found[0].weight.mean_abs
    plot_histograms(tmp_path / "x.png", found)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"bits": [0]}, "bits must be .* got 0"),
        ({"bits": [4, 17]}, "bits must be .* got 17"),
        ({"bits": []}, "bits must be some widths, each once, got "),
        ({"bits": [4, 4]}, r"bits must be some widths, each once, got \[4, 4\]"),
        ({"samples": 1}, "samples must be an int of at least 2, got 1"),
        ({"method": "lsq"}, "method must be one of .* got 'lsq'"),
        ({"percentile": 99.0}, "percentile must be None"),
        ({"batches": []}, "must yield at least one batch"),
    ],
)
def test_bad_arguments(wrong, text):
    arguments = {"batches": some_batches(), **wrong}
    with pytest.raises(ValueError, match=text):
        error_model(a_model(), arguments.pop("batches"), **arguments, **PLAIN)


def test_a_model_that_is_quantized_already():
    prepared = prepare(a_model(), QConfig.minmax(4, 4))
    with pytest.raises(ValueError, match="must be a float model"):
        error_model(prepared, some_batches(), **PLAIN)


# the sample


def test_small_streams_are_kept_whole():
    held = Reservoir(10, rng())
    for part in (torch.arange(4.0), torch.empty(0), torch.arange(4.0, 9.0).double()):
        held.add(part)
    assert held.values.tolist() == list(range(9)) and held.count == 9


def test_every_element_is_as_likely():
    """20 of 100 that come in unequal parts, 4000 times: each is in a fifth of the samples, without
    repetition, and so is each pair at its rate."""
    draws = rng(5)
    hits, together, times = np.zeros(100), 0, 4000
    for _ in range(times):
        held = Reservoir(20, draws)
        for part in torch.arange(100).split([3, 30, 1, 50, 16]):
            held.add(part)
        values = held.values.numpy()
        assert len(np.unique(values)) == 20
        hits[values] += 1
        together += int(np.isin([2, 90], values).all())
    sigma = math.sqrt(times * 0.2 * 0.8)
    assert np.abs(hits - 0.2 * times).max() < 4.5 * sigma
    assert np.square((hits - 0.2 * times) / sigma).mean() == pytest.approx(1, abs=0.5)
    pair = times * (20 * 19) / (100 * 99)
    assert abs(together - pair) < 4 * math.sqrt(pair)
