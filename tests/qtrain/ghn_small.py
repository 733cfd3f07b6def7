"""A small GHN and four networks, for the tests of evaluation."""

import torch
from qtrain.ghn.config import GhnConfig
from qtrain.ghn.evaluate import EvalPlan
from qtrain.ghn.model import Ghn
from qtrain.ghn.space import draw_net
from torch import nn

SMALL = {"width": 16, "heads": 2, "layers": 1, "max_shape": (8, 8, 5, 5), "classes": 10}
PLAN = EvalPlan(bits=(4,), batchnorm_images=96, range_images=64, batch_size=32, seed=5)
NETS = tuple(draw_net("digits", split, 1, i) for split in ("id", "bn-free") for i in (0, 1))


def make_ghn(**settings):
    torch.manual_seed(0)
    ghn = Ghn(GhnConfig(**{**SMALL, **settings}))
    if ghn.embedding.bits is not None:
        nn.init.normal_(ghn.embedding.bits.weight)
    return ghn
