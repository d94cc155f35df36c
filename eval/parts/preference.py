"""Compare two models' replies by the reward model (the scorer), with signs of over-optimization.

Preference training maximizes this score, so a win shows that training worked, not that people prefer the replies.
Length bias, drift from the reference model and a win rate that is too high indicate over-optimization.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.context import Reply, ReplyContext
from eval.scoring import OnProgress, score_conversations, sigmoid, silent
from eval.statistics import Bootstrap, minimum_detectable_effect
from model.scalar_head import ScalarHead
from model.transformer import Transformer
from recipes.loader import Section

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

# Meta's CharacterFlywheel (arXiv 2603.01973): reward-model wins above 65% went with losses in live tests.
OVER_OPTIMISATION_WIN_RATE = 0.65


class PreferenceSection(Section):
    """The replies of `model` are compared with those of `against`."""

    model: str
    against: str


def win_values(score_N: FloatArray, other_N: FloatArray) -> FloatArray:
    """1 for a win, 0 for a loss, one half for a tie."""
    return np.asarray(0.5 + 0.5 * np.sign(score_N - other_N))


def win_rate(score_N: FloatArray, other_N: FloatArray, dialogue_N: IntArray, bootstrap: Bootstrap) -> dict[str, Any]:
    """Win rate with interval, exact sign and Wilcoxon tests, and the minimum detectable win rate."""
    wins_N = win_values(score_N, other_N)
    rate = bootstrap.share(wins_N, dialogue_N)
    smallest = minimum_detectable_effect(wins_N, variance_factor=rate.variance_factor)
    return {
        "win_rate": rate,
        "tests": asdict(bootstrap.paired_tests(score_N - other_N, dialogue_N)),
        "minimum_detectable_win_rate": _above_half(smallest),
        "probability_gain": bootstrap.mean(sigmoid(score_N) - sigmoid(other_N), dialogue_N),
    }


def _above_half(effect: float | None) -> float | None:
    return None if effect is None else min(1.0, 0.5 + effect)


def length_bias(
    score_N: FloatArray,
    other_N: FloatArray,
    length_N: FloatArray,
    other_length_N: FloatArray,
    dialogue_N: IntArray,
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """Length difference in tokens, how often the longer reply wins, and the win rate in pairs of similar length (at
    most 2 tokens or 10% apart)."""
    difference_N = length_N - other_length_N
    matched_N = np.abs(difference_N) <= np.maximum(2, 0.1 * np.maximum(length_N, other_length_N))
    unequal_N = difference_N != 0
    longer_wins_N = win_values(score_N, other_N)
    longer_wins_N = np.where(difference_N > 0, longer_wins_N, 1 - longer_wins_N)
    return {
        "length_difference": bootstrap.mean(difference_N, dialogue_N),
        "longer_reply_wins": bootstrap.share(longer_wins_N[unequal_N], dialogue_N[unequal_N]),
        "win_rate_length_matched": bootstrap.share(win_values(score_N, other_N)[matched_N], dialogue_N[matched_N]),
    }


def drift(
    own: Sequence[FloatArray],
    other: Sequence[FloatArray],
    replies: Sequence[Reply],
    dialogue_N: IntArray,
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """The log-probability of replies under a model minus that under another model, in nats a reply and a token.

    `own` and `other`: log-probabilities of each reply's tokens under the two models (`reply_logprobs`). On replies
    sampled from the first model with unmodified probabilities, the mean estimates KL(first || other).
    """
    # the <|end|> of a reply that was cut at the token limit was not sampled
    n_sampled = [len(reply.tokens) - (0 if reply.finished else 1) for reply in replies]
    difference_N = np.array([float((a[:n] - b[:n]).sum()) for a, b, n in zip(own, other, n_sampled, strict=True)])
    return {
        "nats_per_reply": bootstrap.mean(difference_N, dialogue_N),
        "nats_per_token": bootstrap.ratio(difference_N, np.array(n_sampled, dtype=np.float64), dialogue_N),
    }


def score_replies(
    scorer: tuple[Transformer, ScalarHead],
    contexts: Sequence[ReplyContext],
    replies: Sequence[Reply],
    batch_tokens: int,
    on_progress: OnProgress = silent,
) -> FloatArray:
    """The scorer's logit for each reply in its context."""
    conversations = [[*c.prompt, *r.tokens] for c, r in zip(contexts, replies, strict=True)]
    return score_conversations(scorer, conversations, batch_tokens, on_progress)


def summarize_preference(
    score_N: FloatArray,
    other_N: FloatArray,
    human_N: FloatArray,
    replies: Sequence[Reply],
    other_replies: Sequence[Reply],
    dialogue_N: IntArray,
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """All figures that need only scores and lengths; the caller adds `drift`, which needs the models."""
    length_N, other_length_N = (
        np.array([len(r.tokens) for r in some], dtype=np.float64) for some in (replies, other_replies)
    )
    result = win_rate(score_N, other_N, dialogue_N, bootstrap)
    rate = result["win_rate"]
    return {
        "n_contexts": len(score_N),
        "identical_replies": sum(a.tokens == b.tokens for a, b in zip(replies, other_replies, strict=True)),
        **result,
        **length_bias(score_N, other_N, length_N, other_length_N, dialogue_N, bootstrap),
        "win_rate_against_human": bootstrap.share(win_values(score_N, human_N), dialogue_N),
        "other_win_rate_against_human": bootstrap.share(win_values(other_N, human_N), dialogue_N),
        "over_optimisation_suspected": rate.low is not None and rate.low > OVER_OPTIMISATION_WIN_RATE,
        "over_optimisation_threshold": OVER_OPTIMISATION_WIN_RATE,
    }
