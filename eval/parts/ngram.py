"""Count models of the packed training tokens, scored on the same targets as the transformer: its baselines.

Unigram, add-one bigram and interpolated Kneser-Ney bigram (Kneser & Ney 1995; Chen & Goodman 1998, section 2.7), in
nats a token.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data.packed.batch import collate
from data.packed.shards import PackedDataset

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

ROWS_PER_CHUNK = 2048  # bounds memory: a chunk of 512-token rows is one million pairs


@dataclass(frozen=True)
class PairCounts:
    """Counts of token pairs (a, b) inside documents: sorted codes a * vocab_size + b, and their counts."""

    vocab_size: int
    codes_P: IntArray
    counts_P: IntArray

    @classmethod
    def from_pairs(cls, vocab_size: int, chunks: Iterator[tuple[IntArray, IntArray]]) -> "PairCounts":
        """Count chunks of (previous token, target) pairs; memory is proportional to the distinct pairs."""
        codes_P, counts_P = np.empty(0, np.int64), np.empty(0, np.int64)
        for previous_T, target_T in chunks:
            new_P, new_counts_P = np.unique(previous_T * vocab_size + target_T, return_counts=True)
            both_P = np.concatenate([codes_P, new_P])
            codes_P, place = np.unique(both_P, return_inverse=True)
            merged = np.zeros(codes_P.size, np.int64)
            np.add.at(merged, place, np.concatenate([counts_P, new_counts_P]))
            counts_P = merged
        return cls(vocab_size, codes_P, counts_P)

    @property
    def previous_P(self) -> IntArray:
        return self.codes_P // self.vocab_size

    @property
    def target_P(self) -> IntArray:
        return self.codes_P % self.vocab_size

    def lookup(self, previous_T: IntArray, target_T: IntArray) -> IntArray:
        """Count of each pair, 0 for unseen pairs."""
        asked_T = previous_T * self.vocab_size + target_T
        if self.codes_P.size == 0:
            return np.zeros(asked_T.size, np.int64)
        place_T = np.minimum(np.searchsorted(self.codes_P, asked_T), self.codes_P.size - 1)
        return np.where(self.codes_P[place_T] == asked_T, self.counts_P[place_T], 0)


class Unigram:
    """Add-one unigram: (count(b) + 1) / (tokens + vocab_size)."""

    def __init__(self, pairs: PairCounts) -> None:
        count_V = np.bincount(pairs.target_P, weights=pairs.counts_P, minlength=pairs.vocab_size)
        self.probability_V: FloatArray = (count_V + 1) / (count_V.sum() + pairs.vocab_size)

    def probabilities(self, previous_T: IntArray, target_T: IntArray) -> FloatArray:
        return np.asarray(self.probability_V[target_T])


class AddOneBigram:
    """Add-one bigram: (count(a, b) + 1) / (count(a) + vocab_size)."""

    def __init__(self, pairs: PairCounts) -> None:
        self.pairs = pairs
        self.count_V = np.bincount(pairs.previous_P, weights=pairs.counts_P, minlength=pairs.vocab_size)

    def probabilities(self, previous_T: IntArray, target_T: IntArray) -> FloatArray:
        seen_T = self.pairs.lookup(previous_T, target_T)
        return np.asarray((seen_T + 1) / (self.count_V[previous_T] + self.pairs.vocab_size))


class KneserNeyBigram:
    """Interpolated Kneser-Ney: max(count(a, b) - d, 0) / count(a) + d types(a, .) / count(a) * p_continuation(b).

    The continuation distribution (in how many contexts b was seen) is also discounted and interpolated with the
    uniform distribution, so every token has a positive probability.
    """

    def __init__(self, pairs: PairCounts) -> None:
        self.pairs = pairs
        n = pairs.vocab_size
        self.count_V = np.bincount(pairs.previous_P, weights=pairs.counts_P, minlength=n)
        self.types_V = np.bincount(pairs.previous_P, minlength=n).astype(np.float64)
        self.discount = _discount(pairs.counts_P)
        contexts_V = np.bincount(pairs.target_P, minlength=n).astype(np.float64)
        low = _discount(contexts_V[contexts_V > 0])
        reserved = low * np.count_nonzero(contexts_V) / max(contexts_V.sum(), 1)
        kept_V = np.maximum(contexts_V - low, 0) / max(contexts_V.sum(), 1)
        self.continuation_V: FloatArray = kept_V + (reserved if contexts_V.sum() else 1.0) / n

    def probabilities(self, previous_T: IntArray, target_T: IntArray) -> FloatArray:
        seen_T = np.maximum(self.pairs.lookup(previous_T, target_T) - self.discount, 0)
        total_T = self.count_V[previous_T]
        with np.errstate(invalid="ignore", divide="ignore"):
            kept_T = np.where(total_T > 0, seen_T / total_T, 0.0)
            # after an unseen token only the continuation distribution is used
            backed_off_T = np.where(total_T > 0, self.discount * self.types_V[previous_T] / total_T, 1.0)
        return np.asarray(kept_T + backed_off_T * self.continuation_V[target_T])


class CountModel(Protocol):
    """Probabilities of targets, each after one previous token."""

    def probabilities(self, previous_T: IntArray, target_T: IntArray) -> FloatArray: ...


NGRAM_MODELS: dict[str, Callable[[PairCounts], CountModel]] = {
    "unigram": Unigram,
    "bigram_add_one": AddOneBigram,
    "bigram_kneser_ney": KneserNeyBigram,
}


def _discount(counts: NDArray[np.int64] | FloatArray) -> float:
    """n1 / (n1 + 2 n2), the discount of Ney, Essen & Kneser 1994; 0.5 without singletons."""
    once, twice = int(np.count_nonzero(counts == 1)), int(np.count_nonzero(counts == 2))
    if once == 0:
        return 0.5
    return min(once / (once + 2 * twice), 0.99)  # 1 would remove all singletons


def counted_pairs(dataset: PackedDataset, rows: IntArray | None = None) -> Iterator[tuple[IntArray, IntArray]]:
    """(previous token, target) at the transformer's targets in these rows, or in all."""
    rows = np.arange(dataset.n_rows) if rows is None else rows
    for start in range(0, len(rows), ROWS_PER_CHUNK):
        batch = collate(dataset, rows[start : start + ROWS_PER_CHUNK])
        counted_T = batch.has_target_T.numpy()
        yield batch.tokens_T.numpy()[counted_T], batch.targets_T.numpy()[counted_T]


def ngram_losses(
    train_dataset: PackedDataset, heldout_dataset: PackedDataset, heldout_rows: int | IntArray | None = None
) -> dict[str, float]:
    """Held-out loss of each count model in nats a token.

    Counts are from all rows of `train_dataset`. `heldout_rows`: row numbers, a number of first rows, or None for all.
    """
    assert train_dataset.vocab_size == heldout_dataset.vocab_size
    if isinstance(heldout_rows, int):
        heldout_rows = np.arange(min(heldout_rows, heldout_dataset.n_rows))
    pairs = PairCounts.from_pairs(train_dataset.vocab_size, counted_pairs(train_dataset))
    models = {name: build(pairs) for name, build in NGRAM_MODELS.items()}
    nats = dict.fromkeys(models, 0.0)
    n_targets = 0
    for previous_T, target_T in counted_pairs(heldout_dataset, heldout_rows):
        n_targets += target_T.size
        for name, model in models.items():
            nats[name] -= float(np.log(model.probabilities(previous_T, target_T)).sum())
    assert n_targets, "the held-out rows have no target"
    return {name: total / n_targets for name, total in nats.items()}
