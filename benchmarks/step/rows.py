"""The contenders of the step benchmark: one float net, quantized in different ways.

Treatment of all QAT rows: W4A4, first and last layer with 8 bits, weights symmetric per output
channel, activations affine per tensor, the input of every layer quantized. What differs is the
quantizer.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable

from torch import Tensor, nn

from qkernels.nn import FakeQuantize, QConfig, QuantLayer, QuantSpec, prepare

from .race import Step
from .rivals import ByHand, TorchCore, torch_ao, torchao

BITS = 4
STE, LSQ = QConfig.minmax(BITS, BITS), QConfig.lsq(BITS, BITS)


def with_quantizers(model: nn.Module, make: Callable[[QuantSpec, int], nn.Module]) -> nn.Module:
    """The model prepared as ours STE, its quantizers replaced by make(spec, channels)."""
    model = prepare(model, STE)
    for layer in model.modules():
        if not isinstance(layer, QuantLayer):
            continue
        for name in ("weight_fake_quant", "input_fake_quant"):
            ours = getattr(layer, name)
            assert isinstance(ours, FakeQuantize)
            channels = layer.weight.shape[0] if ours.spec.per_channel else 1
            setattr(layer, name, make(ours.spec, channels).to(layer.weight.device))
    return model


def _compiled(model: nn.Module) -> nn.Module:
    model.compile()
    return model


def noisy_step(model: nn.Module, x: Tensor, labels: Tensor) -> Step:
    """A step of DNQ in its last phase: noise on all weights and layer inputs, at full size.

    The batch is data set and calibration set in one.
    """
    # needs the packages of the trainers, which a machine for benchmarks may lack
    from qtrain.data import Dataset, TensorSplit
    from qtrain.dnq import Dnq, DnqConfig
    from qtrain.recipe import TrainConfig

    split = TensorSplit(x, labels)
    data = Dataset("random", split, split, x.shape[1], x.shape[2], int(labels.max()) + 1)
    noise = DnqConfig(BITS, BITS, ramp="constant", calibration_images=len(x))
    recipe = Dnq(noise)
    recipe.bind(TrainConfig(batch_size=len(x)), data)
    model = recipe.setup(copy.deepcopy(model)).train()
    recipe.on_epoch_start(model, 0)
    return Step(model, x, labels, recipe.perturbation)


def replacing_step(mode: str, model: nn.Module, x: Tensor, labels: Tensor) -> Step:
    """A step of BWRF: ours LSQ, with the mixed networks of a float copy that stays as it is."""
    from qtrain.bwrf import BlockReplacement

    student, teacher = prepare(model, LSQ), copy.deepcopy(model)
    bwrf = BlockReplacement(student, teacher, model.block_names, mode=mode)
    return Step(
        student,
        x,
        labels,
        loss=lambda number: bwrf.loss(x, labels, step=number)[0],
        beside=(teacher,),
    )


def make_step(row: str, model: nn.Module, x: Tensor, labels: Tensor) -> Step:
    """The step of a row, on a copy of the model."""
    if row == DNQ:
        return noisy_step(model, x, labels)
    if row in BWRF:
        return replacing_step(BWRF[row], model, x, labels)
    return Step((ROWS | FULL_ROWS | GRAPH_ROWS)[row](model), x, labels)


DNQ = "ours DNQ"
# row -> mode; they do more than a step of QAT, which the row below is
BWRF = {"ours BWRF prefix": "prefix", "ours BWRF sampled": "sampled"}
PLAIN_QAT = "ours LSQ"
Build = Callable[[nn.Module], nn.Module]
ROWS: dict[str, Build] = {
    "float": copy.deepcopy,
    "ours STE": lambda model: prepare(model, STE),
    "ours LSQ": lambda model: prepare(model, LSQ),
    "torch.ao": lambda model: with_quantizers(model, torch_ao),
    "composite": lambda model: with_quantizers(model, ByHand),
}
FULL_ROWS: dict[str, Build] = {
    "torch core": lambda model: with_quantizers(model, TorchCore),
    "torchao": lambda model: with_quantizers(model, torchao),
    "float, compiled": lambda model: _compiled(copy.deepcopy(model)),
    "ours STE, compiled": lambda model: _compiled(prepare(model, STE)),
    "ours LSQ, compiled": lambda model: _compiled(prepare(model, LSQ)),
    "composite, compiled": lambda model: _compiled(with_quantizers(model, ByHand)),
}
# the step in a CUDA graph: only the kernels count, not the time to launch them
GRAPH_ROWS: dict[str, Build] = {
    f"{name}, graph": ROWS[name] for name in ("float", "ours STE", "ours LSQ")
}
# asked: at most this times the float step, by row and device; torch.ao's tax is asked beside it
BARS = {
    ("ours STE", "cpu"): 1.15,
    ("ours LSQ", "cpu"): 1.25,
    ("ours STE", "cuda"): 1.10,
    ("ours LSQ", "cuda"): 1.10,
    (DNQ, "cpu"): 1.15,
}


def base(row: str) -> str:
    """The float row that a row's tax is against: eager, compiled or in a graph as the row is."""
    _, comma, how = row.partition(",")
    return "float" + comma + how


def why_not(row: str) -> str | None:
    """Why a row cannot run here. BWRF needs of the trainers what has no other requirements."""
    needs = {"torchao": ("torchao",), DNQ: ("accelerate", "rich", "safetensors")}
    missing = [name for name in needs.get(row, ()) if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)} not installed" if missing else None
