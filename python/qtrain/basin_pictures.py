"""The pictures of the basin report, a panel for each bit width."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .basin_result import BasinReport, Width, rtn
from .report import colour, figure, save_figure

CURVES, COSINES = "basin_curves.png", "basin_cosines.png"
PROFILES, SLICES = "basin_profiles.png", "basin_slices.png"
# the least loss that a logarithmic axis shows
FLOOR = 1e-6
LEVELS = 12


def draw(report: BasinReport, out: Path) -> list[str]:
    """Write all pictures that there are figures for; returns their names."""
    made = [CURVES, COSINES, PROFILES]
    _panels(report, out / CURVES, _curves)
    _panels(report, out / COSINES, _cosines)
    _panels(report, out / PROFILES, _profiles)
    if any(width.plane is not None for width in report.widths):
        _panels(report, out / SLICES, _plane, height=4.2)
        made.append(SLICES)
    return made


def _panels(
    report: BasinReport,
    path: Path,
    panel: Callable[[Any, BasinReport, Width], None],
    *,
    height: float = 3.6,
) -> None:
    count = len(report.widths)
    canvas, axes = figure(count, width=4.4, height=height)
    for axis, width in zip([axes] if count == 1 else axes, report.widths, strict=True):
        axis.set_title(f"W{width.bits}")
        panel(axis, report, width)
        axis.grid(alpha=0.3)
    first = axes if count == 1 else axes[0]
    handles, labels = first.get_legend_handles_labels()
    if handles:
        canvas.legend(handles, labels, fontsize="small", loc="outside lower center", ncols=4)
    save_figure(canvas, path)


def _losses(axis: Any, report: BasinReport) -> None:
    """A logarithmic axis of losses, with f(w_fp) and the edge of the basin on it."""
    axis.set_yscale("log")
    home = max(FLOOR, report.home.loss)
    axis.axhline(home, color="black", linewidth=1, label="float model")
    axis.axhline(report.limit, color="black", linestyle=":", linewidth=1, label="basin's edge")
    axis.set_ylabel("loss")


def _curves(axis: Any, report: BasinReport, width: Width) -> None:
    steps = [m.step for m in width.curve]
    latent = [max(FLOOR, m.latent_loss) for m in width.curve]
    deployed = [max(FLOOR, m.deployed_loss) for m in width.curve]
    axis.plot(steps, deployed, color=colour(4), label="deployed, f(Q(w))")
    axis.plot(steps, latent, color=colour(1), label="latent, f(w)")
    _losses(axis, report)
    entry = width.entry(report.limit)
    if entry:
        axis.axvline(entry, color=colour(2), linestyle="--", linewidth=1)
        axis.set_title(f"W{width.bits}, in at step {entry}")
    _steps(axis, width)


def _cosines(axis: Any, _report: BasinReport, width: Width) -> None:
    for number, (name, label) in enumerate(
        (("deployed_cosine", "gradient at Q(w)"), ("latent_cosine", "gradient at w"))
    ):
        known = [(m.step, getattr(m, name)) for m in width.curve if getattr(m, name) is not None]
        if known:
            axis.plot(*zip(*known, strict=True), color=colour((4, 1)[number]), label=label)
    axis.axhline(0, color="black", linewidth=1)
    axis.set_ylabel("cosine(-gradient, w_fp - Q(w))")
    _steps(axis, width)


def _steps(axis: Any, width: Width) -> None:
    """The first steps matter most, and step 0 is one of them."""
    axis.set_xscale("symlog", linthresh=1)
    axis.set(xlabel="QAT step", xlim=(0, width.curve[-1].step))


def _profiles(axis: Any, report: BasinReport, width: Width) -> None:
    for number, (name, line) in enumerate(width.profiles):
        places = [place / (len(line) - 1) for place in range(len(line))]
        axis.plot(places, [max(FLOOR, f) for f in line], color=colour(number), label=name)
    _losses(axis, report)
    axis.set_xlabel("share of the way")


def _plane(axis: Any, report: BasinReport, width: Width) -> None:
    plane = width.plane
    if plane is None:
        axis.text(0.5, 0.5, "the three models lie on a line", ha="center", va="center")
        return
    losses = np.array(plane.losses)
    finite = losses[np.isfinite(losses)]
    low = max(FLOOR, float(finite.min())) if finite.size else FLOOR
    high = max(10 * low, float(finite.max())) if finite.size else 10 * FLOOR
    shown = np.clip(np.nan_to_num(losses, nan=high, posinf=high), low, high)
    levels = np.geomspace(low, high, LEVELS)
    filled = axis.contourf(plane.first, plane.second, np.log10(shown), np.log10(levels))
    edge = min(max(report.limit, low), high)
    axis.contour(plane.first, plane.second, shown, [edge], colors="white", linestyles=":")
    axis.figure.colorbar(filled, ax=axis, label="log10 loss")
    places = {"float": (0.0, 0.0), rtn(width.grid): plane.ptq, "QAT": plane.qat}
    for name, place in places.items():
        axis.plot(*place, "o", color="white", markeredgecolor="black")
        axis.annotate(name, place, color="white", xytext=(4, 4), textcoords="offset points")
    axis.set(xlabel="along float to RTN", ylabel="across, towards QAT")
