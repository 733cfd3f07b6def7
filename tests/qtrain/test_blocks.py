"""Cutting models into stages: blocks are found or named, and the stages are the model."""

import pytest
import torch
from qtrain.blocks import find_blocks, split
from qtrain.models import build_model
from torch import nn

# name, options, how many blocks, the first, the last
MODELS = [
    ("cnn", {}, 4, "features.0", "features.3"),
    ("resnet8", {"width": 4}, 3, "stages.0", "stages.2"),
    ("mobile", {}, 5, "blocks.0", "blocks.4"),
    ("vit_tiny", {"width": 12, "depth": 3}, 3, "blocks.0", "blocks.2"),
    ("torchvision/resnet18", {}, 8, "layer1.0", "layer4.1"),
    ("torchvision/mobilenet_v2", {"width_mult": 0.25}, 19, "features.0", "features.18"),
    ("torchvision/vgg11", {}, 11, "features.2", "classifier.6"),
    ("timm/resnet18", {"channels": (8, 8, 16, 16)}, 8, "layer1.0", "layer4.1"),
    ("timm/mobilenetv2_050", {}, 17, "blocks.0.0", "blocks.6.0"),
    (
        "timm/vit_tiny_patch16_224",
        {"img_size": 32, "embed_dim": 24, "depth": 3},
        3,
        "blocks.0",
        "blocks.2",
    ),
]


def run_stages(stages, x):
    for stage in stages:
        x = stage(x)
    return x


@pytest.mark.parametrize(
    ("name", "options", "count", "first", "last"), MODELS, ids=[m[0] for m in MODELS]
)
def test_found_blocks_make_up_the_model(name, options, count, first, last):
    model = build_model(name, channels=3, classes=7, size=32, options=options).eval()
    blocks = find_blocks(model)
    assert (len(blocks), blocks[0], blocks[-1]) == (count, first, last)
    x = torch.randn(2, 3, 32, 32)
    outputs = {}
    for block in blocks:
        hook = model.get_submodule(block).register_forward_hook
        hook(lambda module, args, y, block=block: outputs.__setitem__(block, y.clone()))
    with torch.no_grad():
        expected, h = model(x), x
        after = dict(outputs)
        for stage, block in zip(split(model, blocks), blocks, strict=True):
            h = stage(h)
            assert block == blocks[-1] or torch.equal(h, after[block])
    assert torch.equal(h, expected)


def test_vit_of_torchvision():
    from torchvision.models import VisionTransformer

    model = VisionTransformer(16, 8, num_layers=3, num_heads=2, hidden_dim=8, mlp_dim=8).eval()
    blocks = find_blocks(model)
    assert blocks == tuple(f"encoder.layers.encoder_layer_{i}" for i in range(3))
    nn.init.normal_(model.heads.head.weight)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(run_stages(split(model, blocks), x), model(x))


def test_stages_are_the_model_itself():
    """Named blocks of any size; new weights are seen, gradients arrive, nothing is copied."""
    model = build_model("resnet20", channels=3, classes=7, size=8, options={"width": 4}).eval()
    before = [id(p) for p in model.parameters()]
    stages = split(model, ["stages.0", "stages.5", "stages.6", "stages.8"])
    assert len(stages) == 4
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    (run_stages(stages, x) ** 2).mean().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    (model(x) ** 2).mean().backward()
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, model.parameters(), strict=True))
    assert [id(p) for p in model.parameters()] == before


def test_children_of_a_sequential():
    layers = [nn.Linear(4, 4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)]
    assert find_blocks(nn.Sequential(*layers)) == ("2", "4", "5")
    nested = nn.Sequential(
        nn.Flatten(),
        nn.Sequential(nn.Sequential(layers[0], layers[1]), nn.Sequential(layers[3], layers[4])),
        nn.ReLU(),
        layers[5],
    )
    assert find_blocks(nested) == ("1.0", "1.1", "3")


class Crossing(nn.Module):
    """Block ``a`` is read again after ``b``."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.shift = nn.Parameter(torch.randn(4))

    def forward(self, x):
        y = self.a(x + self.shift)
        return self.c(self.b(y) + y + self.shift)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Sequential(Crossing()), nn.Sequential(Crossing()))

    def forward(self, x):
        return self.features(x) if x.sum() > 0 else x


class Outer(nn.Module):
    """What cannot be traced lies within one block."""

    def __init__(self):
        super().__init__()
        self.body, self.head = Branching(), nn.Linear(4, 2)

    def forward(self, x, scale: float = 2.0, mask=None):
        if mask is not None:
            x = x * mask
        return self.head(self.body(x)) * scale


def test_only_what_lies_between_blocks_is_traced():
    model, x = Outer(), torch.rand(3, 4)
    assert torch.equal(run_stages(split(model, ["body", "head"]), x), model(x))
    rule = r"bwrf: model must be one whose forward .* got Outer \(TraceError: .*Name larger blocks"
    with pytest.raises(ValueError, match=rule):
        split(model, find_blocks(model))


def test_a_parameter_may_be_read_in_two_stages():
    class Shifted(Crossing):
        def forward(self, x):
            return self.c(self.b(self.a(x + self.shift)) + self.shift)

    model, x = Shifted(), torch.randn(3, 4)
    assert torch.equal(run_stages(split(model, ["a", "b", "c"]), x), model(x))


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        (["a", "d"], r"names of modules of Crossing \(a, b, c, \.\.\.\), got 'd'"),
        (["a", ""], "got ''"),
        (["a"], r"two names or more, each once, got \['a'\]"),
        (["b", "a"], r"in the order of the forward \(a, b\), got b, a"),
        (["a", "a"], r"two names or more, each once, got \['a', 'a'\]"),
        (["a", "b", "c"], "sequential: after 'b' its output alone may be used, got use of a, b"),
    ],
)
def test_blocks_that_do_not_fit(blocks, words):
    with pytest.raises(ValueError, match="bwrf: blocks must be .*" + words):
        split(Crossing(), blocks)


def test_a_block_within_a_block_is_never_called():
    model = build_model("resnet8", channels=3, classes=7, size=8)
    with pytest.raises(ValueError, match=r"none within another, got 'stages', called 0 times"):
        split(model, ["stages.0", "stages"])
    with pytest.raises(TypeError, match="blocks must be a list of names, got 'stages'"):
        split(model, "stages")


def test_a_block_called_twice():
    class Twice(Crossing):
        def forward(self, x):
            return self.b(self.a(self.a(x)))

    with pytest.raises(ValueError, match=r"calls once each, .* got 'a', called 2 times"):
        split(Twice(), ["a", "b"])


def test_no_blocks():
    with pytest.raises(ValueError, match=r"two blocks or more .*name the blocks .*Crossing with 0"):
        find_blocks(Crossing())
