"""The loss under noise against the ops, all figures of a model, the command."""

import copy
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from qtrain.cli import app
from qtrain.data import load_dataset
from qtrain.flatness import (
    Flatness,
    Probing,
    flatness_of,
    loss_under_noise,
    measure_flatness,
    sample_batches,
    weight_noise,
)
from qtrain.flatness_report import plot_noise, tables
from qtrain.hessian import CrossEntropy, cross_entropy
from qtrain.models import build_model
from qtrain.progress import Track
from qtrain.rundir import MODEL, load_model_file
from qtrain.source import FloatSource
from safetensors.torch import save_file
from test_hessian import batches_of, conv_net
from torch import nn
from typer.testing import CliRunner

import qkernels
from qkernels.nn import QConfig, prepare

SMALL = Probing(probes=3, iterations=4, sizes=(0.0, 0.1), draws=2)


def squared_error(model, batch):
    x, y = batch
    return (model(x) - y).square().sum(1).mean()


def test_vit_tiny_runs():
    torch.manual_seed(0)
    model = build_model("vit_tiny", channels=1, classes=10, size=8)
    batch = (torch.randn(4, 1, 8, 8), torch.tensor([1, 2, 3, 4]))
    found = measure_flatness(model, [batch], probing=SMALL)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.top.value > 0 and found.trace.standard_error > 0


def test_unequal_batches_equal_one():
    model, parts, whole = conv_net(), batches_of([1, 11, 3]), batches_of([15])
    one, many = (measure_flatness(model, b, probing=SMALL) for b in (whole, parts))
    assert one.trace.values == pytest.approx(many.trace.values, rel=1e-10)
    assert one.top.value == pytest.approx(many.top.value, rel=1e-10)
    assert one.noise[1].losses == pytest.approx(many.noise[1].losses, rel=1e-10)
    assert (one.examples, one.accuracy) == (many.examples, many.accuracy) == (15, one.accuracy)


def test_noise_is_that_of_the_ops():
    model, batches = conv_net(), batches_of([15])
    found = loss_under_noise(model, batches, sizes=(0.3,), draws=3, seed=5)[0]
    losses = []
    for step in range(3):
        noisy = copy.deepcopy(model).eval()
        for name in ("0.weight", "3.weight", "7.weight"):
            w = noisy.get_parameter(name).data
            rms = torch.tensor([float(row.square().mean()) ** 0.5 for row in w]).double()
            place = qkernels.Noise(5, step=step).at(name, kind="flatness")
            w += 0.3 * qkernels.drop_in_noise(w * 0, (0.0, rms), p=1.0, axis=0, **place)
        losses.append(cross_entropy(noisy, batches[0]).item())
    assert found.losses == pytest.approx(losses, rel=1e-6)
    assert found.loss == pytest.approx(sum(losses) / 3, rel=1e-6)
    assert found.loss_std == pytest.approx(torch.tensor(losses).std().item(), rel=1e-4)
    assert all(0 <= share <= 1 for share in found.accuracies)


def test_noise_on_a_linear_model_has_the_known_mean():
    torch.manual_seed(0)
    model, x = nn.Linear(4, 2, bias=False).double(), torch.randn(20, 4, dtype=torch.float64)
    batch = (x, model(x).detach())  # at the optimum
    (found,) = loss_under_noise(model, [batch], loss=squared_error, sizes=(0.2,), draws=400)
    rms = model.weight.detach().square().mean(1)
    expected = 0.04 * float(rms.sum() * x.square().sum(1).mean())
    assert abs(found.loss - expected) < 3 * found.loss_std / 20 < 0.2 * expected
    assert found.accuracy is None and found.accuracies == ()


def test_a_sharper_loss_has_larger_figures():
    torch.manual_seed(0)
    model, x = nn.Linear(4, 2).double(), torch.randn(20, 4, dtype=torch.float64)
    flat, sharp = (
        measure_flatness(model, [(c * x, model(c * x).detach())], loss=squared_error)
        for c in (1, 3)
    )
    assert sharp.trace.mean > 3 * flat.trace.mean and sharp.top.value > 3 * flat.top.value
    pairs = list(zip(flat.noise, sharp.noise, strict=True))[1:]
    # equal draws: the error under noise is 9 times as large, draw by draw
    assert all(b.losses == pytest.approx([9 * v for v in a.losses]) for a, b in pairs)


def test_noise_of_size_zero_is_the_loss():
    model, batches = conv_net(), batches_of([15])
    found = measure_flatness(model, batches, probing=SMALL)
    model.eval()
    assert found.loss == cross_entropy(model, batches[0]).item()
    assert found.noise[0].losses == (found.loss,) and found.noise[0].loss_std is None
    assert found.noise[0].accuracy == found.accuracy
    assert found.noise[1].loss != found.loss


def test_the_model_is_left_as_it_was():
    model, batches = conv_net(), batches_of([15])
    model.train()
    model[1].eval()  # a BatchNorm that is frozen in training
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    flags = torch.backends.cudnn.deterministic
    track = Track(SMALL.work(1), "", quiet=True)
    with torch.no_grad():
        measure_flatness(model, batches, probing=SMALL, track=track)
    assert track.done == track.total
    assert [module.training for module in model.modules()] == modes
    assert torch.backends.cudnn.deterministic == flags
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_weights_are_put_back_after_an_error():
    model, batches = conv_net().train(), batches_of([15])
    before = copy.deepcopy(model.state_dict())
    seen = []

    def fails(model, batch):
        seen.append(not torch.equal(model[0].weight, before["0.weight"]))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loss_under_noise(model, batches, loss=fails, sizes=(0.5,))
    assert seen == [True] and model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_tied_and_frozen_weights_get_noise_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.LayerNorm(3))
    model[1].weight = model[0].weight
    model.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    place = qkernels.Noise(0).at("0.weight", kind="flatness")
    rms = before["0.weight"].square().mean(1).sqrt()
    expected = qkernels.drop_in_noise(
        before["0.weight"], (0.0, rms), p=1.0, axis=0, ramp=0.5, **place
    )
    with weight_noise(model, 0.5, qkernels.Noise(0)):
        assert torch.equal(model[1].weight, expected)
        assert torch.equal(model[2].weight, before["2.weight"])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("width", [None, 4])
def test_projections_of_attention_get_noise(width):
    """One packed matrix, or three where keys have a width of their own."""
    model = nn.MultiheadAttention(6, 2, kdim=width)
    packed = ["in_proj_weight"] if width is None else [f"{c}_proj_weight" for c in "qkv"]
    before = copy.deepcopy(model.state_dict())
    with weight_noise(model, 0.5, qkernels.Noise(3)):
        moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
        assert moved == {*packed, "out_proj.weight"}
        w = before[packed[0]]
        place = qkernels.Noise(3).at(packed[0], kind="flatness")
        rms = w.square().mean(1).sqrt()
        expected = qkernels.drop_in_noise(w, (0.0, rms), p=1.0, axis=0, ramp=0.5, **place)
        assert torch.equal(model.get_parameter(packed[0]), expected)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_loss_that_is_not_finite_is_written_down(tmp_path):
    """Under one size of noise; what was measured besides stays."""
    model, batches = conv_net(), batches_of([15])

    def loss(model, batch):
        value = cross_entropy(model, batch)
        return value * math.inf if float(value.detach()) > 2 else value

    sizes = (0.0, 0.01, 9.0)
    found = measure_flatness(model, batches, loss=loss, probing=replace(SMALL, sizes=sizes))
    assert found.noise[1].loss > 0 and found.noise[1].loss_std is not None
    assert found.noise[2].loss is None and None in found.noise[2].losses
    text = json.dumps(found.to_dict())
    assert "Infinity" not in text and Flatness.from_dict(json.loads(text)) == found
    rows = tables({"a|b": found})["Rise of the loss under weight noise of relative size r"]
    assert rows[1][-1] == "not\nfinite"
    assert rows[1][2].startswith(f"{found.noise[1].loss - found.loss:.3g}\n± ")
    # a loss of its own has no accuracy
    assert len(tables({"a": found})) == 2
    plot_noise(tmp_path / "x.png", {"a": found})


def test_label_smoothing():
    model, batches = conv_net(), batches_of([15])
    smooth = CrossEntropy(0.2)
    found = measure_flatness(model, batches, loss=smooth, probing=SMALL)
    plain = measure_flatness(model, batches, probing=SMALL)
    x, y = batches[0]
    expected = nn.functional.cross_entropy(model.eval()(x), y, label_smoothing=0.2)
    assert found.loss == expected.item() != plain.loss
    assert found.accuracy == plain.accuracy and found.trace != plain.trace
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\), got 1.0"):
        CrossEntropy(1.0)


def test_a_model_without_a_second_derivative():
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3), nn.Hardsigmoid()).double()
    with pytest.raises(NotImplementedError, match="model must be twice differentiable, got"):
        measure_flatness(model, batches_of([4]), probing=SMALL)
    (noisy,) = loss_under_noise(model, batches_of([4]), sizes=(0.1,))
    assert noisy.loss > 0


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"probes": 0}, "probes must be at least 1, got 0"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"draws": 0}, "draws must be at least 1, got 0"),
        ({"tolerance": 0.0}, "tolerance must be positive, got 0.0"),
        ({"sizes": (0.1, -0.1)}, r"sizes must be .* at least 0, got \[0.1, -0.1\]"),
        ({"sizes": ()}, r"sizes must be .* got \[\]"),
        ({"sizes": (math.nan,)}, "sizes must be"),
        ({"seed": -1}, "seed must be in 0"),
    ],
)
def test_bad_probing(change, rule):
    with pytest.raises(ValueError, match=rule):
        Probing(**change)


def test_bad_models_and_batches():
    model, batches = conv_net(), batches_of([4])
    for nothing in ([], batches_of([4, 0])):
        with pytest.raises(ValueError, match="batches must be a list of at least one batch"):
            measure_flatness(model, nothing)
    with pytest.raises(ValueError, match="a parameter that requires grad, got none"):
        measure_flatness(copy.deepcopy(model).requires_grad_(False), batches)
    with pytest.raises(ValueError, match="a float model, got one with fake quantizers"):
        measure_flatness(prepare(model, QConfig.minmax(4, 4)), batches)
    with pytest.raises(ValueError, match="a Conv, Linear or attention layer, got none"):
        measure_flatness(nn.BatchNorm2d(1), batches)
    model[7].weight.data[0] = math.nan
    with pytest.raises(FloatingPointError, match="loss must be finite, got nan"):
        measure_flatness(model, batches)


def call(*arguments, code=0):
    outcome = CliRunner().invoke(app, [str(a) for a in arguments])
    assert outcome.exit_code == code, outcome.output
    return outcome


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two float runs of different models, a file that says it is quantized, and one that says it
    was trained with label smoothing."""
    base = tmp_path_factory.mktemp("runs")
    for name, widths in (("narrow", "[4,4,4,4]"), ("wide", "[4,8,8,8]")):
        how = ["--epochs", 1, "--cpu", "--set", f"model_options.widths={widths}"]
        call("train", "--out", base / name, *how)
    weights, meta = load_model_file(base / "wide")
    header = {"qtrain": json.dumps({**meta, "recipe": {"name": "ptq"}})}
    save_file(weights, base / "quantized.safetensors", metadata=header)
    smooth = {**meta, "train": {**meta["train"], "label_smoothing": 0.1}}
    save_file(weights, base / "smooth.safetensors", metadata={"qtrain": json.dumps(smooth)})
    return base


QUICK = ["--examples", 60, "--probes", 2, "--iterations", 3, "--draws", 2, "--cpu"]


def test_command(runs, tmp_path):
    out = tmp_path / "flatness"
    pair = (runs / "narrow", runs / "wide" / MODEL)
    text = call("flatness", *pair, "--out", out, *QUICK, "--sizes", "0,0.1,0.5").output
    assert "eigenvalue" in text and "smallest" in text and "report.md" in text
    assert text.count("r=0.5") == 2  # loss and accuracy
    first = (out / "results.json").read_bytes()
    results = json.loads(first)["results"]
    assert list(results) == ["narrow", "wide"]
    wide = results["wide"]
    assert (wide["examples"], wide["dataset"]) == (60, "digits")
    assert wide["parameters"] > results["narrow"]["parameters"]
    assert wide["trace_per_parameter"] == wide["trace"]["mean"] / wide["parameters"]
    assert len(wide["trace"]["values"]) == 2 and len(wide["noise"][1]["losses"]) == 2
    report = (out / "report.md").read_text()
    assert report.count("| wide |") == 3 and "flatness.png" in report and "60 examples" in report
    assert "label smoothing 0, as in training." in report
    assert (out / "flatness.png").read_bytes().startswith(b"\x89PNG")
    command = ["flatness", *pair, "--out", out, *QUICK, "--sizes", "0,0.1,0.5"]
    assert call(*command).output == text
    assert (out / "results.json").read_bytes() == first
    # read back, and not measured again
    changed = json.loads(first)
    changed["results"]["wide"]["top"]["value"] = 1234.0
    (out / "results.json").write_text(json.dumps(changed))
    assert "1234" in call(*command).output and "1234" in (out / "report.md").read_text()
    del changed["results"]["wide"]["trace"]
    (out / "results.json").write_text(json.dumps(changed))
    (line,) = call(*command, code=2).stderr.strip().splitlines()
    assert f"{out}/results.json must hold the results" in line and "--overwrite" in line
    call(*command, "--overwrite")
    assert (out / "results.json").read_bytes() == first


def test_the_loss_is_that_of_training(runs, tmp_path):
    how = [*QUICK, "--sizes", "0", "--out"]
    smooth, wide = runs / "smooth.safetensors", runs / "narrow"
    for number, (given, settings, text) in enumerate(
        [
            ([smooth], [], "label smoothing 0.1, as in training."),
            ([smooth, wide], [], "smoothing 0 for all; trained with: smooth.safetensors 0.1, "),
            ([wide], ["--label-smoothing", 0.3], "smoothing 0.3 for all; trained with: narrow 0."),
        ]
    ):
        out = tmp_path / str(number)
        call("flatness", *given, *settings, *how, out)
        assert text in (out / "report.md").read_text()
    losses = [
        json.loads((tmp_path / number / "results.json").read_text())["results"][name]["loss"]
        for number, name in (("0", "smooth.safetensors"), ("1", "smooth.safetensors"))
    ]
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["--examples", 5000], "examples must be in 1..1297 (the train split of digits), got 5000"),
        (["--examples", 501, "--split", "test"], "in 1..500 (the test split of digits), got 501"),
        (["--examples", 0], "examples must be in 1..1297"),
        (["--split", "valid"], "split must be train or test, got 'valid'"),
        (["--probes", 0], "probes must be at least 1, got 0"),
        (["--sizes", "0,-0.1"], "sizes must be one or more finite numbers of at least 0"),
        (["--sizes", "0;1"], "--sizes: it must be numbers with commas between them, got '0;1'"),
        (["{runs}/quantized.safetensors"], "must be of a float model, got one of ptq"),
        (["{runs}/wide"], "checkpoints must be different paths"),
        (["{base}/copy.safetensors"], "must be different models, got the same in wide and copy."),
        (["--label-smoothing", 1.0], "label_smoothing must be in [0, 1), got 1.0"),
        (["{runs}/nothing"], "nothing must be a model.safetensors or a run directory"),
    ],
)
def test_command_errors_are_one_line(runs, tmp_path, tmp_path_factory, arguments, rule):
    base = tmp_path_factory.mktemp("copies")
    shutil.copy(runs / "wide" / MODEL, base / "copy.safetensors")
    arguments = [str(a).format(runs=runs, base=base) for a in arguments]
    outcome = call("flatness", runs / "wide", *QUICK, *arguments, "--out", tmp_path / "x", code=2)
    (line,) = outcome.stderr.strip().splitlines()
    assert line.startswith("error: ") and rule in line
    assert not list(tmp_path.iterdir())


def test_command_has_a_run_directory_of_its_own(runs, tmp_path):
    call("flatness", runs / "wide", *QUICK, "--out", tmp_path / "x")
    clash = call("flatness", runs / "wide", *QUICK, "--seed", 3, "--out", tmp_path / "x", code=2)
    assert "flatness.probing.seed (0 there, 3 asked for)" in clash.stderr
    call("flatness", runs / "wide", *QUICK, "--seed", 3, "--out", tmp_path / "x", "--overwrite")


def test_checkpoints_of_two_datasets(runs):
    one = FloatSource.load(runs / "wide")
    other = replace(one, dataset="shapes", data_options={"seed": 1})
    rule = r"all of the dataset of one, digits, got two of shapes with \{'seed': 1\}"
    with pytest.raises(ValueError, match=rule):
        flatness_of({"one": one, "two": other})
    with pytest.raises(ValueError, match="checkpoints must be at least one"):
        flatness_of({})


def test_a_checkpoint_of_nan(runs, tmp_path):
    weights, _ = load_model_file(runs / "wide")
    weights["head.bias"][0] = math.nan
    broken = replace(FloatSource.load(runs / "wide"), weights=weights)
    with pytest.raises(FloatingPointError, match="loss must be finite"):
        flatness_of({"broken": broken}, examples=8, quiet=True)


def test_sample_is_without_repetition():
    data = load_dataset("digits")
    parts = sample_batches(data, "test", 500, seed=3, batch_size=200)
    assert [len(y) for _, y in parts] == [200, 200, 100]
    found = torch.cat([x for x, _ in parts]).sum((1, 2, 3)).sort().values
    torch.testing.assert_close(found, data.test.x.sum((1, 2, 3)).sort().values)
    fewer = sample_batches(data, "test", 50, seed=3)
    assert torch.equal(fewer[0][0], parts[0][0][:50])
