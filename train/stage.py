"""What all stages share around the loop: recipe sections, start-up, resume, signals, the final model directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import NonNegativeInt, PositiveInt, ValidationInfo, field_validator
from rich.console import Console
from torch import nn

from data.packed.batch import PackedBatch, PackedRows, collate
from data.packed.mixture import MixtureData, MixtureRows, open_mixture
from data.packed.shards import PackedDataset
from data.packed.synthetic import SyntheticData, SyntheticRows
from eval.scoring import spread_rows
from model.attention_ops import Backend, Documents
from model.config import ModelConfig
from model.scalar_head import ScalarHead
from model.transformer import Transformer
from recipes.loader import Section
from recipes.plan_check import PlanCheck
from recipes.run_identity import Location, MayChange
from train.deepspeed.engine import EngineConfig, TrainingEngine
from train.deepspeed.world import World
from train.initial_model import init_input
from train.loop import LoopConfig, LoopError, Loss, Outcome, TrainingStage, no_grad_sum
from train.memory.report import Summary
from train.metrics import WandbConfig
from train.optim import Muon, Optimizer
from train.schedule import Schedule
from train.targets import Targets, check_targets


class TrainingRecipe(Section):
    """Sections every training stage has."""

    run_dir: Location
    seed: NonNegativeInt = 0
    attention: MayChange[Backend] = "auto"
    loop: LoopConfig
    optimizer: Optimizer
    schedule: Schedule
    engine: EngineConfig
    wandb: MayChange[WandbConfig] = WandbConfig()
    threads: MayChange[PositiveInt | None] = None
    """CPU threads a rank; left out, what torchrun or the system gives. The same number gives the same bits."""

    @property
    def keys_that_may_grow(self) -> tuple[str, ...]:
        """A finished run is continued with a larger number of steps, unless its whole schedule hangs on that."""
        return ("loop.max_steps",) if self.schedule.stable_steps(self.loop.max_steps) else ()

    def inputs(self) -> dict[str, str]:
        """The finished runs and the files that it reads, by the recipe's keys for them."""
        init_from = getattr(self, "init_from", None)
        initial = {} if init_from is None else {"init_from": init_input(init_from)}
        return initial | data_directories(getattr(self, "data", None))

    def check_plan(self, plan: PlanCheck) -> None:
        """What the loop and the model need of the data and of the stage before, as far as it can be told already."""
        loop = self.loop
        if problem := loop.misfit(plan.n_ranks):
            plan.problem(problem)
        init_from = getattr(self, "init_from", None)
        config = getattr(self, "model", None) or (plan.config(init_from) if init_from else None)
        for path in data_directories(getattr(self, "data", None)).values():
            facts = plan.data(path)
            for problem in facts.misfits(config.vocab_size, config.max_length) if facts and config else ():
                plan.problem(problem)

    @field_validator("engine")
    @classmethod
    def _fits_optimizer(cls, engine: EngineConfig, others: ValidationInfo) -> EngineConfig:
        optimizer = others.data.get("optimizer")
        if isinstance(optimizer, Muon) and (obstacle := optimizer.obstacle(engine.precision, engine.zero_stage)):
            raise ValueError(obstacle)
        return engine


class LossModule(nn.Module):
    """A trunk (and a head, where the stage has one) whose forward is the stage's loss.

    The loss is inside the module so that DeepSpeed's hooks see every use of every parameter.
    """

    def __init__(self, trunk: Transformer, loss: Callable[[LossModule, Any], Loss], head: ScalarHead | None = None):
        super().__init__()
        self.trunk, self.head, self._loss = trunk, head, loss

    def forward(self, batch: Any) -> Loss:
        return self._loss(self, batch)


@dataclass(frozen=True)
class Plan:
    """What a recipe asks for, before the ranks have joined: its inputs (name: path), its cost, and what prepares it."""

    inputs: Mapping[str, str]
    summary: Summary
    prepare: Callable[[World, Console], Job]


@dataclass(frozen=True)
class Job:
    """A stage ready to be trained. `finish` runs after the last step and returns the key figure and figures to keep.

    tokenizer: the file to put beside the weights (None: the tokens are made up).
    """

    module: LossModule
    stage: TrainingStage
    tokenizer: Path | None
    finish: Callable[[TrainingEngine, Outcome, Console], tuple[str, dict[str, Any]]]


def documents_of(batch: PackedBatch) -> Documents:
    """The boundaries of a packed batch, as attention takes them, on the batch's device."""
    return Documents.on_device(batch.document_lengths, len(batch.tokens_T), batch.row_length, batch.row_length)


def open_data(data: str | SyntheticData | MixtureData, config: ModelConfig) -> tuple[PackedRows, PackedRows]:
    """Training and held-out rows of a data directory, of several or made up, checked to fit the model."""
    dataset: PackedRows
    heldout: PackedRows
    shards: PackedDataset | MixtureRows
    if isinstance(data, SyntheticData):
        other_seed = data.model_copy(update={"seed": data.seed + 1})
        dataset, heldout = (SyntheticRows(settings, config.vocab_size) for settings in (data, other_seed))
    else:
        if isinstance(data, MixtureData):
            shards, heldout = open_mixture(data, "train"), open_mixture(data, "heldout")
        else:
            shards, heldout = PackedDataset(Path(data) / "train"), PackedDataset(Path(data) / "heldout")
        dataset = shards
        if shards.vocab_size != config.vocab_size:
            raise LoopError(
                f"the model has vocab_size {config.vocab_size}, the tokenizer of {described(data)} "
                f"{shards.vocab_size} pieces"
            )
    if dataset.row_length > config.max_length:
        raise LoopError(
            f"rows of {described(data)} have {dataset.row_length} tokens, the model's max_length is {config.max_length}"
        )
    return dataset, heldout


def described(data: str | SyntheticData | MixtureData) -> str:
    """What to call training data in a sentence."""
    if isinstance(data, MixtureData):
        return " + ".join(f"{part.path} ({part.weight:g})" for part in data.parts)
    return data if isinstance(data, str) else "made-up tokens"


def data_directories(data: str | SyntheticData | MixtureData | None) -> dict[str, str]:
    """The directories that training data is read from, each under the recipe's key for it."""
    if isinstance(data, MixtureData):
        return {f"data.parts.{number}": part.path for number, part in enumerate(data.parts)}
    return {"data": data} if isinstance(data, str) else {}


def share_of_rank(rows: np.ndarray, rows_per_micro_batch: int, world: World) -> list[np.ndarray]:
    """This rank's share of `rows` in micro-batches: at least one row, if there are as many rows as ranks."""
    size = min(rows_per_micro_batch, len(rows) // world.size)
    return [rows[at : at + size] for at in range(0, len(rows), size)][world.rank :: world.size]


def packed_stage(
    dataset: PackedRows,
    heldout: PackedRows,
    evaluation_rows: int,
    rows_per_micro_batch: int,
    world: World,
    targets: Targets,
    extra: Callable[[TrainingEngine, list[PackedBatch]], dict[str, float]] = lambda engine, batches: {},
) -> TrainingStage:
    """A stage over packed shards, evaluated on `evaluation_rows` evenly spread held-out rows (also by `extra`).

    Raises NoTargetsError where a side has nothing of what the loss sums over.
    """
    if isinstance(heldout, MixtureRows):
        numbers = heldout.spread(evaluation_rows)
    else:
        numbers = spread_rows(heldout.n_rows, evaluation_rows)
    if len(numbers) < world.size:
        remedy = "raise evaluation_rows"
        if len(numbers) == heldout.n_rows:
            remedy = f"start at most {len(numbers)} ranks, or prepare data that holds more out (split)"
        raise LoopError(
            f"{world.size} ranks need a held-out row each, found {len(numbers)} "
            f"(evaluation_rows={evaluation_rows} of {heldout.n_rows} held-out rows); {remedy}"
        )
    check_targets(targets, dataset, heldout, numbers)
    mine = [collate(heldout, part) for part in share_of_rank(numbers, rows_per_micro_batch, world)]
    return TrainingStage(
        rows=dataset,
        collate=lambda rows: collate(dataset, rows),
        count=targets.total,
        evaluate=lambda engine: {**no_grad_sum(engine, mine, targets.total), **extra(engine, mine)},
    )
