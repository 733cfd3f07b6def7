"""Progress of anything that takes longer than two seconds.

A bar on a terminal; plain lines elsewhere (a file, a pipe, CI), so that a log stays readable.
"""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

FIRST_LINE_SECONDS = 2.0
LINE_EVERY_SECONDS = 10.0


class Track:
    """Counts ``total`` units of work; a context manager.

    Args:
        total: units of work in all.
        label: what is being done; ``relabel`` changes it on the way.
        quiet: show nothing (ranks other than the first, tests).
    """

    def __init__(self, total: int, label: str, *, quiet: bool = False) -> None:
        self.total, self.label, self.done = total, label, 0
        self.quiet = quiet
        self._bar: Progress | None = None
        self._started = time.monotonic()
        self._next_line = self._started + FIRST_LINE_SECONDS

    def __enter__(self) -> Track:
        if not self.quiet and sys.stdout.isatty() and not os.environ.get("CI"):
            self._bar = Progress(
                TextColumn("{task.description:<24}"),
                BarColumn(),
                MofNCompleteColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(),
            )
            self._task = self._bar.add_task(self.label, total=self.total, note="")
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def relabel(self, label: str) -> None:
        self.label = label
        if self._bar is not None:
            self._bar.update(self._task, description=label)

    def advance(self, count: int = 1, note: str = "") -> None:
        """``note`` is shown beside the bar: the loss, an accuracy."""
        self.done += count
        if self._bar is not None:
            fields = {"note": note} if note else {}
            self._bar.update(self._task, completed=self.done, **fields)  # type: ignore[arg-type]
        elif not self.quiet and time.monotonic() >= self._next_line:
            seconds = time.monotonic() - self._started
            tail = f", {note}" if note else ""
            print(f"{self.label}: {self.done}/{self.total}, {seconds:.0f} s{tail}", flush=True)
            self._next_line = time.monotonic() + LINE_EVERY_SECONDS
