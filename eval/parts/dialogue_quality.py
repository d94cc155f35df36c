"""Diversity, repetition, copying, length and stop rate of replies of models and humans."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.context import Reply, ReplyContext, dialogues_of
from eval.statistics import NOT_NEGATIVE, Bootstrap, Estimate

WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")
N_SUBSAMPLES = 200


def words(text: str) -> list[str]:
    """Lower-case words and punctuation marks."""
    return WORD.findall(text.lower())


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of `n` tokens, in order."""
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def repeated_share(tokens: Sequence[str], n: int = 2) -> float:
    """Share of a reply's n-grams that occurred earlier in it; 0 without n-grams."""
    grams = ngrams(tokens, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def copied_share(reply: Sequence[str], context: Sequence[str], n: int = 3) -> float | None:
    """Share of a reply's n-grams that occur in its context; None for a reply shorter than `n`."""
    grams = ngrams(reply, n)
    if not grams:
        return None
    seen = set(ngrams(context, n))
    return sum(gram in seen for gram in grams) / len(grams)


def diversity(systems: dict[str, list[list[str]]], confidence_level: float, seed: int) -> dict[str, dict[str, Any]]:
    """Distinct-1/2/3 and word entropy (bits) of each system's replies, on the same number of n-grams.

    Distinct-n decreases with the sample size, so samples of every system have half as many n-grams as the smallest
    system, from `N_SUBSAMPLES` random orders of its replies. The value is the mean, the interval the quantiles.
    """
    figures: dict[str, dict[str, Any]] = {name: {} for name in systems}
    for n in (1, 2, 3):
        grams = {name: [ngrams(reply, n) for reply in replies] for name, replies in systems.items()}
        size = min(sum(map(len, replies)) for replies in grams.values()) // 2
        for name, replies in grams.items():
            if size == 0:
                note = f"a system has no {n}-grams"
                figures[name][f"distinct_{n}"] = Estimate(None, None, None, 0, 0, "none", confidence_level, note)
                continue
            samples = _half_samples(replies, size, seed)
            distinct = [len(set(sample)) / size for sample in samples]
            figures[name][f"distinct_{n}"] = _spread(distinct, size, len(replies), confidence_level)
            if n == 1:
                entropies = [_entropy_bits(sample) for sample in samples]
                figures[name]["word_entropy_bits"] = _spread(entropies, size, len(replies), confidence_level)
    return figures


def _half_samples(replies: list[list[tuple[str, ...]]], size: int, seed: int) -> list[list[tuple[str, ...]]]:
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(N_SUBSAMPLES):
        sample: list[tuple[str, ...]] = []
        for number in rng.permutation(len(replies)):
            sample += replies[number]
            if len(sample) >= size:
                break
        samples.append(sample[:size])
    return samples


def _entropy_bits(sample: Sequence[tuple[str, ...]]) -> float:
    counts = np.array(list(Counter(sample).values()), dtype=np.float64)
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def _spread(values: Sequence[float], n: int, n_replies: int, confidence_level: float) -> Estimate:
    tail = (1 - confidence_level) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return Estimate(
        float(np.mean(values)), float(low), float(high), n, n_replies, "spread of half samples", confidence_level
    )


def reply_figures(contexts: Sequence[ReplyContext], replies: Sequence[Reply], bootstrap: Bootstrap) -> dict[str, Any]:
    """Length, stop rate, repetition, copying and duplicates of one system's replies."""
    tokenized = [words(reply.text) for reply in replies]
    histories = [[w for m in context.messages for w in words(m.text)] for context in contexts]
    copied = [copied_share(reply, history) for reply, history in zip(tokenized, histories, strict=True)]
    seen = Counter(tuple(reply) for reply in tokenized)
    echoes = [
        bool(reply) and any(reply == words(m.text) for m in context.messages)
        for reply, context in zip(tokenized, contexts, strict=True)
    ]
    dialogue_N = dialogues_of(contexts)
    has_copied_N = np.array([share is not None for share in copied], dtype=bool)
    return {
        "length_words": bootstrap.mean([len(reply) for reply in tokenized], dialogue_N, NOT_NEGATIVE),
        "length_tokens": bootstrap.mean([len(reply.tokens) for reply in replies], dialogue_N, NOT_NEGATIVE),
        "stop_rate": bootstrap.proportion([reply.finished for reply in replies], dialogue_N),
        "empty_rate": bootstrap.proportion([not reply for reply in tokenized], dialogue_N),
        "repetition": bootstrap.share([repeated_share(reply) for reply in tokenized], dialogue_N),
        "copied_from_context": bootstrap.share(
            [share for share in copied if share is not None], dialogue_N[has_copied_N]
        ),
        "echo_rate": bootstrap.proportion(echoes, dialogue_N),
        "same_as_another_reply": bootstrap.proportion([seen[tuple(reply)] > 1 for reply in tokenized], dialogue_N),
        "lengths": [len(reply) for reply in tokenized],
        "commonest": [[" ".join(reply), count] for reply, count in seen.most_common(3) if count > 1],
    }


def summarize_quality(
    contexts: Sequence[ReplyContext], systems: dict[str, list[Reply]], bootstrap: Bootstrap
) -> dict[str, dict[str, Any]]:
    """Figures of every system (models and `human`) on the same contexts."""
    tokenized = {name: [words(reply.text) for reply in replies] for name, replies in systems.items()}
    diverse = diversity(tokenized, bootstrap.confidence_level, bootstrap.seed)
    return {name: reply_figures(contexts, replies, bootstrap) | diverse[name] for name, replies in systems.items()}
