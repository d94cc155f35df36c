"""Tests of eval/parts/ranking.py."""

from typing import Literal

import numpy as np
import pytest

from data.format.dialogue import Dialogue
from data.format.tokenizer import DialogueTokenizer
from eval.context import ReplyContext, select_contexts
from eval.parts.ranking import (
    SCORES,
    RankingTask,
    build_tasks,
    candidate_scores,
    chance_figures,
    empty_prompts,
    length_only_scores,
    rank_figures,
)
from eval.scoring import reply_logprobs
from eval.statistics import Bootstrap
from model.transformer import Transformer

BOOTSTRAP = Bootstrap(n_resamples=50)


@pytest.fixture(scope="module")
def contexts(dialogues: list[Dialogue], tokenizer: DialogueTokenizer) -> list[ReplyContext]:
    return select_contexts(dialogues, tokenizer, 30, seed=0, max_prompt_tokens=60)


def tasks_of(
    contexts: list[ReplyContext], tokenizer: DialogueTokenizer, kind: Literal["length_matched", "random"], seed: int = 0
) -> list[RankingTask]:
    return build_tasks(contexts[:10], contexts, empty_prompts(tokenizer, contexts), 4, kind, seed)


@pytest.mark.parametrize("kind", ["length_matched", "random"])
def test_truth_comes_first_and_no_distractor_equals_it(
    contexts: list[ReplyContext], tokenizer: DialogueTokenizer, kind: Literal["length_matched", "random"]
) -> None:
    tasks = tasks_of(contexts, tokenizer, kind)
    for context, task in zip(contexts, tasks, strict=False):
        assert task.candidates[0] == context.human_tokens
        assert len(set(task.candidates)) == 5
    assert tasks == tasks_of(contexts, tokenizer, kind)
    assert tasks != tasks_of(contexts, tokenizer, kind, seed=1)


def test_length_matched_distractors_are_the_closest(contexts: list[ReplyContext], tokenizer: DialogueTokenizer) -> None:
    gaps = {
        kind: np.mean(
            [abs(len(c) - len(t.candidates[0])) for t in tasks_of(contexts, tokenizer, kind) for c in t.candidates]
        )
        for kind in ("length_matched", "random")
    }
    assert gaps["length_matched"] < gaps["random"]


def test_too_few_replies_is_an_error(contexts: list[ReplyContext], tokenizer: DialogueTokenizer) -> None:
    with pytest.raises(ValueError, match=r"ranking\.n_distractors"):
        build_tasks(contexts, contexts, empty_prompts(tokenizer, contexts), 1000, "random", 0)


def test_figures_of_known_ranks() -> None:
    scores = [np.array([3.0, 1, 2]), np.array([1.0, 2, 0]), np.array([0.0, 1, 2]), np.array([1.0, 1, 0])]
    figures = rank_figures(scores, BOOTSTRAP, np.arange(4))
    # Ranks 1, 2, 3, and a tie between 1 and 2 that counts as its expectation.
    assert figures["recall_at_1"].value == pytest.approx((1 + 0 + 0 + 0.5) / 4)
    assert figures["mrr"].value == pytest.approx((1 + 1 / 2 + 1 / 3 + 3 / 4) / 4)


def test_the_gain_from_context_is_the_mean_less_the_mean_without_context(
    contexts: list[ReplyContext], tokenizer: DialogueTokenizer, models: dict[str, Transformer]
) -> None:
    tasks = tasks_of(contexts, tokenizer, "random")[:3]
    scores = candidate_scores(models["sft"], tasks, 500)
    for number, task in enumerate(tasks):
        for key, prompt in (("mean_logprob", task.prompt), ("without", task.empty_prompt)):
            logprobs = reply_logprobs(models["sft"], [(prompt, reply) for reply in task.candidates], 500)
            means = np.array([values.mean() for values in logprobs])
            found = scores["mean_logprob"][number] - (scores["context_gain"][number] if key == "without" else 0)
            np.testing.assert_allclose(found, means, atol=1e-5)


def test_chance_is_what_random_scores_give() -> None:
    rng = np.random.default_rng(0)
    figures = rank_figures(list(rng.normal(size=(4000, 10))), BOOTSTRAP, np.arange(4000))
    assert figures["recall_at_1"].value == pytest.approx(chance_figures(10)["recall_at_1"], abs=0.02)
    assert figures["mrr"].value == pytest.approx(chance_figures(10)["mrr"], abs=0.02)
    constant = rank_figures([np.zeros(10)] * 3, BOOTSTRAP, np.arange(3))
    assert constant["recall_at_1"].value == pytest.approx(0.1)
    assert constant["mrr"].value == pytest.approx(chance_figures(10)["mrr"])
    assert constant["recall_at_1"].value == pytest.approx(chance_figures(10)["recall_at_1"])


def test_length_only_scores() -> None:
    task = RankingTask("d", (1,), (1,), ((5, 4), (5, 6, 4), (4,)), 0)
    assert length_only_scores([task], -1)[0].argmax() == 2 and length_only_scores([task], 1)[0].argmax() == 1


def test_summed_score_is_mean_times_length(
    contexts: list[ReplyContext], tokenizer: DialogueTokenizer, models: dict[str, Transformer]
) -> None:
    tasks = tasks_of(contexts, tokenizer, "random")[:4]
    scores = candidate_scores(models["sft"], tasks, batch_tokens=500)
    assert set(scores) == set(SCORES) and all(len(values) == 4 for values in scores.values())
    for task, mean, total in zip(tasks, scores["mean_logprob"], scores["sum_logprob"], strict=True):
        np.testing.assert_allclose(mean * [len(c) for c in task.candidates], total, rtol=1e-6)
