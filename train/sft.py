"""Supervised fine-tuning on one character's messages: `python -m train.sft recipes/demo/sft.yaml`."""

from __future__ import annotations

import sys
from typing import Any, Literal

from pydantic import PositiveInt
from rich.console import Console

from data.packed.batch import PackedBatch, to_device
from data.packed.mixture import MixtureData
from recipes.run_identity import Location
from train.deepspeed.engine import TrainingEngine
from train.deepspeed.world import World
from train.initial_model import initial_model
from train.loop import Loss, Outcome
from train.losses import next_token_loss
from train.run import run_stage
from train.stage import (
    Job,
    LossModule,
    Plan,
    TrainingRecipe,
    data_directories,
    documents_of,
    open_data,
    packed_stage,
)
from train.summary import summarize
from train.targets import Targets


class SFTRecipe(TrainingRecipe):
    """A fine-tuning run: where the weights come from, and the dialogues."""

    stage: Literal["sft"]
    init_from: Location
    data: Location | MixtureData
    evaluation_rows: PositiveInt


REPLY_TOKENS = Targets(
    lambda batch: {"trained tokens of the character's replies": int(batch.loss_mask_T.sum())},
    "A reply is trained where the character wrote it and nothing keeps it out (trained: false, weight: 0): look at the "
    "data with python -m data.inspect, and prepare dialogues with replies to train",
)


def answer_loss(module: LossModule, batch: PackedBatch) -> Loss:
    """Next-token cross-entropy over the character's text and its `<|end|>` only."""
    device = module.trunk.embed_tokens.weight.device
    places_T = to_device(batch.loss_mask_T.nonzero()[:, 0], device)  # found before the device is busy
    batch = batch.to(device)
    hidden_TD = module.trunk(batch.tokens_T, documents_of(batch))
    return Loss(next_token_loss(module.trunk, hidden_TD[places_T], batch.targets_T[places_T]))


def prepare(recipe: SFTRecipe, world: World) -> Job:
    """Data and model of a fine-tuning run."""
    initial = initial_model(recipe.init_from, world)
    initial.check_tokenizer(data_directories(recipe.data).values())
    trunk = initial.load(recipe.attention, world.device, recipe.engine.dtype)
    dataset, heldout = open_data(recipe.data, trunk.config)

    def finish(engine: TrainingEngine, outcome: Outcome, console: Console) -> tuple[str, dict[str, Any]]:
        loss = outcome.last_evaluation["heldout_loss"]
        return f"held-out loss {loss:.3f} nats/token of the character", {"heldout_loss": loss}

    return Job(
        module=LossModule(trunk, answer_loss),
        stage=packed_stage(
            dataset, heldout, recipe.evaluation_rows, recipe.loop.rows_per_micro_batch, world,
            REPLY_TOKENS,
        ),
        tokenizer=initial.tokenizer,
        finish=finish,
    )  # fmt: skip


def plan(recipe: SFTRecipe) -> Plan:
    """What the recipe asks for."""
    summary = summarize(recipe, recipe.data, loss="chosen tokens")
    return Plan(recipe.inputs(), summary, lambda world, console: prepare(recipe, world))


def main() -> int:
    """Entry point."""
    return run_stage(SFTRecipe, __doc__, plan)


if __name__ == "__main__":
    sys.exit(main())
