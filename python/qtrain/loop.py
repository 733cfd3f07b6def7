"""THE training loop, on Hugging Face Accelerate: device, AMP, DDP, checkpoints, SWA, logging.

A trainer is this loop and a ``Recipe``: what the recipe leaves alone is plain float training.
A run that is killed at any moment goes on to the same bits (same machine, same thread count):
batches, dropout and augmentation are functions of (seed, step), the learning rate is a function
of the step, and the rest is in the checkpoint.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, update_bn

from .data import Batch, Dataset, Split, batch_count, eval_batches, load_dataset, train_batches
from .progress import Track
from .recipe import Recipe, TrainConfig, learning_rate, make_optimizer, require
from .rundir import RunDir, load_model_file
from .seeds import seed_globals


def train_step(
    model: nn.Module,
    batch: Batch,
    step: int,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    *,
    backward: Callable[[Tensor], None] = Tensor.backward,
    clip: Callable[[], Tensor] | None = None,
    scaled: bool = False,
) -> Tensor | None:
    """Forward, backward and update; returns the detached loss, or None if the recipe refused the
    step. Reads nothing back, unless the recipe does.

    Args:
        clip: clips the gradients and returns the norm that they had.
        scaled: the optimizer is one with a scaler of the loss (fp16). It does not move where a
            gradient is not finite, but must be called, or the scale would never become smaller.
    """
    optimizer.zero_grad()
    with recipe.perturbation(step):
        loss = recipe.loss(model, batch, step)
        backward(loss)
    norm = clip() if clip is not None else None
    accepted = recipe.accepts(loss.detach(), norm)
    if accepted or scaled:
        optimizer.step()
    return loss.detach() if accepted else None


@torch.no_grad()
def evaluate(
    model: nn.Module, split: Split, *, accelerator: Accelerator | None = None, workers: int = 0
) -> dict[str, float]:
    """Mean cross entropy and accuracy over a split; the training mode is put back afterwards."""
    rank = accelerator.process_index if accelerator else 0
    world = accelerator.num_processes if accelerator else 1
    was_training = model.training
    model.eval()
    totals: Tensor | None = None
    for x, y in eval_batches(split, rank=rank, world=world, workers=workers):
        logits = model(x).float()
        loss = F.cross_entropy(logits, y, reduction="sum")
        part = torch.stack([loss, (logits.argmax(1) == y).sum().float(), loss.new_tensor(len(y))])
        totals = part if totals is None else totals + part
    model.train(was_training)
    if totals is None:
        device = accelerator.device if accelerator else "cpu"
        totals = torch.zeros(3, device=device)
    if accelerator is not None:
        totals = accelerator.reduce(totals, "sum")
    loss, correct, count = totals.tolist()
    return {"test_loss": loss / count, "test_accuracy": correct / count}


@dataclass
class TrainResult:
    """A finished run: the trained model (in eval mode) and its last evaluation."""

    model: nn.Module
    data: Dataset
    run: RunDir
    test_loss: float
    test_accuracy: float
    steps: int


def train(
    config: TrainConfig,
    recipe: Recipe,
    out: str | Path,
    *,
    overwrite: bool = False,
    cpu: bool = False,
    track: Track | None = None,
) -> TrainResult:
    """Train, or go on with the run in ``out``; a finished run is read back.

    Args:
        out: run directory.
        overwrite: start afresh even if ``out`` holds a run.
        cpu: stay on the CPU.
        track: a progress bar to advance by the steps made; None: one of our own.

    Raises:
        ValueError: bad config; ``out`` holds another config; a damaged checkpoint.
        FloatingPointError: the loss is no longer finite.
    """
    loop = Loop(config, recipe, out, overwrite=overwrite, cpu=cpu)
    quiet = not loop.accelerator.is_main_process
    ours = Track(loop.total, recipe.name, quiet=quiet)
    with ours if track is None else nullcontext(track) as bar:
        bar.advance(loop.step)
        loop.run_steps(bar)
        return loop.finish()


def make_accelerator(config: TrainConfig, cpu: bool, sparse: bool = False) -> Accelerator:
    """One process, or those that torchrun or ``accelerate launch`` started.

    Args:
        sparse: some parameters may have no gradient in a step.
    """
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    # without a GPU Accelerate joins the processes only if it is told to use the CPU
    cpu = cpu or (asked > 1 and not torch.cuda.is_available())
    ddp = DistributedDataParallelKwargs(find_unused_parameters=sparse)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision, cpu=cpu, kwargs_handlers=[ddp]
    )
    have = accelerator.num_processes
    lonely = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    if have == 1 and lonely and "RANK" not in os.environ:
        # without a GPU it starts one process, whatever --num_processes says, and says nothing
        print(
            "warning: accelerate launch started one process; to start several without a GPU, give "
            "it --multi_gpu too (gloo is used then)",
            file=sys.stderr,
        )
    require(have == asked, "processes", f"the {asked} that were launched", have)
    return accelerator


def reestimate_batchnorm(model: nn.Module, data: Dataset, config: TrainConfig) -> None:
    """BatchNorm's statistics anew, over one pass through the training data; equal on all ranks."""
    batches = train_batches(
        data.train,
        config.batch_size,
        seed=config.seed,
        epoch=0,
        stream="swa",
        workers=config.workers,
    )
    update_bn(batches, model)


class Loop:
    """The state of one training run, and its steps."""

    def __init__(
        self, config: TrainConfig, recipe: Recipe, out: str | Path, *, overwrite: bool, cpu: bool
    ) -> None:
        self.config, self.recipe = config, recipe
        accelerator = make_accelerator(config, cpu, recipe.sparse)
        self.accelerator, world = accelerator, accelerator.num_processes
        require(
            config.batch_size % world == 0,
            "batch_size",
            f"a multiple of {world} processes",
            config.batch_size,
        )
        # a run that cannot start leaves nothing behind: all is built before the directory is made
        described = {"train": asdict(config), "recipe": recipe.describe()}
        main = accelerator.is_main_process
        self.run = RunDir(out, described, overwrite=overwrite, writer=main)
        data = load_dataset(config.dataset, config.data_options)
        self.data = data.to(accelerator.device)
        self.per_epoch = batch_count(data.train, config.batch_size)
        self.total = self.per_epoch * config.epochs
        recipe.bind(config, self.data)
        # cuDNN's autotuner may choose another algorithm after a restart, and with it other bits
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        seed_globals(config.seed, 0, "init")
        model = recipe.setup(recipe.build(config, data)).to(accelerator.device)
        self.run.create()
        accelerator.wait_for_everyone()
        self._start(model, self.run.load_checkpoint())

    def _start(self, model: nn.Module, saved: dict[str, Any] | None) -> None:
        """Everything as at step 0, or as the checkpoint has it."""
        config, recipe = self.config, self.recipe
        if saved is None:
            recipe.initialize(model, self.data, config)
        else:
            model.load_state_dict(saved["model"])
            recipe.load_state_dict(saved["recipe"])
        model.train()
        self.average = AveragedModel(model) if config.swa_start is not None else None
        self.swa_from = (config.swa_start or 0.0) * self.total
        optimizer = make_optimizer(recipe.param_groups(model, config), config)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.plain = self.accelerator.unwrap_model(self.model)
        self.step = 0
        self.scores: Any = None  # of a run that was finished before
        # steps made, the loss and its parts, since the last line of the log
        self.loss_sum = torch.zeros(2 + len(recipe.parts), device=self.accelerator.device)
        if saved is not None:
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step = saved["step"]
            if self.step == self.total:
                self.scores = self.run.finished_scores()
            self.loss_sum.copy_(saved["loss_sum"])
            if self.average is not None:
                self.average.load_state_dict(saved["average"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(saved["scaler"])

    def run_steps(self, bar: Track) -> None:
        config, accelerator = self.config, self.accelerator
        while self.step < self.total:
            epoch, start = divmod(self.step, self.per_epoch)
            if start == 0:
                seed_globals(config.seed, self.step, "epoch")
                self.recipe.on_epoch_start(self.plain, epoch)
            batches = train_batches(
                self.data.train,
                config.batch_size,
                seed=config.seed,
                epoch=epoch,
                start=start,
                rank=accelerator.process_index,
                world=accelerator.num_processes,
                workers=config.workers,
            )
            for batch in batches:
                self._advance(batch)
                bar.advance()

    def _advance(self, batch: Batch) -> None:
        config, accelerator = self.config, self.accelerator
        # dropout differs from rank to rank, and is the same after a restart
        seed_globals(config.seed, self.step, f"model/{accelerator.process_index}")
        rate = learning_rate(config, self.step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_factor"]
        loss = train_step(
            self.model,
            batch,
            self.step,
            self.recipe,
            self.optimizer,
            backward=accelerator.backward,
            clip=self._clip if config.clip else None,
            scaled=accelerator.scaler is not None,
        )
        if loss is not None:
            self.loss_sum += torch.stack([torch.ones_like(loss), loss, *self.recipe.part_values])
        self.recipe.on_step_end(self.plain, self.step)
        self.step += 1
        epochs, within = divmod(self.step, self.per_epoch)
        last = self.step == self.total
        if self.average is not None and within == 0 and self.step > self.swa_from:
            self.average.update_parameters(self.plain)
        if self.step % config.log_every == 0 or last:
            self._log(epochs, rate)
        if last or (within == 0 and epochs % config.eval_every == 0):
            self._evaluate(epochs)
        if self.step % config.checkpoint_every == 0 or last:
            self._save()

    def _evaluate(self, epoch: int) -> None:
        # a forward in training mode may drop out; the same on all ranks, and after a restart
        seed_globals(self.config.seed, self.step, "evaluation")
        self.recipe.before_evaluation(self.plain, self.step)
        if self.accelerator.num_processes > 1:
            # BatchNorm's statistics of the last step are each rank's own: all take the first's
            for buffer in self.plain.buffers():
                torch.distributed.broadcast(buffer, 0)
        workers = self.config.workers
        scores = self.recipe.scores(self.plain, self.step)
        if scores is None:
            scores = evaluate(
                self.plain, self.data.test, accelerator=self.accelerator, workers=workers
            )
        self.run.append({"step": self.step, "epoch": epoch, **scores})

    def _clip(self) -> Tensor:
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip)
        assert norm is not None, "no sharded parameters here"
        return norm

    def _log(self, epoch: int, rate: float) -> None:
        """The mean loss since the last line; the one place that waits for the device."""
        count, *sums = self.accelerator.reduce(self.loss_sum, "mean").tolist()
        self.loss_sum.zero_()
        # None where the recipe refused every step
        loss, *parts = [total / count if count else None for total in sums]
        if loss is not None and not math.isfinite(loss):
            raise FloatingPointError(
                f"train: loss must be finite, got {loss} at step {self.step} of {self.run.path} "
                f"(lr {rate:.3g}); try a smaller lr, or clip"
            )
        named = dict(zip(self.recipe.parts, parts, strict=True))
        record = {"step": self.step, "epoch": epoch, "lr": rate, "loss": loss}
        self.run.append({**record, **named, **self.recipe.counts()})

    def _save(self) -> None:
        scaler = self.accelerator.scaler
        # the mean over ranks, here and in a run that goes on, so that both log the same bits
        self.loss_sum = self.accelerator.reduce(self.loss_sum, "mean")
        self.run.save_checkpoint(
            {
                "step": self.step,
                "model": self.plain.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "loss_sum": self.loss_sum,
                "recipe": self.recipe.state_dict(),
                "average": self.average.state_dict() if self.average is not None else None,
                "scaler": scaler.state_dict() if scaler is not None else None,
            }
        )

    def finish(self) -> TrainResult:
        """Write model.safetensors; with SWA that is the average, its BatchNorm re-estimated."""
        config, averaged, scores = self.config, self.average is not None, self.scores
        model = self.recipe.finish(self.average.module if self.average else self.plain)
        if scores is not None:
            scores = {key: scores[key] for key in ("test_loss", "test_accuracy")}
            model.load_state_dict(load_model_file(self.run.path)[0])
        elif averaged:
            seed_globals(config.seed, self.step, "swa")
            reestimate_batchnorm(model, self.data, config)
            scores = evaluate(model, self.data.test, accelerator=self.accelerator)
        else:
            last = [r for r in self.run.metrics() if "test_accuracy" in r][-1]
            scores = {key: last[key] for key in ("test_loss", "test_accuracy")}
        if self.scores is None:
            self.run.save_model(model.state_dict(), {**self.run.config, "scores": scores})
        if averaged:
            self.run.append({"step": self.step, "epoch": config.epochs, "swa": True, **scores})
        self.accelerator.wait_for_everyone()
        self.accelerator.free_memory()
        return TrainResult(model.eval(), self.data, self.run, steps=self.step, **scores)
