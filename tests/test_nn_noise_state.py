"""A model with noise: taking it off, checkpoints, copies, resuming."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from test_nn_noise import assert_same, inputs, net, noisy, train
from torch import nn
from torch.nn.utils import parametrize

from qkernels import Noise
from qkernels.nn import attach_noise, noise_handles


def test_remove_restores_the_very_model() -> None:
    model, plain = net(), net()
    parameters = dict(model.named_parameters())
    _, handle = noisy(model, clean_batchnorm=True)
    train(model, handle)
    handle.remove()
    handle.remove()
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert list(dict(model.named_parameters())) == list(parameters)
    for name, p in model.named_parameters():
        assert p is parameters[name]
        if name.endswith("weight"):
            assert not torch.equal(p, plain.get_parameter(name))
    for module in model.modules():
        assert "_qkernels_noise" not in vars(module)
        for hooks in ("_forward_pre_hooks", "_forward_hooks", "_state_dict_hooks"):
            assert not getattr(module, hooks)
        assert not module._load_state_dict_pre_hooks
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(inputs()), plain(inputs()))
    assert noise_handles(model) == []
    noisy(model)[1].remove()


def test_removal_is_refused_under_another_parametrization() -> None:
    model, handle = noisy()
    parametrize.register_parametrization(model[5], "weight", nn.Identity(), unsafe=True)
    with pytest.raises(RuntimeError, match=r"weight of '5\.weight' must have no parametrization"):
        handle.remove()
    assert len(noise_handles(model)) == 1 and parametrize.is_parametrized(model[0])


def test_checkpoints_have_the_plain_keys() -> None:
    plain = net(1)
    model, handle = noisy()
    train(model, handle)
    state = handle.model_state_dict()
    assert list(state) == list(plain.state_dict())
    assert set(state) < set(model.state_dict())
    assert not any("original" in key for key in model.state_dict())
    assert torch.equal(state["0.weight"], model[0].parametrizations.weight.original)
    plain.load_state_dict(state, strict=True)
    assert torch.equal(plain.eval()(inputs()), model.eval()(inputs()))
    source = net(2)
    model.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(model(inputs()), source.eval()(inputs()))
    partial = source.state_dict()
    del partial["5.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*5\.parametrizations\.weight\.original"):
        model.load_state_dict(partial)


def test_assigning_sets_the_clean_weight() -> None:
    model, _ = noisy(nn.Linear(3, 2))
    parameter, value = model.parametrizations.weight.original, torch.randn(2, 3)
    model.weight = value.clone()
    assert model.parametrizations.weight.original is parameter
    assert torch.equal(parameter, value) and not torch.equal(model.weight, value)


def test_a_resumed_run_goes_on_to_the_same_bits() -> None:
    model, handle = noisy()
    train(model, handle)
    stream = io.BytesIO()
    torch.save({"model": model.state_dict(), "noise": handle.noise.state_dict()}, stream)
    stream.seek(0)
    saved = torch.load(stream, weights_only=True)
    other, resumed = noisy(net(5), noise=Noise(0))
    other.load_state_dict(saved["model"], strict=True)
    resumed.noise.load_state_dict(saved["noise"])
    assert_same(train(other, resumed, start=3), train(model, handle, start=3))
    assert_same(list(other.state_dict().values()), list(model.state_dict().values()))


def test_two_runs_are_the_same_and_another_seed_is_not() -> None:
    runs = [train(*noisy(noise=Noise(seed))) for seed in (7, 7, 8)]
    assert_same(runs[0], runs[1])
    assert not torch.equal(runs[0][0], runs[2][0])


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_copies_stand_alone(way: str) -> None:
    model, handle = noisy(clean_batchnorm=True)
    train(model, handle)
    if way == "save":
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        other = torch.load(stream, weights_only=False)
    else:
        other = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    (own,) = noise_handles(other)
    assert repr(other) == repr(model)
    assert list(other.state_dict()) == list(model.state_dict())
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, _ in other.named_parameters()] == names
    second = copy.deepcopy(other)
    assert_same(train(other, own), train(model, handle))
    own.enabled = False
    assert handle.enabled
    own.remove()
    assert list(other.state_dict()) == list(net().state_dict())
    # the others keep their noise
    assert not torch.equal(model[0].weight, model[0].parametrizations.weight.original)
    handle.remove()
    assert noise_handles(second)[0].enabled
    second(inputs()).sum().backward()
    assert second[0].parametrizations.weight.original.grad.any()


def test_averaged_models_have_handles() -> None:
    model, handle = noisy()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    train(model, handle)
    averaged.update_parameters(model)
    (own,) = noise_handles(averaged)
    with own.off():
        torch.optim.swa_utils.update_bn([inputs(1)], averaged)
    own.remove()
    plain = net()
    plain.load_state_dict(handle.model_state_dict())
    torch.optim.swa_utils.update_bn([inputs(1)], plain)
    assert torch.equal(averaged.module[1].running_var, plain[1].running_var)


def test_layers_and_skip_choose() -> None:
    model, first = noisy(layers=["0", "[36]"], skip=["3"])
    assert sorted(first.stats) == ["0.input", "0.weight", "6.input", "6.weight"]
    # another attachment takes the rest, and goes alone
    second = attach_noise(model, noise=first.noise, weights=8, layers=["5"])
    model(inputs())
    assert list(second.stats) == ["5.weight"]
    assert {id(h._control) for h in noise_handles(model)} == {
        id(first._control),
        id(second._control),
    }
    first.remove()
    assert list(second.model_state_dict()) == list(net().state_dict())
    assert not torch.equal(model[5].weight, model[5].parametrizations.weight.original)
    second.remove()
    assert list(model.state_dict()) == list(net().state_dict())


def test_two_handles_keep_the_norms_clean() -> None:
    model = net()
    noise = Noise(1)
    first = attach_noise(model, noise=noise, weights=3, layers=["0"], clean_batchnorm=True)
    second = attach_noise(model, noise=noise, weights=3, layers=["3", "5"], clean_batchnorm=True)
    before = model[1].running_mean.clone()
    first.enabled = False
    model(inputs())
    first.remove()
    model(inputs())
    assert torch.equal(model[1].running_mean, before)
    second.remove()
    model(inputs())
    assert not torch.equal(model[1].running_mean, before)
    assert not vars(model[1]).get("_qkernels_noise")
