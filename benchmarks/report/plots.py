"""Plots: speed against size, and the roofline."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .read import ReportError, Result

INK = ("#1f5fa8", "#c4501b", "#2e7d4f", "#7a4fa3", "#a8871f", "#b03060", "#4f7a8a", "#6b6b6b")


def pyplot() -> Any:
    """matplotlib without a display, or a ReportError that says how to get it."""
    try:
        import matplotlib
    except ImportError as error:
        raise ReportError(
            'plots need matplotlib: `pip install ".[bench]"`, or give --no-plots'
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def save_all(rows: list[Result], folder: Path) -> list[Path]:
    """Two plots per device, for what was timed with its ideal bytes."""
    plt = pyplot()
    saved = []
    usable = [r for r in rows if r.number("gb_per_s") and r.text("suite") == "sweep"]
    for device in sorted({r.device for r in usable}):
        mine = [r for r in usable if r.device == device]
        stem = re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
        for name, draw in (("speed", speed_against_size), ("roofline", roofline)):
            figure = draw(plt, mine, device)
            path = folder / f"{name}_{stem}.png"
            figure.savefig(path, dpi=120, bbox_inches="tight")
            plt.close(figure)
            saved.append(path)
    return saved


def grid(plt: Any, count: int, columns: int = 4) -> tuple[Any, list[Any]]:
    """A figure of `count` panels."""
    lines = -(-count // columns)
    figure, axes = plt.subplots(
        lines, min(count, columns), figsize=(3.6 * min(count, columns), 2.9 * lines), squeeze=False
    )
    panels = list(axes.flat)
    for unused in panels[count:]:
        unused.set_visible(False)
    return figure, panels[:count]


def is_plain(r: Result) -> bool:
    """fp32 in one memory order, a single tensor: a line against size has one point per size."""
    return r.text("dtype") == "float32" and r.text("granularity") == "channel (axis 0)"


def speed_against_size(plt: Any, rows: list[Result], device: str) -> Any:
    """Per op GB/s on the ideal bytes against elements: ours by row, the peers, the copy."""
    rows = [r for r in rows if is_plain(r) and r.text("memory_format") == "contiguous"]
    ops = sorted({r.op for r in rows})
    figure, panels = grid(plt, max(len(ops), 1))
    for panel, op in zip(panels, ops, strict=False):
        mine = sorted((r for r in rows if r.op == op), key=lambda r: r.number("elements") or 0)
        for i, row in enumerate(sorted({r.text("row") for r in mine})):
            line(
                panel,
                [(r, r.median_us) for r in mine if r.text("row") == row],
                INK[i],
                f"ours, {row}",
                "o-",
            )
        names = sorted({n for r in mine for n in r.peers})
        for i, name in enumerate(names):
            points = [(r, r.times[name]) for r in mine if name in r.times]
            line(panel, points, INK[(i + 3) % len(INK)], name, ".--")
        copy = [(r.number("elements"), r.number("copy_gb_per_s")) for r in mine]
        known = [(n, speed) for n, speed in copy if n and speed]
        if known:
            panel.plot(*zip(*known, strict=True), color="#999999", label="copy")
        panel.set(xscale="log", yscale="log", title=op)
        panel.legend(fontsize=6)
        panel.grid(alpha=0.25)
    figure.supxlabel("elements")
    figure.supylabel("GB/s on the ideal bytes")
    figure.suptitle(f"Speed against size, fp32 per channel: {device}")
    figure.tight_layout()
    return figure


def line(
    panel: Any, points: list[tuple[Result, float]], color: str, label: str, style: str
) -> None:
    """GB/s of some times."""
    if points:
        sizes = [r.number("elements") for r, _ in points]
        speeds = [(r.number("ideal_bytes") or 0) / us / 1e3 for r, us in points]
        panel.plot(sizes, speeds, style, color=color, label=label, linewidth=1.2, markersize=4)


def roofline(plt: Any, rows: list[Result], device: str) -> Any:
    """Every result of ours, GB/s against ideal bytes, under the line of the copy."""
    figure, panel = plt.subplots(figsize=(8.5, 5.2))
    ops = sorted({r.op for r in rows})
    marks = "osv^D<>Ph*X"
    for i, op in enumerate(ops):
        mine = [r for r in rows if r.op == op]
        panel.scatter(
            [r.number("ideal_bytes") for r in mine],
            [r.number("gb_per_s") for r in mine],
            s=18, label=op, color=INK[i % len(INK)], marker=marks[(i // len(INK)) % len(marks)],
        )  # fmt: skip
    roof: dict[float, float] = {}
    for r in rows:
        size, speed = r.number("ideal_bytes"), r.number("copy_gb_per_s")
        if size and speed:
            roof[size] = max(speed, roof.get(size, 0.0))
    if roof:
        panel.plot(*zip(*sorted(roof.items()), strict=True), color="black", label="copy")
    panel.set(xscale="log", yscale="log", xlabel="ideal bytes of a call", ylabel="GB/s")
    panel.set_title(f"Roofline: {device}")
    panel.grid(alpha=0.25)
    panel.legend(fontsize=6, ncols=2, bbox_to_anchor=(1.01, 1), loc="upper left")
    return figure
