"""Hold the arms of an architecture ablation against each other: `python -m eval.ablation recipes/ablation/eval.yaml`.

Writes table.md, report.json and plots/ into the recipe's run_dir.
"""

import sys
import time
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
from eval.ablation.plots import draw_ablation
from eval.ablation.runs import AblationRecipe, Arm, describe_arm, read_arms, unseen_rows
from eval.ablation.table import key_figure, render_table
from eval.context import ReplyContext
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
from eval.parts.recall import build_probes, candidate_logprobs, summarise_recall
from eval.parts.section import Part, run_parts
from eval.report import to_json
from eval.scoring import OnProgress, share_of
from eval.speed.decode import device_name, measure_speed, speed_prompts
from eval.statistics import Bootstrap
from eval.workspace import EvalError, check_finished, heldout_contexts, print_inputs
from model.transformer import Transformer
from model.weights import load_model
from recipes.files import write_text
from recipes.json_text import json_text
from recipes.loader import dump_recipe, parse_command_line
from recipes.run_directory import RunState, finish_run, prepare_run_directory, read_done
from recipes.stage_errors import run_entry

# Tokens of its document that a target can read. 128 is the window of the ablation's local layers.
CONTEXT_BINS = ((1, 31), (32, 63), (64, 127), (128, 255), (256, 511), (512, 10**9))


@dataclass
class Ablation:
    """Everything loaded once; the models are those of the arms' best runs, in float32."""

    recipe: AblationRecipe
    tokenizer: DialogueTokenizer
    heldout: PackedDataset
    dialogues: list[Dialogue]
    contexts: list[ReplyContext]
    arms: dict[str, Arm]
    models: dict[str, Transformer]
    device: torch.device
    bootstrap: Bootstrap


def open_ablation(recipe: AblationRecipe, console: Console) -> Ablation:
    """Load data, contexts, arms and models; print how many dialogues gave no context.

    Raises EvalError, or the errors of the readers, naming what is wrong.
    """
    check_finished("data", recipe.data)
    data = Path(recipe.data)
    tokenizer, heldout = DialogueTokenizer.load(data), PackedDataset(data / "heldout")
    longest = max(heldout.row_length, recipe.contexts.max_prompt_tokens, max(recipe.recall.distances))
    arms = read_arms(recipe, tokenizer, max(longest, recipe.speed.prompt_tokens + recipe.speed.new_tokens))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = {name: load_model(Path(arm.best.run_dir) / "model", device) for name, arm in arms.items()}
    dialogues = list(read_dialogues(data / "dialogues" / "heldout.jsonl"))
    contexts = heldout_contexts(dialogues, tokenizer, recipe.seed, recipe.contexts, console)
    if recipe.ranking.n_contexts > len(contexts):
        raise EvalError(f"ranking.n_contexts: {recipe.ranking.n_contexts} asked for, {len(contexts)} found; lower it")
    bootstrap = recipe.bootstrap.over(heldout, recipe.seed)
    return Ablation(recipe, tokenizer, heldout, dialogues, contexts, arms, models, device, bootstrap)


def loss_part(space: Ablation, on_progress: OnProgress) -> dict[str, Any]:
    """Held-out loss of every arm and its difference to the first on the same targets: overall, by context, by turn."""
    rows = unseen_rows(list(space.arms.values()), space.heldout.n_rows, space.recipe.heldout_rows)
    scored = {
        name: score_dataset(
            model, space.heldout, space.tokenizer, rows, space.recipe.batch_tokens,
            share_of(on_progress, number, len(space.models)),
        )
        for number, (name, model) in enumerate(space.models.items())
    }  # fmt: skip
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
            "loss": bootstrap.mean(nats_N, targets.dialogue_N[chosen_N]),
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
    """A fact stated early and asked later, by distance."""
    probes = build_probes(space.dialogues, space.tokenizer, space.recipe.recall, space.recipe.seed)
    longest = max(len(probe.prompts[0]) + len(probe.candidates[0]) for probe in probes)
    for name, arm in space.arms.items():
        if longest > arm.config.max_length:
            raise EvalError(
                f"recall.distances: {max(space.recipe.recall.distances)} makes prompts of {longest} tokens, the "
                f"max_length of arms.{name} is {arm.config.max_length}; lower it"
            )
    logprobs = {
        name: candidate_logprobs(
            model, probes, space.recipe.batch_tokens, share_of(on_progress, number, len(space.models))
        )
        for number, (name, model) in enumerate(space.models.items())
    }
    return summarise_recall(probes, logprobs, space.recipe.against, space.bootstrap)


def speed_part(space: Ablation, on_progress: OnProgress) -> dict[str, Any]:
    """Decoding speed of every arm, in the precision that the recipe names."""
    section = space.recipe.speed
    dtype = getattr(torch, section.precision)
    models = {n: load_model(Path(arm.best.run_dir) / "model", space.device, dtype) for n, arm in space.arms.items()}
    figures = measure_speed(models, speed_prompts(space.heldout, section), section, on_progress)
    return {**section.model_dump(), "device": device_name(space.device), "arms": figures}


PARTS: dict[str, Part[Ablation]] = {
    "loss": loss_part,
    "ranking": ranking_part,
    "recall": recall_part,
    "speed": speed_part,
}


def evaluate(space: Ablation, console: Console) -> dict[str, Any]:
    """Run every part with a progress line each; the report's content."""
    results, seconds = run_parts(PARTS, space, console)
    recipe = space.recipe
    return {
        "title": recipe.title,
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device_name(space.device),
        "torch": torch.__version__,
        "seed": recipe.seed,
        "bootstrap": recipe.bootstrap.model_dump(),
        "data": {"run_dir": recipe.data, "fingerprint": space.heldout.fingerprint},
        "against": recipe.against,
        "spikes": recipe.spikes.model_dump(),
        "arms": {name: describe_arm(arm, recipe.conversation_lengths) for name, arm in space.arms.items()},
        **results,
        "seconds": seconds,
    }


def write_outputs(run_dir: Path, report: dict[str, Any]) -> None:
    """Write plots/*.png, report.json and table.md; `report` as plain JSON values."""
    draw_ablation(report, run_dir / "plots")
    write_text(run_dir / "report.json", json_text(report, indent=1) + "\n")
    write_text(run_dir / "table.md", render_table(report))


def run(recipe: AblationRecipe, console: Console) -> None:
    """Evaluate into recipe.run_dir, or say that it is done already."""
    started, run_dir = time.monotonic(), Path(recipe.run_dir)
    with prepare_run_directory(run_dir, recipe, recipe.inputs()) as state:
        if state is RunState.FINISHED:
            console.print(
                f"{run_dir} is finished: {(read_done(run_dir) or {}).get('key_figure')}",
                highlight=False,
                soft_wrap=True,
            )
            return
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        report = to_json({"schema_version": 1, **evaluate(open_ablation(recipe, console), console)})
        write_outputs(run_dir, report)
        finish_run(
            run_dir, recipe, recipe.inputs(), key_figure(report), time.monotonic() - started,
            by_size=("report.json", "table.md", "plots"),
        )  # fmt: skip
    console.print(render_table(report), highlight=False, markup=False, soft_wrap=True)
    console.print(f"table: {run_dir / 'table.md'}  plots: {run_dir / 'plots'}", highlight=False, soft_wrap=True)


def main() -> int:
    """Entry point: 0 when the report is there, 2 for a problem the user can mend."""
    command = parse_command_line(AblationRecipe, description=__doc__)
    console = Console()

    def dry_run(recipe: AblationRecipe, console: Console) -> None:
        console.print(dump_recipe(recipe), highlight=False, markup=False)
        print_inputs(recipe.inputs(), console)

    action = dry_run if command.dry_run else run
    return run_entry(lambda: action(command.recipe, console), command.recipe.run_dir)


if __name__ == "__main__":
    sys.exit(main())
