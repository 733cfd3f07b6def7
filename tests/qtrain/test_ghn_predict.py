"""Predicted weights for a model of one's own: in Python, and as a file that ptq and qat take."""

import logging
import subprocess
import sys

import pytest
import qtrain.ghn
import torch
from ghn_graphs import Branches, branches_graph
from qtrain.cli import app, ghn_use
from qtrain.data import load_dataset
from qtrain.ghn import prediction
from qtrain.ghn.checkpoint import ghn_digest, save_ghn
from qtrain.ghn.config import GhnConfig, ghn2
from qtrain.ghn.graph import build_graph
from qtrain.ghn.model import Ghn
from qtrain.ghn.prediction import as_ghn, coverage, predict, predicted_model
from qtrain.loop import evaluate
from qtrain.models import MODELS, Cnn, build_model
from qtrain.ptq import calibration_images, ptq_qconfig
from qtrain.ptq_run import PtqOptions, run_ptq
from qtrain.recipe import TrainConfig
from qtrain.rundir import RunDir, load_model_file
from qtrain.source import FloatSource
from test_ghn_checkpoint import public_state
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

assert ghn_use.app is app  # its import adds the commands
SMALL = {"width": 16, "heads": 2, "layers": 1, "max_shape": (4, 4, 5, 5), "classes": 10}
CNN = ["--set", "model_options.widths=[4,12]", "--set", "model_options.strides=[2,2]"]


def make_ghn(**settings):
    torch.manual_seed(0)
    return Ghn(GhnConfig(**{**SMALL, **settings}))


def images(count=40, seed=0):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("ghn") / "run"
    save_ghn(make_ghn(), path)
    return path


def test_weights_load_and_are_the_ghns():
    ghn, model = make_ghn(), Branches(classes=10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = predict(model, ghn)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    (expected,) = ghn.predict([branches_graph(classes=10)], skeletons=[model])
    assert weights.keys() == dict(model.named_parameters()).keys()
    keys = model.load_state_dict(weights, strict=False)
    assert not keys.unexpected_keys
    assert set(keys.missing_keys) == {"bn.running_mean", "bn.running_var"}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name])
        weight = weights[name]
        assert not weight.requires_grad
        assert weight.untyped_storage().nbytes() == weight.nbytes  # no view of a larger block


def test_weights_are_where_the_model_is():
    ghn = make_ghn()
    plain = predict(Branches(), ghn)
    with torch.device("meta"):
        skeleton = Branches()
    meta, double = predict(skeleton, ghn), predict(Branches().double(), ghn)
    for name, weight in plain.items():
        assert meta[name].device.type == "cpu" and torch.equal(meta[name], weight)
        assert double[name].dtype == torch.float64 and torch.equal(double[name].float(), weight)
    with pytest.raises(ValueError, match=r"^ghn: model must be one with values"):
        predicted_model(skeleton, ghn)


def test_noise_parts_equal_channels():
    ghn, model = make_ghn(), Branches(width=8, classes=10)
    weights = predict(model, ghn)
    # channels c and c + 4 of weights, 16 of pointwise's outputs
    for name in ("stem.weight", "pointwise.weight", "depthwise.weight", "pointwise.bias"):
        assert torch.equal(weights[name][:4], weights[name][4:8])
    assert torch.equal(weights["flat.weight"][:, :4], weights["flat.weight"][:, 4:])
    shaken = predict(model, ghn, noise=0.05, seed=3)
    for name, weight in weights.items():
        if weight.ndim < 2:
            assert torch.equal(shaken[name], weight)
            continue
        numbers = (shaken[name] - weight) / (0.05 * weight.std(correction=0))
        assert numbers.unique().numel() == numbers.numel()
        if numbers.numel() >= 128:
            assert abs(numbers.mean()) < 0.3 and abs(numbers.std() - 1) < 0.2
    again, other = (predict(model, ghn, noise=0.05, seed=seed) for seed in (3, 4))
    assert all(torch.equal(again[name], value) for name, value in shaken.items())
    assert not torch.equal(other["stem.weight"], shaken["stem.weight"])

    class More(Branches):
        """Another parameter in front changes the noise of none."""

        def __init__(self):
            super().__init__(width=8, classes=10)
            self.first = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x):
            return super().forward(self.first(x))

    more, plain = (predict(More(), ghn, noise=noise, seed=3) for noise in (0.05, 0))
    numbers = [
        (loud - quiet) / quiet.std(correction=0)
        for loud, quiet in (
            (more["flat.weight"], plain["flat.weight"]),
            (shaken["flat.weight"], weights["flat.weight"]),
        )
    ]
    torch.testing.assert_close(*numbers, rtol=1e-4, atol=1e-5)


def test_rescaled_weights_have_hes_size_and_compute_the_same_before_batchnorm():
    ghn, model = make_ghn(), Cnn(1, 10, (4, 8), (2, 2))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-12  # which alone would tell them apart
    batches = [images(24)]
    plain, rescaled = (predict(model, ghn, rescale=rescale) for rescale in (False, True))
    for name, weight in plain.items():
        if weight.ndim < 2:
            assert torch.equal(rescaled[name], weight)
            continue
        size = (2 / weight[0].numel()) ** 0.5
        torch.testing.assert_close(rescaled[name].std(correction=0).item(), size)
        torch.testing.assert_close(
            rescaled[name] / size, weight / weight.std(correction=0), rtol=1e-4, atol=1e-6
        )
    nets = [predicted_model(model, ghn, batches, rescale=rescale) for rescale in (False, True)]
    features = [net.features(images(24)) for net in nets]
    torch.testing.assert_close(*features, rtol=1e-3, atol=1e-4)
    noisy = predict(model, ghn, noise=0.1, rescale=True)
    name = next(name for name, weight in plain.items() if weight.ndim == 4)
    drawn = (predict(model, ghn, noise=0.1)[name] - plain[name]) / plain[name].std(correction=0)
    after = (noisy[name] - rescaled[name]) / rescaled[name].std(correction=0)
    torch.testing.assert_close(after, drawn, rtol=1e-3, atol=1e-4)


def test_noise_lets_gradients_part_channels():
    """Without it, equal channels whose readers are equal stay equal under any training."""
    ghn, model = make_ghn(), Cnn(1, 10, (4, 8), (2, 2))
    for noise, stay in ((0, True), (0.05, False)):
        model.load_state_dict(predict(model, ghn, noise=noise), strict=False)
        F.cross_entropy(model(images()), torch.arange(40) % 10).backward()
        grad = model.features[1][0].weight.grad
        assert torch.allclose(grad[:4], grad[4:8], rtol=1e-4, atol=1e-7) is stay
        model.zero_grad()


def test_a_model_ready_to_use_has_statistics_of_the_batches():
    ghn, model = make_ghn(), Branches(classes=10)
    batches = [images(24), (images(24, seed=1), torch.zeros(24))]
    state = torch.random.get_rng_state()
    made = predicted_model(model, ghn, batches)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not made.training and model.training and not model.bn.num_batches_tracked
    weights = predict(model, ghn)
    outputs = [
        F.conv2d(x, weights["stem.weight"], padding=1).transpose(0, 1).flatten(1)
        for x in (batches[0], batches[1][0])
    ]
    mean = torch.stack([y.mean(1) for y in outputs]).mean(0)
    var = torch.stack([y.var(1) for y in outputs]).mean(0)
    torch.testing.assert_close(made.bn.running_mean, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made.bn.running_var, var, rtol=1e-5, atol=1e-6)
    assert torch.equal(made.head.weight, weights["head.weight"])
    fresh = predicted_model(model, ghn)
    assert torch.equal(fresh.bn.running_var, torch.ones(6))


def test_dropout_of_these_forwards_is_named_by_the_seed():
    class Dropping(Branches):
        def forward(self, x):
            return super().forward(F.dropout(x, 0.5, self.training))

    ghn, model = make_ghn(), Dropping()
    found = []
    for seed in (0, 0, 1):
        torch.rand(7)  # whatever else was drawn
        found.append(predicted_model(model, ghn, [images()], seed=seed).bn.running_mean)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_bits_are_told():
    ghn, model = make_ghn(bit_widths=(2, 4)), Branches()
    nn.init.normal_(ghn.embedding.bits.weight)
    told = [predict(model, ghn, bits=bits)["flat.weight"] for bits in (None, 2, {"flat": 4})]
    assert all(not torch.equal(a, b) for i, a in enumerate(told) for b in told[:i])
    with pytest.raises(ValueError, match="bits must be among 2, 4 and None, got 3"):
        predict(model, ghn, bits=3)


def test_names_at_hand_without_waiting_for_torch():
    assert qtrain.ghn.predict is prediction.predict
    assert qtrain.ghn.predicted_model is prediction.predicted_model
    assert qtrain.ghn.predict is prediction.predict  # importing the home has not hidden it
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        qtrain.ghn.nothing
    code = "import sys, qtrain.ghn; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_files_of_ghns(tmp_path, checkpoint):
    ours = as_ghn(checkpoint)
    assert torch.equal(ours.head.block.weight, make_ghn().head.block.weight)
    torch.manual_seed(0)
    public = Ghn(ghn2(width=16, max_shape=(4, 4, 3, 3)))
    torch.save({"state_dict": public_state(public)}, tmp_path / "ghn2.pt")
    weights = predict(Branches(), tmp_path / "ghn2.pt")
    expected = predict(Branches(), public)
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


class Odd(nn.Module):
    """A 7 x 7 kernel, 6 channels, a scale that no primitive has, and 10 classes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 7, padding=3)
        self.narrow = nn.Conv2d(6, 4, 1)
        self.scale = nn.Parameter(torch.full((4, 1, 1), 0.5))
        self.head = nn.Linear(4, 10)

    def forward(self, x):
        return self.head((self.scale * self.narrow(self.conv(x))).mean((2, 3)))


def test_what_becomes_of_each_parameter(caplog):
    model = Odd()
    graph = build_graph(model)
    found = coverage(model, graph, make_ghn().config)
    assert set(found.predicted) == {n for n, _ in model.named_parameters()} - {"scale"}
    assert found.tiled == ("conv.weight", "conv.bias", "narrow.weight")
    assert found.interpolated == ("conv.weight",)
    assert found.undecoded == ("scale",)
    low = coverage(model, graph, make_ghn(head="low_rank").config)
    assert (low.tiled, low.interpolated) == ((), ()) and low.undecoded == ("scale",)
    with caplog.at_level(logging.WARNING, logger="qtrain"):
        ghn = make_ghn()
        for _ in range(2):
            made = predicted_model(model, ghn, [images()])
    assert [r.message for r in caplog.records] == [
        "ghn: a kernel of 7 x 7 is interpolated, the head decodes up to 5 x 5"
    ]
    assert torch.equal(made.scale, model.scale)
    assert not torch.equal(made.conv.weight, model.conv.weight)


def call(command, *words):
    return CliRunner().invoke(app, [command, *map(str, words)])


def test_command_with_a_dataset(tmp_path, checkpoint):
    out = tmp_path / "new" / "cnn.safetensors"
    words = ["--model", "cnn", "--dataset", "digits", "--ghn", checkpoint, *CNN]
    words += ["--noise", "0.1", "--rescale", "--seed", "2", "--batchnorm-images", "100"]
    done = call("ghn-predict", *words, "--out", out)
    assert done.exit_code == 0, done.output
    state, meta = load_model_file(out)
    options = {"widths": [4, 12], "strides": [2, 2]}
    assert meta["train"] == {
        "dataset": "digits",
        "data_options": {},
        "model": "cnn",
        "model_options": options,
    }
    told = {"bits": None, "noise": 0.1, "rescale": True, "seed": 2, "batchnorm_images": 100}
    assert meta["predicted"] == {"ghn": ghn_digest(checkpoint), **told}
    # the file is the model, whole
    data = load_dataset("digits")
    model = build_model("cnn", channels=1, classes=10, size=8, options=options)
    batches = calibration_images(data, TrainConfig(seed=2, batch_size=256), 100)
    expected = predicted_model(model, checkpoint, batches, noise=0.1, rescale=True, seed=2)
    model.load_state_dict(state, strict=True)
    for name, value in expected.state_dict().items():
        assert torch.equal(value, state[name]), name
    scores = evaluate(model, data.test)
    assert meta["scores"] == scores
    assert f"float test accuracy: {100 * scores['test_accuracy']:.1f} %" in done.output
    assert "statistics of 100 training images of digits" in done.output
    assert "tiled (channels repeat from 4 x 4 on): 4 (features.1.0.weight, " in done.output
    # and ptq and qat start from it
    source = FloatSource.load(out)
    result = run_ptq(source, ptq_qconfig("minmax", 8, 8), tmp_path / "ptq", PtqOptions(64))
    assert result.run.metrics()[-1]["float_loss"] == scores["test_loss"]
    done = call("qat", out, "--out", tmp_path / "qat", "--epochs", "1", "--batch-size", "256")
    assert done.exit_code == 0, done.output
    # a file that is there stays, unless it is to be replaced; then it is the same
    before = out.read_bytes()
    refused = call("ghn-predict", *words, "--out", out)
    assert refused.exit_code == 2 and "out must be a new file" in refused.output
    assert call("ghn-predict", *words, "--out", out, "--overwrite").exit_code == 0
    assert out.read_bytes() == before


def test_command_without_a_dataset(tmp_path, checkpoint):
    out = tmp_path / "squeezenet.safetensors"
    words = ["--model", "torchvision:squeezenet1_1", "--ghn", checkpoint, "--out", out]
    done = call("ghn-predict", *words)
    assert done.exit_code == 0, done.output
    state, meta = load_model_file(out)
    assert meta["train"] == {"model": "torchvision/squeezenet1_1", "model_options": {}}
    assert "scores" not in meta
    model = build_model("torchvision/squeezenet1_1", channels=3, classes=1000, size=224)
    expected = predict(model, checkpoint)
    assert model.load_state_dict(state, strict=True) and expected.keys() == state.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert "predicted: 52 parameters of torchvision/squeezenet1_1" in done.output
    refused = call("ptq", out, "--out", tmp_path / "ptq")
    assert refused.exit_code == 2 and "name them with --dataset and --model" in refused.output


class Untraceable(nn.Module):
    def __init__(self, *_):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)

    def forward(self, x):
        y = self.conv(x)
        return y if float(y.detach().sum()) > 0 else -y


class WithoutPrimitive(nn.Module):
    def __init__(self, *_):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.act = nn.PReLU()

    def forward(self, x):
        return self.act(self.conv(x))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "untraceable"], "graph: model must be one that torch.fx or torch.export can"),
        (["--model", "unknown"], "models: model must be one of cnn"),
        (["--model", "without"], "with a primitive, got 'act' (PReLU)"),
        (["--dataset", "nothing"], "data: dataset must be one of digits"),
        (["--bits", "4"], "bits must be None without bit_widths in the config"),
        (["--noise", "-1"], "ghn: noise must be at least 0 and finite, got -1.0"),
        (["--noise", "nan"], "ghn: noise must be at least 0 and finite, got nan"),
        (["--batchnorm-images", "2000"], "images must be at most the 1297 training examples"),
        (["--set", "lr=3"], "--set: it must be of model_options or data_options here, got lr"),
        (["--set", "model_options.depth=3"], "models: options must be known to cnn"),
        (["--ghn", "nowhere"], "nowhere must be a model.safetensors or a run directory with one"),
        (["--ghn", "OTHER"], "must be of a GHN, got a file without its settings"),
        (["--ghn", "DAMAGED"], "must be of its configuration, got embedding.primitive.weight"),
        (["--out", "FOLDER", "--overwrite"], "out must be a file, got the directory"),
    ],
)
def test_bad_input(tmp_path, checkpoint, monkeypatch, words, message):
    monkeypatch.setitem(MODELS, "untraceable", Untraceable)
    monkeypatch.setitem(MODELS, "without", WithoutPrimitive)
    folders = {name: tmp_path / name for name in ("OTHER", "DAMAGED", "FOLDER")}
    folders["FOLDER"].mkdir()
    state = make_ghn().state_dict()
    del state["embedding.primitive.weight"]
    for name, meta in (("OTHER", {}), ("DAMAGED", {"ghn": make_ghn().config.to_dict()})):
        run = RunDir(folders[name], {})
        run.create()
        run.save_model(state, meta)
    usual = {"--model": "cnn", "--dataset": "digits", "--ghn": checkpoint}
    usual["--out"] = tmp_path / "new" / "file.safetensors"
    asked = dict(zip(words[::2], words[1::2], strict=False))
    given = [str(folders.get(word, word)) for word in words]
    given += [str(w) for pair in usual.items() if pair[0] not in asked for w in pair]
    before = sorted(tmp_path.rglob("*"))
    done = call("ghn-predict", *given)
    assert done.exit_code == 2 and message in done.output, done.output
    assert sorted(tmp_path.rglob("*")) == before


def test_a_node_is_named_where_tracing_stopped(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setitem(MODELS, "untraceable", Untraceable)
    words = ["--model", "untraceable", "--ghn", checkpoint, "--out", tmp_path / "x"]
    done = call("ghn-predict", *words)
    assert "torch.fx stopped after node 'sum_1'" in done.output, done.output
