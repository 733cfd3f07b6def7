"""Whole DNQ trainings: what stays clean, odd models, and that it helps."""

import copy

import pytest
import torch
from qtrain.data import load_dataset
from qtrain.dnq import Dnq, DnqConfig
from qtrain.loop import evaluate, reestimate_batchnorm, train
from qtrain.models import MODELS
from qtrain.progress import Track
from qtrain.ptq import calibration_images, quantize_after_training
from qtrain.recipe import Recipe, new_model
from qtrain.rundir import METRICS, MODEL, load_model_file
from qtrain.source import FloatSource
from test_dnq import NOISY, settings

# 2 bits hurt this net
NARROW = {"widths": [8, 8, 8, 16, 16, 16, 32, 32], "strides": [1, 1, 1, 2, 1, 1, 2, 1]}


def run(config, recipe, out):
    with Track(0, "", quiet=True) as track:
        return train(config, recipe, out, cpu=True, track=track)


def test_without_noise_it_is_the_float_trainer(tmp_path):
    off = DnqConfig(weight_noise="none", activation_noise="none", warmup_epochs=1, ramp_epochs=1)
    for config in (settings(), settings(swa_start=0.5)):
        ours = run(config, Dnq(off), tmp_path / f"dnq{config.swa_start}")
        plain = run(config, Recipe(), tmp_path / f"float{config.swa_start}")
        assert ours.test_loss == plain.test_loss
        for name, value in plain.model.state_dict().items():
            assert torch.equal(ours.model.state_dict()[name], value)


@pytest.mark.parametrize("swa_start", [None, 0.5], ids=["last weights", "swa"])
def test_the_result_is_a_plain_clean_model(tmp_path, swa_start):
    """Its keys are the float model's, BatchNorm's statistics are of a forward without noise."""
    config = settings(swa_start=swa_start)
    result = run(config, Dnq(DnqConfig(**NOISY)), tmp_path)
    data = load_dataset("digits")
    model = new_model(config, data)
    state, meta = load_model_file(tmp_path)
    assert set(state) == set(model.state_dict())
    assert meta["recipe"]["name"] == "dnq"
    FloatSource.load(tmp_path / MODEL).fill(model)
    assert evaluate(model, data.test)["test_loss"] == result.test_loss
    again = copy.deepcopy(model)
    reestimate_batchnorm(again, data, config)
    for name, value in again.state_dict().items():
        assert torch.equal(state[name], value), name


def test_it_helps_at_two_bits(tmp_path):
    """The demo's net after min-max PTQ at W2A2, which takes it from 98 % to 50 %."""
    noise = {"weight_bits": 2, "activation_bits": 2, "warmup_epochs": 8, "ramp_epochs": 4}
    config = settings(
        epochs=16, batch_size=64, model_options=NARROW, label_smoothing=0.1, swa_start=0.75
    )
    losses = {}
    for name, kinds in (
        ("dnq", {}),
        ("swa", {"weight_noise": "none", "activation_noise": "none"}),
    ):
        dnq = DnqConfig(**noise, **kinds)
        result = run(config, Dnq(dnq), tmp_path / name)
        batches = calibration_images(result.data, config, 100)
        quantized = quantize_after_training(result.model, dnq.qconfig(), batches)
        losses[name] = evaluate(quantized, result.data.test)["test_loss"]
        assert result.test_accuracy > 0.93
    assert losses["dnq"] < 0.7 * losses["swa"]


class Odd(torch.nn.Module):
    """A layer that is never called, and two that share a weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.idle = (torch.nn.Linear(64, 64) for _ in range(3))
        self.second.weight = self.first.weight
        self.drop, self.norm = torch.nn.Dropout(0.3), torch.nn.BatchNorm1d(64)

    def forward(self, x):
        return self.second(self.norm(self.drop(self.first(x.flatten(1)))))


@pytest.fixture
def odd_model(monkeypatch):
    monkeypatch.setitem(MODELS, "odd", lambda *sizes, **options: Odd())
    return settings(model="odd", model_options={}, checkpoint_every=10, swa_start=0.7)


def test_an_odd_model_is_resumed_to_the_same_bits(tmp_path, odd_model):
    """Dropout before BatchNorm draws in the simulation too, whose first step resumes here."""
    dnq = DnqConfig(weight_bits=2, activation_bits=2, warmup_epochs=1, ramp_epochs=1)
    recipe = Dnq(dnq)
    whole = run(odd_model, recipe, tmp_path / "whole")
    assert [weight.name for weight in recipe.weights] == ["first.weight", "idle.weight"]

    class Mortal(Dnq):
        def loss(self, model, batch, step):
            if step == self.die_at:
                raise KeyboardInterrupt
            return super().loss(model, batch, step)

    for die_at in (10, 20, 30):
        mortal = Mortal(dnq)
        mortal.die_at = die_at
        with pytest.raises(KeyboardInterrupt):
            run(odd_model, mortal, tmp_path / "killed")
    killed = run(odd_model, Dnq(dnq), tmp_path / "killed")
    assert (tmp_path / "killed" / MODEL).read_bytes() == (tmp_path / "whole" / MODEL).read_bytes()
    assert killed.test_loss == whole.test_loss
    # a finished run is read back: nothing is computed or written again
    stamp = (tmp_path / "whole" / MODEL).stat().st_mtime_ns
    metrics = (tmp_path / "whole" / METRICS).read_bytes()
    again = run(odd_model, Dnq(dnq), tmp_path / "whole")
    assert again.test_loss == whole.test_loss
    assert (tmp_path / "whole" / MODEL).stat().st_mtime_ns == stamp
    assert (tmp_path / "whole" / METRICS).read_bytes() == metrics
