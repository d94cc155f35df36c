"""Evaluate the models of a pipeline; write report.html and report.json: `python -m eval.run recipes/demo/eval.yaml`."""

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from eval.context import dialogues_of, human_replies, sample_replies
from eval.figure import HUMAN
from eval.number_text import interval_text, number_text
from eval.parts.dialogue_quality import summarize_quality
from eval.parts.engagement import score_turns, summarize_scorer, training_turns
from eval.parts.ngram import ngram_losses
from eval.parts.perplexity import CHARACTER, paired_difference, score_dataset, summarize
from eval.parts.preference import drift, score_replies, summarize_preference
from eval.parts.ranking import evaluate_ranking
from eval.parts.section import Part, run_parts
from eval.parts.training_curve import training_curves
from eval.parts.user_sensitivity import evaluate_user_sensitivity
from eval.report import to_json, write_report
from eval.scoring import OnProgress, reply_logprobs, share_of, sigmoid, spread_rows
from eval.speed.decode import device_name
from eval.workspace import EvalRecipe, Workspace, open_workspace, print_inputs
from model.weights import load_config
from recipes.run_directory import read_done
from recipes.stage_command import Made, StageCommand, text_report


def perplexity_part(space: Workspace, on_progress: OnProgress) -> dict[str, Any] | None:
    """Held-out loss of count models and models; the difference of each later model to the first on the same targets."""
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
    is_character_N = scored[first].role_N == CHARACTER
    return {
        "n_targets": int(scored[first].nats_N.size),
        "n_dialogues": int(np.unique(scored[first].dialogue_D).size),
        "ngrams": ngrams,
        "models": {name: summarize(targets, space.bootstrap) for name, targets in scored.items()},
        "differences": [
            {
                "model": name,
                "against": first,
                "character": paired_difference(scored[name], scored[first], is_character_N, space.bootstrap),
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
    message_id = space.tokenizer.message_id
    train = training_turns(space.train, message_id, section.training_rows)
    rows = spread_rows(space.heldout.n_rows, section.heldout_rows)
    scorer, batch_tokens = space.models.scorer(), space.recipe.batch_tokens
    turns, logit_N = score_turns(scorer, space.heldout, message_id, rows, batch_tokens, on_progress)
    return summarize_scorer(turns, logit_N, train, space.bootstrap)


def quality_part(space: Workspace, on_progress: OnProgress) -> dict[str, Any]:
    """Sample every model's replies and describe them; later parts score the same replies."""
    contexts = space.reply_contexts
    for number, (name, model) in enumerate(space.models.items()):
        space.replies[name] = sample_replies(
            model, space.tokenizer, contexts, space.sampling,
            on_progress=share_of(on_progress, number, len(space.models)),
        )  # fmt: skip
    space.replies[HUMAN] = human_replies(contexts)
    return {"n_contexts": len(contexts), "systems": summarize_quality(contexts, space.replies, space.bootstrap)}


def preference_part(space: Workspace, on_progress: OnProgress) -> dict[str, Any] | None:
    """The scorer's preference between the replies of two models, and the drift between the two."""
    section, batch_tokens = space.recipe.preference, space.recipe.batch_tokens
    if section is None:
        return None
    contexts, replies, scores = space.reply_contexts, space.replies, space.reply_scores
    model, against = section.model, section.against
    n_steps = len(replies) + 4
    scorer = space.models.scorer()
    for number, name in enumerate(replies):
        shown = share_of(on_progress, number, n_steps)
        scores[name] = score_replies(scorer, contexts, replies[name], batch_tokens, shown)
    logprobs = {}
    sides = [(name, source) for name in (model, against) for source in (model, against)]  # each model is loaded once
    for number, (name, source) in enumerate(sides, start=len(replies)):
        items = [(context.prompt, reply.tokens) for context, reply in zip(contexts, replies[source], strict=True)]
        shown = share_of(on_progress, number, n_steps)
        logprobs[name, source] = reply_logprobs(space.models[name], items, batch_tokens, shown)
    dialogue_N = dialogues_of(contexts)
    drifts = {
        key: drift(logprobs[model, source], logprobs[against, source], replies[source], dialogue_N, space.bootstrap)
        for key, source in (("on_model", model), ("on_against", against))
    }
    sampling = space.recipe.replies
    is_kl = sampling.temperature == 1 and sampling.top_p >= 1 and sampling.top_k == 0
    figures = summarize_preference(
        scores[model], scores[against], scores[HUMAN], replies[model], replies[against], dialogue_N, space.bootstrap
    )
    return {"model": model, "against": against, **figures, "drift": {**drifts, "is_kl": is_kl}}


def user_sensitivity_part(space: Workspace, on_progress: OnProgress) -> dict[str, Any] | None:
    """How much the next-token distribution changes when a message is replaced."""
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
    """The first contexts with the replies of all systems and the scorer's probability for each."""
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
        shown.append({
            "character": context.character, "n_opening": context.n_opening, "n_earlier": n_earlier,
            "context": messages, "replies": replies,
        })  # fmt: skip
    return shown


def evaluate(recipe: EvalRecipe, console: Console) -> dict[str, Any]:
    """Run every part, with a progress bar each; the content of the report."""
    space = open_workspace(recipe, console)
    results, seconds = run_parts(PARTS, space, console)
    space.models.release()
    return {**_described(space), **results, "seconds": seconds, "samples": sample_conversations(space)}


def _described(space: Workspace) -> dict[str, Any]:
    recipe, device = space.recipe, space.models.device

    def described(path: str) -> dict[str, Any]:
        return {
            "run_dir": path,
            "n_parameters": load_config(Path(path) / "model").n_parameters,
            "key_figure": (read_done(path) or {}).get("key_figure", ""),
        }

    scorer = {} if recipe.scorer is None else {"scorer": recipe.scorer}
    return {
        "title": recipe.title,
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "seed": recipe.seed,
        "confidence_level": recipe.bootstrap.confidence_level,
        "bootstrap": recipe.bootstrap.model_dump(),
        "sampling": recipe.replies.model_dump(),
        "precision": f"{'float32' if device.type == 'cpu' else 'the dtype of their weights'}, {device_name(device)}",
        "models": {name: described(path) for name, path in recipe.models.items()},
        "scorer": described(recipe.scorer) if recipe.scorer else None,
        "data": {"run_dir": recipe.data, "n_dialogues": space.n_dialogues, "fingerprint": space.heldout.fingerprint},
        "training_curves": training_curves({**recipe.models, **scorer}),
    }


def key_figure(report: dict[str, Any]) -> str:
    """One line with the main figures, for the pipeline's table; `report` as plain JSON values."""
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


def make(recipe: EvalRecipe, console: Console) -> Made:
    """Evaluate, and write the report."""
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    report = to_json(evaluate(recipe, console))
    html, figure = write_report(Path(recipe.run_dir), report)["html"], key_figure(report)
    return Made(figure, text_report(f"{figure}\nreport: {html.resolve()}"))


def print_plan(recipe: EvalRecipe, console: Console) -> None:
    """Print which inputs exist, and what a run would do."""
    print_inputs(recipe.inputs(), console)
    console.print(f"parts: {', '.join(recipe.parts())}", highlight=False)
    console.print(f"report: {Path(recipe.run_dir) / 'report.html'}", highlight=False)


FILES = ("report.json", "report.html", "plots")
COMMAND = StageCommand(EvalRecipe, __doc__, make, print_plan, FILES, by_size=FILES)
main = COMMAND.main


if __name__ == "__main__":
    sys.exit(main())
