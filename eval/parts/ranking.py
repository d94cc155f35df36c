"""Next-reply ranking: the rank of the real reply among distractors by the model's log-probability."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveInt

from data.format.encode import encode_prompt
from data.format.tokenizer import DialogueTokenizer
from eval.context import ReplyContext
from eval.scoring import OnProgress, reply_logprobs, share_of, silent
from eval.statistics import Bootstrap
from model.transformer import Transformer
from recipes.loader import Section

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

# Scores of a candidate: mean or summed log-probability, or the mean minus the mean without context.
SCORES = ("mean_logprob", "sum_logprob", "context_gain")


class RankingSection(Section):
    """`distractors`: replies of other held-out dialogues, random ones or those closest in length."""

    n_contexts: PositiveInt
    n_distractors: PositiveInt
    distractors: Literal["length_matched", "random"]


@dataclass(frozen=True)
class RankingTask:
    """A context with its candidate replies (token ids); the true reply is candidate 0."""

    dialogue_id: str
    prompt: tuple[int, ...]
    empty_prompt: tuple[int, ...]  # the same character without messages
    candidates: tuple[tuple[int, ...], ...]
    dialogue: int  # the context's, by number


def build_tasks(
    contexts: Sequence[ReplyContext],
    pool: Sequence[ReplyContext],
    empty_prompts: Mapping[str, tuple[int, ...]],
    n_distractors: int,
    distractors: Literal["length_matched", "random"],
    seed: int,
) -> list[RankingTask]:
    """Give each context `n_distractors` replies of other dialogues of `pool` that differ from its own.

    Raises ValueError if `pool` has too few different replies.
    """
    rng = np.random.default_rng(seed)
    tasks = []
    for context in contexts:
        truth = context.human_tokens
        others = {c.human_tokens for c in pool if c.dialogue_id != context.dialogue_id} - {truth}
        if len(others) < n_distractors:
            raise ValueError(
                f"ranking: {n_distractors} distractors asked for, but the {len(pool)} held-out contexts have only "
                f"{len(others)} other replies; lower ranking.n_distractors or prepare more held-out dialogues"
            )
        ordered = sorted(others)
        drawn = [ordered[i] for i in rng.permutation(len(ordered))]
        if distractors == "length_matched":
            drawn.sort(key=lambda reply: abs(len(reply) - len(truth)))
        chosen = tuple(drawn[:n_distractors])
        empty = empty_prompts[context.character]
        tasks.append(RankingTask(context.dialogue_id, context.prompt, empty, (truth, *chosen), context.dialogue))
    return tasks


def candidate_scores(
    model: Transformer, tasks: Sequence[RankingTask], batch_tokens: int, on_progress: OnProgress = silent
) -> dict[str, list[FloatArray]]:
    """For each name in SCORES, one array of candidate scores a task."""
    with_context = [(task.prompt, reply) for task in tasks for reply in task.candidates]
    # without context a reply needs one pass, whatever the number of contexts with this candidate
    alone = sorted({(task.empty_prompt, reply) for task in tasks for reply in task.candidates})
    total = len(with_context) + len(alone)
    logprobs = reply_logprobs(model, with_context, batch_tokens, lambda done, _: on_progress(done, total))
    alone_logprobs = reply_logprobs(
        model, alone, batch_tokens, lambda done, _: on_progress(len(with_context) + done, total)
    )
    alone_mean = {item: float(values.mean()) for item, values in zip(alone, alone_logprobs, strict=True)}
    scores: dict[str, list[FloatArray]] = {name: [] for name in SCORES}
    position = 0
    for task in tasks:
        values = logprobs[position : position + len(task.candidates)]
        position += len(task.candidates)
        mean = np.array([v.mean() for v in values])
        scores["mean_logprob"].append(mean)
        scores["sum_logprob"].append(np.array([v.sum() for v in values]))
        without = np.array([alone_mean[(task.empty_prompt, reply)] for reply in task.candidates])
        scores["context_gain"].append(mean - without)
    return scores


def rank_figures(scores: Sequence[FloatArray], bootstrap: Bootstrap, dialogue_N: IntArray) -> dict[str, Any]:
    """Recall@1 and mean reciprocal rank of candidate 0, with ties in random order.

    `dialogue_N`: the dialogue of each task.
    """
    recall, reciprocal = [], []
    for values in scores:
        better = int((values[1:] > values[0]).sum())
        ties = int((values[1:] == values[0]).sum())
        recall.append(1 / (ties + 1) if better == 0 else 0.0)
        reciprocal.append(float(np.mean(1 / np.arange(better + 1, better + ties + 2))))
    return {"recall_at_1": bootstrap.share(recall, dialogue_N), "mrr": bootstrap.share(reciprocal, dialogue_N)}


def chance_figures(n_candidates: int) -> dict[str, float]:
    """Recall@1 and mean reciprocal rank of a random order."""
    return {"recall_at_1": 1 / n_candidates, "mrr": float(np.mean(1 / np.arange(1, n_candidates + 1)))}


def length_only_scores(tasks: Sequence[RankingTask], sign: int) -> list[FloatArray]:
    """Scores by length only: shortest first for sign -1, longest first for +1."""
    return [sign * np.array([len(reply) for reply in task.candidates], dtype=np.float64) for task in tasks]


def empty_prompts(tokenizer: DialogueTokenizer, contexts: Sequence[ReplyContext]) -> dict[str, tuple[int, ...]]:
    """The prompt of each character without messages."""
    return {c: tuple(encode_prompt(tokenizer, (), c)) for c in sorted({context.character for context in contexts})}


def evaluate_ranking(
    models: Mapping[str, Transformer],
    tokenizer: DialogueTokenizer,
    pool: Sequence[ReplyContext],
    section: RankingSection,
    seed: int,
    batch_tokens: int,
    bootstrap: Bootstrap,
    on_progress: OnProgress = silent,
) -> dict[str, Any]:
    """The ranking part of the report: figures of every model, chance and length-only baselines.

    The tasks are the first `section.n_contexts` contexts of `pool`; distractors come from all of `pool`.
    """
    contexts = pool[: section.n_contexts]
    prompts = empty_prompts(tokenizer, contexts)
    tasks = build_tasks(contexts, pool, prompts, section.n_distractors, section.distractors, seed)
    dialogue_N = np.array([task.dialogue for task in tasks], dtype=np.int64)
    figures: dict[str, dict[str, Any]] = {}
    for number, (name, model) in enumerate(models.items()):
        scores = candidate_scores(model, tasks, batch_tokens, share_of(on_progress, number, len(models)))
        figures[name] = {kind: rank_figures(values, bootstrap, dialogue_N) for kind, values in scores.items()}
    return {
        "n_contexts": len(tasks),
        "n_candidates": section.n_distractors + 1,
        "distractors": section.distractors,
        "chance": chance_figures(section.n_distractors + 1),
        "length_only": {
            "shortest_first": rank_figures(length_only_scores(tasks, -1), bootstrap, dialogue_N),
            "longest_first": rank_figures(length_only_scores(tasks, 1), bootstrap, dialogue_N),
        },
        "models": figures,
    }
