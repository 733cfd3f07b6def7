"""ghn: train a graph hypernetwork."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .app import app
from .options import (
    Cpu,
    FirstLast,
    Out,
    Overwrite,
    Seed,
    Set,
    finish,
    parse_settings,
    whole_numbers,
)


@app.command("ghn")
def ghn(
    out: Out = Path("runs/ghn"),
    preset: Annotated[
        str, typer.Option(help="digits or shapes (tiny networks, two cores), or paper (CIFAR-10).")
    ] = "digits",
    start: Annotated[
        Path | None,
        typer.Option(help="A trained GHN to go on from: a run directory, or its safetensors file."),
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(help="graphormer (GHN-3) or gated (GHN-2); else the start's.")
    ] = None,
    head: Annotated[
        str | None, typer.Option(help="tiled, or low_rank (no tiling); else the start's.")
    ] = None,
    quantizer: Annotated[
        str,
        typer.Option(
            help="none (float, GHN-Q), sim (straight-through), noise, or paper (noise at 2 bits "
            "and below, else sim)."
        ),
    ] = "none",
    bits: Annotated[
        str | None,
        typer.Option(help="Widths of weights and inputs, e.g. 8,4,2; each network draws one."),
    ] = None,
    tell_bits: Annotated[
        bool, typer.Option("--tell-bits", help="The GHN is told the width of each layer.")
    ] = False,
    mixed: Annotated[
        float, typer.Option(help="Share of networks whose layers draw widths of their own.")
    ] = 0.0,
    first_last_bits: FirstLast = 8,
    method: Annotated[
        str, typer.Option(help="Ranges of inputs in training: minmax or percentile.")
    ] = "minmax",
    percentile: Annotated[float | None, typer.Option(help="For percentile: e.g. 99.")] = None,
    per_tensor: Annotated[
        bool, typer.Option("--per-tensor", help="Ranges of weights per tensor, not per channel.")
    ] = False,
    no_norm: Annotated[
        bool, typer.Option("--no-norm", help="Train on networks without BatchNorm.")
    ] = False,
    nets: Annotated[int | None, typer.Option(min=1, help="Networks to draw from.")] = None,
    meta_batch: Annotated[int | None, typer.Option(min=1, help="Networks in a step.")] = None,
    held_out: Annotated[
        int | None, typer.Option(min=1, help="Networks of the evaluations during training.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Times through the images.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images in a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    seed: Seed = 0,
    set_: Set = None,
    overwrite: Overwrite = False,
    cpu: Cpu = False,
) -> None:
    """Train a hypernetwork that predicts the weights of networks it has not seen.

    In float (GHN-Q), or quantized, so that what it predicts survives few bits (GHN-QAT). Settings
    that are not given are the preset's. Those of the GHN itself: --set model_options.width=64.
    """
    from ..ghn.quantizers import Quantizer
    from ..ghn.run import run_ghn, settings_for
    from ..ghn.train import Start

    given = {"epochs": epochs, "batch_size": batch_size, "lr": lr}
    changed = {key: value for key, value in given.items() if value is not None}
    train = {**changed, "seed": seed, **parse_settings(set_ or [])}
    shape = {"encoder": encoder, "head": head}
    options: dict[str, Any] = {key: value for key, value in shape.items() if value is not None}
    options.update(train.pop("model_options", {}))
    if tell_bits:
        options["bit_widths"] = True
    counts = {"nets": nets, "meta_batch": meta_batch, "held_out": held_out}
    training = {
        **{key: value for key, value in counts.items() if value is not None},
        "norm": not no_norm,
        "quantizer": Quantizer(quantizer, method, percentile, per_channel=not per_tensor),
        "bits": () if bits is None else whole_numbers("bits", bits, 1, 32),
        "mixed": mixed,
        "first_last_bits": first_last_bits or None,
    }
    begin = None if start is None else Start.load(start)
    config, how = settings_for(preset, train=train, ghn=options, training=training, start=begin)
    run_ghn(config, how, out, start=begin, overwrite=overwrite, cpu=cpu)
    finish(out)
