"""Train the reward model, P(the partner writes again): `python -m train.engagement RECIPE`."""

from __future__ import annotations

import sys
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from rich.console import Console
from scipy.stats import mannwhitneyu

from data.format.dialogue import Dialogue, supervision
from data.packed.batch import PackedBatch
from model.scalar_head import ScalarHead
from train.deepspeed.engine import TrainingEngine
from train.deepspeed.world import World
from train.loop import Loss, Outcome
from train.losses import continuation_loss
from train.run import run_stage
from train.stage import FineTuningRecipe, Job, LossModule, documents_of, load_start, of_all_ranks, packed_stage
from train.summary import summarize
from train.targets import Targets


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
    """Number of turns of a batch with each label."""
    return {"partner continues": int((batch.label_T == 1).sum()), "partner leaves": int((batch.label_T == 0).sum())}


def n_by_label_of_dialogue(dialogue: Dialogue, continue_within_seconds: float | None) -> dict[str, int]:
    """Number of turns of a dialogue with each label."""
    _, labels = supervision(dialogue, continue_within_seconds)
    return {"partner continues": labels.count(1), "partner leaves": labels.count(0)}


LABELS = Targets(
    n_by_label,
    n_by_label_of_dialogue,
    "The scorer needs both. Label what users did (metadata.engagement_label of a reply, or data.feedback), give "
    "the messages times and set continue_within_seconds, or add dialogues that end because the partner left "
    "(chat_jsonl: the last message is the character's); then prepare the data again",
)


class EngagementRecipe(FineTuningRecipe):
    """A reward model run, on dialogues whose turns have engagement labels."""

    heldout_figures: ClassVar = {"heldout_loss": "lower", "heldout_auc": "higher"}
    targets: ClassVar = LABELS

    stage: Literal["engagement"]


def roc_auc(score: np.ndarray, label: np.ndarray) -> float:
    """Area under the ROC curve: P(a positive scores above a negative), ties one half (Mann-Whitney U)."""
    positive, negative = score[label == 1], score[label == 0]
    assert len(positive) and len(negative), "check_targets refuses one class"
    return float(mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative)))


def heldout_auc(engine: TrainingEngine, batches: list[PackedBatch]) -> float:
    """AUC over the labeled turns of all ranks' batches."""
    engine.module.eval()
    pairs = []
    with torch.no_grad():
        for batch in batches:
            labeled_T = batch.label_T >= 0
            assert isinstance(engine.module, LossModule)
            score_T = scores(engine.module, batch).float().cpu()
            pairs.append(torch.stack([score_T[labeled_T], batch.label_T[labeled_T].float()]))
    engine.module.train()
    score, label = of_all_ranks(torch.cat(pairs, dim=1).numpy(), engine.world)
    return roc_auc(score, label)


def prepare(recipe: EngagementRecipe, world: World, console: Console) -> Job:
    """Data and model of a reward model run."""
    initial, trunk, dataset, heldout = load_start(recipe, world)
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


def main() -> int:
    """Entry point."""
    return run_stage(EngagementRecipe, __doc__, lambda recipe: summarize(recipe, recipe.data, loss="score"), prepare)


if __name__ == "__main__":
    sys.exit(main())
