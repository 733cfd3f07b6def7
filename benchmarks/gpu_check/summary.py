"""One page about a run of gpu_check.sh: `gpu_check/summary.py WORK OUTDIR PART ...`.

Reads what the parts left in WORK and writes OUTDIR/summary.md (for people), OUTDIR/gpu_check.json
(the same for programs) and OUTDIR/log.txt (the ends of all logs). Prints the page.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

LOG_BYTES = 1_500_000  # of each part; all logs together stay far below 16 MB
SLOWEST = 12
COPY_ENOUGH = 1 << 20  # elements from which bandwidth, not the launch, is what is seen


def read_json(file: Path) -> dict[str, Any]:
    """The content, {} if the file is not there or was cut off."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def verdicts(work: Path, parts: list[str]) -> dict[str, dict[str, Any]]:
    """part -> verdict, seconds, limit, reason."""
    found = {}
    for part in parts:
        file = work / "parts" / part
        if file.exists():
            verdict, seconds, limit, *reason = file.read_text().rstrip("\n").split("\n")
            found[part] = {
                "verdict": verdict,
                "seconds": int(seconds),
                "limit": int(limit),
                "reason": " ".join(reason),
            }
        else:
            found[part] = {"verdict": "not run", "seconds": 0, "limit": 0, "reason": "not reached"}
    return found


def rows_of(bench: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows with a bandwidth, the furthest from the copy first."""
    rows = []
    for entry in bench.get("benchmarks", []):
        info = entry.get("extra_info", {})
        if "fraction_of_copy" not in info or info.get("elements", COPY_ENOUGH) < COPY_ENOUGH:
            continue
        rows.append({"name": entry["name"].removeprefix("bench_"), **info})
    return sorted(rows, key=lambda row: row["fraction_of_copy"])


def slim(file: Path) -> None:
    """Take the single times out of pytest-benchmark's file: its statistics say enough."""
    bench = read_json(file)
    for entry in bench.get("benchmarks", []):
        entry.get("stats", {}).pop("data", None)
    if bench:
        whole = file.with_suffix(".part")  # a run that is killed must not lose its measurements
        whole.write_text(json.dumps(bench, indent=1))
        whole.replace(file)


def heading(info: dict[str, Any]) -> list[str]:
    gpu = info.get("gpu") or {}
    native = info.get("build", {}).get("native", "unknown: the part build was not run")
    name = gpu.get("name", "no GPU")
    lines = [f"# gpu_check: {name}", ""]
    if gpu:
        memory = f"{gpu['memory_bytes'] / 2**30:.0f} GiB"
        lines.append(f"- device: {name}, sm {gpu['capability']}, {memory}, driver {gpu['driver']}")
    else:
        lines.append("- device: no GPU; nothing below was measured on one")
    for key in ("date", "commit", "torch", "torch_cuda", "nvcc", "python", "platform", "cpu_count"):
        lines.append(f"- {key}: {info.get(key, 'unknown')}")
    lines.append(f"- triton: {info.get('build', {}).get('triton', 'unknown')}")
    return [*lines, f"- native: {native}", ""]


def table(parts: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["| part | verdict | seconds | limit | reason |", "|---|---|---|---|---|"]
    for name, p in parts.items():
        lines.append(f"| {name} | {p['verdict']} | {p['seconds']} | {p['limit']} | {p['reason']} |")
    return [*lines, ""]


def tests(name: str, found: dict[str, Any]) -> list[str]:
    """What pytest did in a part."""
    if not found:
        return []
    counts = ", ".join(f"{n} {what}" for what, n in found["counts"].items()) or "nothing"
    lines = [f"## {name}: {counts} ({found['processes']} processes)", ""]
    lines += [f"- no test ran the row {row}" for row in found["missing_rows"]]
    lines += [f"- skipped {n}: {reason}" for reason, n in found["skips"].items()]
    for failure in found["failures"][:8]:
        lines += [f"- FAILED {failure['test']}", "```", failure["tail"][-700:].strip(), "```"]
    return [*lines, ""]


def bandwidth(rows: list[dict[str, Any]]) -> list[str]:
    """The rows that are furthest from the speed of a copy."""
    if not rows:
        return []
    lines = [f"## the {min(SLOWEST, len(rows))} of {len(rows)} rows furthest from a copy", ""]
    lines += ["| row | us | GB/s | of copy |", "|---|---|---|---|"]
    for row in rows[:SLOWEST]:
        speed = row.get("gb_per_s", "")
        lines.append(
            f"| {row['name']} | {row.get('median_us', '')} | {speed} | "
            f"{row['fraction_of_copy']:.0%} |"
        )
    return [*lines, ""]


def taxes(step: dict[str, Any]) -> list[str]:
    """QAT tax of each net and row."""
    lines = []
    for entry in step.get("benchmarks", []):
        info = entry.get("extra_info", {})
        if "tax" in info:
            lines.append(f"| {entry['name'].removeprefix('bench_')} | {info['tax']:.3f} |")
    return ["## QAT tax", "", "| row | times the float step |", "|---|---|", *lines, ""] * bool(
        lines
    )


def tail_of(file: Path, size: int = LOG_BYTES) -> str:
    """The last bytes of a log as text."""
    data = file.read_bytes()
    return data[-size:].decode(errors="replace")


def write_log(work: Path, out: Path) -> None:
    """The logs of all parts, one after the other."""
    logs = sorted(work.glob("*.log"))
    text = "".join(f"==== {log.stem}\n{tail_of(log)}\n" for log in logs)
    (out / "log.txt").write_text(text)


def ends_of_failed(work: Path, parts: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for name, part in parts.items():
        log = work / f"{name}.log"
        if part["verdict"] == "failed" and log.exists():
            end = "\n".join(tail_of(log, 3000).splitlines()[-25:])
            lines += [f"## {name}: the end of its log", "```", end, "```", ""]
    return lines


def main() -> int:
    work, out = Path(sys.argv[1]), Path(sys.argv[2])
    chosen = [part for part in sys.argv[3:] if part != "summary"]
    known = ("build", "tests", "sanitizer", "graph", "large", "bench")
    left = [part for part in known if (work / "parts" / part).exists()]
    parts = verdicts(work, [part for part in known if part in chosen] or left)
    info = read_json(work / "info.json")
    tested = {name: read_json(work / f"{name}.json") for name in ("tests", "graph", "large")}
    for name in ("bench.json", "bench_step.json"):
        slim(out / name)
    ran_bench = parts.get("bench", {}).get("verdict") in ("passed", "failed")
    bench = read_json(out / "bench.json") if ran_bench else {}
    step = read_json(out / "bench_step.json") if ran_bench else {}
    sanitizer = work / "sanitizer.log"
    lines = [*heading(info), *table(parts)]
    for name, found in tested.items():
        lines += tests(name, found)
    if sanitizer.exists():
        lines += ["## sanitizer", "```", tail_of(sanitizer, 2000).strip(), "```", ""]
    lines += [*bandwidth(rows_of(bench)), *taxes(step), *ends_of_failed(work, parts)]
    page = "\n".join(lines).rstrip() + "\n"
    (out / "summary.md").write_text(page)
    joined = {"info": info, "parts": parts, **tested, "rows": rows_of(bench)}
    (out / "gpu_check.json").write_text(json.dumps(joined, indent=1))
    write_log(work, out)
    sys.stdout.write(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
