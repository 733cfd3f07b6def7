"""Checkpoints of prepared models: float ones in and out, round trips, copies."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import qkernels
from qkernels import Noise
from qkernels.nn import QConfig, calibrate, float_state_dict, prepare

# what keeps its old value until the first forward sets it
FIRST_VALUES = ("scale", "zero_point", "offset", "alpha")
CONFIGS = {
    "minmax": QConfig.minmax(3, 3),
    "lsq": QConfig.lsq(3, 3),
    "lsq+": QConfig.lsq_plus(3, 3),
    "pact": QConfig.pact(3, 3),
    "dorefa": QConfig.dorefa(3, 3, first_last_bits=None),
    "quant-noise": QConfig.quant_noise(3, 3),
}


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 8),
        nn.Linear(8, 3),
    )


def made(seed: int, config: QConfig) -> nn.Module:
    """The net, prepared; its masks, if it has any, are those of step 0 throughout."""
    return prepare(net(seed), config, noise=Noise(0))


def inputs(seed: int = 9) -> Tensor:
    return torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


def trained(config: QConfig) -> nn.Module:
    """A prepared model after a few steps, so that everything has moved."""
    model = made(0, config)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for seed in range(3):
        optimizer.zero_grad()
        model(inputs(seed)).square().mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_float_keys_survive(config: QConfig) -> None:
    plain, model = net(0), made(0, config)
    assert set(plain.state_dict()) <= set(model.state_dict())
    state = float_state_dict(model)
    assert list(state) == list(plain.state_dict())
    model = trained(config)
    other = net(1)
    other.load_state_dict(float_state_dict(model), strict=True)
    assert torch.equal(other[0].weight, model[0].weight)
    assert torch.equal(other[1].running_mean, model[1].running_mean)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_float_checkpoint_loads_strictly_and_starts_the_quantizers_anew(config: QConfig) -> None:
    source = net(1)
    model = trained(config)
    result = model.load_state_dict(source.state_dict(), strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    fresh = prepare(source, config, noise=Noise(0))
    for name, tensor in fresh.state_dict().items():
        if not name.endswith(tuple(f"input_fake_quant.{kept}" for kept in FIRST_VALUES)):
            assert torch.equal(model.state_dict()[name], tensor), name
    with pytest.raises(RuntimeError, match=r"'0\.input_fake_quant': range must be set"):
        model.eval()(inputs())
    assert torch.equal(model.train()(inputs()), fresh(inputs()))
    assert torch.equal(model.eval()(inputs()), fresh.eval()(inputs()))


def test_a_missing_float_key_is_still_an_error() -> None:
    model = prepare(net(0), QConfig.lsq(3, 3))
    state = net(1).state_dict()
    del state["0.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0.bias"'):
        model.load_state_dict(state)


def test_a_partial_checkpoint_leaves_other_layers_alone() -> None:
    model = trained(CONFIGS["minmax"])
    before = model[0].input_fake_quant.range.clone()
    model.load_state_dict({"5.weight": torch.zeros(3, 8)}, strict=False)
    assert torch.equal(model[0].input_fake_quant.range, before)
    assert int(model[0].input_fake_quant.initialized) == 1
    assert int(model[5].input_fake_quant.initialized) == 0


def test_half_a_quantizer_is_an_error() -> None:
    model = trained(CONFIGS["lsq"])
    state = model.state_dict()
    del state["4.weight_fake_quant.scale"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"4.weight_fake_quant.scale"'):
        model.load_state_dict(state)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_prepared_checkpoint_comes_back_to_the_bit(config: QConfig) -> None:
    model = trained(config)
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    other = made(1, config)
    other.load_state_dict(torch.load(stream, weights_only=True), strict=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    x = inputs()
    assert torch.equal(other.eval()(x), model.eval()(x))
    assert torch.equal(other.train()(x), model.train()(x))
    assert torch.equal(other.eval()(x), model.eval()(x))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_copy_and_pickle(config: QConfig) -> None:
    model = trained(config)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    x = inputs()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert torch.equal(other.train()(x), copy.deepcopy(model).train()(x))
        assert repr(other) == repr(model)


def test_learned_scales_follow_a_float_checkpoint() -> None:
    source = net(1)
    model = prepare(net(0), CONFIGS["lsq"])
    model.load_state_dict(source.state_dict())
    weight = source[4].weight
    scale = qkernels.quant_range(weight, bits=3, axis=0, symmetric=True, method="lsq").scale
    assert torch.equal(model[4].weight_fake_quant.scale, scale)


def test_safetensors_takes_the_state(tmp_path: object) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    model = trained(CONFIGS["lsq"])
    other = prepare(net(1), CONFIGS["lsq"])
    other.load_state_dict(safetensors.load(safetensors.save(model.state_dict())))
    assert torch.equal(other.eval()(inputs()), model.eval()(inputs()))


def test_calibrated_state_moves_with_the_checkpoint() -> None:
    model = prepare(net(0), CONFIGS["minmax"])
    calibrate(model, [inputs(1), inputs(2)])
    other = prepare(net(1), CONFIGS["minmax"])
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(inputs()), model.eval()(inputs()))
