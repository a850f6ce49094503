"""The training loop: steps, log, checkpoints, and in the end the exported model."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from nai_t5_core.backends.sharding import whole
from nai_t5_core.generation.t5 import T5
from nai_t5_core.model.precision import DTYPES
from nai_t5_core.training import checkpoints, losses
from nai_t5_core.training.batches import Batches
from nai_t5_core.training.config import TrainConfig
from nai_t5_core.training.dropout import add_dropout, drawn_for
from nai_t5_core.training.export import export
from nai_t5_core.training.losses import LossLog, StepReport
from nai_t5_core.training.optimizers import learning_rate, make_optimizer, refuse_unsharded
from nai_t5_core.training.processes import Processes, alone, joined
from nai_t5_core.training.start import first_model
from nai_t5_core.training.weights import MasterWeights, ShardedWeights
from nai_t5_core.weights.whole_files import alone_in

Progress = Callable[[StepReport, int], None]


class TrainingError(ValueError):
    """A run cannot go on; the message says why and what to do."""


class Run:
    """The state of a run: weights, optimizer and number of steps taken.

    Args:
        config: the config of the run.
        model: the float32 model to train.
        batches: its batches; with several processes, this process's rows of each.
        processes: those that train together; by default this one alone.

    Raises:
        ValueError: several processes and an optimizer that cannot be sharded, or flex attention on the CPU.
    """

    def __init__(self, config: TrainConfig, model: T5, batches: Batches, processes: Processes | None = None) -> None:
        self.config, self.batches = config, batches
        self.processes = processes or alone(config.device)
        dtype, checkpointing = DTYPES[config.precision], config.gradient_checkpointing
        self.weights: MasterWeights | ShardedWeights
        if self.processes.count == 1:
            self.weights = MasterWeights(model.to(self.processes.device), dtype, checkpointing)
        else:
            refuse_unsharded(config.optimizer)
            self.weights = ShardedWeights(model, dtype, checkpointing, self.processes)
        if config.attention == "flex" and self.processes.device.type == "cpu":
            raise ValueError("torch's flex attention has no backward on the CPU; use attention 'auto' or 'sdpa'")
        self.weights.compute.encoder_stack.attention = config.attention
        if config.dropout > 0:
            add_dropout(self.weights.compute, config.dropout)
        self.optimizer = make_optimizer(model, config.optimizer)
        self.step = 0

    @property
    def model(self) -> T5:
        """The float32 model."""
        return self.weights.model

    def advance(self) -> StepReport:
        """Takes one optimizer step on ``accumulation`` batches, which count as one large batch.

        Raises:
            TrainingError: the loss or its gradient is not finite; the weights are those before the step.
        """
        config = self.config
        rate = learning_rate(config.optimizer, self.step, config.steps)
        first = self.step * config.accumulation
        batches = [self.batches(first + part).to(self.processes.device) for part in range(config.accumulation)]
        targets = int(self.processes.total(sum(batch.targets for batch in batches)))
        loss = 0.0
        for number, batch in enumerate(batches, first):
            share = batch.targets / targets
            with drawn_for(config.seed, number, self.processes.rank, self.processes.device):
                loss += share * self.weights.add_gradients(batch, share)
        loss = self.processes.total(loss)
        # Without a limit, an infinite one: nothing is clipped, but the norm is computed.
        limit = config.optimizer.max_gradient_norm or math.inf
        norm = float(whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)))
        if not math.isfinite(loss + norm):
            raise TrainingError(
                f"step {self.step + 1}: the loss is {loss:g} and its gradient's norm {norm:g}; lower "
                "optimizer.learning_rate or raise optimizer.warmup, and go on from the last checkpoint or anew"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.weights.publish()
        self.step += 1
        return StepReport(self.step, loss, rate, norm, targets)

    def save(self, path: Path) -> None:
        """Writes a checkpoint, from which any number of processes can go on."""
        identity, is_writer = self.config.identity(), self.processes.is_first
        checkpoints.save(path, self.step, self.model, self.optimizer, identity, is_writer)

    def resume(self, path: Path) -> None:
        """Goes on from a checkpoint, as if it had never stopped.

        Raises:
            ValueError: see :func:`nai_t5_core.training.checkpoints.load`.
        """
        self.step = checkpoints.load(path, self.model, self.optimizer, self.config.identity())
        self.weights.publish()


@dataclass(frozen=True)
class Trained:
    """The results of a run: the folder in the Hugging Face layout, our file, and the losses that were logged."""

    hf_folder: Path
    file: Path
    reports: list[StepReport]


def train(config: TrainConfig, resume: bool = False, progress: Progress | None = None) -> Trained:
    """Trains to the last step and exports.

    Processes that torchrun has started, or that have a process group, train one model together: its weights are sharded
    and every batch is divided among them. The losses are those of a single process, up to rounding.

    Args:
        config: the run; its folder gets ``losses.jsonl``, ``checkpoint.pt``, ``model.safetensors`` and ``hf``.
        resume: go on from the checkpoint in the folder.
        progress: called with every step's report and the total number of steps.

    Raises:
        ValueError: bad data, weights or tokenizer; a folder that holds a run, without ``resume``, or none, with it, or
            in which another process trains.
        TrainingError: the loss is not finite any more.
    """
    with joined(config.device) as processes:
        return _train(config, resume, progress, processes)


def _train(config: TrainConfig, resume: bool, progress: Progress | None, processes: Processes) -> Trained:
    _refuse_other_run(config, resume)
    model, tokenizer = first_model(config)
    batches = Batches(config.data, tokenizer, config.seed, processes.rank, processes.count)
    run = Run(config, model, batches, processes)
    if resume:
        run.resume(config.out / checkpoints.NAME)
    config.out.mkdir(parents=True, exist_ok=True)
    with alone_in(config.out) if processes.is_first else nullcontext():
        _refuse_other_run(config, resume)
        _take_steps(run, progress)
        folder, file = export(run.model, tokenizer, config.out, config.export_dtype, processes.is_first)
    # Until the first has written all of it, which the others read.
    processes.total(0)
    return Trained(folder, file, losses.read_losses(config.out / losses.NAME))


def _refuse_other_run(config: TrainConfig, resume: bool) -> None:
    if (config.out / checkpoints.NAME).exists() and not resume:
        raise ValueError(f"{config.out} holds a run already; go on with --resume, or give another folder as out")


def _take_steps(run: Run, progress: Progress | None) -> None:
    config = run.config
    log = LossLog(config.out / losses.NAME, run.step) if run.processes.is_first else None
    while run.step < config.steps:
        report = run.advance()
        is_last = run.step == config.steps
        if log is not None and (run.step == 1 or run.step % config.log_every == 0 or is_last):
            log.append(report)
        if run.step % config.checkpoint_every == 0 or is_last:
            run.save(config.out / checkpoints.NAME)
        if progress is not None:
            progress(report, config.steps)
