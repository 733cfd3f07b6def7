"""Seconds a training step takes, with the candidates taking turns in one run.

Turns matter: a machine that slows down for a second then slows down all of them. Their order
changes from round to round, so that none is always the one behind another.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch
from torch import nn

from .data import Dataset, train_batches
from .loop import train_step
from .progress import Track
from .recipe import Recipe, TrainConfig, make_optimizer
from .seeds import generator

WARM_UP = 5


def median_step_seconds(
    candidates: Mapping[str, tuple[nn.Module, Recipe]],
    data: Dataset,
    config: TrainConfig,
    *,
    rounds: int = 40,
    track: Track | None = None,
) -> dict[str, float]:
    """Median seconds of one step of each candidate: forward, backward and optimizer.

    Args:
        candidates: name -> (model on the data's device, its recipe). The models are trained.
        rounds: timed steps of each, after a warm-up; batches are read before the clock starts.
        track: advanced by one a round.
    """
    batches = list(train_batches(data.train, config.batch_size, seed=config.seed, epoch=0, stop=8))
    steppers = {}
    for name, (model, recipe) in candidates.items():
        optimizer = make_optimizer(recipe.param_groups(model.train(), config), config)
        for group in optimizer.param_groups:
            # the weights stay put, the work is the same
            group["lr"] = 0.0
        steppers[name] = (model, recipe, optimizer)
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    for turn in range(WARM_UP + rounds):
        batch = batches[turn % len(batches)]
        order = torch.randperm(len(steppers), generator=generator(config.seed, turn, "turns"))
        for name in (list(steppers)[place] for place in order.tolist()):
            model, recipe, optimizer = steppers[name]
            started = _clock(batch[0].device)
            train_step(model, batch, turn, recipe, optimizer)
            seconds[name].append(_clock(batch[0].device) - started)
        if track is not None:
            track.advance()
    return {name: statistics.median(taken[WARM_UP:]) for name, taken in seconds.items()}


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
