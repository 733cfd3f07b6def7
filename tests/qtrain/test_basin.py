"""The basin report of a user's own model: one grid, equal budgets, the same bits, and its words."""

import copy
import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from qtrain import basin_run
from qtrain.adaround import AdaRound, weight_layers
from qtrain.basin_measure import BasinConfig
from qtrain.basin_probe import deployed_state, inside
from qtrain.basin_result import (
    ENOUGH,
    FLOAT_ENOUGH,
    NEEDED,
    NEITHER,
    QAT,
    BasinReport,
    Moment,
    Solution,
    Width,
    answer,
    verdict,
)
from qtrain.basin_run import basin
from qtrain.basin_train import LoaderBatches, Schedule, Training, freeze_grid
from qtrain.hessian import CrossEntropy, cross_entropy
from qtrain.progress import Track
from qtrain.rundir import MODEL, load_model_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from qkernels.nn import prepare

PICTURES = ("basin_curves.png", "basin_cosines.png", "basin_profiles.png", "basin_slices.png")
SMALL = BasinConfig(
    bits=(3, 2),
    first_last_bits=None,
    schedule=Schedule(steps=12, lr=1e-2, record_every=4, checkpoint_every=5),
    adaround=AdaRound(iterations=6, batch_size=8),
    profile_points=3,
    slice_points=2,
)
QUIET = Track(0, "", quiet=True)


def data(count=40):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(count, 4, generator=g)
    return x, (x[:, 0] > x[:, 1]).long()


def loader():
    return DataLoader(TensorDataset(*data()), batch_size=8, shuffle=True)


def net(dropout=0.2):
    torch.manual_seed(0)
    layers = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 2)
    model = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    x, y = data()
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return net()


@pytest.fixture(scope="module")
def report(model):
    return basin(model, loader(), config=SMALL, test=[data()], quiet=True)


def test_solutions(report):
    names = ["RTN min-max", "RTN MSE", "AdaRound"]
    for width in report.widths:
        controls = [f"more float + {name}" for name in names]
        assert [s.name for s in width.solutions] == [*names, QAT, *controls]
        first, last = width.curve[0], width.curve[-1]
        assert [m.step for m in width.curve] == [0, 1, 2, 4, 8, 12]
        # QAT starts at RTN on its grid, and its last look is the solution
        assert first.deployed_loss == width.nearest.loss
        assert first.latent_loss == report.home.loss
        assert first.latent_distance == 0 and first.deployed_distance == width.nearest.distance
        assert last.deployed_loss == width.qat.loss and last.deployed_distance == width.qat.distance
        assert width.nearest.angle is None and 0 < width.qat.angle < 180
        for s in width.solutions:
            assert s.inside == inside(s.loss, report.limit)
            # the evaluation set is part of the test set here, and neither is the other
            assert s.test_loss != s.loss and 0 <= s.test_accuracy <= 1
        ends = [(line[0], line[-1]) for _, line in width.profiles]
        ptq, ada, qat = width.nearest.loss, width.named("AdaRound").loss, width.qat.loss
        home = report.home.loss
        assert ends == [
            pytest.approx(pair) for pair in ((home, ptq), (home, ada), (home, qat), (ptq, qat))
        ]
    assert report.home.distance == 0 and report.home.inside
    assert report.more_float.distance > 0


def test_the_answer_is_the_same_twice(model, report):
    assert basin(model, loader(), config=SMALL, test=[data()], quiet=True) == report
    other = basin(model, loader(), config=SMALL, test=[data()], seed=1, quiet=True)
    assert other.width(2).qat != report.width(2).qat


def test_nothing_of_the_callers_changes(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    short = replace(SMALL, bits=(2,), schedule=replace(SMALL.schedule, steps=2))
    basin(model, loader(), config=short, quiet=True)
    assert (torch.rand(1), random.random(), np.random.rand()) == expected
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not model.training and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("grid", ["minmax", "mse"])
def test_the_grid_is_frozen_and_shared(model, grid, tmp_path):
    config = replace(SMALL, bits=(2,), grid=grid)
    basin(model, loader(), config=config, out=tmp_path / "run", quiet=True)
    start = prepare(model, config.qconfig(2))
    end = prepare(model, config.qconfig(2))
    end.load_state_dict(load_model_file(tmp_path / "run" / "w2")[0])
    deployed = deployed_state(end)
    for name, layer in weight_layers(end).items():
        old = start.get_submodule(name)
        # equal to the bit, though the weights have moved
        assert torch.equal(layer.weight_fake_quant.range, old.weight_fake_quant.range)
        assert not torch.equal(layer.weight, old.weight)
        scale = old.weight_fake_quant.qparams().scale[:, None]
        codes = deployed[f"{name}.weight"] / scale
        assert torch.equal(codes, codes.round())
        assert codes.min() >= -2 and codes.max() <= 1


@pytest.mark.parametrize("mode", ["frozen", "train"])
def test_batchnorm_statistics(mode):
    model = prepare(net(), SMALL.qconfig(2))
    freeze_grid(model)
    before = {k: v.clone() for k, v in model[1].state_dict().items()}
    schedule = replace(SMALL.schedule, batchnorm=mode, steps=3)
    batches = LoaderBatches(loader(), 0, torch.device("cpu"))
    Training(model, batches, cross_entropy, schedule, lambda m: {}, seed=0, run=None).train(QUIET)
    still = torch.equal(model[1].running_mean, before["running_mean"])
    assert still == (mode == "frozen")
    assert not torch.equal(model[1].weight, before["weight"])


def test_statistics_of_their_own(model, report):
    config = replace(SMALL, bits=(2,), reestimate_batchnorm=True)
    found = basin(model, loader(), config=config, test=[data()], quiet=True).width(2)
    before = report.width(2)
    assert found.qat == before.qat and found.curve == before.curve
    pairs = zip(found.ptq + found.control, before.ptq + before.control, strict=True)
    assert all(new.loss != old.loss and new.distance == old.distance for new, old in pairs)
    again = basin(model, loader(), config=config, test=[data()], quiet=True)
    assert again.width(2) == found


def test_equal_budgets():
    """QAT at each width and the float control see the same batches in the same steps."""
    seen = []

    def noting(model, batch):
        if model.training:
            seen.append(round(float(batch[0].sum()), 5))
        return cross_entropy(model, batch)

    basin(net(), loader(), config=SMALL, loss=noting, quiet=True)
    steps = SMALL.schedule.steps
    arms = [seen[start : start + steps] for start in range(0, len(seen), steps)]
    assert len(seen) == steps * (1 + len(SMALL.bits))
    assert all(arm == arms[0] for arm in arms)
    # and not one batch again and again, nor one order for all epochs of 5 batches
    assert len(set(arms[0])) > 5


class KilledError(BaseException):
    """Not an Exception, as a Ctrl-C is none."""


class Dying(CrossEntropy):
    """Cross entropy that kills the run at its n-th call, wherever that is."""

    def __init__(self, calls):
        super().__init__()
        object.__setattr__(self, "left", iter(range(calls)))

    def of(self, logits, y):
        if next(self.left, None) is None:
            raise KilledError
        return super().of(logits, y)


def test_same_bits_after_kills(model, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    report = basin(model, loader(), config=SMALL, loss=Dying(10**6), out=whole, quiet=True)
    kills = 0
    # ever later: in the control, in QAT between checkpoints, in what is quantized and drawn after
    for calls in range(9, 400, 23):
        try:
            found = basin(model, loader(), config=SMALL, loss=Dying(calls), out=killed, quiet=True)
        except KilledError:
            kills += 1
            assert not (killed / "results.json").exists()
        else:
            break
    assert kills > 4 and found == report
    parts = [f"{arm}/metrics.jsonl" for arm in ("float", "w3", "w2")]
    parts += [f"{arm}/{name}" for arm in ("w3", "w2") for name in ("results.json", MODEL)]
    for part in ("results.json", "report.md", *parts, *PICTURES):
        ours, theirs = ((place / part).read_bytes() for place in (killed, whole))
        assert ours.replace(b"# killed", b"# whole") == theirs, part
    assert not list(killed.rglob("*.part"))


def test_finished_runs_are_read_back(model, tmp_path, monkeypatch):
    out = tmp_path / "run"
    short = replace(SMALL, bits=(2,))
    first = basin(model, loader(), config=short, out=out, quiet=True)
    (out / "report.md").unlink()

    def refuse(*_):
        raise AssertionError("nothing is to be computed")

    monkeypatch.setattr(basin_run, "measure", refuse)
    again = basin(model, loader(), config=short, out=out, quiet=True)
    assert again == first and (out / "report.md").exists()
    assert BasinReport.from_dict(json.loads(json.dumps(first.to_dict()))) == first
    with pytest.raises(ValueError, match=r"lr \(0.01 there, 0.5 asked for\)"):
        basin(model, loader(), config=short, lr=0.5, out=out, quiet=True)
    others = {"calibration": [data(8)], "test": [data()], "loss": CrossEntropy(0.1)}
    for name, value in others.items():
        with pytest.raises(ValueError, match=rf"recipe\.{name} \("):
            basin(model, loader(), config=short, out=out, quiet=True, **{name: value})
    with pytest.raises(ValueError, match=r"recipe\.loss \(.* there, '.*refuse' asked for\)"):
        basin(model, loader(), config=short, loss=refuse, out=out, quiet=True)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"recipe\.model"):
        basin(net(0.1).append(nn.Linear(2, 2)), loader(), config=short, out=out, quiet=True)
    (out / "results.json").write_text('{"basin": {"home": 1}}')
    with pytest.raises(ValueError, match=r"basin: .*results\.json must hold the results"):
        basin(model, loader(), config=short, out=out, quiet=True)
    (out / "results.json").unlink()
    (out / "w2" / "results.json").write_text("{")
    with pytest.raises(ValueError, match=r"w2/results\.json must be a JSON file"):
        basin(model, loader(), config=short, out=out, quiet=True)
    assert basin(model, loader(), config=short, out=out, overwrite=True, quiet=True) == first


def test_bad_input(model, tmp_path):
    out = tmp_path / "run"

    def refused(error, match, model=model, loader=None, **how):
        batches = [data()] if loader is None else loader
        with pytest.raises(error, match=match):
            basin(model, batches, out=out, quiet=True, **{"config": SMALL, **how})
        assert not out.exists()

    refused(ValueError, "basin: loader must be one of at least one batch, got none", loader=[])
    refused(TypeError, "can be iterated again, got generator", loader=(b for b in [data()]))
    refused(TypeError, r"must yield pairs \(x, y\) of tensors, got a Tensor", loader=[data()[0]])
    refused(ValueError, "evaluation must be one of at least one batch", evaluation=[])
    refused(ValueError, "calibration must be one of at least one batch", calibration=[])
    refused(ValueError, "test must be one of at least one batch", test=[])
    refused(ValueError, "must have a Conv, ConvTranspose or Linear", model=nn.BatchNorm1d(4))
    frozen = copy.deepcopy(model).requires_grad_(False)
    refused(ValueError, "one with parameters that require grad, got none", model=frozen)
    refused(ValueError, "float model", model=prepare(model, SMALL.qconfig(2)))
    refused(ValueError, "bits must be one or more, each once, got", bits=())
    refused(ValueError, "each once", bits=(2, 2))
    refused(ValueError, "bits", bits=(17,))
    refused(ValueError, "basin: steps must be at least 1, got 0", steps=0)
    refused(ValueError, "lr must be positive", lr=-1.0)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"grid": "lsq"}, "grid must be one of minmax, mse, got 'lsq'"),
        ({"eps_absolute": -1.0}, "eps_absolute must be at least 0"),
        ({"profile_points": 1}, "profile_points must be at least 2, got 1"),
        ({"eps_relative": math.inf}, "eps_relative must be at least 0 and finite, got inf"),
        ({"eps_absolute": math.nan}, "eps_absolute must be at least 0 and finite, got nan"),
        ({"slice_points": -1}, "slice_points must be 0, or at least 2, got -1"),
        ({"slice_points": 1}, "slice_points must be 0, or at least 2, got 1"),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=f"basin: {match}"):
        BasinConfig(**settings)
    with pytest.raises(ValueError, match=r"halve_at must be shares in \(0, 1\)"):
        Schedule(halve_at=(1.5,))
    with pytest.raises(ValueError, match="batchnorm must be one of frozen, train, got 'off'"):
        Schedule(batchnorm="off")


def test_a_loss_that_explodes_is_named(model):
    def exploding(model, batch):
        return cross_entropy(model, batch) * (math.inf if model.training else 1)

    with pytest.raises(FloatingPointError, match="basin: loss must be finite, got inf at step 1"):
        basin(model, loader(), config=SMALL, loss=exploding, quiet=True)


def test_schedule():
    schedule = Schedule(steps=20, lr=0.8, halve_at=(0.5, 0.8), record_every=8)
    assert [schedule.rate(s) for s in (0, 9, 10, 15, 16, 19)] == [0.8, 0.8, 0.4, 0.4, 0.2, 0.2]
    assert [s for s in range(21) if schedule.watched(s)] == [0, 1, 2, 4, 8, 16, 20]


def solution(name, loss, limit=1.0, control=False):
    return Solution(name, control, loss, None, None, None, inside(loss, limit), 1.0, 0.1, 90.0)


def width(ptq, curve, control):
    names = ["RTN min-max", "RTN MSE", "AdaRound"]
    moments = tuple(Moment(2**k - 1, None, 0.1, f, 0.0, 0.5, 0.0, 1.0) for k, f in enumerate(curve))
    solutions = [solution(n, f) for n, f in zip(names, ptq, strict=True)]
    solutions.append(solution(QAT, curve[-1]))
    solutions += [
        solution(f"more float + {n}", f, control=True) for n, f in zip(names, control, strict=True)
    ]
    return Width(2, "minmax", tuple(solutions), moments, (), None)


def test_the_words_of_the_issue():
    found = width((2.31, 4.0, 2.5), (2.31, 1.4, 0.9, 0.06), (3.0, 3.5, 2.0))
    assert verdict(found, 0.05, 1.0) == (
        "at W2 PTQ leaves the basin: loss RTN min-max 2.31, RTN MSE 4, AdaRound 2.5 against 0.05; "
        "QAT came back at step 3 and ended inside (loss 0.06); with the same steps of float "
        "training first, PTQ is outside (more float + AdaRound, loss 2): QAT is needed"
    )


def test_words_follow_the_figures():
    """All combinations of inside and outside, and no sentence against its figures."""
    low, high = 0.5, 3.0
    seen = set()
    for code in range(2**9):
        f = [low if code >> bit & 1 else high for bit in range(9)]
        ptq, middle, end, control = f[:3], f[3:5], f[5], f[6:]
        found = width(ptq, (ptq[0], *middle, end), control)
        text, said = verdict(found, 0.1, 1.0), answer(found)
        seen.add(said)
        assert text.endswith(said)
        # the sentence names each fact once, and only where it holds
        assert ("PTQ leaves the basin:" in text) == (low not in ptq)
        assert ("PTQ stays in the basin:" in text) == (high not in ptq)
        assert ("by some ways" in text) == (low in ptq and high in ptq)
        path = [ptq[0], *middle, end]
        assert ("did not come into it" in text) == (low not in path)
        assert ("came back at step" in text) == (low in path and ptq[0] == high)
        assert ("started inside" in text) == (ptq[0] == low)
        assert ("ended inside" in text) == (end == low)
        assert ("first, PTQ is inside" in text) == (low in control)
        if said == ENOUGH:
            assert low in ptq
        else:
            assert low not in ptq
            assert (said == FLOAT_ENOUGH) == (low in control)
            assert (said == NEEDED) == (low not in control and end == low)
    assert seen == {ENOUGH, FLOAT_ENOUGH, NEEDED, NEITHER}


def test_half_of_the_fall():
    def moments(*pairs):
        return tuple(Moment(k, None, a, b, None, None, 0.0, 0.0) for k, (a, b) in enumerate(pairs))

    base = width((9, 9, 9), (9.0, 1.0), (9, 9, 9))
    fall = replace(base, curve=moments((0.1, 9), (0.2, 6), (0.3, 4), (5, 2), (6, 1))).half_fall
    assert (fall.step, fall.fall) == (2, 5) and fall.latent_change == pytest.approx(0.2)
    assert fall.before_latent
    late = replace(base, curve=moments((0.1, 9), (3.0, 4), (6, 1))).half_fall
    assert late.latent_change == pytest.approx(2.9) and not late.before_latent
    assert replace(base, curve=moments((0.1, 1), (0.2, 2))).half_fall is None
