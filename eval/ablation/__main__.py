"""Compare the arms of an architecture ablation: `python -m eval.ablation recipes/ablation/eval.yaml`.

Writes table.md, report.json and plots/ into the recipe's run_dir.
"""

import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from data.format.dialogue import Dialogue
from data.format.dialogue_json import read_dialogues
from data.format.tokenizer import DialogueTokenizer
from data.packed.shards import PackedDataset
from eval.ablation.plots import DRAWINGS
from eval.ablation.runs import AblationRecipe, Arm, describe_arm, read_arms, training_spread, unseen_rows
from eval.ablation.table import key_figure, render_table
from eval.context import ReplyContext
from eval.figure import draw_all
from eval.models import Models
from eval.parts.perplexity import (
    CONTROL,
    TURN_BINS,
    ScoredTargets,
    in_turns,
    paired_difference,
    score_dataset,
    turn_label,
)
from eval.parts.ranking import evaluate_ranking
from eval.parts.recall import build_probes, candidate_logprobs, summarize_recall
from eval.parts.section import Part, run_parts
from eval.report import to_json
from eval.scoring import OnProgress, share_of
from eval.speed.decode import device_name, measure_speed, speed_prompts
from eval.statistics import NOT_NEGATIVE, Bootstrap
from eval.workspace import EvalError, check_finished, heldout_contexts, print_inputs
from model.weights import load_model
from recipes.files import write_text
from recipes.json_text import json_text
from recipes.stage_command import Made, StageCommand, text_report

# Number of tokens of its document before a target. 128 is the window of the ablation's local layers.
CONTEXT_BINS = ((1, 31), (32, 63), (64, 127), (128, 255), (256, 511), (512, 10**9))


@dataclass
class Ablation:
    """What the parts work on; the models are those of the arms' best runs, in float32."""

    recipe: AblationRecipe
    tokenizer: DialogueTokenizer
    heldout: PackedDataset
    dialogues: list[Dialogue]
    contexts: list[ReplyContext]
    arms: dict[str, Arm]
    models: Models
    bootstrap: Bootstrap


def open_ablation(recipe: AblationRecipe, console: Console) -> Ablation:
    """Load data, contexts and arms; print how many dialogues have no context.

    Raises EvalError, or an error of the readers, naming what does not match.
    """
    check_finished("data", recipe.data)
    data = Path(recipe.data)
    tokenizer, heldout = DialogueTokenizer.load(data), PackedDataset(data / "heldout")
    longest = max(heldout.row_length, recipe.contexts.max_prompt_tokens, max(recipe.recall.distances))
    arms = read_arms(recipe, tokenizer, max(longest, recipe.speed.prompt_tokens + recipe.speed.new_tokens))
    models = Models({name: arm.best.run_dir for name, arm in arms.items()}, dtype=torch.float32)
    dialogues = list(read_dialogues(data / "dialogues" / "heldout.jsonl"))
    contexts = heldout_contexts(dialogues, tokenizer, recipe.seed, recipe.contexts, console)
    if recipe.ranking.n_contexts > len(contexts):
        raise EvalError(f"ranking.n_contexts: {recipe.ranking.n_contexts} asked for, {len(contexts)} found; lower it")
    bootstrap = recipe.bootstrap.over(heldout, recipe.seed)
    return Ablation(recipe, tokenizer, heldout, dialogues, contexts, arms, models, bootstrap)


def loss_part(space: Ablation, on_progress: OnProgress) -> dict[str, Any]:
    """Held-out loss of every arm and its difference to the first on the same targets: overall, by context, by turn."""
    rows = unseen_rows(list(space.arms.values()), space.heldout.n_rows, space.recipe.heldout_rows)
    scored = {}
    for number, (name, model) in enumerate(space.models.items()):
        shown = share_of(on_progress, number, len(space.models))
        scored[name] = score_dataset(model, space.heldout, space.tokenizer, rows, space.recipe.batch_tokens, shown)
    base = scored[space.recipe.against]
    return {
        "n_rows": int(rows.size),
        "n_targets": int(base.nats_N.size),
        "n_dialogues": int(np.unique(base.dialogue_D).size),
        "arms": {name: _loss_figures(targets, base, space.bootstrap) for name, targets in scored.items()},
    }


def _loss_figures(targets: ScoredTargets, base: ScoredTargets, bootstrap: Bootstrap) -> dict[str, Any]:
    def figures(chosen_N: NDArray[np.bool_]) -> dict[str, Any]:
        nats_N = targets.nats_N[chosen_N]
        return {
            "loss": bootstrap.mean(nats_N, targets.dialogue_N[chosen_N], NOT_NEGATIVE),
            "difference": None if targets is base else paired_difference(targets, base, chosen_N, bootstrap),
        }

    text_N = targets.role_N != CONTROL
    return {
        **figures(np.ones(targets.nats_N.size, dtype=bool)),
        "by_context": [
            {"tokens": turn_label(*limits), "first": limits[0], **figures(_has_context(targets, *limits))}
            for limits in CONTEXT_BINS
        ],
        "by_turn": [
            {"turns": turn_label(*limits), "first": limits[0], **figures(text_N & in_turns(targets, *limits))}
            for limits in TURN_BINS
        ],
    }


def _has_context(targets: ScoredTargets, low: int, high: int) -> NDArray[np.bool_]:
    return np.asarray((targets.context_N >= low) & (targets.context_N <= high))


def ranking_part(space: Ablation, on_progress: OnProgress) -> dict[str, Any]:
    """The true next reply among distractors."""
    recipe = space.recipe
    return evaluate_ranking(
        space.models, space.tokenizer, space.contexts, recipe.ranking, recipe.seed, recipe.batch_tokens,
        space.bootstrap, on_progress,
    )  # fmt: skip


def recall_part(space: Ablation, on_progress: OnProgress) -> dict[str, Any]:
    """Recall of a fact stated earlier, by distance."""
    probes = build_probes(space.dialogues, space.tokenizer, space.recipe.recall, space.recipe.seed)
    longest = max(len(probe.prompts[0]) + len(probe.candidates[0]) for probe in probes)
    for name, arm in space.arms.items():
        if longest > arm.config.max_length:
            raise EvalError(
                f"recall.distances: {max(space.recipe.recall.distances)} gives prompts of {longest} tokens, and "
                f"max_length of arms.{name} is {arm.config.max_length}; lower it"
            )
    logprobs = {}
    for number, (name, model) in enumerate(space.models.items()):
        shown = share_of(on_progress, number, len(space.models))
        logprobs[name] = candidate_logprobs(model, probes, space.recipe.batch_tokens, shown)
    return summarize_recall(probes, logprobs, space.recipe.against, space.bootstrap)


def speed_part(space: Ablation, on_progress: OnProgress) -> dict[str, Any]:
    """Decoding speed of every arm in the recipe's precision; all models are in memory, since they take turns."""
    section, device = space.recipe.speed, space.models.device
    space.models.release()
    dtype = getattr(torch, section.precision)
    models = {name: load_model(Path(arm.best.run_dir) / "model", device, dtype) for name, arm in space.arms.items()}
    figures = measure_speed(models, speed_prompts(space.heldout, section), section, on_progress)
    return {**section.model_dump(), "device": device_name(device), "arms": figures}


PARTS: dict[str, Part[Ablation]] = {
    "loss": loss_part,
    "ranking": ranking_part,
    "recall": recall_part,
    "speed": speed_part,
}


def evaluate(recipe: AblationRecipe, console: Console) -> dict[str, Any]:
    """Run every part, with a progress bar each; the content of the report."""
    space = open_ablation(recipe, console)
    results, seconds = run_parts(PARTS, space, console)
    return {
        "schema_version": 1,
        "title": recipe.title,
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device_name(space.models.device),
        "torch": torch.__version__,
        "seed": recipe.seed,
        "bootstrap": recipe.bootstrap.model_dump(),
        "data": {"run_dir": recipe.data, "fingerprint": space.heldout.fingerprint},
        "against": recipe.against,
        "spikes": recipe.spikes.model_dump(),
        "training_spread": training_spread(space.arms.values()),
        "arms": {name: describe_arm(arm, recipe.conversation_lengths) for name, arm in space.arms.items()},
        **results,
        "seconds": seconds,
    }


def make(recipe: AblationRecipe, console: Console) -> Made:
    """Evaluate, and write plots/*.png, report.json and table.md."""
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    run_dir, report = Path(recipe.run_dir), to_json(evaluate(recipe, console))
    draw_all(DRAWINGS, report, run_dir / "plots")
    write_text(run_dir / "report.json", json_text(report, indent=1) + "\n")
    write_text(run_dir / "table.md", table := render_table(report))
    result = f"{table}\ntable: {run_dir / 'table.md'}  plots: {run_dir / 'plots'}"
    return Made(key_figure(report), text_report(result))


def print_plan(recipe: AblationRecipe, console: Console) -> None:
    """Print which inputs exist."""
    print_inputs(recipe.inputs(), console)


FILES = ("report.json", "table.md", "plots")
COMMAND = StageCommand(AblationRecipe, __doc__, make, print_plan, FILES, by_size=FILES)
main = COMMAND.main


if __name__ == "__main__":
    sys.exit(main())
