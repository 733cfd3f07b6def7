"""ghn-space: networks for a graph hypernetwork to learn from."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .app import app
from .options import Seed


@app.command("ghn-space")
def ghn_space(
    count: Annotated[int, typer.Option(min=1, help="How many networks, from index 0 on.")] = 1000,
    split: Annotated[
        str, typer.Option(help="train, id, wide, deep, dense or bn-free; no two share a genotype.")
    ] = "train",
    space: Annotated[
        str, typer.Option(help="paper (32x32 images), digits (tiny networks) or vit.")
    ] = "digits",
    out: Annotated[Path, typer.Option(help="File to write, one JSON line a network.")] = Path(
        "runs/ghn-space.jsonl"
    ),
    seed: Seed = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file if there is one.")
    ] = False,
) -> None:
    """Draw networks of a space, and write them to a file.

    A network is what (space, split, seed, index) say, wherever and however often it is drawn.
    """
    from ..ghn.space import draw_nets, write_nets
    from ..report import rich_grid

    if out.exists() and not overwrite:
        raise ValueError(f"ghn-space: out must be a new file, got {out} (--overwrite replaces it)")
    nets = draw_nets(space, split, seed, count)
    write_nets(out, nets)
    rows = []
    for what, values in {
        "channels": [net.spec.width for net in nets],
        "parameters": [net.parameters for net in nets],
    }.items():
        figures = min(values), round(statistics.median(values)), max(values)
        rows.append((what, *(f"{figure:,}" for figure in figures)))
    genotypes = len({net.spec.digest for net in nets})
    title = f"{count} networks of {space}/{split}, {genotypes} genotypes"
    Console().print(rich_grid(("", "least", "median", "most"), rows, title, left=1))
    typer.echo(str(out))
