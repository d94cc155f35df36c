"""Evaluate the models of a pipeline, write report.html and report.json: `python -m eval.run recipes/demo/eval.yaml`."""

import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from eval.context import dialogues_of, human_replies, sample_replies
from eval.parts.dialogue_quality import summarise_quality
from eval.parts.engagement import score_turns, summarise_scorer, training_turns
from eval.parts.ngram import ngram_losses
from eval.parts.perplexity import CHARACTER, paired_difference, score_dataset, summarise
from eval.parts.preference import drift, score_replies, summarise_preference
from eval.parts.ranking import evaluate_ranking
from eval.parts.section import Part, run_parts
from eval.parts.training_curve import training_curves
from eval.parts.user_sensitivity import evaluate_user_sensitivity
from eval.plots import HUMAN
from eval.report import interval_text, number_text, to_json, write_report
from eval.scoring import OnProgress, share_of, sigmoid, spread_rows
from eval.workspace import EvalRecipe, Workspace, open_workspace, print_inputs
from recipes.loader import dump_recipe, parse_command_line
from recipes.run_directory import RunState, finish_run, prepare_run_directory, read_done
from recipes.stage_errors import run_entry


def perplexity_part(space: Workspace, on_progress: OnProgress) -> dict[str, Any] | None:
    """Held-out loss of count models and models; each later model's change against the first on the same targets."""
    section = space.recipe.perplexity
    if section is None:
        return None
    rows = spread_rows(space.heldout.n_rows, section.heldout_rows)
    ngrams = ngram_losses(space.train, space.heldout, rows)
    scored = {}
    for number, (name, model) in enumerate(space.models.items()):
        scored[name] = score_dataset(
            model, space.heldout, space.tokenizer, rows, space.recipe.batch_tokens,
            share_of(on_progress, number, len(space.models)),
        )  # fmt: skip
    first, *later = scored
    return {
        "n_targets": int(scored[first].nats_N.size),
        "n_dialogues": int(np.unique(scored[first].dialogue_D).size),
        "ngrams": ngrams,
        "models": {name: summarise(targets, space.bootstrap) for name, targets in scored.items()},
        "differences": [
            {
                "model": name,
                "against": first,
                "character": paired_difference(
                    scored[name], scored[first], scored[first].role_N == CHARACTER, space.bootstrap
                ),
            }
            for name in later
        ],
    }


def ranking_part(space: Workspace, on_progress: OnProgress) -> dict[str, Any] | None:
    """The true next reply among distractors."""
    section = space.recipe.ranking
    if section is None:
        return None
    return evaluate_ranking(
        space.models, space.tokenizer, space.contexts, section, space.recipe.seed, space.recipe.batch_tokens,
        space.bootstrap, on_progress,
    )  # fmt: skip


def engagement_part(space: Workspace, on_progress: OnProgress) -> dict[str, Any] | None:
    """The scorer on held-out turns."""
    section = space.recipe.engagement
    if section is None:
        return None
    assert space.scorer is not None
    message_id = space.tokenizer.message_id
    train = training_turns(space.train, message_id, section.training_rows)
    rows = spread_rows(space.heldout.n_rows, section.heldout_rows)
    turns, logit_N = score_turns(space.scorer, space.heldout, message_id, rows, space.recipe.batch_tokens, on_progress)
    return summarise_scorer(turns, logit_N, train, space.bootstrap)


def quality_part(space: Workspace, on_progress: OnProgress) -> dict[str, Any]:
    """Draw every model's replies, then compare what they are like; later parts judge the same replies."""
    contexts = space.reply_contexts
    for number, (name, model) in enumerate(space.models.items()):
        space.replies[name] = sample_replies(
            model, space.tokenizer, contexts, space.sampling,
            on_progress=share_of(on_progress, number, len(space.models)),
        )  # fmt: skip
    space.replies[HUMAN] = human_replies(contexts)
    return {"n_contexts": len(contexts), "systems": summarise_quality(contexts, space.replies, space.bootstrap)}


def preference_part(space: Workspace, on_progress: OnProgress) -> dict[str, Any] | None:
    """The scorer's verdict on the replies of one model against another's, and the drift between the two."""
    section, batch_tokens = space.recipe.preference, space.recipe.batch_tokens
    if section is None:
        return None
    assert space.scorer is not None
    contexts, replies, scores = space.reply_contexts, space.replies, space.reply_scores
    n_steps = len(replies) + 2
    for number, name in enumerate(replies):
        shown = share_of(on_progress, number, n_steps)
        scores[name] = score_replies(space.scorer, contexts, replies[name], batch_tokens, shown)
    model, against = section.model, section.against
    drifts = {
        key: drift(
            space.models[model], space.models[against], contexts, replies[source], batch_tokens, space.bootstrap,
            share_of(on_progress, len(replies) + number, n_steps),
        )
        for number, (key, source) in enumerate((("on_model", model), ("on_against", against)))
    }  # fmt: skip
    sampling = space.recipe.replies
    unbiased = sampling.temperature == 1 and sampling.top_p >= 1 and sampling.top_k == 0
    verdict = summarise_preference(
        scores[model],
        scores[against],
        scores[HUMAN],
        replies[model],
        replies[against],
        dialogues_of(contexts),
        space.bootstrap,
    )
    return {"model": model, "against": against, **verdict, "drift": {**drifts, "is_kl": unbiased}}


def user_sensitivity_part(space: Workspace, on_progress: OnProgress) -> dict[str, Any] | None:
    """Does a changed message change the next token?"""
    section = space.recipe.user_sensitivity
    if section is None:
        return None
    contexts = space.contexts[: section.n_contexts]
    figures = evaluate_user_sensitivity(
        space.models, space.tokenizer, contexts, space.recipe.seed, space.recipe.batch_tokens, space.bootstrap,
        on_progress,
    )  # fmt: skip
    return {"n_contexts": len(contexts), "models": figures}


PARTS: dict[str, Part[Workspace]] = {
    "perplexity": perplexity_part,
    "ranking": ranking_part,
    "engagement": engagement_part,
    "quality": quality_part,
    "preference": preference_part,
    "user_sensitivity": user_sensitivity_part,
}


def sample_conversations(space: Workspace) -> list[dict[str, Any]]:
    """The first contexts with every system's reply and the scorer's probability of it."""
    shown = []
    for number, context in enumerate(space.reply_contexts[: space.recipe.replies.shown]):
        replies = []
        for system in (HUMAN, *space.models):
            reply = space.replies[system][number]
            scores = space.reply_scores.get(system)
            probability = None if scores is None else float(sigmoid(np.asarray(scores[number])))
            replies.append(
                {"system": system, "text": reply.text, "finished": reply.finished, "probability": probability}
            )
        messages = [{"speaker": m.speaker, "text": m.text} for m in context.messages]
        n_earlier = context.turn - 1 - len(messages)
        shown.append({"character": context.character, "n_earlier": n_earlier, "context": messages, "replies": replies})
    return shown


def evaluate(space: Workspace, console: Console) -> dict[str, Any]:
    """Run every part with a progress line each; the report's content."""
    results, seconds = run_parts(PARTS, space, console)
    return {**_described(space), **results, "seconds": seconds, "samples": sample_conversations(space)}


def _described(space: Workspace) -> dict[str, Any]:
    recipe = space.recipe

    def described(path: str, n_parameters: int) -> dict[str, Any]:
        return {
            "run_dir": path,
            "n_parameters": n_parameters,
            "key_figure": (read_done(path) or {}).get("key_figure", ""),
        }

    curves = {**recipe.models} | ({} if recipe.scorer is None else {"scorer": recipe.scorer})
    scorer = None
    if recipe.scorer is not None and space.scorer is not None:
        scorer = described(recipe.scorer, space.scorer[0].config.n_parameters)
    return {
        "title": recipe.title,
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "seed": recipe.seed,
        "confidence_level": recipe.bootstrap.confidence_level,
        "bootstrap": recipe.bootstrap.model_dump(),
        "sampling": recipe.replies.model_dump(),
        "models": {n: described(recipe.models[n], model.config.n_parameters) for n, model in space.models.items()},
        "scorer": scorer,
        "data": {"run_dir": recipe.data, "n_dialogues": space.n_dialogues, "fingerprint": space.heldout.fingerprint},
        "training_curves": training_curves(curves),
    }


def key_figure(report: dict[str, Any]) -> str:
    """One line of the figures that matter, for the pipeline's table; `report` as plain JSON values."""
    parts = []
    if report["perplexity"]:
        name, figures = next(iter(report["perplexity"]["models"].items()))
        parts.append(f"{name} {number_text(figures['loss']['value'])} nats")
    if report["ranking"]:
        name, figures = list(report["ranking"]["models"].items())[-1]
        parts.append(f"recall@1 {number_text(figures['mean_logprob']['recall_at_1']['value'])}")
    if report["engagement"]:
        auc = report["engagement"]["auc"]["value"]
        parts.append("AUC undefined (one class)" if auc is None else f"AUC {number_text(auc)}")
    if report["preference"]:
        rate = report["preference"]["win_rate"]
        parts.append(
            f"{report['preference']['model']} win {number_text(rate['value'], 1, True)} {interval_text(rate, 1, True)}"
        )
    return ", ".join(parts).strip() or "see report.html"


def run(recipe: EvalRecipe, console: Console) -> None:
    """Evaluate into recipe.run_dir, or say that it is done already."""
    started = time.monotonic()
    with prepare_run_directory(recipe.run_dir, recipe, recipe.inputs()) as state:
        if state is RunState.FINISHED:
            console.print(f"{recipe.run_dir} is finished: {(read_done(recipe.run_dir) or {}).get('key_figure')}")
            return
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        report = to_json(evaluate(open_workspace(recipe, console), console))
        paths = write_report(recipe.run_dir, report)
        figure = key_figure(report)
        finish_run(
            recipe.run_dir, recipe, recipe.inputs(), figure, time.monotonic() - started,
            by_size=("report.json", "report.html", "plots"),
        )  # fmt: skip
    console.print(f"[bold]{figure}[/]", highlight=False)
    console.print(f"report: {paths['html'].resolve()}", highlight=False, soft_wrap=True)


def print_plan(recipe: EvalRecipe, console: Console) -> None:
    """What a run would evaluate, and which of its inputs are there."""
    console.print(dump_recipe(recipe), highlight=False, markup=False)
    print_inputs(recipe.inputs(), console)
    console.print(f"parts: {', '.join(recipe.parts())}", highlight=False)
    console.print(f"report: {Path(recipe.run_dir) / 'report.html'}", highlight=False)


def main() -> int:
    """Entry point: 0 when the report is there, 2 for a problem the user can mend."""
    command = parse_command_line(EvalRecipe, description=__doc__)
    recipe: EvalRecipe = command.recipe
    console = Console()
    action = print_plan if command.dry_run else run
    return run_entry(lambda: action(recipe, console), recipe.run_dir)


if __name__ == "__main__":
    sys.exit(main())
