"""Supervised fine-tuning on one character's messages: `python -m train.sft recipes/demo/sft.yaml`."""

from __future__ import annotations

import sys
from typing import Any, ClassVar, Literal

from rich.console import Console

from data.format.dialogue import supervision
from data.packed.batch import PackedBatch, to_device
from train.deepspeed.engine import TrainingEngine
from train.deepspeed.world import World
from train.loop import Loss, Outcome
from train.losses import next_token_loss
from train.run import run_stage
from train.stage import FineTuningRecipe, Job, LossModule, documents_of, load_start, packed_stage
from train.summary import summarize
from train.targets import Targets

_KIND = "trained tokens of the character's replies"
REPLY_TOKENS = Targets(
    lambda batch: {_KIND: int(batch.loss_mask_T.sum())},
    lambda dialogue, within: {_KIND: sum(supervision(dialogue, within)[0])},
    "The loss covers replies that the character wrote and that are not excluded (trained: false, weight: 0): look at "
    "the data with python -m data.inspect, and prepare dialogues with replies to train",
)


class SFTRecipe(FineTuningRecipe):
    """A supervised fine-tuning run."""

    targets: ClassVar = REPLY_TOKENS

    stage: Literal["sft"]


def answer_loss(module: LossModule, batch: PackedBatch) -> Loss:
    """Next-token cross-entropy over the character's text and its `<|end|>` only."""
    device = module.trunk.embed_tokens.weight.device
    places_T = to_device(batch.loss_mask_T.nonzero()[:, 0], device)  # nonzero on the device would synchronize
    batch = batch.to(device)
    hidden_TD = module.trunk(batch.tokens_T, documents_of(batch))
    return Loss(next_token_loss(module.trunk, hidden_TD[places_T], batch.targets_T[places_T]))


def prepare(recipe: SFTRecipe, world: World, console: Console) -> Job:
    """Data and model of a fine-tuning run."""
    initial, trunk, dataset, heldout = load_start(recipe, world)

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


def main() -> int:
    """Entry point."""
    return run_stage(SFTRecipe, __doc__, lambda recipe: summarize(recipe, recipe.data, loss="chosen tokens"), prepare)


if __name__ == "__main__":
    sys.exit(main())
