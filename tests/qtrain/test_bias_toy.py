"""The toy with a known optimum: noise as it should be, closed forms, and who is biased."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from qtrain import cli
from qtrain.bias_toy import (
    MODES,
    NOISES,
    PICTURE,
    Problem,
    ToyConfig,
    add_noise,
    bias_toy,
    descend,
    expected_mean,
    expected_variance,
    run_bias_toy,
)
from qtrain.cli.bias_toy import bias_toy as command
from qtrain.rundir import CONFIG
from scipy.linalg import solve_discrete_lyapunov
from typer.testing import CliRunner

SMALL = ToyConfig(channels=4, width=16, steps=800, late=400, replicas=32)
# standard errors; with a seed a figure is either within them for good or not
FEW, MANY = 4.0, 10.0
PAIRS = [(mode, noise) for mode in MODES for noise in NOISES]


@pytest.fixture(scope="module")
def rows():
    return {h: bias_toy(replace(SMALL, hessian=h), quiet=True) for h in ("dense", "diagonal")}


def test_problem():
    config = replace(SMALL, seed=3)
    problem = Problem.make(config)
    h = problem.hessian()
    assert h.shape == (64, 64) and torch.allclose(h, h.T)
    assert torch.allclose(torch.linalg.eigvalsh(h), problem.values.sort().values)
    assert torch.isclose(problem.values.min(), torch.tensor(0.1, dtype=torch.float64))
    assert bool((problem.mean.abs() > 0.04).all()) and bool((problem.std > 0).all())
    again = Problem.make(config)
    assert torch.equal(problem.hessian(), again.hessian())
    assert not torch.equal(problem.start, Problem.make(replace(config, seed=4)).start)
    v = torch.randn(3, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(problem.function_of_h(1 / problem.values, v @ h), v)


@pytest.mark.parametrize(
    ("kind", "mean", "variance", "memory"),
    [("naive", 1, 1, 0.0), ("iid", 0, 2, 0.0), ("differential", 0, 2, -0.5)],
)
def test_noise_is_what_it_is_called(kind, mean, variance, memory):
    """Mean, variance per channel, and the correlation from one step to the next."""
    problem = Problem.make(replace(SMALL, mean=0.3))
    w = torch.zeros(64, 64, dtype=torch.float64)
    p = torch.stack([add_noise(kind, w, problem, 5, step) for step in range(40)])
    rows = p.reshape(40, 64, 4, 16)
    n = 40 * 64 * 16
    for c in range(4):
        mu, sigma, mine = problem.mean[c], problem.std[c], rows[:, :, c]
        assert abs(mine.mean() - mean * mu) < FEW * sigma * (2 / n) ** 0.5
        assert abs(mine.var() / sigma**2 - variance) < FEW * variance * (3 / n) ** 0.5
    q = (p - p.mean(0)).flatten(1)
    lag = (q[1:] * q[:-1]).mean() / q.square().mean()
    # the mean of 40 steps that was taken off shifts it by about -1 / 40 without memory
    assert abs(lag - memory) < 0.04


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("hessian", ["dense", "diagonal"])
def test_closed_forms_by_another_way(hessian, kind, mode):
    """Mean and covariance of the state (v, delta) from the linear recursion's own equations."""
    config = replace(SMALL, hessian=hessian)
    problem, lr = Problem.make(config), config.lr
    d = len(problem.values)
    h = problem.hessian().numpy()
    h = h if h.ndim == 2 else np.diag(h)
    a = np.eye(d) - lr * h
    b = -lr * h if mode == "temporary" else a
    mu = problem.per_element(problem.mean).numpy()
    cov = np.diag(problem.per_element(problem.std).numpy() ** 2)
    if kind == "differential":
        # v' = a v + b (new - old), delta' = new
        zero = np.zeros((d, d))
        move, enter = np.block([[a, -b], [zero, zero]]), np.vstack([b, np.eye(d)])
        drive = enter @ mu
    else:
        move, enter = a, b if kind == "naive" else b * np.sqrt(2)
        drive = b @ mu * (kind == "naive")
    mean = np.linalg.solve(np.eye(len(move)) - move, drive)[:d]
    sigma = solve_discrete_lyapunov(move, enter @ cov @ enter.T)[:d, :d]
    if problem.basis is not None:
        sigma = problem.basis.numpy().T @ sigma @ problem.basis.numpy()
    np.testing.assert_allclose(expected_mean(problem, lr, kind, mode), mean, atol=1e-9)
    np.testing.assert_allclose(expected_variance(problem, lr, kind, mode), np.diag(sigma), 1e-6)


@pytest.mark.parametrize("hessian", ["dense", "diagonal"])
def test_runs_meet_the_closed_forms(rows, hessian):
    assert [(row.mode, row.noise) for row in rows[hessian]] == [
        (m, k) for m in MODES for k in NOISES
    ]
    for row in rows[hessian]:
        where = f"{row.mode} {row.noise}"
        assert abs(row.bias - row.bias_expected) < FEW * row.bias_error, where
        assert abs(row.distance - row.distance_expected) < FEW * row.distance_error, where
        # and the figures say something: an error bar is small beside what it is of
        assert row.bias_error < 0.1 and row.distance_error < 0.01 * row.distance, where


@pytest.mark.parametrize("hessian", ["dense", "diagonal"])
def test_only_naive_noise_is_biased(rows, hessian):
    for row in rows[hessian]:
        if row.noise == "naive":
            assert abs(row.bias) > MANY * row.bias_error
        else:
            assert abs(row.bias) < FEW * row.bias_error
    named = {(row.mode, row.noise): row for row in rows[hessian]}
    assert abs(named["temporary", "naive"].bias + 1) < 0.02
    # drift against the restoring force: up to 1 / (lr h) - 1 times mu
    assert named["permanent", "naive"].bias > 2
    for mode in MODES:
        assert named[mode, "differential"].distance < 0.7 * named[mode, "iid"].distance


def test_start_is_forgotten(rows):
    for row in rows["dense"]:
        assert row.curve[0][:2] == rows["dense"][0].curve[0][:2]
        assert row.curve[0][1] > 0.8 and row.curve[-1][0] == SMALL.steps
        assert row.curve[-1][1] == pytest.approx(row.distance_expected, rel=0.15)


def test_same_seed_same_bits():
    config = replace(SMALL, hessian="diagonal")
    problem = Problem.make(config)
    first, again = (descend(problem, config, "differential", "temporary") for _ in range(2))
    assert first == again
    other = replace(config, seed=1)
    assert descend(problem, other, "differential", "temporary").bias != first.bias


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"lr": 2.5}, r"lr must be in \(0, 2\), .* got 2.5"),
        ({"steps": 300}, "steps must be at least 751: 351 to forget .*, 400 late ones, got 300"),
        ({"steps": 400, "late": 100}, "steps must be at least 451: .* got 400"),
        ({"channels": 65}, "channels must be at most 64 with a dense hessian .* got 65"),
        ({"replicas": 1}, "replicas must be at least 2 .* got 1"),
        ({"hessian": "sparse"}, "hessian must be dense or diagonal, got sparse"),
        ({"std": 0.0}, "std must be positive, got 0.0"),
        ({"least": 2.0}, "greatest must be at least 2.0, got 1.0"),
        ({"channels": 0}, "channels must be at least 1, got 0"),
    ],
)
def test_bad_config(wrong, text):
    with pytest.raises(ValueError, match="bias-toy: " + text):
        ToyConfig(**wrong)


def test_bounds_can_be_met():
    assert ToyConfig(steps=451, late=100).late == 100
    assert ToyConfig(channels=64).channels == 64
    assert ToyConfig(channels=65, hessian="diagonal").channels == 65


@pytest.mark.parametrize(
    ("bias", "error", "text", "theory"),
    [
        (2.34567, 0.0234, "+2.35 ± 0.02", "+2.00"),
        (-0.98765, 0.00012, "-0.9877 ± 0.0001", "+2.0000"),
        (1.5, 0.0096, "+1.50 ± 0.01", "+2.00"),
        (12.6, 3.2, "+13 ± 3", "+2"),
        (1.5, 0.0, "+1.5000 ± 0.0000", "+2.0000"),
    ],
)
def test_decimals_are_those_of_the_error(rows, bias, error, text, theory):
    row = replace(rows["dense"][0], bias=bias, bias_error=error, bias_expected=2.0)
    assert row.cells()[2:4] == (text, theory)


def test_bad_names():
    problem = Problem.make(SMALL)
    with pytest.raises(ValueError, match=r"noise must be one of naive, .* got 'pink'"):
        descend(problem, SMALL, "pink", "temporary")
    with pytest.raises(ValueError, match="mode must be one of temporary, permanent, got 'both'"):
        descend(problem, SMALL, "iid", "both")


def test_command(tmp_path):
    assert command is cli.bias_toy.bias_toy
    out = tmp_path / "toy"
    small = ["--hessian", "diagonal", "--channels", "1", "--replicas", "4"]
    outcome = CliRunner().invoke(cli.app, ["bias-toy", "--out", str(out), *small])
    assert outcome.exit_code == 0, outcome.output
    assert outcome.output.count("differential") == 2 and "report.md" in outcome.output
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert set(files) == {CONFIG, "results.json", "report.md", PICTURE}
    assert files[PICTURE].startswith(b"\x89PNG")
    assert "| temporary | naive |" in files["report.md"].decode()
    kept = json.loads(files["results.json"])["noises"]
    assert [(row["mode"], row["noise"]) for row in kept] == PAIRS
    # read back, and run afresh: the same files
    for extra in ([], ["--overwrite"]):
        CliRunner().invoke(cli.app, ["bias-toy", "--out", str(out), *small, *extra])
        assert {path.name: path.read_bytes() for path in out.iterdir()} == files
    # read back, and not computed again
    kept[0]["distance"] = 77.0
    (out / "results.json").write_text(json.dumps({"noises": kept}))
    outcome = CliRunner().invoke(cli.app, ["bias-toy", "--out", str(out), *small])
    assert "77.0" in outcome.output and "77.0" in (out / "report.md").read_text()
    (out / "results.json").write_text("{}")
    outcome = CliRunner().invoke(cli.app, ["bias-toy", "--out", str(out), *small])
    (line,) = outcome.stderr.strip().splitlines()
    assert outcome.exit_code == 2 and "--overwrite" in line
    assert f"bias-toy: {out}/results.json must hold the results" in line
    outcome = CliRunner().invoke(cli.app, ["bias-toy", "--out", str(out), *small, "--mean", "0.2"])
    assert outcome.exit_code == 2 and "toy.mean (0.1 there, 0.2 asked for)" in outcome.stderr
    assert len(outcome.stderr.strip().splitlines()) == 1


def test_overwrite_takes_another_config(tmp_path):
    config = replace(SMALL, hessian="diagonal", channels=1, replicas=2)
    run_bias_toy(config, tmp_path)
    changed = run_bias_toy(replace(config, seed=1), tmp_path, overwrite=True)
    assert json.loads((tmp_path / CONFIG).read_text())["toy"]["seed"] == 1
    assert (
        json.loads((tmp_path / "results.json").read_text())["noises"][0]["bias"] == changed[0].bias
    )
