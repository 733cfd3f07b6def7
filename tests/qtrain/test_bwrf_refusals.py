"""BWRF: what is refused, and in which words."""

import copy
import math

import pytest
import torch
from qtrain.bwrf import BlockReplacement
from qtrain.bwrf_config import BwrfConfig
from qtrain.models import build_model
from test_bwrf import CLASSES, batch, partners
from torch import nn

from qkernels.nn import QConfig, prepare


class Reusing(nn.Module):
    """Its second block changes its input in place."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.skip = False

    def forward(self, x):
        h = x if self.skip else self.a(x)
        return self.c(self.b(h.sin_()))


class TimeFirst(nn.Module):
    """The batch lies in dim 1 between its blocks."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):  # [N, T, 4]
        return self.c(self.b(self.a(x.transpose(0, 1))).mean(0))


def linear_partners(kind):
    teacher = kind()
    student = prepare(teacher, QConfig.lsq(4, 4))
    return student, teacher


@pytest.mark.parametrize("mode", ["prefix", "single"])
def test_a_block_that_changes_its_input(mode):
    student, teacher = linear_partners(Reusing)
    bwrf = BlockReplacement(student, teacher, ["a", "b", "c"], mode=mode)
    with pytest.raises(ValueError, match="changes its output in place, got a change of 'a'"):
        bwrf.loss(torch.randn(5, 4), torch.zeros(5, dtype=torch.long))


def test_a_student_that_skips_a_block():
    student, teacher = linear_partners(Reusing)
    bwrf = BlockReplacement(student, teacher, ["a", "b", "c"])
    student.skip = True
    with pytest.raises(
        ValueError, match=r"student must be a model that calls all its blocks .* of 'a'"
    ):
        bwrf.loss(torch.randn(5, 4), torch.zeros(5, dtype=torch.long))


def test_a_batch_elsewhere():
    student, teacher = linear_partners(TimeFirst)
    bwrf = BlockReplacement(student, teacher, ["a", "b", "c"])
    y = torch.zeros(5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"keep the batch \(5\) in dim 0, got \(7, 5, 4\) from"):
        bwrf.loss(torch.randn(5, 7, 4), y)
    # as many steps as examples: only what comes out in the end can tell
    with pytest.raises(ValueError, match=r"keep the batch \(10\) in dim 0, got \(5, 3\) from"):
        bwrf.loss(torch.randn(5, 5, 4), y)


def test_partners_that_do_not_fit():
    student, teacher = partners("resnet8")
    rule = "bwrf: teacher must be a float model of the student's architecture, got "
    other = build_model("resnet8", channels=3, classes=CLASSES, size=8, options={"width": 8})
    with pytest.raises(ValueError, match=rule + r"'stem\.0\.weight' of \[8, 3, 3, 3\], \[4, 3"):
        BlockReplacement(student, other)
    other = build_model("cnn", channels=3, classes=CLASSES, size=8)
    with pytest.raises(ValueError, match=rule + r"'features\.0\.0\.weight' in the teacher alone"):
        BlockReplacement(student, other)
    with pytest.raises(ValueError, match="must be a float model, got one with fake quantizers"):
        BlockReplacement(student, copy.deepcopy(student))
    own = copy.deepcopy(teacher)
    own.head.weight = student.head.weight
    with pytest.raises(ValueError, match="another module than the student, got one that shares"):
        BlockReplacement(student, own)
    with pytest.raises(ValueError, match="another module than the student, got one that shares"):
        BlockReplacement(teacher, teacher)
    with pytest.raises(TypeError, match="teacher must be a Module, got OrderedDict"):
        BlockReplacement(student, teacher.state_dict())
    # so far the teacher is as it was
    assert teacher.training and all(p.requires_grad for p in teacher.parameters())
    with pytest.raises(ValueError, match=r"names of modules of ResNet .*got 'stages\.9'"):
        BlockReplacement(student, teacher, ["stages.0", "stages.9"])
    with pytest.raises(TypeError, match="blocks must be a list of names, got 'stages'"):
        BlockReplacement(student, teacher, "stages")


def test_calls_that_do_not_fit():
    student, teacher = partners("resnet8")
    x, y = batch()
    with pytest.raises(ValueError, match="step must be the number of the step for mode sampled"):
        BlockReplacement(student, teacher, mode="sampled").loss(x, y)
    bwrf = BlockReplacement(student, teacher, schedule="linear")
    for progress in (None, -0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"progress must be in .* for a schedule, got"):
            bwrf.loss(x, y, progress=progress)
    with pytest.raises(ValueError, match=r"block must be in 1\.\.3, got 4"):
        BlockReplacement(student, teacher, mode="single", block=4)
    student.head, teacher.head = nn.Identity(), nn.Unflatten(1, (4, 4))
    with pytest.raises(ValueError, match=r"teacher must be .* logits \[6, C\], got \(6, 4, 4\)"):
        BlockReplacement(student, teacher).loss(x, y)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "suffix"}, "mode must be one of prefix, single, sampled, got 'suffix'"),
        ({"schedule": "cosine"}, "schedule must be one of linear, exponential, got 'cosine'"),
        ({"effect": "none"}, "effect must be one of both, forward, backward, got 'none'"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"temperature": math.inf}, "temperature must be at least 0 and finite, got inf"),
        ({"temperature": "4"}, "temperature must be a number, got '4'"),
        ({"temperature": True}, "temperature must be a number, got True"),
        ({"alpha": None}, "alpha must be a number, got None"),
        ({"block": 1.5, "mode": "single"}, "block must be a whole number or None, got 1.5"),
        ({"alpha": -1.0}, "alpha must be at least 0 and finite, got -1.0"),
        ({"beta": math.nan}, "beta must be at least 0 and finite, got nan"),
        ({"block": 1}, "block must be None unless mode is single, got 1"),
        ({"block": 1, "mode": "single", "schedule": "linear"}, "schedule must be None with a"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match="bwrf: " + words):
        BwrfConfig(**options)
