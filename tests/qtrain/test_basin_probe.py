"""What is measured at a point of weight space, on problems with known answers."""

import math

import pytest
import torch
from qtrain.basin_probe import (
    Plane,
    Probe,
    angle,
    blend,
    cosine,
    deployed_state,
    first_entry,
    inside,
    inward_cosine,
    latent_state,
    loss_slice,
    profile,
    threshold,
    weight_names,
)
from qtrain.ptq import ptq_qconfig
from torch import nn

import qkernels
from qkernels.nn import prepare

BATCH = [(torch.zeros(1, 1), torch.zeros(1))]


class Point(nn.Module):
    """Nothing but a weight."""

    def __init__(self, values):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(values))


def quadratic(optimum, curvature):
    """1/2 (w - w*)^T diag(h) (w - w*)."""

    def loss(model, batch):
        away = model.weight.flatten() - torch.tensor(optimum)
        return 0.5 * (torch.tensor(curvature) * away * away).sum()

    return loss


def probe_at(optimum, curvature):
    return Probe(Point(optimum), ["weight"], BATCH, quadratic(optimum, curvature))


def state(*values):
    return {"weight": torch.tensor(values)}


def test_loss_gradient_and_cosine_of_a_quadratic():
    optimum = [1.0, -2.0, 0.5]
    curvature = [4.0, 1.0, 2.0]
    probe = probe_at(optimum, curvature)
    place = state(2.0, 0.0, 0.5)
    value, slope = probe.slope(place)
    assert value == pytest.approx(0.5 * (4 * 1 + 1 * 4))
    assert slope.tolist() == [4.0, 2.0, 0.0]
    home = probe.vector(state(*optimum))
    found = inward_cosine(slope, probe.vector(place), home)
    # <H e, e> / (|H e| |e|) for e = (1, 2, 0)
    assert found == pytest.approx(8 / (math.sqrt(20) * math.sqrt(5)))
    # the exit test: 4 against an optimum of 0
    limit = threshold(probe.loss(state(*optimum)), relative=0.1, absolute=0.05)
    assert limit == 0.05
    assert not inside(value, limit)
    assert inside(probe.loss(state(1.0, -1.7, 0.5)), limit)


@pytest.mark.parametrize(("sign", "expected"), [(1.0, 1.0), (-1.0, -1.0)])
def test_descent_in_a_round_bowl_leads_straight_home(sign, expected):
    home, place = torch.tensor([1.0, 2.0]).double(), torch.tensor([4.0, -1.0]).double()
    assert inward_cosine(sign * (place - home), place, home) == pytest.approx(expected)


def test_threshold():
    assert threshold(2.0, relative=0.1, absolute=0.05) == pytest.approx(2.25)
    # a loss that can be negative is not a smaller basin
    assert threshold(-2.0, relative=0.1, absolute=0.05) == pytest.approx(-1.75)
    assert inside(2.25, 2.25)
    assert not inside(math.nan, 2.25) and not inside(math.inf, 2.25)


def test_first_entry():
    curve = [(0, 2.3), (1, math.nan), (2, 1.0), (4, 0.3), (8, 0.9), (16, 0.1)]
    assert first_entry(curve, 0.5) == 4
    assert first_entry(curve, 0.3) == 4
    assert first_entry(curve, 0.2) == 16
    assert first_entry(curve, 5.0) == 0
    assert first_entry(curve, 0.05) is None
    assert first_entry([], 1.0) is None


def test_angles_and_cosines_by_hand():
    a = torch.tensor([3.0, 4.0]).double()
    assert cosine(a, torch.tensor([4.0, 3.0]).double()) == pytest.approx(24 / 25)
    assert angle(a, torch.tensor([-4.0, 3.0]).double()) == pytest.approx(90)
    assert angle(a, -2 * a) == pytest.approx(180)
    assert angle(a, torch.tensor([1.0, 0.0]).double()) == pytest.approx(53.13010235)
    assert cosine(a, 0 * a) is None and angle(0 * a, a) is None
    assert cosine(a, a * math.inf) is None


def test_blend_moves_all_entries():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    first = {k: v.clone() for k, v in net.state_dict().items()}
    second = {k: v + 1 if v.is_floating_point() else v + 7 for k, v in first.items()}
    for shares, expected in (([1, 0], first), ([0, 1], {**second, **counters(first)})):
        mixed = blend([first, second], shares)
        assert all(torch.equal(mixed[k], v) for k, v in expected.items())
    middle = blend([first, second], [0.5, 0.5])
    assert torch.allclose(middle["0.bias"], first["0.bias"] + 0.5)
    assert torch.allclose(middle["1.running_mean"], torch.full((2,), 0.5))
    # beyond the first state by 3 its variance of 1 would be -2
    beyond = blend([first, second], [4, -3])
    assert beyond["1.running_var"].tolist() == [0.0, 0.0]
    assert beyond["1.running_mean"].tolist() == [-3.0, -3.0]


def counters(state):
    return {k: v for k, v in state.items() if not v.is_floating_point()}


def test_profile_of_a_quadratic():
    probe = probe_at([0.0, 0.0], [1.0, 3.0])
    line = profile(probe, state(0.0, 0.0), state(2.0, 2.0), 5)
    # 1/2 (4 + 12) t^2
    assert line == pytest.approx([8 * t * t for t in (0, 0.25, 0.5, 0.75, 1)])


def test_plane_and_slice():
    home, ptq, qat = state(1.0, 1.0, 1.0), state(1.0, 4.0, 5.0), state(3.0, 1.0, 1.5)
    probe = Probe(Point([1.0] * 3), ["weight"], BATCH, quadratic([1.0] * 3, [1.0] * 3))
    plane = Plane.through(probe, home, ptq, qat)
    assert plane is not None and plane.ptq == (5.0, 0.0)
    # along: <(2, 0, .5), (0, 3, 4)> / 5; across: what is left of the norm
    assert plane.qat[0] == pytest.approx(0.4)
    assert plane.qat[1] == pytest.approx(math.sqrt(4.25 - 0.16))
    for place, expected in (((0.0, 0.0), home), (plane.ptq, ptq), (plane.qat, qat)):
        torch.testing.assert_close(plane.state(*place)["weight"], expected["weight"])
    found = loss_slice(probe, plane, 4, margin=0.5)
    assert found.first == pytest.approx([-2.5, 5 / 6, 25 / 6, 7.5])
    # distances in the plane are those of the weights, so the bowl stays round
    for b, row in zip(found.second, found.losses, strict=True):
        for a, loss in zip(found.first, row, strict=True):
            assert loss == pytest.approx(0.5 * (a * a + b * b), rel=1e-5)


def test_three_models_on_a_line_have_no_plane():
    probe = probe_at([0.0, 0.0], [1.0, 1.0])
    home = state(0.0, 0.0)
    assert Plane.through(probe, home, state(1.0, 2.0), state(2.0, 4.0)) is None
    assert Plane.through(probe, home, home, state(1.0, 0.0)) is None
    assert Plane.through(probe, home, state(1.0, 0.0), home) is None


def test_deployed_weights_are_on_the_grid():
    torch.manual_seed(0)
    shared = nn.Linear(4, 4)
    net = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(4, 2))
    model = prepare(net, ptq_qconfig("minmax", 2, None, first_last_bits=None)).eval()
    assert weight_names(model) == ["0.weight", "3.weight"]
    latent, deployed = latent_state(model), deployed_state(model)
    assert latent.keys() == deployed.keys() == net.state_dict().keys()
    assert all(torch.equal(latent[k], v) for k, v in net.state_dict().items())
    for name in ("0", "3"):
        weight = net.get_submodule(name).weight
        scale, _ = model.get_submodule(name).weight_fake_quant.qparams()
        expected = qkernels.fake_quant(weight, scale, bits=2, axis=0, symmetric=True)
        assert torch.equal(deployed[f"{name}.weight"], expected)
        assert not torch.equal(expected, weight)
    # under both of its names
    assert torch.equal(deployed["2.weight"], deployed["0.weight"])
    assert torch.equal(deployed["3.bias"], net[3].bias)


def test_the_probe_leaves_the_model_alone():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    batches = [
        (torch.randn(6, 3), torch.randint(2, (6,))),
        (torch.randn(2, 3), torch.zeros(2).long()),
    ]
    probe = Probe(net, ["0.weight", "3.weight"], batches)
    value, slope = probe.slope(before)
    assert net.training and all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    # the mean over examples, not over batches, and its gradient, by one batch of all
    net.eval()
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    loss = nn.functional.cross_entropy(net(x), y)
    grads = torch.autograd.grad(loss, [net[0].weight, net[3].weight])
    assert value == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(slope.float(), torch.cat([g.flatten() for g in grads]))
