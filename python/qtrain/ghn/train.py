"""``qtrain ghn``: train a graph hypernetwork, in float (GHN-Q) or under quantization (GHN-QAT).

In each step it predicts the weights of a few networks (the meta-batch) at once, and its loss is the
mean of theirs on one batch of images, after all weights and inputs are quantized. One backward goes
through the networks, the quantizers and the GHN. BatchNorm uses the statistics of the batch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import Batch, Dataset
from ..progress import Track
from ..recipe import Recipe, TrainConfig, autocast, require
from ..report import bits_name
from ..rundir import config_differences
from ..seeds import generator
from .checkpoint import ghn_digest
from .config import GhnConfig
from .embedding import Bits
from .evaluate import EvalPlan, evaluate_networks, told
from .graph import Graph
from .model import Ghn
from .nets import NetPool, TrainNet
from .prediction import as_ghn
from .quantizers import FLOAT_BITS, Place, Quantizer, layer_bits, quantize_weights
from .space import draw_nets, space_named, without_norm

# a step counts as exploding when its loss is above so many times that of guessing, log(classes)
EXPLODING = 3.0


@dataclass(frozen=True)
class GhnTraining:
    """How a GHN is trained, besides `TrainConfig` and `GhnConfig`.

    Attributes:
        space: one of `qtrain.ghn.space.SPACES`.
        nets: how many of its train split there are to draw from: indices 0 .. nets - 1 of net_seed.
        meta_batch: networks in a step, all different; over all processes.
        norm: False: the networks have no BatchNorm.
        quantizer: see `Quantizer`.
        bits: widths of weights and inputs; of several each network draws one. 32 is float. Empty
            for float training.
        mixed: the share of networks whose layers draw widths of their own, one each.
        first_last_bits: the first and the last layer have at least so many; None: as the others.
        penalty: of the sum of the norms of a network's predicted tensors; GHN-3 has 3e-5 (for the
            whole meta-batch there, for the mean over it here).
        max_skipped: steps whose gradient was not finite, before training gives up.
        held_out: networks of the id split that the evaluations in training are of. Their scores are
            after PTQ to the least of the bits, see `qtrain.ghn.evaluate`.

    Raises:
        TypeError, ValueError: a setting of another kind, or outside its range.
    """

    space: str = "digits"
    nets: int = 512
    net_seed: int = 0
    meta_batch: int = 8
    norm: bool = True
    quantizer: Quantizer = field(default_factory=Quantizer)
    bits: tuple[int, ...] = ()
    mixed: float = 0.0
    first_last_bits: int | None = 8
    penalty: float = 0.0
    max_skipped: int = 100
    held_out: int = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", tuple(self.bits))
        kinds = {"int": int, "bool": bool}
        for setting in fields(self):
            kind, value = kinds.get(str(setting.type)), getattr(self, setting.name)
            if kind is not None and type(value) is not kind:
                raise TypeError(f"ghn: {setting.name} must be of {kind.__name__}, got {value!r}")
        space_named(self.space)
        for name, least in (("meta_batch", 1), ("max_skipped", 0), ("held_out", 1)):
            value = getattr(self, name)
            require(value >= least, name, f"at least {least}", value, "ghn")
        rule = f"at least the meta_batch of {self.meta_batch}"
        require(self.nets >= self.meta_batch, "nets", rule, self.nets, "ghn")
        require(0 <= self.mixed <= 1, "mixed", "in [0, 1]", self.mixed, "ghn")
        require(self.penalty >= 0, "penalty", "at least 0", self.penalty, "ghn")
        self._check_bits()

    def _check_bits(self) -> None:
        bits, floats = self.bits, self.quantizer.kind == "none"
        rule = "none without a quantizer, and some with one"
        require(bool(bits) != floats, "bits", rule, bits or "none", "ghn")
        for width in bits:
            known = type(width) is int and (1 <= width <= 16 or width == FLOAT_BITS)
            require(known, "bits", f"in 1..16, or {FLOAT_BITS} for float", width, "ghn")
        several = len(set(bits)) > 1 or self.mixed == 0
        require(several, "mixed", "0 with fewer than two bit widths", self.mixed, "ghn")
        ends = self.first_last_bits
        inside = ends is None or 1 <= ends <= 16
        require(inside, "first_last_bits", "in 1..16 or None", ends, "ghn")

    def describe(self) -> dict[str, Any]:
        """JSON-able; decides, with the configs, the result."""
        return {**asdict(self), "bits": list(self.bits)}


@dataclass(frozen=True)
class Start:
    """A trained GHN to start from: its weights, and what names them in the run's config."""

    ghn: Ghn
    digest: str

    @classmethod
    def load(cls, path: str | Path) -> Start:
        """A run directory, a safetensors file or a public GHN-2's.

        Raises:
            FileNotFoundError, ValueError: as `load_ghn` and `load_public_ghn2`.
        """
        return cls(as_ghn(path), ghn_digest(Path(path)))


class GhnRecipe(Recipe):
    """Trains a GHN in place of the model; `TrainConfig.model` is "ghn", and its options are those
    of `GhnConfig`. Logged beside the loss is that of the worst network, with several processes the
    mean of theirs.

    With several processes each has its share of the networks, and of the images of each step (OUR
    choice: a network then sees batch_size / processes images).

    Args:
        training: see `GhnTraining`.
        start: None: fresh weights.
    """

    name = "ghn"
    parts = ("worst",)
    sparse = True

    def __init__(self, training: GhnTraining, start: Start | None = None) -> None:
        self.training, self.start = training, start
        self.skipped = 0
        self.exploded = torch.zeros((), dtype=torch.int64)

    def bind(self, config: TrainConfig, data: Dataset) -> None:
        super().bind(config, data)
        settings = ghn_config(config, data)
        training, state = self.training, PartialState()
        self.rank, self.world = state.process_index, state.num_processes
        rule = "no or bf16: the scaler of fp16 skips steps of its own"
        half = config.mixed_precision == "fp16"
        require(not half, "mixed_precision", rule, config.mixed_precision, "ghn")
        require(config.clip is not None, "clip", "set: the norm tells a bad step", None, "ghn")
        require(config.swa_start is None, "swa_start", "None", config.swa_start, "ghn")
        rule = f"a multiple of {self.world} processes"
        split = training.meta_batch % self.world == 0
        require(split, "meta_batch", rule, training.meta_batch, "ghn")
        self.known_bits = settings.bit_widths
        unknown = set(training.bits) - {FLOAT_BITS, *self.known_bits}
        rule = f"all of {training.bits}, which are trained, or none"
        require(not (self.known_bits and unknown), "bit_widths", rule, self.known_bits, "ghn")
        if self.start is not None:
            require_start(self.start.ghn.config, settings)
        self.pool = NetPool(
            training.space,
            training.net_seed,
            training.nets,
            data,
            training.quantizer,
            norm=training.norm,
        )
        nets = draw_nets(training.space, "id", training.net_seed, training.held_out, quiet=True)
        self.held_out = nets if training.norm else [without_norm(net) for net in nets]

    def describe(self) -> dict[str, Any]:
        start = self.start and self.start.digest
        return {"name": self.name, "training": self.training.describe(), "start": start}

    def build(self, config: TrainConfig, data: Dataset) -> nn.Module:
        return Ghn(ghn_config(config, data))

    def initialize(self, model: nn.Module, data: Dataset, config: TrainConfig) -> None:
        if self.start is not None:
            # a GHN that was not told widths starts as one that makes nothing of them
            wanted = model.state_dict()
            given = self.start.ghn.state_dict()
            fresh = {k: torch.zeros_like(v) for k, v in wanted.items() if k not in given}
            model.load_state_dict({**given, **fresh})

    def draw(self, step: int) -> list[tuple[int, TrainNet, dict[str, int]]]:
        """(index, network, widths by layer) of this process's part of a step's meta-batch."""
        training = self.training
        draws = generator(self.config.seed, step, "nets")
        indices = torch.randperm(training.nets, generator=draws)[: training.meta_batch].tolist()
        chosen = []
        for index in indices[self.rank :: self.world]:
            net = self.pool.get(index)
            chosen.append((index, net, self._widths(step, index, list(net.inputs))))
        return chosen

    def _widths(self, step: int, index: int, layers: Sequence[str]) -> dict[str, int]:
        bits = self.training.bits
        if not bits:
            return {}
        draws = generator(self.config.seed, step, f"widths/{index}")
        apart = torch.rand((), generator=draws).item() < self.training.mixed
        picks = torch.randint(len(bits), (len(layers) if apart else 1,), generator=draws).tolist()
        each = [bits[pick] for pick in picks]
        return layer_bits(layers, each if apart else each[0], self.training.first_last_bits)

    def loss(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        x, y = batch
        chosen = self.draw(step)
        nets = [net for _, net, _ in chosen]
        widths = [layers for _, _, layers in chosen]
        places = [Place(self.config.seed, step, index) for index, _, _ in chosen]
        predictions = model(
            [net.graph for net in nets],
            bits=[self.told(n.graph, layers) for n, layers in zip(nets, widths, strict=True)],
            skeletons=[net.skeleton for net in nets],
        )
        quantized = quantize_weights(predictions, widths, self.training.quantizer, places)
        losses = []
        with autocast(self.config.mixed_precision, x.device):
            for net, weights, layers, place in zip(nets, quantized, widths, places, strict=True):
                for name, inputs in net.inputs.items():
                    inputs.set(layers.get(name, FLOAT_BITS), place)
                smooth = self.config.label_smoothing
                losses.append(F.cross_entropy(net.run(weights, x), y, label_smoothing=smooth))
        each = torch.stack(losses)
        mean = each.mean()
        self.part_values = (each.detach().amax(),)
        self._watch(mean.detach())
        if self.training.penalty:
            sizes = [value.norm() for weights in predictions for value in weights.values()]
            mean = mean + self.training.penalty * torch.stack(sizes).sum() / len(nets)
        return mean

    def told(self, graph: Graph, layers: Mapping[str, int]) -> Bits:
        """See `qtrain.ghn.evaluate.told`."""
        return told(graph, layers, self.known_bits)

    def _watch(self, loss: Tensor) -> None:
        """Count exploding steps, without waiting for the device."""
        if self.exploded.device != loss.device:
            self.exploded = self.exploded.to(loss.device)
        everywhere = reduce(loss, "mean") if self.world > 1 else loss
        self.exploded += everywhere > EXPLODING * math.log(self.data.classes)

    def accepts(self, loss: Tensor, norm: Tensor | None) -> bool:
        """The one wait for the device in each step; the norm is the same on all ranks.

        Raises:
            FloatingPointError: more steps than max_skipped were refused.
        """
        assert norm is not None, "bind asks for clip"
        if bool(torch.isfinite(norm)):
            return True
        self.skipped += 1
        if self.skipped > self.training.max_skipped:
            raise FloatingPointError(
                f"ghn: gradients must be finite in all but {self.training.max_skipped} steps "
                f"(max_skipped), got one more; try a smaller lr, or another quantizer"
            )
        return False

    def scores(self, model: nn.Module, step: int) -> dict[str, float]:
        """The mean over the held-out networks, the same on all ranks: each evaluates all of them.
        The loss is that of those whose logits are finite."""
        assert isinstance(model, Ghn), "what `build` made"
        training = self.training
        bits = tuple(width for width in (min(training.bits, default=FLOAT_BITS),) if width <= 16)
        quantizer = training.quantizer
        plan = EvalPlan(
            bits=bits,
            methods=(quantizer.method,),
            first_last_bits=training.first_last_bits,
            percentile=quantizer.percentile or EvalPlan.percentile,
            per_channel=quantizer.per_channel,
        )
        quiet = Track(0, "", quiet=True)
        found = evaluate_networks(model, self.held_out, self.data, plan, track=quiet)
        last = bits_name((bits[0], bits[0])) if bits else "FP32"
        rows = [score for score in found if score.bits == last]
        losses = [score.loss for score in rows if score.loss is not None]
        return {
            "test_loss": statistics.fmean(losses) if losses else math.inf,
            "test_accuracy": statistics.fmean(score.accuracy for score in rows),
        }

    def counts(self) -> dict[str, int]:
        return {"skipped": self.skipped, "exploded": int(self.exploded)}

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "exploded": self.exploded}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.skipped, self.exploded = state["skipped"], state["exploded"]


def ghn_config(config: TrainConfig, data: Dataset) -> GhnConfig:
    """The GHN that a run's settings ask for; the dataset decides how many classes.

    Raises:
        ValueError: they ask for none, or for a GHN that there is not.
    """
    require(config.model == "ghn", "model", "ghn", config.model, "ghn")
    try:
        return GhnConfig.from_dict({"classes": data.classes, **config.model_options})
    except TypeError as error:  # on the command line a setting of another kind is a slip
        raise ValueError(str(error)) from error


def require_start(start: GhnConfig, wanted: GhnConfig) -> None:
    """Raise a ValueError unless a GHN can be trained on as the other: with another gain, and told
    bit widths where it was not before."""
    start = replace(start, gain=wanted.gain)
    if not start.bit_widths:
        start = replace(start, bit_widths=wanted.bit_widths)
    different = config_differences(start.to_dict(), wanted.to_dict())
    require(not different, "start", "a GHN of these settings", "; ".join(different), "ghn")
