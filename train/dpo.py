"""Direct preference optimization on sampled or given pairs: `python -m train.dpo RECIPE`."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt
from rich.console import Console

from data.clean.ledger import reasons_text
from data.format.tokenizer import MODEL_FILE, DialogueTokenizer
from data.sources.preferences import PreferencePair, distinct_pairs, hold_out, read_pair_file
from eval.number_text import estimate_text
from eval.statistics import Bootstrap
from model.execution import shape_blocks
from model.transformer import Transformer
from recipes.loader import Section
from recipes.plan_check import PlanCheck
from recipes.run_identity import Location, identity
from train.deepspeed.engine import TrainingEngine
from train.deepspeed.world import World
from train.initial_model import content_key, init_input, initial_model
from train.loop import LoopError, Loss, Outcome, TrainingStage, no_grad_sum
from train.losses import dpo_loss
from train.memory.report import Summary
from train.preference.on_policy import OnPolicyPairs, sample_pairs
from train.preference.pair_rows import EncodedPair, PairBatch, PairRows, add_reference, encode_pairs, reply_logprobs
from train.run import run_stage
from train.stage import Job, LossModule, TrainingRecipe, of_all_ranks, share_of_rank
from train.summary import summarize


class FilePairs(Section):
    """Pairs from a file: our JSONL, or transcripts as in hh-rlhf (`Human:` / `Assistant:`), gzip allowed."""

    kind: Literal["file"]
    path: Location
    format: Literal["jsonl", "hh_rlhf"] = "jsonl"
    max_pairs: PositiveInt | None = None
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """A larger fraction of unusable records (malformed, nobody else speaks in the context, an empty reply, two equal
    replies, weight: 0) is an error; a smaller one is skipped and counted."""


Pairs = Annotated[OnPolicyPairs | FilePairs, Field(discriminator="kind")]


class DPORecipe(TrainingRecipe):
    """A preference run: the initial policy (also the reference model), and the sources of pairs."""

    heldout_figures: ClassVar = {
        "heldout_loss": "lower", "heldout_accuracy": "higher", "heldout_margin": "higher",
        "heldout_chosen_drift": None, "heldout_rejected_drift": None,
    }  # fmt: skip

    stage: Literal["dpo"]
    init_from: Location
    data: Location
    pairs: Annotated[tuple[Pairs, ...], Field(min_length=1, strict=False)]
    beta: PositiveFloat = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    max_pair_tokens: PositiveInt
    """Longest prompt + reply. A longer prompt loses its oldest messages, but never the narrator's opening or the
    newest message; a pair that still does not fit is skipped and counted."""
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1

    def check_plan(self, plan: PlanCheck) -> None:
        """Also read the files of pairs, and look at both sides of the split, before earlier stages are trained."""
        super().check_plan(plan)
        pairs: list[PreferencePair] = []
        are_all_known = True
        for number, source in enumerate(self.pairs):
            if isinstance(source, OnPolicyPairs):
                plan.check_reward_model(f"pairs.{number}.scorer", source.scorer)
                are_all_known = False
            elif Path(source.path).is_file() and not plan.is_to_come(source.path):
                with plan.finding():
                    pairs += read_pair_file(source.path, source.format, source.max_bad_fraction).pairs[
                        : source.max_pairs
                    ]
            else:
                are_all_known = False
        tokenizer = Path(self.data) / MODEL_FILE
        if are_all_known and pairs and tokenizer.is_file() and not plan.is_to_come(self.data):
            with plan.finding():
                split_pairs(self, distinct_pairs(pairs)[0], DialogueTokenizer.load(tokenizer.parent), plan.n_ranks)

    def inputs(self) -> dict[str, str]:
        """The finished runs and files that the stage reads, by recipe key."""
        pairs = {
            f"pairs.{number}": source.scorer if isinstance(source, OnPolicyPairs) else source.path
            for number, source in enumerate(self.pairs)
        }
        return super().inputs() | pairs


def preference_loss(module: LossModule, batch: PairBatch, beta: float, label_smoothing: float) -> Loss:
    """DPO loss of a batch; also logs accuracy, margin, and drift of both sides from the reference (nats)."""
    policy_B = reply_logprobs(module.trunk, batch)
    reference_B = batch.reference_B.to(policy_B.device)
    chosen_B, rejected_B = policy_B.chunk(2)
    reference_chosen_B, reference_rejected_B = reference_B.chunk(2)
    loss, margin_B = dpo_loss(chosen_B, rejected_B, reference_chosen_B, reference_rejected_B, beta, label_smoothing)
    with torch.no_grad():
        sums = {
            "accuracy": (margin_B > 0).float().sum() + 0.5 * (margin_B == 0).float().sum(),
            "margin": margin_B.sum(),
            "chosen_drift": (chosen_B - reference_chosen_B).sum(),
            "rejected_drift": (rejected_B - reference_rejected_B).sum(),
        }
    return Loss(loss, sums)


def collect_pairs(
    recipe: DPORecipe, policy: Transformer, tokenizer: DialogueTokenizer, world: World, console: Console
) -> list[PreferencePair]:
    """Pairs of all sources in the recipe's order, without repeated and contradicting ones."""
    pairs: list[PreferencePair] = []
    for number, source in enumerate(recipe.pairs):
        if isinstance(source, OnPolicyPairs):
            folder = Path(recipe.run_dir) / "pairs" / f"{number}_{_digest_of(source, recipe)}"
            pairs += sample_pairs(source, policy, Path(recipe.data), tokenizer, recipe.seed, folder, world, console)
        else:
            found = read_pair_file(source.path, source.format, source.max_bad_fraction)
            console.print(found.report, highlight=False, markup=False, soft_wrap=True)
            if source.max_pairs is not None and source.max_pairs < len(found.pairs):
                console.print(f"the first {source.max_pairs:,} of them are used (max_pairs)", highlight=False)
            pairs += found.pairs[: source.max_pairs]
    distinct, left_out = distinct_pairs(pairs)
    message = f"{len(distinct):,} distinct pairs"
    if left_out:
        message += f"; left out of {len(pairs):,}: {reasons_text(left_out)}"
    if n_continue := sum(pair.continues for pair in distinct):
        message += f"; in {n_continue:,} the character writes twice in a row"
    if not distinct:
        raise LoopError(f"{message}: nothing to train on; add pairs that do not contradict each other")
    console.print(message, highlight=False, soft_wrap=True)
    return distinct


def _digest_of(source: OnPolicyPairs, recipe: DPORecipe) -> str:
    """Hash of everything that sampled pairs depend on, to name their folder."""
    inputs = {"init_from": init_input(recipe.init_from), "scorer": source.scorer, "data": recipe.data}
    settings = f"{json.dumps(identity(source))} {recipe.seed} {recipe.engine.precision}"
    return hashlib.sha256(f"{settings} {content_key(inputs)}".encode()).hexdigest()[:16]


def prepare(recipe: DPORecipe, world: World, console: Console) -> Job:
    """Pairs, reference log-probabilities and model of a preference run."""
    initial = initial_model(recipe.init_from, world)
    trunk = initial.load(recipe.attention, world.device, recipe.engine.dtype)
    settings = recipe.engine
    # before the reference is computed, so that reference and policy round alike
    blocks = shape_blocks(trunk.blocks, settings.blocks, settings.recompute, settings.recompute_blocks, world.device)
    initial.check_tokenizer([recipe.data])
    tokenizer = DialogueTokenizer.load(initial.directory)
    pairs = collect_pairs(recipe, trunk, tokenizer, world, console)
    rows, heldout, fitting = split_pairs(recipe, pairs, tokenizer, world.size)
    console.print(fitting, highlight=False)
    model_key = f"{content_key({'init_from': init_input(recipe.init_from)})} {settings.precision} {blocks}"
    folder, rows_per_micro_batch = Path(recipe.run_dir) / "reference", recipe.loop.rows_per_micro_batch
    for part in (rows, heldout):
        add_reference(part, trunk, model_key, folder, rows_per_micro_batch, world, console)

    shares = share_of_rank(np.arange(heldout.n_rows), rows_per_micro_batch, world)
    batches = [heldout.collate(part) for part in shares]
    return Job(
        module=LossModule(trunk, lambda m, batch: preference_loss(m, batch, recipe.beta, recipe.label_smoothing)),
        stage=TrainingStage(
            rows=rows,
            collate=rows.collate,
            count=lambda batch: len(batch.sequence_lengths) // 2,
            evaluate=lambda engine: no_grad_sum(engine, batches, lambda batch: len(batch.sequence_lengths) // 2),
        ),
        tokenizer=initial.tokenizer,
        finish=lambda engine, outcome, console: _figures(
            outcome, rows, heldout, heldout_wins(engine, list(zip(shares, batches, strict=True)), heldout.n_rows)
        ),
    )


def split_pairs(
    recipe: DPORecipe, pairs: Sequence[PreferencePair], tokenizer: DialogueTokenizer, n_ranks: int
) -> tuple[PairRows, PairRows, str]:
    """The training and the held-out pairs that fit, and a line on how many fit. Raises LoopError for a side with fewer
    pairs than ranks."""
    encoded, left_out = encode_pairs(pairs, tokenizer, recipe.max_pair_tokens)
    fitting = f"{len(encoded)} of {len(pairs)} pairs fit max_pair_tokens {recipe.max_pair_tokens}"
    if left_out:
        fitting += f"; left out: {reasons_text(left_out)}"
    sides = hold_out([pair.group for pair in encoded], recipe.heldout_fraction, recipe.seed)
    heldout, rows = (PairRows([encoded[i] for i in side]) for side in sides)
    if min(heldout.n_rows, rows.n_rows) < n_ranks:
        raise LoopError(_too_few(encoded, heldout.n_rows, recipe, n_ranks, fitting))
    return rows, heldout, fitting


def _too_few(encoded: Sequence[EncodedPair], n_heldout: int, recipe: DPORecipe, n_ranks: int, fitting: str) -> str:
    """Why a side of the split has too few pairs, and what to change."""
    if not encoded:
        return f"{fitting}. Raise max_pair_tokens"
    sizes = sorted(Counter(pair.group for pair in encoded).values())
    found = (
        f"{fitting}. Of these, heldout_fraction {recipe.heldout_fraction:g} leaves {len(encoded) - n_heldout} for "
        f"training and {n_heldout} held out; each side needs at least {n_ranks}, one per rank. Pairs of one user "
        "(metadata.user), or without a user of one context, stay on one side, and there are "
        f"{len(sizes)} user(s) or context(s)"
    )
    smallest = sizes[0] / len(encoded)
    if n_heldout < n_ranks and recipe.heldout_fraction < smallest < 1:
        enough = f"set heldout_fraction to {smallest + 0.005:.2f} or more"
        return f"{found}: {enough}, or add pairs of other users or contexts"
    return f"{found}: add pairs of other users or contexts"


@torch.no_grad()
def heldout_wins(engine: TrainingEngine, batches: Sequence[tuple[np.ndarray, PairBatch]], n_pairs: int) -> np.ndarray:
    """wins_N of the held-out pairs: 1 where the policy prefers the chosen reply more than the reference does, 0.5 where
    equally, 0 otherwise. `batches`: this rank's rows, and their batch."""
    assert isinstance(engine.module, LossModule)
    engine.module.eval()
    mine_N = np.full(n_pairs, np.nan)
    for rows, batch in batches:
        change_B = reply_logprobs(engine.module.trunk, batch).float().cpu() - batch.reference_B.cpu()
        chosen_B, rejected_B = change_B.chunk(2)
        mine_N[rows] = (0.5 + 0.5 * torch.sign(chosen_B - rejected_B)).numpy()
    engine.module.train()
    return np.nanmax(of_all_ranks(mine_N[:, None], engine.world), axis=1)  # a pair is on one rank


def _figures(outcome: Outcome, rows: PairRows, heldout: PairRows, wins_N: np.ndarray) -> tuple[str, dict[str, Any]]:
    """Key figure: held-out accuracy, next to the accuracy of preferring by length alone, with 95% intervals over the
    users or contexts that a split keeps together."""
    longer_N = 0.5 + 0.5 * np.sign([len(pair.chosen) - len(pair.rejected) for pair in heldout.pairs])
    if longer_N.mean() < 0.5:
        longer_N = 1 - longer_N
    groups = [pair.group for pair in heldout.pairs]
    accuracy, by_length = (Bootstrap().mean(values_N, groups) for values_N in (wins_N, longer_N))
    figures = {
        **outcome.last_evaluation,
        "heldout_accuracy_interval": [accuracy.low, accuracy.high],
        "heldout_length_only_accuracy": by_length.value,
        "heldout_length_only_interval": [by_length.low, by_length.high],
        "training_pairs": rows.n_rows,
        "heldout_pairs": heldout.n_rows,
    }
    shown, alone = (estimate_text(asdict(estimate), 3) for estimate in (accuracy, by_length))
    return f"held-out pair accuracy {shown} of {heldout.n_rows} (length alone {alone})", figures


def main() -> int:
    """Entry point."""

    def summary(recipe: DPORecipe) -> Summary:
        # a row is a pair: the prompt twice, once with each reply
        return summarize(recipe, recipe.data, loss="chosen tokens", row_tokens=2 * recipe.max_pair_tokens)

    return run_stage(DPORecipe, __doc__, summary, prepare)


if __name__ == "__main__":
    sys.exit(main())
