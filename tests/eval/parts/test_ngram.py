"""Tests of eval/parts/ngram.py: against plain Python over dictionaries, and as distributions that sum to one."""

import itertools
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.parts.ngram import NGRAM_MODELS, AddOneBigram, KneserNeyBigram, PairCounts, Unigram

VOCAB = 9
tokens = st.integers(0, VOCAB - 1)
pair_lists = st.lists(st.tuples(tokens, tokens), min_size=1, max_size=60)


def count(pairs: list[tuple[int, int]], chunk: int = 7) -> PairCounts:
    arrays = np.array(pairs, dtype=np.int64)
    chunks = [arrays[start : start + chunk] for start in range(0, len(pairs), chunk)]
    return PairCounts.from_pairs(VOCAB, ((c[:, 0], c[:, 1]) for c in chunks))


@settings(max_examples=40, deadline=None)
@given(pair_lists)
def test_pair_counts_equal_a_dictionary(pairs: list[tuple[int, int]]) -> None:
    counted, expected = count(pairs), Counter(pairs)
    assert counted.counts_P.sum() == len(pairs)
    for a in range(VOCAB):
        found = counted.lookup(np.full(VOCAB, a), np.arange(VOCAB))
        assert found.tolist() == [expected[(a, b)] for b in range(VOCAB)]


@settings(max_examples=40, deadline=None)
@given(pair_lists)
def test_probabilities_sum_to_one_in_every_context(pairs: list[tuple[int, int]]) -> None:
    counted = count(pairs)
    for build in NGRAM_MODELS.values():
        model = build(counted)
        for a in range(VOCAB):
            probabilities = model.probabilities(np.full(VOCAB, a), np.arange(VOCAB))
            assert probabilities.sum() == pytest.approx(1.0)
            assert (probabilities > 0).all()


def reference_discount(counts: list[int]) -> float:
    once, twice = counts.count(1), counts.count(2)
    return min(once / (once + 2 * twice), 0.99) if once else 0.5


def reference_kneser_ney(pairs: list[tuple[int, int]], a: int, b: int) -> float:
    """The textbook formula over dictionaries."""
    bigrams = Counter(pairs)
    contexts: dict[int, set[int]] = defaultdict(set)
    followers: dict[int, set[int]] = defaultdict(set)
    for x, y in bigrams:
        contexts[y].add(x)
        followers[x].add(y)
    types = len(bigrams)
    low = reference_discount([len(s) for s in contexts.values()])
    continuation = max(len(contexts[b]) - low, 0) / types
    continuation += low * sum(1 for s in contexts.values() if s) / types / VOCAB
    total = sum(n for (x, _), n in bigrams.items() if x == a)
    if total == 0:
        return continuation
    discount = reference_discount(list(bigrams.values()))
    return max(bigrams[(a, b)] - discount, 0) / total + discount * len(followers[a]) / total * continuation


@settings(max_examples=40, deadline=None)
@given(pair_lists)
def test_models_equal_the_plain_formulas(pairs: list[tuple[int, int]]) -> None:
    counted = count(pairs)
    bigrams = Counter(pairs)
    targets, firsts = Counter(b for _, b in pairs), Counter(a for a, _ in pairs)
    unigram, add_one, kneser_ney = Unigram(counted), AddOneBigram(counted), KneserNeyBigram(counted)
    everything = [(a, b) for a in range(VOCAB) for b in range(VOCAB)]
    previous, target = (np.array(column) for column in zip(*everything, strict=True))
    assert unigram.probabilities(previous, target) == pytest.approx(
        [(targets[b] + 1) / (len(pairs) + VOCAB) for _, b in everything]
    )
    assert add_one.probabilities(previous, target) == pytest.approx(
        [(bigrams[(a, b)] + 1) / (firsts[a] + VOCAB) for a, b in everything]
    )
    assert kneser_ney.probabilities(previous, target) == pytest.approx(
        [reference_kneser_ney(pairs, a, b) for a, b in everything]
    )


def test_kneser_ney_beats_add_one_on_sparse_pairs() -> None:
    rng = np.random.default_rng(0)
    follow = rng.integers(0, VOCAB, (VOCAB, 2))
    chain = [0]
    for _ in range(600):
        chain.append(int(follow[chain[-1], rng.integers(0, 2)]))
    pairs = list(itertools.pairwise(chain))
    counted = count(pairs[:120])
    previous, target = (np.array(column) for column in zip(*pairs[120:], strict=True))
    losses = {n: -np.log(build(counted).probabilities(previous, target)).mean() for n, build in NGRAM_MODELS.items()}
    assert losses["bigram_kneser_ney"] < losses["bigram_add_one"] < losses["unigram"]
