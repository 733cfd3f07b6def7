"""Two runs against each other: what became slower, what became faster."""

from __future__ import annotations

import statistics
from typing import NamedTuple

from .markdown import micro, table
from .read import ReportError, Result, Results


class Change(NamedTuple):
    """One benchmark in both runs. ratio: new time by old; above 1 is slower."""

    old: Result
    new: Result
    ratio: float


class Comparison(NamedTuple):
    """Matched benchmarks, worst first, and the names that one run has alone."""

    changes: list[Change]
    only_old: list[str]
    only_new: list[str]

    def slower(self, threshold: float) -> list[Change]:
        return [c for c in self.changes if c.ratio > 1 + threshold]

    def faster(self, threshold: float) -> list[Change]:
        return [c for c in reversed(self.changes) if c.ratio < 1 / (1 + threshold)]


def compare(old: Results, new: Results) -> Comparison:
    """Match by benchmark and device.

    Raises:
        ReportError: the runs have no benchmark in common.
    """
    before, after = ({r.key: r for r in results.rows} for results in (old, new))
    both = [k for k in before if k in after]
    if not both:
        devices = sorted({r.device for r in old.rows}), sorted({r.device for r in new.rows})
        raise ReportError(
            "--compare: the files must share a benchmark on one device, got devices "
            f"{', '.join(devices[0])} and {', '.join(devices[1])}"
        )
    changes = [Change(before[k], after[k], after[k].median_us / before[k].median_us) for k in both]
    return Comparison(
        sorted(changes, key=lambda c: c.ratio, reverse=True),
        [k[0] for k in before if k not in after],
        [k[0] for k in after if k not in before],
    )


def document(found: Comparison, threshold: float) -> str:
    """The comparison as markdown."""
    slower, faster = found.slower(threshold), found.faster(threshold)
    middle = statistics.median(c.ratio for c in found.changes)
    parts = [
        f"{len(found.changes)} results in both, median of new by old {middle:.3f}; beyond "
        f"{threshold:.0%}: {len(slower)} slower, {len(faster)} faster."
    ]
    for title, changes in (("Regressions", slower), ("Improvements", faster)):
        if changes:
            parts += ["", f"## {title}", "", *rows(changes)]
    for title, names in (("only in the old", found.only_old), ("only in the new", found.only_new)):
        if names:
            parts += ["", f"{len(names)} {title}: {', '.join(names)}"]
    return "\n".join(parts) + "\n"


def rows(changes: list[Change]) -> list[str]:
    """What a copy in the same runs did tells a slower machine from a slower kernel."""
    head = ("benchmark", "old, us", "new, us", "new by old", "copy, new by old")
    return table(
        head,
        [
            (c.old.name, micro(c.old.median_us), micro(c.new.median_us), f"{c.ratio:.2f}", copy(c))
            for c in changes
        ],
    )


def copy(change: Change) -> str:
    old, new = change.old.times.get("copy"), change.new.times.get("copy")
    return f"{new / old:.2f}" if old and new else ""
