"""The benchmarks' report, their table, and the GPU clock on events that are not there."""

from __future__ import annotations

import ast
import json
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import clocks, table, timing
from harness.record import work_of
from report import __main__ as command
from report import markdown, read

import qkernels


def bench(name: str, us: float, rivals: dict[str, float], **info: Any) -> dict[str, Any]:
    """A benchmark of 2 Mi elements as the suite writes it."""
    ideal = 2 * 4 << 21
    extra = {
        "op": "fake_quant", "row": "native", "dtype": "float32", "shape": [512, 4096],
        "granularity": "channel (axis 0)", "memory_format": "contiguous", "suite": "sweep",
        "elements": 1 << 21, "device": "cpu", "device_name": "a CPU", "median_us": us,
        "p20_us": us * 0.9, "p80_us": us * 1.1, "rivals_us": rivals, "bars": {},
        "speedup": {n: t / us for n, t in rivals.items()}, "ideal_bytes": ideal,
        "formula": "2 N s", "gb_per_s": ideal / us / 1e3, "copy_gb_per_s": 200.0,
        "fraction_of_copy": ideal / us / 2e5, "torch": "2.6", "commit": "abc",
        "saved_bytes": 1 << 18, "peak_bytes": 4 << 21, "calls": 30,
    }  # fmt: skip
    return {"name": f"bench_{name}", "stats": {"median": us / 1e6}, "extra_info": extra | info}


def write(path: Path, *benches: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"benchmarks": list(benches)}))
    return path


WON = bench("won", 100.0, {"copy": 90.0, "torch core": 400.0, "torch.compile": 150.0})
LOST = bench("lost", 100.0, {"copy": 50.0, "torch core": 80.0, "ours in place": 10.0})


def row_of(text: str, *parts: str) -> str:
    """The one table line that holds all the parts."""
    (found,) = (n for n in text.splitlines() if n.startswith("| ") and all(p in n for p in parts))
    return found


def test_table_keeps_losses_and_names_the_best_peer(tmp_path: Path) -> None:
    text = markdown.document(read.read([write(tmp_path / "a.json", WON, LOST)]))
    assert "| torch.compile | 150 | 1.50x |" in text
    assert "| torch core | 80 | **0.80x LOSS** |" in text
    assert "1 of 2 results with a peer are losses; the largest: lost 0.80x of torch core." in text
    won = row_of(text, "1.50x").strip("| ").split(" | ")
    assert won[:4] == ["fake_quant", "native", "512 x 4096", "float32"]
    assert won[8] == "84%"  # 16.8 MB in 100 us against 200 GB/s
    assert won[-1] == "8.39" and "1" in won  # MB; one bit saved per element


def test_bars_are_told_as_met_and_missed(tmp_path: Path) -> None:
    bars = bench("bars", 100.0, {"a": 300.0, "b": 50.0}, bars={"a": 2.0, "b": 0.8}, suite="bar")
    text = markdown.document(read.read([write(tmp_path / "a.json", bars)]))
    assert "a: 3.00x of 2x; b: 0.50x of 0.8x **MISSED**" in text
    assert "1 of 2 bars missed: bars: b 0.50x of 0.8x." in text


def test_short_table_is_the_bars(tmp_path: Path) -> None:
    bar = bench("bar", 70.0, {"copy": 60.0}, suite="bar")
    text = markdown.short(read.read([write(tmp_path / "a.json", bar, WON)]))
    assert len(text.splitlines()) == 3 and "| 70 |" in text


def test_steps_have_their_own_table(tmp_path: Path) -> None:
    steps = [
        bench(f"step[{row}]", 1e5 * tax, {}, op="qat_step", net="resnet18", row=row, tax=tax)
        for row, tax in (("float", 1.0), ("ours STE", 1.1), ("ours LSQ", 1.4), ("torch.ao", 1.3))
    ]
    text = markdown.document(read.read([write(tmp_path / "a.json", *steps)]))
    assert "| resnet18 | ours STE | 110.00 | 1.100 |" in text
    assert "| resnet18 | ours LSQ | 140.00 | **1.400 LOSS** |" in text
    assert "| resnet18 | torch.ao | 130.00 | 1.300 |" in text


def test_figures_without_a_time_are_kept(tmp_path: Path) -> None:
    saved = {"name": "bench_saved", "stats": {"median": 0.0}, "extra_info": {"figures": {"b": 1}}}
    text = markdown.document(read.read([write(tmp_path / "a.json", saved, WON)]))
    assert "| saved | b | 1 |" in text and text.count("| fake_quant | native |") == 1


def test_a_later_file_replaces(tmp_path: Path) -> None:
    later = bench("won", 120.0, {"torch core": 400.0})
    files = [write(tmp_path / "a.json", WON, LOST), write(tmp_path / "b.json", later)]
    results = read.read(files)
    assert {r.name: r.median_us for r in results.rows} == {"won": 120.0, "lost": 100.0}
    assert "1 results that a later file holds too" in markdown.document(results)


def test_out_holds_the_report_and_its_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    small = bench("small", 10.0, {"copy": 2.0, "torch core": 12.0}, elements=1024)
    source, out = write(tmp_path / "a.json", WON, small), tmp_path / "out"
    assert command.main([str(source), "--out", str(out)]) == 0
    names = sorted(p.name for p in out.iterdir())
    assert names == ["report.md", "roofline_a_cpu.png", "speed_a_cpu.png"]
    assert all((out / n).read_bytes()[:4] == b"\x89PNG" for n in names[1:])
    assert "![speed_a_cpu.png](speed_a_cpu.png)" in (out / "report.md").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must be JSON"),
        ("[]", "got no 'benchmarks' list"),
        ('{"benchmarks": []}', "got an empty list"),
        ('{"benchmarks": [3]}', "benchmark 0: must be a dict with a name, got 3"),
        ('{"benchmarks": [{"name": "a", "stats": {"median": "x"}}]}', "must be a time, got 'x'"),
        ('{"benchmarks": [{"name": "a", "extra_info": 1}]}', "extra_info and stats must be dicts"),
        (
            '{"benchmarks": [{"name": "a", "extra_info": {"median_us": 1, "bars": {"b": "c"}}}]}',
            "bars['b'] must be a number, got 'c'",
        ),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_broken_files_give_an_error_and_no_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    good, bad, out = write(tmp_path / "a.json", WON), tmp_path / "bad.json", tmp_path / "out"
    if content is not None:
        bad.write_text(content)
    assert command.main([str(good), str(bad), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error and "bad.json" in error and not out.exists()


def test_compare_fails_on_a_regression_beyond_the_threshold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = write(tmp_path / "old.json", WON, LOST, bench("gone", 1.0, {}))
    slower = bench("won", 115.0, {"copy": 99.0})
    faster = bench("lost", 50.0, {"copy": 50.0})
    new = write(tmp_path / "new.json", slower, faster)
    assert command.main(["--compare", str(old), str(new)]) == 1
    text = capsys.readouterr().out
    regressions, improvements = text.split("## Improvements")
    assert "| won | 100 | 115 | 1.15 | 1.10 |" in regressions
    assert "| lost | 100 | 50 | 0.50 | 1.00 |" in improvements
    assert "1 only in the old: gone" in text
    assert command.main(["--compare", str(old), str(new), "--threshold", "0.2"]) == 0
    assert "Regressions" not in capsys.readouterr().out


def test_compare_of_other_machines_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = write(tmp_path / "old.json", WON)
    new = write(tmp_path / "new.json", bench("won", 1.0, {}, device_name="a GPU"))
    assert command.main(["--compare", str(old), str(new)]) == 2
    assert "must share a benchmark on one device" in capsys.readouterr().err


def test_table_at_the_end_of_a_run_keeps_losses() -> None:
    benches = [SimpleNamespace(name=b["name"], extra_info=b["extra_info"]) for b in (WON, LOST)]
    lines = table.lines(benches)
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert "1.50x" in lines[2] and "0.80x LOSS" in lines[3]
    assert table.lines([]) == []


class FakeEvent:
    """Takes the time of the fake GPU's queue."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def record(self) -> None:
        self.at = self.cuda.queued_ms

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.cuda.synchronized, "an event was read before the GPU had finished"
        return end.at - self.at


class FakeCuda:
    """A GPU whose work is a sum of milliseconds."""

    def __init__(self) -> None:
        self.queued_ms, self.synchronized = 0.0, True

    def current_device(self) -> int:
        return 0

    def get_device_properties(self, _: int) -> Any:
        return SimpleNamespace(L2_cache_size=1 << 10)

    def Event(self, enable_timing: bool) -> FakeEvent:  # noqa: N802
        assert enable_timing
        return FakeEvent(self)

    def synchronize(self) -> None:
        self.synchronized = True

    def work(self, ms: float) -> None:
        self.queued_ms += ms
        self.synchronized = False


class FlushBuffer:
    """Counts how often it is written."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.flushes = cuda, 0

    def zero_(self) -> None:
        self.flushes += 1
        self.cuda.work(10.0)


def fake_clock(monkeypatch: pytest.MonkeyPatch) -> tuple[clocks.CudaClock, FakeCuda, FlushBuffer]:
    cuda = FakeCuda()
    buffer = FlushBuffer(cuda)
    sizes: list[int] = []

    def empty(size: int, **_: Any) -> FlushBuffer:
        sizes.append(size)
        return buffer

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        clock = clocks.CudaClock(cuda)
    assert sizes == [256 * clocks.MIB]
    return clock, cuda, buffer


def test_cuda_clock_times_the_call_and_not_the_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, cuda, buffer = fake_clock(monkeypatch)
    prepared = []
    times = clock.times(lambda: cuda.work(2.0), 4, lambda: prepared.append(1))
    assert times == pytest.approx([0.002] * 4)
    assert len(prepared) == 5  # once to see how long the host takes
    assert buffer.flushes >= 3 + 4
    assert clock.wall(lambda: cuda.work(2.0), 5) > 0


def test_cuda_clock_lets_the_host_get_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, cuda, buffer = fake_clock(monkeypatch)
    now = iter(range(0, 1000))  # a host that takes 1 s for each call, 100 flushes of 10 ms
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: float(next(now)))
    clock.times(lambda: cuda.work(2.0), 1)
    assert buffer.flushes == 3 + 64  # three to time a flush, then the most


class FakeBenchmark:
    """What pytest-benchmark's fixture has that a race uses."""

    def __init__(self) -> None:
        self.disabled, self.extra_info = False, {}
        self.stats = SimpleNamespace(stats=SimpleNamespace(median=0.0))

    def pedantic(self, call: Any, rounds: int, iterations: int) -> None:
        spent = []
        for _ in range(rounds):
            start = clocks.read_ledger()
            call()
            spent.append(clocks.read_ledger() - start)
        self.stats.stats.median = statistics.median(spent)


RECORDED = {
    "op", "row", "granularity", "dtype", "shape", "median_us", "p20_us", "p80_us", "ideal_bytes",
    "formula", "gb_per_s", "fraction_of_copy", "saved_bytes", "peak_bytes", "torch", "triton",
    "cuda", "device", "device_name", "commit",
}  # fmt: skip


def test_a_row_says_all_of_its_work_even_of_many_small_calls() -> None:
    x, scale = torch.randn(8, 128, requires_grad=True), torch.tensor(0.1)
    own = x.detach()
    out = torch.empty_like(own)
    ours = lambda: qkernels.fake_quant(x, scale, bits=8)  # noqa: E731
    benchmark = FakeBenchmark()
    timing.race(
        benchmark,
        timing.batched(ours, 10),
        {"copy": timing.batched(lambda: out.copy_(own), 10)},
        work=work_of("fake_quant", x, 10 * 8320, "10 (2 N s + N/8)", copied=10 * 8192),
        rounds=3,
        one=ours,
    )
    info = benchmark.extra_info
    assert set(info) >= RECORDED
    # the memory of one call: a bit an element is saved; result and mask are allocated
    assert (info["saved_bytes"], info["peak_bytes"]) == (128, 4096 + 128)
    assert info["gb_per_s"] == pytest.approx(83_200 / info["median_us"] / 1e3, rel=1e-2)


def test_every_race_is_told_its_work() -> None:
    files = sorted(Path(timing.__file__).parents[1].glob("bench_*.py"))
    races = [
        (path.name, node.lineno, {k.arg for k in node.keywords})
        for path in files
        if path.name != "bench_step.py"  # whose race is of steps
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "race"
    ]
    assert len(races) > 20
    assert [where for *where, given in races if "work" not in given] == []


def test_ledger_hands_over_what_was_measured() -> None:
    """pytest-benchmark's pedantic takes the timer before and after each call."""
    spent = []

    def pedantic(call: Any, rounds: int, iterations: int) -> None:
        for _ in range(rounds):
            start = clocks.read_ledger()
            call()
            spent.append(clocks.read_ledger() - start)

    stats = SimpleNamespace(stats=SimpleNamespace(median=2.0))
    timing.hand_over(SimpleNamespace(pedantic=pedantic, stats=stats), [1.0, 2.0, 4.0])
    assert spent == pytest.approx([1.0, 2.0, 4.0])
    stats.stats.median = 0.001  # a module without the ledger as its timer
    with pytest.raises(RuntimeError, match="must have pytestmark"):
        timing.hand_over(SimpleNamespace(pedantic=pedantic, stats=stats), [1.0, 2.0, 4.0])


def test_plan_gives_long_calls_fewer_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        how = "given"

        def times(self, call: Any, count: int, prepare: Any = clocks.nothing) -> list[float]:
            return [call()] * count

    contenders = {"ours": lambda: 1e-4, "slow": lambda: 0.5}
    timing.set_budget(0.1)
    turns, rounds = timing.plan(Clock(), contenders, clocks.nothing, None)
    assert turns == {"ours": (8, 5), "slow": (1, 2)} and rounds == timing.FEWEST
    del contenders["slow"]
    assert timing.plan(Clock(), contenders, clocks.nothing, None)[1] == timing.MOST
    assert timing.plan(Clock(), contenders, clocks.nothing, 5) == ({"ours": (8, 5)}, 5)
