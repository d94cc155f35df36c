"""The one training loop: evaluate? save? stop? -> micro-steps -> step -> schedule -> log."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveInt, model_validator
from torch import Tensor

from data.packed.mixture import training_order
from data.packed.sampler import DataPosition, Rows, position_after, rows_of_rank
from recipes.loader import Section
from recipes.run_identity import MayChange
from train.checkpoint.best import BestWeights, KeepBest
from train.checkpoint.checkpoint import Checkpoints, CheckpointState, Write
from train.deepspeed.engine import TrainingEngine
from train.deepspeed.world import World
from train.health.skipping import RecentSteps, SkippedSteps, SkipSpikes
from train.metrics import Metrics
from train.schedule import Schedule
from train.throughput import Batch, Throughput


class LoopConfig(Section):
    """Steps, batch sizes, and intervals. A row is `row_length` tokens (in DPO, one pair)."""

    max_steps: PositiveInt
    rows_per_step: PositiveInt
    rows_per_micro_batch: MayChange[PositiveInt]
    evaluate_every: MayChange[PositiveInt]
    save_every: MayChange[PositiveInt | None]
    """null: no checkpoints, for measurements."""
    keep: MayChange[PositiveInt] = 2
    log_every: MayChange[PositiveInt] = 1
    max_skipped_steps: MayChange[NonNegativeInt] = 10
    """Consecutive skipped steps that are tolerated; one more ends training."""
    skip_spikes: SkipSpikes | None = None
    """null: skip only steps with a non-finite loss or gradient."""
    keep_best: KeepBest | None = None
    """null: the run keeps the weights of the last step."""
    stop_after: PositiveInt | None = None
    """Stop after this many consecutive evaluations without a better `keep_best` figure; null: never."""

    @model_validator(mode="after")
    def _stop_has_a_figure(self) -> LoopConfig:
        if self.stop_after is not None and self.keep_best is None:
            raise ValueError("stop_after compares the figure of keep_best; add keep_best or remove stop_after")
        return self

    def misfit(self, n_ranks: int) -> str | None:
        """Why `rows_per_step` does not divide over this many ranks; None when it does."""
        if self.rows_per_step % (self.rows_per_micro_batch * n_ranks) == 0:
            return None
        return (
            f"loop.rows_per_step={self.rows_per_step} is not a multiple of rows_per_micro_batch="
            f"{self.rows_per_micro_batch} x {n_ranks} rank(s); change one of them"
        )


class LoopError(ValueError):
    """The loop's settings do not fit the number of ranks or the data."""


@dataclass(frozen=True)
class Loss:
    """Summed loss of one micro-batch, and other sums to log (divided by the same count)."""

    total: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingStage:
    """The parts of the loop that differ between stages.

    collate: row numbers -> micro-batch. count: terms in a micro-batch's loss sum (tokens, labels, or pairs).
    evaluate: held-out figures; called on every rank.
    """

    rows: Rows
    collate: Callable[[np.ndarray], Batch]
    count: Callable[[Any], int]
    evaluate: Callable[[TrainingEngine], dict[str, float]]


@dataclass(frozen=True)
class Outcome:
    """How the loop ended: finished or stopped early. `last_evaluation` belongs to the weights that are kept."""

    step: int
    finished: bool
    last_evaluation: dict[str, float]
    skipped_steps: int


def train(
    stage: TrainingStage,
    engine: TrainingEngine,
    config: LoopConfig,
    schedule: Schedule,
    seed: int,
    start: CheckpointState | None,
    checkpoints: Checkpoints,
    snapshot: Callable[[], Write],
    metrics: Metrics | None,
    should_stop: Callable[[], bool],
    run_dir: Path,
    throughput: Throughput,
    best: BestWeights,
) -> Outcome:
    """Train until `max_steps`, an early stop, or a stop request on any rank, which saves a checkpoint first."""
    world = engine.world
    if misfit := config.misfit(world.size):
        raise LoopError(misfit)
    reader = StepReader(stage, config, seed, world)
    step = start.step if start else 0
    skipped = SkippedSteps(
        config.max_skipped_steps, run_dir, world, *((start.skipped_steps, start.skipped_in_a_row) if start else (0,))
    )
    recent = RecentSteps(config.skip_spikes, world, start.recent_steps if start else None)
    fresh, evaluation = True, dict[str, float]()
    extra: dict[str, float] = {}  # occasional figures, for the next log line
    at = world.progress.at
    while True:
        world.progress.begin(step)
        is_last = step == config.max_steps or best.is_over
        if (step % config.evaluate_every == 0 or is_last) and not (fresh and start):
            at("evaluating", may_last=True)
            with throughput.paused():
                evaluation = stage.evaluate(engine)
                best.record(step, evaluation)
            is_last = is_last or best.is_over
            if metrics:
                metrics.log(step, evaluation | ({"best_step": best.best.step} if best.best else {}))
        at("reading")
        # None at the end; a read error is raised only after the checkpoint that is due now
        reading = None if is_last else reader.read(step)
        batches = [] if reading is None or reading.exception() else reading.result()[1]
        n_targets, needed_flops = sum(map(stage.count, batches)), throughput.needed_flops(batches)
        at("agreeing on stopping, saving and the number of targets")
        n_stops, n_busy, n_failed, count, flops = world.sum(
            [float(should_stop()), *checkpoints.report(), float(n_targets), needed_flops]
        )
        checkpoints.advance(n_busy, n_failed)
        ends_stable = step == schedule.stable_steps(config.max_steps)  # a longer run continues from here
        is_due = config.save_every is not None and (step % config.save_every == 0 or ends_stable or is_last or n_stops)
        if is_due and not (fresh and (start or not n_stops)):
            at("saving", may_last=True)
            state = CheckpointState(
                step, reader.position(step), world.size, config.max_steps, skipped.total, skipped.in_a_row,
                recent.state(), best.to_save(),
            )  # fmt: skip
            began = time.perf_counter()
            with throughput.paused():
                if n_stops:  # do not wait for two saves after a stop request
                    checkpoints.abandon()
                checkpoints.save(state, snapshot)
            extra = {"save_seconds": time.perf_counter() - began}
        if is_last or n_stops:
            at("waiting for the save", may_last=True)
            checkpoints.finish()
            if best.best:
                evaluation = best.best.figures
            return Outcome(step, is_last, evaluation or (stage.evaluate(engine) if is_last else {}), skipped.total)

        assert reading is not None
        rows, batches = reading.result()
        throughput.add(batches, flops)
        means = accumulate(engine, batches, count)
        at("optimizer step")
        gradient_norm, taken = engine.step(schedule.multiplier(step, config.max_steps), recent.check(means, count))
        if metrics and fresh:
            extra |= metrics.first_step()
        step, fresh = step + 1, False

        reason = skipped.note(taken, recent.refusal)
        at("logging")
        if step % config.log_every == 0 or reason:
            values = means()
            if metrics:
                values["lr"] = engine.peak_lr * schedule.multiplier(step - 1, config.max_steps)
                values["gradient_norm"] = gradient_norm
                values |= throughput.figures()
                metrics.log(step, {**values, **extra, **({"skipped_steps": skipped.total} if reason else {})}, reason)
            extra = {}
        if skipped.too_many:
            checkpoints.finish()
            skipped.give_up(step, rows)


class StepReader:
    """Reads the micro-batches of a step, and prefetches the next step in a thread."""

    def __init__(self, stage: TrainingStage, config: LoopConfig, seed: int, world: World):
        self._order = training_order(stage.rows, seed)
        self._stage, self._config, self._world = stage, config, world
        self._thread = ThreadPoolExecutor(1, "reader")
        self._ahead: tuple[int, Future[tuple[np.ndarray, list[Batch]]]] | None = None

    def position(self, step: int) -> DataPosition:
        """Position in the data order before this step."""
        return position_after(step * self._config.rows_per_step, self._stage.rows, self._order)

    def read(self, step: int) -> Future[tuple[np.ndarray, list[Batch]]]:
        """A completed future: the rows of a step (all ranks') and this rank's micro-batches of them, or the error."""
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = (step, self._thread.submit(self._read, step))
        found = self._ahead[1]
        found.exception()  # waits
        self._ahead = (step + 1, self._thread.submit(self._read, step + 1))
        return found

    def _read(self, step: int) -> tuple[np.ndarray, list[Batch]]:
        rows = self._order.rows(step * self._config.rows_per_step, self._config.rows_per_step)
        parts = rows_of_rank(rows, self._config.rows_per_micro_batch, self._world.rank, self._world.size)
        return rows, [self._stage.collate(part) for part in parts]


def accumulate(engine: TrainingEngine, batches: list[Any], count: float) -> Callable[[], dict[str, float]]:
    """Add the gradient of sum(loss) / count over micro-batches. Returns a function that gives the means over all ranks.

    Does not synchronize with the device. The sums are queued before the weight update, so calling the function after
    `step` was launched does not wait for the update.
    """
    sums: dict[str, Tensor] = {}
    for number, batch in enumerate(batches, 1):
        engine.world.progress.at(f"micro-batch {number} of {len(batches)}, forward")
        loss: Loss = engine.forward(batch)
        for name, value in {"loss": loss.total, **loss.sums}.items():
            sums[name] = sums.get(name, 0.0) + value.detach().float()
        # a non-finite loss must give a non-finite gradient, so that the step is skipped
        engine.world.progress.at(f"micro-batch {number} of {len(batches)}, backward")
        engine.accumulate(loss.total * torch.where(sums["loss"].isfinite(), 1 / max(count, 1), float("nan")))
    total = engine.world.sum_later(sums)
    return lambda: {name: value / count if count else math.nan for name, value in total().items()}


def no_grad_sum(engine: TrainingEngine, batches: list[Any], count: Callable[[Any], int]) -> dict[str, float]:
    """Mean loss and other sums of the module over all ranks' batches, named heldout_*. `batches`: this rank's share."""
    names: list[str] = []
    totals: dict[str, float] = {}
    counted = 0.0
    engine.module.eval()
    with torch.no_grad():
        for batch in batches:
            loss: Loss = engine.module(batch)
            for name, value in {"loss": loss.total, **loss.sums}.items():
                totals[name] = totals.get(name, 0.0) + float(value)
            counted += count(batch)
            engine.world.progress.tick()
    engine.module.train()
    engine.world.progress.at("adding up the evaluation", may_last=True)
    names = sorted(totals)
    *sums, counted = engine.world.sum([*(totals[name] for name in names), counted])
    totals = dict(zip(names, sums, strict=True))
    return {f"heldout_{name}": total / counted if counted else math.nan for name, total in totals.items()}
