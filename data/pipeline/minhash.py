"""Stages minhash_signatures and minhash_clusters: find near-duplicates of earlier rows. Signatures are datatrove's; the
result depends only on the texts, their order and the settings."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
import xxhash
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
from datatrove.utils.hashing import HashConfig
from datatrove.utils.text import TextNormConfig, simplify_text
from datatrove.utils.word_tokenizers import WordTokenizer

from data.clean.near_duplicates import NearDuplicates, compared_text
from data.pipeline.executor import DataStage
from data.pipeline.item_step import ItemStep
from data.pipeline.read import UnitResults
from data.pipeline.work_folder import WorkFolder

SIGNATURES, CLUSTERS = "minhash_signatures", "minhash_clusters"
TextsOfUnit = Callable[[int], Iterable[str]]
_KEYS_FILE, _DROPPED_FILE = "keys.npy", "dropped.npy"
_NO_KEY = 0  # for a text without shingles

# Scripts without spaces between words (Thai, Lao, Tibetan, Burmese, Khmer, kana, Han): a character is a word.
_UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_AS_ASCII = TextNormConfig(norm_unicode_diacritics=False)  # the same for ASCII, twice as fast
_MERSENNE_PRIME = np.uint64((1 << 61) - 1)  # modulus of datatrove's permutations
_SHINGLES_AT_ONCE = 256  # keeps the products with all hash functions in the cache, and memory constant for long texts


class UnicodeWords(WordTokenizer):
    """Splits words at spaces. datatrove's own splitters need spaCy or downloaded models, and its MinHash has already
    replaced punctuation by spaces."""

    def word_tokenize(self, text: str) -> list[str]:
        return (text if text.isascii() else _UNSPACED.sub(r" \g<0> ", text)).split()

    def sent_tokenize(self, text: str) -> list[str]:
        raise NotImplementedError("MinHash asks for words alone")

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        raise NotImplementedError("MinHash asks for words alone")


def minhash_config(settings: NearDuplicates) -> MinhashConfig:
    """The recipe section as datatrove's settings (64-bit hashes; ignores case, punctuation, accents and digits)."""
    return MinhashConfig(
        n_grams=settings.n_grams,
        num_buckets=settings.buckets,
        hashes_per_bucket=settings.hashes_per_bucket,
        seed=settings.seed,
        hash_config=HashConfig(precision=64, hash_fc="sha1"),  # sha1 is not called; xxhash is limited to 32 bits
    )


class DialogueSignature(MinhashDedupSignature):
    """datatrove's signatures (same words, same hash functions) computed on arrays: over twice as fast, with memory
    independent of the text length."""

    def __init__(self, folder: Path, config: MinhashConfig) -> None:
        super().__init__(str(folder), config, language=UnicodeWords())

    def get_shingles(self, text: str) -> np.ndarray:
        """The 64-bit hash of every `n_grams` consecutive words, shape (n, 1)."""
        text = simplify_text(text, _AS_ASCII if text.isascii() else self.config.norm_config)
        words = np.array([_word_hash(word) for word in self.word_tokenizer.word_tokenize(text)], dtype=np.uint64)
        n = max(0, len(words) - self.config.n_grams + 1)
        hashes = np.zeros(n, dtype=np.uint64)
        for i in range(self.config.n_grams):
            hashes *= np.uint64(0x9E3779B97F4A7C15)
            hashes += words[i : i + n]
        hashes ^= hashes >> np.uint64(32)  # mixed, because the permutations are linear too
        hashes *= np.uint64(0xD6E8FEB86659FD93)
        return (hashes ^ (hashes >> np.uint64(32))).reshape(-1, 1)

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        """For each bucket, the minima over the shingles of its hash functions."""
        factors, offsets = self.parameters
        smallest = np.full(self.num_hashes, _MERSENNE_PRIME)
        for start in range(0, len(shingles), _SHINGLES_AT_ONCE):
            permuted = shingles[start : start + _SHINGLES_AT_ONCE] * factors
            permuted += offsets
            permuted %= _MERSENNE_PRIME
            np.minimum(smallest, permuted.min(axis=0), out=smallest)
        return [bucket.tolist() for bucket in np.split(smallest, self.config.num_buckets)]

    def keys(self, text: str) -> list[int]:
        """A 64-bit hash of the signature in each bucket; _NO_KEY for a text without shingles. The probability of a
        collision in a bucket of 100 million rows is 3e-4."""
        shingles = self.get_shingles(text)
        if not len(shingles):
            return [_NO_KEY] * self.config.num_buckets
        signature = np.array(self.get_signature(shingles), np.uint64)
        return [xxhash.xxh3_64_intdigest(bucket.tobytes()) or 1 for bucket in signature]


@lru_cache(maxsize=1 << 17)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


class SignUnits(ItemStep):
    """Items are units: a key for each row and bucket, equal for equal signatures."""

    stage = SIGNATURES

    def __init__(self, work: WorkFolder, texts_of_unit: TextsOfUnit, n_units: int, settings: NearDuplicates) -> None:
        super().__init__(work)
        self.texts_of_unit, self.n_units, self.settings = texts_of_unit, n_units, settings

    def n_items(self) -> int:
        return self.n_units

    def do(self, number: int, folder: Path) -> None:
        signature = DialogueSignature(folder, minhash_config(self.settings))
        keys = [signature.keys(text) for text in self.texts_of_unit(number)]
        np.save(folder / _KEYS_FILE, np.array(keys, np.uint64).reshape(-1, self.settings.buckets))


class KeepFirst(ItemStep):
    """One item: drop each row that shares a bucket's key with an earlier row that is kept.

    datatrove's last step keeps one row of each connected cluster, and not the first. In a chain a ~ b ~ c that drops c,
    which may be unlike a; here every dropped row is similar to a kept row, and no two kept rows were found similar.
    Uses about 40 bytes of memory per row, and 150 for each key that a row shares with another.
    """

    stage = CLUSTERS
    counted = "step"

    def __init__(self, work: WorkFolder, n_units: int, settings: NearDuplicates) -> None:
        super().__init__(work)
        self.n_units, self.settings = n_units, settings

    def do(self, number: int, folder: Path) -> None:
        units = [np.load(self.work.item(SIGNATURES, unit) / _KEYS_FILE, mmap_mode="r") for unit in range(self.n_units)]
        rows, groups, n_groups = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
        for bucket in range(self.settings.buckets):
            keys = np.concatenate([unit[:, bucket] for unit in units]) if units else np.zeros(0, np.uint64)
            _, group, size = np.unique(keys, return_inverse=True, return_counts=True)
            shared = np.flatnonzero((size[group] > 1) & (keys != _NO_KEY))
            rows.append(shared)
            groups.append(n_groups + group[shared])
            n_groups += len(size)
        is_dropped = np.zeros(sum(map(len, units)), bool)
        is_dropped[repeated_rows(np.concatenate(rows), np.concatenate(groups))] = True
        np.save(folder / _DROPPED_FILE, is_dropped)


def repeated_rows(rows: np.ndarray, groups: np.ndarray) -> list[int]:
    """`rows` and `groups` are pairs; the rows that share a group with an earlier kept row, ascending."""
    order = np.argsort(rows, kind="stable")
    claimed: set[int] = set()
    dropped = []
    for row, of_row in groupby(zip(rows[order].tolist(), groups[order].tolist(), strict=True), key=itemgetter(0)):
        own = {group for _, group in of_row}
        if claimed.isdisjoint(own):
            claimed |= own
        else:
            dropped.append(row)
    return dropped


def minhash_stages(
    work: WorkFolder, texts_of_unit: TextsOfUnit, n_units: int, settings: NearDuplicates, n_tasks: int
) -> list[DataStage]:
    """The stages in order; `texts_of_unit(unit)` yields the text of every row of a unit, and is pickled.
    `near_duplicates` returns the result."""
    return [
        DataStage(SIGNATURES, [SignUnits(work, texts_of_unit, n_units, settings)], n_tasks),
        DataStage(CLUSTERS, [KeepFirst(work, n_units, settings)], 1),
    ]


def texts_read(work: WorkFolder) -> TextsOfUnit:
    """The compared texts of units, from the results of stage read."""
    return partial(_texts_of_unit, work)


def _texts_of_unit(work: WorkFolder, unit: int) -> Iterator[str]:
    return map(compared_text, UnitResults(work, unit).read_dialogues())


def near_duplicates(work: WorkFolder) -> np.ndarray:
    """A mask of the rows to drop, over the concatenated rows of all units, bool."""
    found: np.ndarray = np.load(work.item(CLUSTERS, 0) / _DROPPED_FILE)
    return found
