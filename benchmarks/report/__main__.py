"""Tables and plots of benchmark results, and the comparison of two runs.

python -m benchmarks.report results.json more.json --out report/
python -m benchmarks.report --compare old.json new.json --threshold 0.1
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from . import compare, markdown, plots
from .read import ReportError, read


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=(__doc__ or "").splitlines()[0]
    )
    made.add_argument("files", nargs="*", type=Path, help="results of --benchmark-json")
    made.add_argument("--out", type=Path, help="folder for report.md and the plots")
    made.add_argument("--short", action="store_true", help="print the short table only")
    made.add_argument("--no-plots", action="store_true", help="write report.md alone")
    made.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="two results")
    made.add_argument(
        "--threshold", type=float, default=0.1, help="a change beyond it counts; default 0.1"
    )
    return made


def main(arguments: list[str] | None = None) -> int:
    """0; 1 for a regression beyond the threshold; 2 for files or arguments that are wrong."""
    made = parser()
    options = made.parse_args(arguments)
    if bool(options.compare) == bool(options.files):
        made.error("give result files, or --compare OLD NEW")
    if options.threshold <= 0:
        made.error(f"--threshold must be positive, got {options.threshold}")
    try:
        return compared(options) if options.compare else reported(options)
    except ReportError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2


def compared(options: argparse.Namespace) -> int:
    """Print the comparison, and write it to --out if given."""
    old, new = (read([path]) for path in options.compare)
    found = compare.compare(old, new)
    text = compare.document(found, options.threshold)
    if options.out:
        write_all(options.out, {"compare.md": text})
    print(text, end="")
    return 1 if found.slower(options.threshold) else 0


def reported(options: argparse.Namespace) -> int:
    """Print the table, or write it with the plots."""
    results = read(options.files)
    if options.short:
        print(markdown.short(results))
        return 0
    text = markdown.document(results)
    if not options.out:
        print(text, end="")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        drawn = [] if options.no_plots else plots.save_all(results.rows, Path(folder))
        files: dict[str, str | bytes] = {path.name: path.read_bytes() for path in drawn}
    if files:
        text += "\n## Plots\n\n" + "\n".join(f"![{name}]({name})" for name in files) + "\n"
    write_all(options.out, {"report.md": text, **files})
    print(f"{options.out}: report.md, {len(files)} plots")
    return 0


def write_all(folder: Path, files: dict[str, str] | dict[str, str | bytes]) -> None:
    """Each file whole or not at all: written beside its name, then moved there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            beside = folder / f".{name}.part"
            data = content.encode() if isinstance(content, str) else content
            beside.write_bytes(data)
            os.replace(beside, folder / name)
    except OSError as error:
        raise ReportError(f"--out {folder}: cannot be written ({error.strerror})") from error


if __name__ == "__main__":
    sys.exit(main())
