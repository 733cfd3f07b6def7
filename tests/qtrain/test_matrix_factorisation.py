"""The paper's toy: its five numbers for seed 0, and what 30 seeds give."""

import json

import pytest
import torch
from qtrain.cli import app, basin
from qtrain.matrix_factorisation import (
    PICTURE,
    FactorisationConfig,
    Problem,
    better,
    factorise,
    factorise_all,
    run_factorisation,
)
from qtrain.study import spread
from typer.testing import CliRunner

assert basin.app is app
SMALL = FactorisationConfig(d=12, rank=2, float_steps=200, qat_steps=60, seeds=3)


@pytest.fixture(scope="module")
def found():
    return factorise_all(FactorisationConfig(), quiet=True)


def test_the_five_printed_numbers(found):
    first = found[0]
    assert f"{first.ptq_loss:.4f}" == "0.7502"
    assert f"{first.qat_loss:.4f}" == "0.2543"
    assert f"{first.ptq_distance:.3f}" == "0.474"
    assert f"{first.qat_distance:.3f}" == "0.594"
    assert f"{first.angle:.1f}" == "95.3"
    assert first.float_loss < 1e-20


def test_thirty_seeds(found):
    """The paper: PTQ .50 ± .18, QAT .24 ± .07, QAT lower in 28."""
    assert [one.seed for one in found] == list(range(30))
    ptq, qat = spread([s.ptq_loss for s in found]), spread([s.qat_loss for s in found])
    assert [f"{value:.2f}" for value in ptq] == ["0.50", "0.18"]
    # ours is 0.2349: the paper's .24 within a hundredth
    assert qat[0] == pytest.approx(0.24, abs=0.01) and f"{qat[1]:.2f}" == "0.07"
    assert better(found) == 28
    # the gradient at Q(X) leads back to the float solution, in every seed
    assert all(one.inward > 0.5 for one in found)


def test_gradient_and_grid():
    problem = Problem(SMALL)
    x = torch.randn(12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    leaf = x.clone().requires_grad_()
    (leaf @ leaf.T - problem.target).square().sum().backward()
    torch.testing.assert_close(problem.gradient(x), leaf.grad)
    torch.testing.assert_close(problem.rounded(x), 0.3 * torch.round(x / 0.3), rtol=0, atol=1e-15)
    # the minima: any rotation of the target's root
    turn = torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64)).Q
    assert problem.loss(torch.eye(12, 2, dtype=torch.float64) @ turn) < 1e-28


def test_curve_and_ends():
    one = factorise(SMALL, 1)
    step, latent, deployed = one.curve[0]
    assert (step, latent, deployed) == (0, one.float_loss, one.ptq_loss)
    assert one.curve[-1][0] == 60 and one.curve[-1][2] == one.qat_loss
    assert factorise(SMALL, 1) == one != factorise(SMALL, 2)


def test_command(tmp_path):
    out = tmp_path / "run"
    words = ["matrix-factorisation", "--out", str(out), "--seeds", "2"]
    words += ["--float-steps", "50", "--qat-steps", "20"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    text = (out / "report.md").read_text()
    assert "do not compare" in text and (out / PICTURE).exists()
    options = "--seeds 2 --rho 0.3 --float-steps 50 --qat-steps 20"
    assert f"Again: `qtrain matrix-factorisation {options}`." in text
    before = (out / "results.json").read_bytes()
    assert CliRunner().invoke(app, words).exit_code == 0
    assert (out / "results.json").read_bytes() == before
    assert len(json.loads(before)["seeds"]) == 2
    done = CliRunner().invoke(app, [*words, "--rho", "0"])
    assert done.exit_code == 2 and "rho must be positive and finite, got 0.0" in done.output


def test_bad_settings_and_damaged_results(tmp_path):
    with pytest.raises(ValueError, match="factorisation: rank must be at most d, 12, got 13"):
        FactorisationConfig(d=12, rank=13)
    with pytest.raises(FloatingPointError, match="X must stay finite"):
        factorise(FactorisationConfig(float_lr=10.0, float_steps=50), 0)
    run_factorisation(SMALL, tmp_path, quiet=True)
    missing = "--qat-steps 60`; it has no option for d 12, rank 2. Settings"
    assert missing in (tmp_path / "report.md").read_text()
    (tmp_path / "results.json").write_text('{"seeds": [{}]}')
    with pytest.raises(ValueError, match=r"matrix-factorisation: .*results\.json must hold"):
        run_factorisation(SMALL, tmp_path, quiet=True)
