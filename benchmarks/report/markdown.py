"""The tables: a short one for README, and one line per result; losses stay and are marked."""

from __future__ import annotations

from collections.abc import Iterable

from .read import Result, Results

SHORT_SUITES = ("bar", "cold")  # what the short table holds, beside results with a bar
HEAD = (
    "op", "row", "shape", "dtype", "per", "us", "p20-p80", "GB/s", "of copy", "best peer",
    "its us", "ours is", "asked", "saved, bits/el.", "peak, MB",
)  # fmt: skip
SHORT_HEAD = ("op", "shape", "dtype", "us", "GB/s", "of copy", "best peer", "ours is", "asked")
LEFT = {"op", "row", "shape", "dtype", "per", "best peer", "asked"}


def document(results: Results) -> str:
    """The whole report."""
    rows, steps = parted(results.rows)
    parts = ["# Benchmarks", "", *origin([*rows, *steps]), ""]
    if steps:
        parts += ["## Training steps", "", *step_table(steps), ""]
    parts += ["## Short", "", *short_table(rows), "", "## All", ""]
    parts += table(HEAD, [line(r) for r in rows])
    parts += ["", *losses(rows), "", *missed(rows)]
    if results.figures:
        parts += ["", "## Figures that are no times", ""]
        parts += table(("benchmark", "what", "value"), [(f.name, f.what, f.value)
                                                        for f in results.figures])  # fmt: skip
    if results.replaced:
        parts += ["", f"{results.replaced} results that a later file holds too were left out."]
    parts += ["", "## Ideal bytes", "", *formulas(rows)]
    return "\n".join(parts).rstrip() + "\n"


def parted(results: list[Result]) -> tuple[list[Result], list[Result]]:
    """(results of ops, results of whole training steps), in order."""
    rows = sorted(results, key=order)
    return [r for r in rows if "tax" not in r.info], [r for r in rows if "tax" in r.info]


def short(results: Results) -> str:
    """Steps and bars, for README."""
    rows, steps = parted(results.rows)
    return "\n".join([*step_table(steps), "", *short_table(rows)] if steps else short_table(rows))


def step_table(steps: list[Result]) -> list[str]:
    """QAT tax: a step by the same step in floating point; ours above the best other is marked."""
    best: dict[tuple[str, str], float] = {}
    for r in steps:
        if not r.text("row").startswith(("ours", "float")):
            net = r.device, r.text("net")
            best[net] = min(r.info["tax"], best.get(net, r.info["tax"]))
    lines: list[tuple[str, ...]] = []
    for r in sorted(steps, key=lambda r: (r.device, r.text("net"), r.info["tax"])):
        tax, peak = r.info["tax"], r.number("peak_bytes")
        other = best.get((r.device, r.text("net")))
        # a row with a plain step beside it does more than the others
        peer = r.text("row").startswith("ours") and "beside" not in r.info
        lost = peer and other is not None and tax > other
        shown = f"**{tax:.3f} LOSS**" if lost else f"{tax:.3f}"
        memory = f"{peak / 1e6:.0f}" if peak is not None else ""
        lines.append((r.text("net"), r.text("row"), f"{r.median_us / 1e3:.2f}", shown, memory))
    return table(("net", "row", "ms a step", "times float", "peak, MB"), lines)


def short_table(rows: Iterable[Result]) -> list[str]:
    """The bars, steps and lists: what README shows."""
    chosen = [r for r in rows if r.bars or r.text("suite") in SHORT_SUITES]
    return table(SHORT_HEAD, [short_line(r) for r in chosen])


def order(result: Result) -> tuple[str, str, str, str, float, str]:
    """Device, op, suite, dtype, size."""
    size = result.number("elements") or 0.0
    return result.device, result.op, result.text("suite"), result.text("dtype"), size, result.name


def origin(rows: Iterable[Result]) -> list[str]:
    """One line per machine: device, versions, commit."""
    found = {
        f"- {r.device}: torch {r.text('torch')}, triton {r.text('triton')}, CUDA {r.text('cuda')}, "
        f"{r.text('threads')} CPU threads, commit {r.text('commit')}, timed by {r.text('clock')}"
        for r in rows
        if r.text("torch")
    }
    return sorted(found) or ["- the files do not say on which machine they were made"]


def line(r: Result) -> tuple[str, ...]:
    """A result in the full table."""
    saved, elements = r.number("saved_bytes"), r.number("elements")
    bits = f"{8 * saved / elements:.3g}" if saved is not None and elements else ""
    peak = r.number("peak_bytes")
    spread = f"{micro(r.info['p20_us'])}-{micro(r.info['p80_us'])}" if "p20_us" in r.info else ""
    return (
        title(r), r.text("row"), r.shape, r.text("dtype"), r.text("granularity"),
        micro(r.median_us), spread, number(r.number("gb_per_s"), ".3g"), share(r),
        r.best_peer or "",
        micro(r.peers[r.best_peer]) if r.best_peer else "", ratio(r), asked(r), bits,
        f"{peak / 1e6:.3g}" if peak is not None else "",
    )  # fmt: skip


def short_line(r: Result) -> tuple[str, ...]:
    """A result in the short table."""
    return (
        title(r), r.shape, r.text("dtype"), micro(r.median_us), number(r.number("gb_per_s"), ".3g"),
        share(r), r.best_peer or "", ratio(r), asked(r),
    )  # fmt: skip


def title(r: Result) -> str:
    """The op; cold memory is said."""
    return f"{r.op}, cold memory" if r.text("suite") == "cold" else r.op


def micro(us: float) -> str:
    """Microseconds in three digits or more."""
    return f"{us:.3g}" if us < 100 else f"{us:.0f}"


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def share(r: Result) -> str:
    fraction = r.number("fraction_of_copy")
    return "" if fraction is None else f"{fraction:.0%}"


def ratio(r: Result) -> str:
    """How many times as fast as the best peer."""
    value = r.ratio
    if value is None:
        return ""
    return f"{value:.2f}x" if value >= 1 else f"**{value:.2f}x LOSS**"


def asked(r: Result) -> str:
    """The bars, as met or missed."""
    return "; ".join(
        f"{name}: {got:.2f}x of {bar:.3g}x" + ("" if got >= bar else " **MISSED**")
        for name, (got, bar) in r.bars.items()
    )


def losses(rows: Iterable[Result]) -> list[str]:
    """How many results a peer wins, worst first."""
    lost = sorted((r for r in rows if (r.ratio or 1) < 1), key=lambda r: r.ratio or 1)
    compared = sum(r.ratio is not None for r in rows)
    head = f"{len(lost)} of {compared} results with a peer are losses"
    if not lost:
        return [f"{head}."]
    worst = "; ".join(f"{r.name} {r.ratio:.2f}x of {r.best_peer}" for r in lost[:5])
    return [f"{head}; the largest: {worst}."]


def missed(rows: Iterable[Result]) -> list[str]:
    """The bars that were missed."""
    every = [(r, name, *pair) for r in rows for name, pair in r.bars.items()]
    short = [f"{r.name}: {n} {got:.2f}x of {bar:.3g}x" for r, n, got, bar in every if got < bar]
    head = f"{len(short)} of {len(every)} bars missed"
    return [f"{head}: {'; '.join(short)}." if short else f"{head}."]


def formulas(rows: Iterable[Result]) -> list[str]:
    """Each op's ideal bytes: N elements of s bytes."""
    found = {f"- {r.op}: {r.text('formula')}" for r in rows if r.text("formula")}
    return sorted(found)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """A markdown table; numbers to the right."""
    if not rows:
        return ["(no results)"]
    rule = ["---" if name in LEFT or i == 0 else "---:" for i, name in enumerate(head)]
    cells = [[c.replace("|", "\\|") for c in row] for row in (head, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return [lines[0], "|" + "|".join(rule) + "|", *lines[1:]]
