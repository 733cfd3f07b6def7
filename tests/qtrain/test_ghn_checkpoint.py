"""Files of graph hypernetworks, ours and the public GHN-2's."""

import collections

import pytest
import torch
from ghn_graphs import branches_graph, residual_graph
from qtrain.ghn.checkpoint import load_ghn, load_public_ghn2, save_ghn
from qtrain.ghn.config import GhnConfig, ghn2
from qtrain.ghn.model import Ghn
from qtrain.rundir import CONFIG, MODEL, RunDir

SMALL = {"width": 16, "max_shape": (8, 8, 5, 5), "classes": 5}
GRAPHS = (branches_graph(), residual_graph())
# the names and shapes of facebookresearch/ppuda's GHN-2 for CIFAR-10
PUBLIC = {
    "ln.weight": (32,),
    "ln.bias": (32,),
    "embed.weight": (15, 32),
    "shape_enc.embed_spatial.weight": (9, 8),
    "shape_enc.embed_channel.weight": (392, 8),
    "gnn.mlp.fc.0.weight": (16, 32),
    "gnn.mlp.fc.0.bias": (16,),
    "gnn.mlp.fc.2.weight": (32, 16),
    "gnn.mlp.fc.2.bias": (32,),
    "gnn.mlp_ve.fc.0.weight": (16, 32),
    "gnn.mlp_ve.fc.0.bias": (16,),
    "gnn.mlp_ve.fc.2.weight": (32, 16),
    "gnn.mlp_ve.fc.2.bias": (32,),
    "gnn.gru.weight_ih": (96, 32),
    "gnn.gru.weight_hh": (96, 32),
    "gnn.gru.bias_ih": (96,),
    "gnn.gru.bias_hh": (96,),
    "decoder.fc.0.weight": (15488, 32),
    "decoder.fc.0.bias": (15488,),
    "decoder.conv.0.weight": (256, 128, 1, 1),
    "decoder.conv.0.bias": (256,),
    "decoder.conv.2.weight": (4096, 256, 1, 1),
    "decoder.conv.2.bias": (4096,),
    "decoder.class_layer_predictor.1.weight": (10, 64, 1, 1),
    "decoder.class_layer_predictor.1.bias": (10,),
    "decoder_1d.fc.0.weight": (64, 32),
    "decoder_1d.fc.0.bias": (64,),
    "decoder_1d.fc.2.weight": (128, 64),
    "decoder_1d.fc.2.bias": (128,),
    "bias_class.1.weight": (10, 64),
    "bias_class.1.bias": (10,),
}
PUBLIC_CONFIG = {
    "max_shape": (64, 64, 11, 11),
    "num_classes": 10,
    "hypernet": "gatedgnn",
    "decoder": "conv",
    "weight_norm": True,
    "ve": True,
    "layernorm": True,
    "hid": 32,
}


def make_ghn(**settings):
    torch.manual_seed(0)
    return Ghn(GhnConfig(**{"encoder": "gated", **SMALL, **settings}))


def predicted(ghn):
    return torch.cat([v.flatten() for p in ghn.predict(GRAPHS) for v in p.values()])


def public_state(ghn):
    """A GHN-2 of ours as the public code would save it, by the order of its parts."""
    ours = {name: value.clone() for name, value in ghn.state_dict().items()}
    order = [
        "norm",
        "embedding.primitive",
        "embedding.kernel",
        "embedding.channel",
        "encoder.direct",
        "encoder.virtual",
        "encoder.gru",
        "head.spread",
        "head.hidden",
        "head.block",
        "head.classes",
        "head.vectors",
        "head.class_bias",
    ]
    values = [v for part in order for name, v in ours.items() if name.startswith(part + ".")]
    named = zip(PUBLIC, values, strict=True)
    return {k: v[:, :, None, None] if len(PUBLIC[k]) == 4 else v for k, v in named}


def test_round_trip(tmp_path):
    ghn = make_ghn(encoder="graphormer", heads=2, bit_widths=(2, 4))
    save_ghn(ghn, tmp_path / "ghn")
    before = torch.get_rng_state()
    again = load_ghn(tmp_path / "ghn", ghn.config)
    assert torch.equal(before, torch.get_rng_state())
    assert again.config == ghn.config and torch.equal(predicted(again), predicted(ghn))
    assert all(p.requires_grad and p.device.type == "cpu" for p in again.parameters())
    assert torch.equal(predicted(load_ghn(tmp_path / "ghn" / MODEL)), predicted(ghn))


def test_another_configuration(tmp_path):
    save_ghn(make_ghn(), tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError) as error:
        load_ghn(tmp_path, GhnConfig(**{**SMALL, "encoder": "graphormer", "classes": 6}))
    assert "classes (5 there, 6 asked for); encoder ('gated' there" in str(error.value)
    with pytest.raises(ValueError, match=r"ghn.rank \(32 there, 8 asked for\)"):
        save_ghn(make_ghn(rank=8), tmp_path)
    assert files == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(files) == {CONFIG, MODEL}


def test_weights_that_are_not_of_their_configuration(tmp_path):
    ghn = make_ghn()
    run = RunDir(tmp_path, {"ghn": ghn.config.to_dict()})
    run.create()
    weights = ghn.state_dict()
    weights["head.more"] = weights.pop("norm.bias")
    weights["norm.weight"] = torch.ones(3)
    run.save_model(weights, run.config)
    with pytest.raises(ValueError) as error:
        load_ghn(tmp_path)
    for part in ("head.more ([16] there", "norm.bias ('nothing' there", "norm.weight ([3] there"):
        assert part in str(error.value)


def test_files_of_something_else(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_ghn(tmp_path / "none")
    run = RunDir(tmp_path, {"train": {}})
    run.create()
    run.save_model({"w": torch.ones(2)}, run.config)
    with pytest.raises(ValueError, match=r"must be of a GHN, got a file without its settings"):
        load_ghn(tmp_path)
    (tmp_path / MODEL).write_bytes(b"\x08")
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        load_ghn(tmp_path)


def test_public_ghn2_by_its_names(tmp_path):
    ghn = make_ghn()
    torch.save({"state_dict": public_state(ghn), "optimzer": {}, "epoch": 3}, tmp_path / "a.pt")
    torch.save(collections.OrderedDict(public_state(ghn)), tmp_path / "b.pt")
    for name in ("a.pt", "b.pt"):
        loaded = load_public_ghn2(tmp_path / name, ghn.config)
        assert loaded.config == ghn2(**SMALL)
        assert torch.equal(predicted(loaded), predicted(ghn))


def test_public_ghn2_in_its_own_shapes(tmp_path):
    state = {name: torch.full(shape, i / 99) for i, (name, shape) in enumerate(PUBLIC.items())}
    torch.save({"state_dict": state, "config": PUBLIC_CONFIG}, tmp_path / "ghn2.pt")
    ghn = load_public_ghn2(tmp_path / "ghn2.pt")
    assert ghn.config == ghn2() and sum(p.numel() for p in ghn.parameters()) == 1_620_764
    wide = load_public_ghn2(tmp_path / "ghn2.pt", ghn2(bit_widths=(2, 8)))
    assert wide.embedding.bits.weight.shape == (3, 32)
    assert wide.embedding.bits.weight.count_nonzero() == 0
    assert torch.equal(predicted(wide), predicted(ghn))
    with pytest.raises(ValueError, match=r"classes \(10 there, 100 asked for\)"):
        load_public_ghn2(tmp_path / "ghn2.pt", ghn2(classes=100))


def test_public_files_that_are_no_ghn2(tmp_path):
    state = public_state(make_ghn())
    file = tmp_path / "ghn.pt"
    settings = {**PUBLIC_CONFIG, "ve": False, "layernorm": False}
    torch.save({"state_dict": state, "config": settings}, file)
    with pytest.raises(ValueError, match=r"ve \(False there, True in a GHN-2\); layernorm"):
        load_public_ghn2(file)

    state["gnn.extra"] = state.pop("ln.bias")
    torch.save({"state_dict": state}, file)
    with pytest.raises(ValueError, match=r"ln.bias is missing; gnn.extra is unknown"):
        load_public_ghn2(file)

    torch.save([state], file)
    with pytest.raises(ValueError, match="must be a mapping, got list"):
        load_public_ghn2(file)
    file.write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"must be a file of torch.save"):
        load_public_ghn2(file)
    with pytest.raises(FileNotFoundError):
        load_public_ghn2(tmp_path / "none.pt")


class Stranger:
    """Runs code when it is unpickled."""

    loaded = 0

    def __setstate__(self, state):
        Stranger.loaded += 1


def test_public_files_run_no_code(tmp_path):
    stranger = Stranger()
    stranger.value = 1
    torch.save({"state_dict": public_state(make_ghn()), "config": stranger}, tmp_path / "ghn.pt")
    with pytest.raises(ValueError, match=r"must be a file of torch.save with tensors and plain"):
        load_public_ghn2(tmp_path / "ghn.pt")
    assert Stranger.loaded == 0
