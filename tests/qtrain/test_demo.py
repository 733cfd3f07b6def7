"""The demo in little, end to end."""

import json
from dataclasses import replace

import pytest
from qtrain import demo
from qtrain.cli import app
from qtrain.demo import DemoConfig
from qtrain.report import COLUMNS
from qtrain.rundir import load_model_file, read_metrics
from typer.testing import CliRunner

STAGES = ["float", "ptq_w8a8", "ptq_w4a4", "ptq_w2a2"]
STAGES += [f"qat_{method}_w{bits}a{bits}" for bits in (2,) for method in ("minmax", "lsq")]
STAGES += [f"{method}_w{bits}a{bits}" for method in ("bwrf", "dnq", "ghn") for bits in (2,)]


def call(*arguments):
    return CliRunner().invoke(app, ["demo", *arguments])


@pytest.fixture(scope="module", autouse=True)
def little():
    """`--quick` in even less, for all of this file."""
    quick = DemoConfig.quick(0)
    config = replace(
        quick,
        float_run=replace(quick.float_run, epochs=3),
        qat_run=replace(quick.qat_run, epochs=2),
        qat_bits=(2,),
        dnq_epochs=4,
        ghn_nets=2,
        ghn_meta_batch=2,
        timing_rounds=3,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DemoConfig, "quick", lambda seed: config)
        yield config


@pytest.fixture(scope="module")
def finished(tmp_path_factory, little):
    out = tmp_path_factory.mktemp("runs") / "demo"
    outcome = call("--quick", "--cpu", "--out", str(out))
    assert outcome.exit_code == 0, outcome.output
    return out, outcome.output


def test_files(finished):
    out, _ = finished
    files = {path.name for path in out.iterdir()}
    assert {f"{stage}.safetensors" for stage in STAGES} <= files
    assert {"config.json", "metrics.jsonl", "report.md", "results.json"} <= files
    for plot in ("accuracy.png", "curves.png"):
        assert (out / plot).read_bytes().startswith(b"\x89PNG")
    records = read_metrics(out / "metrics.jsonl")
    assert list(dict.fromkeys(record["run"] for record in records)) == STAGES
    for stage in STAGES:
        _, meta = load_model_file(out / f"{stage}.safetensors")
        assert meta["train"]["dataset"] == "digits"


def test_table(finished):
    out, printed = finished
    rows = json.loads((out / "results.json").read_text())["rows"]
    widths = [row["bits"] and row["bits"][0] for row in rows]
    assert widths == [None, 8, 4, 2, 2, 2, 2, 2, 2]
    report = (out / "report.md").read_text()
    for row in rows:
        quantized = row["method"].startswith(("QAT", "LSQ"))
        assert (row["step_seconds"] is not None) == (quantized or row["method"] == "float")
        assert (row["step_ratio"] is not None) == quantized
        assert f"| {row['method']} |" in report and row["method"].split()[0] in printed
        assert 0 < row["accuracy"] <= 1 and row["loss"] > 0
    assert all(column in report for column in COLUMNS)
    accuracy = {(row["method"], str(row["bits"])): row["accuracy"] for row in rows}
    assert accuracy["PTQ", "[8, 8]"] > accuracy["PTQ", "[2, 2]"]
    assert accuracy["QAT LSQ", "[2, 2]"] > accuracy["PTQ", "[2, 2]"]


def test_again(finished):
    out, first = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    outcome = call("--quick", "--cpu", "--out", str(out))
    assert outcome.exit_code == 0 and "finished demo" in outcome.output
    table = [line for line in first.splitlines() if line.startswith("│")]
    assert len(table) == 9 and all(line in outcome.output for line in table)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    report = CliRunner().invoke(app, ["report", str(out)])
    assert all(line in report.output for line in table)


def test_another_config(finished):
    out, _ = finished
    outcome = call("--out", str(out))
    assert outcome.exit_code == 2
    assert "demo.float_run.epochs (3 there, 20 asked for)" in outcome.stderr


def test_goes_on_where_it_stopped(finished, little, tmp_path, monkeypatch):
    """Stopped in the timing, all trained stages are read back, and only the rest is done."""
    out, _ = finished

    class Killed(BaseException):
        pass

    def die(*args, **kwargs):
        raise Killed

    other = tmp_path / "demo"
    with monkeypatch.context() as patch:
        patch.setattr(demo, "median_step_seconds", die)
        with pytest.raises(Killed):
            demo.run_demo(little, other, cpu=True)
        trained = {p: p.stat().st_mtime_ns for p in other.glob("*/checkpoint.pt")}
    assert len(trained) == 7 and not (other / "results.json").exists()
    demo.run_demo(little, other, cpu=True)
    assert {p: p.stat().st_mtime_ns for p in trained} == trained
    assert (other / "metrics.jsonl").read_bytes() == (out / "metrics.jsonl").read_bytes()
    for stage in STAGES:
        name = f"{stage}.safetensors"
        assert (other / name).read_bytes() == (out / name).read_bytes()
