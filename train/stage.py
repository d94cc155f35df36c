"""What the stages share: recipe sections, opening data, and a packed stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
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
from train.initial_model import InitialModel, find_initial_model, init_input, initial_model
from train.loop import LoopConfig, LoopError, Loss, Outcome, TrainingStage, no_grad_sum
from train.metrics import WandbConfig
from train.optim import Muon, Optimizer
from train.schedule import Schedule
from train.targets import Targets, check_targets, check_targets_of_dialogues


class TrainingRecipe(Section):
    """Sections of every training stage."""

    heldout_figures: ClassVar[Mapping[str, str | None]] = {"heldout_loss": "lower"}
    """What an evaluation computes, and which direction is better, if one is."""
    targets: ClassVar[Targets | None] = None
    """What the loss sums over, for stages on packed dialogues."""

    run_dir: Location
    seed: NonNegativeInt = 0
    attention: MayChange[Backend] = "auto"
    loop: LoopConfig
    optimizer: Optimizer
    schedule: Schedule
    engine: EngineConfig
    wandb: MayChange[WandbConfig] = WandbConfig()
    threads: MayChange[PositiveInt | None] = None
    """CPU threads per rank; null: the default of torchrun or the system. Equal numbers give bit-identical results."""

    @property
    def keys_that_may_grow(self) -> tuple[str, ...]:
        """A finished run can be extended, unless its whole schedule depends on the number of steps."""
        return ("loop.max_steps",) if self.schedule.stable_steps(self.loop.max_steps) else ()

    def inputs(self) -> dict[str, str]:
        """The finished runs and files that the stage reads, by recipe key."""
        init_from = getattr(self, "init_from", None)
        initial = {} if init_from is None else {"init_from": init_input(init_from)}
        return initial | data_directories(getattr(self, "data", None))

    def check_plan(self, plan: PlanCheck) -> None:
        """Check what the loop and the model need of the data and of earlier stages, as far as it is known."""
        loop = self.loop
        if problem := loop.misfit(plan.n_ranks):
            plan.problem(problem)
        plan.check_inputs(self.inputs())
        init_from = getattr(self, "init_from", None)
        config = getattr(self, "model", None) or (plan.config(init_from) if init_from else None)
        data = data_directories(getattr(self, "data", None)).values()
        fits = True
        for path in data:
            facts = plan.data(path)
            for problem in facts.misfits(config.vocab_size, config.max_length) if facts and config else ():
                plan.problem(problem)
                fits = False
            if facts and facts.train is not None and facts.heldout is not None and self.targets:
                sides = {"the training side": facts.train, "the held-out side": facts.heldout}
                with plan.finding():
                    check_targets_of_dialogues(self.targets, sides, facts.continue_within_seconds)
        is_there = not any(plan.is_to_come(path) for path in data)
        if is_there and fits and config and self.targets:
            with plan.finding():
                dataset, heldout = open_data(self.data, config)  # type: ignore[attr-defined]
                check_targets(self.targets, dataset, heldout, evaluated_rows(heldout, self.evaluation_rows))  # type: ignore[attr-defined]
        if is_there and init_from and not plan.is_to_come(init_from) and (initial := find_initial_model(init_from)):
            with plan.finding():
                initial.check_tokenizer(data)

    @field_validator("loop")
    @classmethod
    def _keeps_a_figure_of_the_stage(cls, loop: LoopConfig) -> LoopConfig:
        if (keep := loop.keep_best) is not None:
            if keep.figure not in cls.heldout_figures:
                raise ValueError(
                    f"keep_best.figure: found {keep.figure}, this stage computes {', '.join(cls.heldout_figures)}; "
                    "choose one"
                )
            if (better := cls.heldout_figures[keep.figure]) not in (None, keep.better):
                raise ValueError(f"keep_best.better: found {keep.better}, but a {better} {keep.figure} is better")
        return loop

    @field_validator("engine")
    @classmethod
    def _fits_optimizer(cls, engine: EngineConfig, others: ValidationInfo) -> EngineConfig:
        optimizer = others.data.get("optimizer")
        if isinstance(optimizer, Muon) and (obstacle := optimizer.obstacle(engine.precision, engine.zero_stage)):
            raise ValueError(obstacle)
        return engine


class FineTuningRecipe(TrainingRecipe):
    """A stage that starts from a trained model and reads packed dialogues."""

    init_from: Location
    data: Location | MixtureData
    evaluation_rows: PositiveInt


class LossModule(nn.Module):
    """A trunk, and a scalar head if the stage has one. `forward` computes the stage's loss.

    The loss is computed inside the module so that DeepSpeed's hooks see every use of every parameter.
    """

    def __init__(self, trunk: Transformer, loss: Callable[[LossModule, Any], Loss], head: ScalarHead | None = None):
        super().__init__()
        self.trunk, self.head, self._loss = trunk, head, loss

    def forward(self, batch: Any) -> Loss:
        return self._loss(self, batch)


@dataclass(frozen=True)
class Job:
    """A stage ready to be trained.

    tokenizer: the file to copy next to the weights (None: synthetic data). finish: called after the last step; returns
    the key figure as text, and figures for done.json.
    """

    module: LossModule
    stage: TrainingStage
    tokenizer: Path | None
    finish: Callable[[TrainingEngine, Outcome, Console], tuple[str, dict[str, Any]]]


def documents_of(batch: PackedBatch) -> Documents:
    """Document boundaries of a packed batch, on the batch's device."""
    return Documents.on_device(batch.document_lengths, len(batch.tokens_T), batch.row_length, batch.row_length)


def open_data(data: str | SyntheticData | MixtureData, config: ModelConfig) -> tuple[PackedRows, PackedRows]:
    """Training and held-out rows of a data directory, a mixture, or synthetic data. Raises LoopError for a misfit."""
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


def load_start(recipe: FineTuningRecipe, world: World) -> tuple[InitialModel, Transformer, PackedRows, PackedRows]:
    """The initial model, its loaded trunk, and training and held-out rows."""
    initial = initial_model(recipe.init_from, world)
    initial.check_tokenizer(data_directories(recipe.data).values())
    trunk = initial.load(recipe.attention, world.device, recipe.engine.dtype)
    return initial, trunk, *open_data(recipe.data, trunk.config)


def described(data: str | SyntheticData | MixtureData) -> str:
    """The data in words, for messages."""
    if isinstance(data, MixtureData):
        return " + ".join(f"{part.path} ({part.weight:g})" for part in data.parts)
    return data if isinstance(data, str) else "made-up tokens"


def data_directories(data: str | SyntheticData | MixtureData | None) -> dict[str, str]:
    """The directories of training data, by recipe key."""
    if isinstance(data, MixtureData):
        return {f"data.parts.{number}": part.path for number, part in enumerate(data.parts)}
    return {"data": data} if isinstance(data, str) else {}


def share_of_rank(rows: np.ndarray, rows_per_micro_batch: int, world: World) -> list[np.ndarray]:
    """This rank's share of `rows` in micro-batches; not empty if there are as many rows as ranks."""
    size = min(rows_per_micro_batch, len(rows) // world.size)
    return [rows[at : at + size] for at in range(0, len(rows), size)][world.rank :: world.size]


def evaluated_rows(heldout: PackedRows, evaluation_rows: int) -> np.ndarray:
    """The numbers of `evaluation_rows` evenly spread rows, or of all if there are fewer."""
    return (
        heldout.spread(evaluation_rows)
        if isinstance(heldout, MixtureRows)
        else spread_rows(heldout.n_rows, evaluation_rows)
    )


def of_all_ranks(mine: np.ndarray, world: World) -> np.ndarray:
    """The arrays of all ranks, concatenated along the last axis in the order of the ranks."""
    gathered: list[Any] = [mine] * world.size
    if world.size > 1:
        torch.distributed.all_gather_object(gathered, mine)
    return np.concatenate(gathered, axis=-1)


def packed_stage(
    dataset: PackedRows,
    heldout: PackedRows,
    evaluation_rows: int,
    rows_per_micro_batch: int,
    world: World,
    targets: Targets,
    extra: Callable[[TrainingEngine, list[PackedBatch]], dict[str, float]] = lambda engine, batches: {},
) -> TrainingStage:
    """A stage over packed shards, evaluated on `evaluation_rows` evenly spread held-out rows.

    extra: computes further held-out figures. Raises NoTargetsError when a side has no targets.
    """
    numbers = evaluated_rows(heldout, evaluation_rows)
    if len(numbers) < world.size:
        remedy = "raise evaluation_rows"
        if len(numbers) == heldout.n_rows:
            remedy = f"start at most {len(numbers)} ranks, or prepare data that holds more out (split)"
        raise LoopError(
            f"{world.size} ranks need a held-out row each, found {len(numbers)} "
            f"(evaluation_rows={evaluation_rows} of {heldout.n_rows} held-out rows); {remedy}"
        )
    check_targets(targets, dataset, heldout, numbers)
    if len(numbers) < evaluation_rows and world.rank == 0:
        found = f"{evaluation_rows:,} asked for, {len(numbers):,} held-out rows found; all are used"
        Console().print(f"evaluation_rows: {found}", highlight=False, soft_wrap=True)
    mine = [collate(heldout, part) for part in share_of_rank(numbers, rows_per_micro_batch, world)]
    return TrainingStage(
        rows=dataset,
        collate=lambda rows: collate(dataset, rows),
        count=targets.total,
        evaluate=lambda engine: {**no_grad_sum(engine, mine, targets.total), **extra(engine, mine)},
    )
