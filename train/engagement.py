"""Train the engagement scorer, P(the partner writes again): `python -m train.engagement RECIPE`."""

from __future__ import annotations

import sys
from typing import Any, Literal

import numpy as np
import torch
from pydantic import PositiveInt
from rich.console import Console
from scipy.stats import mannwhitneyu

from data.packed.batch import PackedBatch
from data.packed.mixture import MixtureData
from model.scalar_head import ScalarHead
from recipes.run_identity import Location
from train.deepspeed.engine import TrainingEngine
from train.deepspeed.world import World
from train.initial_model import initial_model
from train.loop import Loss, Outcome
from train.losses import continuation_loss
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


class EngagementRecipe(TrainingRecipe):
    """A scorer run: the trunk it starts from, and dialogues whose turns carry labels."""

    stage: Literal["engagement"]
    init_from: Location
    data: Location | MixtureData
    evaluation_rows: PositiveInt


def scores(module: LossModule, batch: PackedBatch) -> torch.Tensor:
    """score_T: the logit of "the partner writes again" at every position."""
    assert module.head is not None
    batch = batch.to(module.trunk.embed_tokens.weight.device)
    return module.head(module.trunk(batch.tokens_T, documents_of(batch)))


def scorer_loss(module: LossModule, batch: PackedBatch) -> Loss:
    """Binary cross-entropy at the last token of every character turn."""
    score_T = scores(module, batch)
    return Loss(continuation_loss(score_T, batch.label_T.to(score_T.device)))


def n_by_label(batch: PackedBatch) -> dict[str, int]:
    """How many turns of a batch carry each label."""
    return {"partner continues": int((batch.label_T == 1).sum()), "partner leaves": int((batch.label_T == 0).sum())}


LABELS = Targets(
    n_by_label,
    "The scorer learns from both. Label what users did (metadata.engagement_label of a reply, or data.feedback), give "
    "the messages times and set continue_within_seconds, or add dialogues that end because the partner left "
    "(chat_jsonl: the last message is the character's); then prepare the data again",
)


def roc_auc(score: np.ndarray, label: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a positive outranks a negative (Mann-Whitney U)."""
    positive, negative = score[label == 1], score[label == 0]
    assert len(positive) and len(negative), "check_targets refuses one class"
    return float(mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative)))


def heldout_auc(engine: TrainingEngine, batches: list[PackedBatch]) -> float:
    """AUC over the labelled turns of these batches, gathered from all ranks."""
    engine.module.eval()
    pairs = []
    with torch.no_grad():
        for batch in batches:
            labelled_T = batch.label_T >= 0
            assert isinstance(engine.module, LossModule)
            score_T = scores(engine.module, batch).float().cpu()
            pairs.append(torch.stack([score_T[labelled_T], batch.label_T[labelled_T].float()]))
    engine.module.train()
    mine = torch.cat(pairs, dim=1).numpy()
    gathered: list[Any] = [mine] * engine.world.size
    if engine.world.size > 1:
        torch.distributed.all_gather_object(gathered, mine)
    score, label = np.concatenate(gathered, axis=1)
    return roc_auc(score, label)


def prepare(recipe: EngagementRecipe, world: World) -> Job:
    """Data and model of a scorer run."""
    initial = initial_model(recipe.init_from, world)
    initial.check_tokenizer(data_directories(recipe.data).values())
    trunk = initial.load(recipe.attention, world.device, recipe.engine.dtype)
    dataset, heldout = open_data(recipe.data, trunk.config)
    head = ScalarHead(trunk.config.d_model)
    stage = packed_stage(
        dataset, heldout, recipe.evaluation_rows, recipe.loop.rows_per_micro_batch, world, LABELS,
        extra=lambda engine, batches: {"heldout_auc": heldout_auc(engine, batches)},
    )  # fmt: skip

    def finish(engine: TrainingEngine, outcome: Outcome, console: Console) -> tuple[str, dict[str, Any]]:
        auc, loss = (outcome.last_evaluation[name] for name in ("heldout_auc", "heldout_loss"))
        return f"held-out AUC {auc:.3f}", {"heldout_auc": auc, "heldout_loss": loss}

    return Job(
        module=LossModule(trunk, scorer_loss, head),
        stage=stage,
        tokenizer=initial.tokenizer,
        finish=finish,
    )


def plan(recipe: EngagementRecipe) -> Plan:
    """What the recipe asks for."""
    summary = summarize(recipe, recipe.data, loss="score")
    return Plan(recipe.inputs(), summary, lambda world, console: prepare(recipe, world))


def main() -> int:
    """Entry point."""
    return run_stage(EngagementRecipe, __doc__, plan)


if __name__ == "__main__":
    sys.exit(main())
