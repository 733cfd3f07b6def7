"""Models by name: ours run on every input size they are for; others are looked up."""

import pytest
import torch
from qtrain.models import MODELS, build_model


def make(name, channels=3, size=32, **options):
    torch.manual_seed(0)
    return build_model(name, channels=channels, classes=7, size=size, options=options)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32)])
def test_ours_learn_something(name, channels, size):
    model = make(name, channels, size)
    x = torch.randn(4, channels, size, size)
    logits = model(x)
    assert logits.shape == (4, 7)
    logits.square().mean().backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still
    # nothing but the pictures themselves decides a row
    model.eval()
    assert torch.allclose(model(x)[2:], model(x[2:]), atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_ours_can_be_prepared(name):
    from qkernels.nn import QConfig, float_state_dict, prepare

    model = make(name).eval()
    x = torch.randn(2, 3, 32, 32)
    before = model(x)
    prepared = prepare(model, QConfig.minmax(2, 2))
    prepared.load_state_dict(model.state_dict())
    assert set(float_state_dict(prepared)) == set(model.state_dict())
    from qkernels.nn import calibrate

    calibrate(prepared, [x])
    after = prepared.eval()(x)
    assert after.isfinite().all() and not torch.allclose(before, after)


@pytest.mark.parametrize("name", ["cnn", "resnet8", "mobile"])
def test_ours_fold(name):
    from qkernels.nn import fold_batchnorm

    model = make(name)
    for _ in range(3):
        model(torch.randn(8, 3, 32, 32) + 1)
    x = torch.randn(4, 3, 32, 32)
    folded = fold_batchnorm(model.eval())
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    assert torch.allclose(folded(x), model(x), atol=1e-4)


def test_same_seed_same_weights():
    first, second = make("resnet8").state_dict(), make("resnet8").state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", ["torchvision/mobilenet_v3_small", "timm/resnet10t", "resnet10t"])
def test_libraries(name):
    pytest.importorskip(name.partition("/")[0] if "/" in name else "timm")
    assert make(name).eval()(torch.randn(1, 3, 32, 32)).shape == (1, 7)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("nope", {}, r"cnn, resnet8, resnet20, mobile, vit_tiny, .*torchvision/resnet18.*'nope'"),
        ("timm/nope", {}, "got 'timm/nope'"),
        ("torchvision/resnet10t", {}, "got 'torchvision/resnet10t'"),
        ("cnn", {"depth": 3}, "models: options must be known to cnn.*depth"),
    ],
)
def test_unknown(name, options, words):
    with pytest.raises(ValueError, match=words):
        make(name, **options)


def test_torchvision_takes_three_channels():
    with pytest.raises(ValueError, match=r"models: channels must be 3 .*got 1"):
        make("torchvision/resnet18", channels=1)
