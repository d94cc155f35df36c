"""Tests of eval/parts/preference.py."""

from typing import Any

import numpy as np
import pytest

from data.format.dialogue import Dialogue
from data.format.tokenizer import DialogueTokenizer
from eval.context import Reply, ReplyContext, dialogues_of, human_replies, select_contexts
from eval.parts.preference import drift, length_bias, score_replies, summarize_preference, win_rate, win_values
from eval.scoring import reply_logprobs
from eval.shared_participants import SharedParticipants
from eval.statistics import Bootstrap
from model.scalar_head import ScalarHead
from model.transformer import Transformer
from tests.eval.estimates import excludes

BOOTSTRAP = Bootstrap(n_resamples=200)


def test_wins_ties_and_losses() -> None:
    assert win_values(np.array([1.0, 0, 2]), np.array([0.0, 0, 3])).tolist() == [1, 0.5, 0]


def test_win_rate_of_a_clear_winner_and_of_nobody() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=150)
    better = win_rate(base + rng.normal(0.5, 1, 150), base, np.arange(150), BOOTSTRAP)
    assert excludes(better["win_rate"], 0.5) and better["tests"]["sign_p"] < 0.01
    assert better["probability_gain"].low > 0
    nobody = win_rate(base + rng.normal(0, 1, 150), base, np.arange(150), BOOTSTRAP)
    assert not excludes(nobody["win_rate"], 0.5) and nobody["tests"]["sign_p"] > 0.05
    # With n fair coins the detectable effect is (1.96 + 0.84) / (2 sqrt(n)).
    assert nobody["minimum_detectable_win_rate"] == pytest.approx(0.5 + 2.8 / 2 / np.sqrt(150), abs=0.01)


def test_people_in_several_dialogues_raise_the_detectable_win_rate() -> None:
    people = SharedParticipants([[number // 6] for number in range(60)])
    score_N, zero = np.where(np.arange(60) // 6 % 3 > 0, 1.0, -1.0), np.zeros(60)
    plain = win_rate(score_N, zero, np.arange(60), BOOTSTRAP)
    linked = win_rate(score_N, zero, np.arange(60), Bootstrap(n_resamples=200, people=people))
    factor = np.sqrt(linked["win_rate"].variance_factor)
    assert factor > 1.5
    effects = [figures["minimum_detectable_win_rate"] - 0.5 for figures in (plain, linked)]
    assert effects[1] == pytest.approx(min(0.5, effects[0] * factor))


def test_a_win_that_is_all_length_is_exposed() -> None:
    rng = np.random.default_rng(1)
    length, other_length = rng.integers(5, 20, 400).astype(float), rng.integers(4, 14, 400).astype(float)
    figures = length_bias(length, other_length, length, other_length, np.arange(400), BOOTSTRAP)
    assert figures["longer_reply_wins"].value == 1.0 and 0.98 < figures["longer_reply_wins"].low < 1
    assert figures["length_difference"].low > 2
    same = length_bias(rng.normal(size=400), rng.normal(size=400), length, other_length, np.arange(400), BOOTSTRAP)
    assert not excludes(same["longer_reply_wins"], 0.5) and not excludes(same["win_rate_length_matched"], 0.5)
    assert 0 < same["win_rate_length_matched"].n < 400


def test_summary_flags_a_win_that_is_too_good() -> None:
    replies = [Reply("a", (7, 4), True)] * 40
    others = [Reply("b", (8, 9, 4), True)] * 39 + [Reply("a", (7, 4), True)]
    score, zero = np.linspace(0.1, 2, 40), np.zeros(40)
    figures = summarize_preference(score, zero, zero + 1, replies, others, np.arange(40), BOOTSTRAP)
    assert figures["over_optimisation_suspected"] and figures["identical_replies"] == 1
    against_human = [figures[key].value for key in ("win_rate_against_human", "other_win_rate_against_human")]
    assert against_human == [np.mean(score > 1), 0]
    fair = summarize_preference(np.resize([1.0, -1.0], 40), zero, zero, replies, others, np.arange(40), BOOTSTRAP)
    assert not fair["over_optimisation_suspected"] and fair["win_rate"].value == 0.5


def test_a_point_above_the_threshold_is_no_verdict() -> None:
    """70% of 20 wins: the interval holds 65%."""
    replies, zero = [Reply("a", (7, 4), True)] * 20, np.zeros(20)
    score = np.array([1.0] * 14 + [-1.0] * 6)
    figures = summarize_preference(score, zero, zero, replies, replies, np.arange(20), BOOTSTRAP)
    assert figures["win_rate"].value == 0.7 and not figures["over_optimisation_suspected"]


def drift_between(
    first: Transformer, second: Transformer, contexts: list[ReplyContext], replies: list[Reply]
) -> dict[str, Any]:
    items = [(context.prompt, reply.tokens) for context, reply in zip(contexts, replies, strict=True)]
    own, other = (reply_logprobs(model, items, 500) for model in (first, second))
    return drift(own, other, replies, dialogues_of(contexts), BOOTSTRAP)


def test_drift_is_zero_for_the_same_model_and_positive_between_two(
    dialogues: list[Dialogue], tokenizer: DialogueTokenizer, models: dict[str, Transformer]
) -> None:
    contexts = select_contexts(dialogues, tokenizer, 6, seed=0, max_prompt_tokens=60)
    replies = human_replies(contexts)
    assert drift_between(models["sft"], models["sft"], contexts, replies)["nats_per_reply"].value == 0
    there = drift_between(models["dpo"], models["sft"], contexts, replies)
    back = drift_between(models["sft"], models["dpo"], contexts, replies)
    assert there["nats_per_reply"].value == pytest.approx(-back["nats_per_reply"].value) != 0


def test_the_closing_token_of_a_cut_reply_is_no_sample(
    dialogues: list[Dialogue], tokenizer: DialogueTokenizer, models: dict[str, Transformer]
) -> None:
    contexts = select_contexts(dialogues, tokenizer, 2, seed=0, max_prompt_tokens=60)
    whole = human_replies(contexts)
    cut = [Reply(r.text, r.tokens, False) for r in whole]
    figures = [drift_between(models["dpo"], models["sft"], contexts, some)["nats_per_token"] for some in (whole, cut)]
    assert figures[0].n == figures[1].n + 2


def test_scores_depend_on_the_reply(
    dialogues: list[Dialogue], tokenizer: DialogueTokenizer, scorer: tuple[Transformer, ScalarHead]
) -> None:
    contexts = select_contexts(dialogues, tokenizer, 4, seed=0, max_prompt_tokens=60)
    replies = human_replies(contexts)
    other = [Reply("x", (50, 51, tokenizer.end_id), True)] * 4
    assert not np.allclose(score_replies(scorer, contexts, replies, 500), score_replies(scorer, contexts, other, 500))
