"""Stages minhash_signatures, minhash_buckets and minhash_clusters: which rows of which units say almost what an earlier
row says. The signatures and the buckets are datatrove's; here they become items, so that the result depends on the
texts, their units and the settings alone."""

import hashlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.io import DataFolder
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets, MinhashDedupSignature
from datatrove.utils.hashing import HashConfig
from datatrove.utils.text import TextNormConfig, simplify_text
from datatrove.utils.word_tokenizers import WordTokenizer

from data.atomic_file import sync_path
from data.clean.near_duplicates import NearDuplicates, compared_text
from data.pipeline.executor import Stage
from data.pipeline.item_step import ItemStep
from data.pipeline.read import UnitResults
from data.pipeline.work_folder import WorkFolder

SIGNATURES, BUCKETS, CLUSTERS = "minhash_signatures", "minhash_buckets", "minhash_clusters"
TextsOfUnit = Callable[[int], Iterable[str]]
_PAIRS_AT_ONCE = 1 << 20
_BUFFER_BYTES = 64 << 20  # of signatures, over all the units that a bucket's task reads side by side
_OTHER_OPEN_FILES = 64
_PAIR = np.dtype([("first", [("unit", "<u4"), ("row", "<u4")]), ("second", [("unit", "<u4"), ("row", "<u4")])])
_MEMBER = np.dtype([("row", "<u4"), ("group", "<u8")])

# Scripts that put no spaces between words (Thai, Lao, Tibetan, Burmese, Khmer, kana, Han): a character is a word.
_UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_AS_ASCII = TextNormConfig(norm_unicode_diacritics=False)  # of ASCII the same, in half the time
_MERSENNE_PRIME = np.uint64((1 << 61) - 1)  # datatrove's permutations are modulo this
_SHINGLES_AT_ONCE = 256  # their products with all hash functions stay in the cache, and the memory of a long text flat


class UnicodeWords(WordTokenizer):
    """Words by spaces. datatrove's own splitters need spaCy or downloaded models; its MinHash has already put spaces in
    the place of punctuation when it asks for words."""

    def word_tokenize(self, text: str) -> list[str]:
        return (text if text.isascii() else _UNSPACED.sub(r" \g<0> ", text)).split()

    def sent_tokenize(self, text: str) -> list[str]:
        raise NotImplementedError("MinHash asks for words alone")

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        raise NotImplementedError("MinHash asks for words alone")


def minhash_config(settings: NearDuplicates) -> MinhashConfig:
    """The recipe's section as datatrove's settings (64-bit hashes; case, punctuation, accents and digits ignored)."""
    return MinhashConfig(
        n_grams=settings.n_grams,
        num_buckets=settings.buckets,
        hashes_per_bucket=settings.hashes_per_bucket,
        seed=settings.seed,
        hash_config=HashConfig(precision=64, hash_fc="sha1"),  # sha1 is not called; xxhash would have to be below 4
    )


class DialogueSignature(MinhashDedupSignature):
    """datatrove's signatures of the same words and the same hash functions, computed over arrays: over twice as fast,
    and in memory that does not grow with the longest text."""

    def __init__(self, folder: Path, config: MinhashConfig) -> None:
        super().__init__(str(folder), config, language=UnicodeWords())

    def get_shingles(self, text: str) -> np.ndarray:
        """The 64-bit hash of every `n_grams` words in a row, shape (n, 1)."""
        text = simplify_text(text, _AS_ASCII if text.isascii() else self.config.norm_config)
        words = np.array([_word_hash(word) for word in self.word_tokenizer.word_tokenize(text)], dtype=np.uint64)
        n = max(0, len(words) - self.config.n_grams + 1)
        hashes = np.zeros(n, dtype=np.uint64)
        for i in range(self.config.n_grams):
            hashes *= np.uint64(0x9E3779B97F4A7C15)
            hashes += words[i : i + n]
        hashes ^= hashes >> np.uint64(32)  # mixed, for the permutations are linear too
        hashes *= np.uint64(0xD6E8FEB86659FD93)
        return (hashes ^ (hashes >> np.uint64(32))).reshape(-1, 1)

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        """For each bucket the minima over the shingles under its hash functions."""
        factors, offsets = self.parameters
        smallest = np.full(self.num_hashes, _MERSENNE_PRIME)
        for start in range(0, len(shingles), _SHINGLES_AT_ONCE):
            permuted = shingles[start : start + _SHINGLES_AT_ONCE] * factors
            permuted += offsets
            permuted %= _MERSENNE_PRIME
            np.minimum(smallest, permuted.min(axis=0), out=smallest)
        return [bucket.tolist() for bucket in np.split(smallest, self.config.num_buckets)]


@lru_cache(maxsize=1 << 17)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


class SignUnits(ItemStep):
    """An item is a unit: the signatures of its rows, a sorted file for each bucket."""

    stage = SIGNATURES

    def __init__(self, work: WorkFolder, texts_of_unit: TextsOfUnit, n_units: int, settings: NearDuplicates) -> None:
        super().__init__(work)
        self.texts_of_unit, self.n_units, self.settings = texts_of_unit, n_units, settings

    def n_items(self) -> int:
        return self.n_units

    def do(self, number: int, folder: Path) -> None:
        rows = (Document(text, str(row)) for row, text in enumerate(self.texts_of_unit(number)))
        DialogueSignature(folder, minhash_config(self.settings)).run(rows, number)
        for file in folder.glob("*/*"):
            sync_path(file)


class SortBuckets(ItemStep):
    """An item is a bucket: the pairs of rows, of all units, whose signatures in it are equal."""

    stage = BUCKETS
    counted = "buckets"

    def __init__(self, work: WorkFolder, n_units: int, settings: NearDuplicates) -> None:
        super().__init__(work)
        self.n_units, self.settings = n_units, settings

    def n_items(self) -> int:
        return self.settings.buckets

    def do(self, number: int, folder: Path) -> None:
        _allow_open_files(self.n_units + _OTHER_OPEN_FILES)
        record_bytes = 8 * self.settings.hashes_per_bucket + 4
        lines = max(8, min(4_096, _BUFFER_BYTES // (self.n_units * record_bytes + 1)))
        signatures = _Signatures(self.work.path / SIGNATURES, self.n_units)
        buckets = MinhashDedupBuckets(
            signatures, str(folder), config=minhash_config(self.settings), lines_to_buffer=lines
        )
        buckets.run(None, number, self.settings.buckets)


class _Signatures(DataFolder):
    """The files of a bucket, which lie in the folders of the units."""

    def __init__(self, path: Path, n_units: int) -> None:
        super().__init__(str(path))
        self.n_units = n_units

    def list_files(self, subdirectory: str = "", *_: object, **__: object) -> list[str]:
        return [f"{unit:06d}/{subdirectory}/{unit:05d}.minhash.sig" for unit in range(self.n_units)]


class KeepFirst(ItemStep):
    """One item. Row by row in the order of the units, a row that shares a bucket's signature with a row that is kept is
    left out.

    datatrove's own last step keeps one row of each connected cluster, not the first, and holds all of them in memory.
    In a chain a ~ b ~ c that leaves out c, which may be unlike a; here everything that is left out was found similar to
    something that is kept, and no two that are kept were found similar. The memory is a byte for each group of equal
    signatures.
    """

    stage = CLUSTERS
    counted = "step"

    def __init__(self, work: WorkFolder, n_units: int, settings: NearDuplicates) -> None:
        super().__init__(work)
        self.n_units, self.settings = n_units, settings

    def n_items(self) -> int:
        return 1

    def do(self, number: int, folder: Path) -> None:
        members = folder / "members"
        members.mkdir()
        n_groups = 0
        for bucket in range(self.settings.buckets):
            for pairs in sorted(self.result(BUCKETS, bucket).glob("*.dups")):
                n_groups = _write_members(pairs, members, n_groups)
        claimed = np.zeros(n_groups, dtype=bool)
        for unit in range(self.n_units):
            np.save(_dropped_file(folder, unit), _dropped_of_unit(_members_file(members, unit), claimed))
        shutil.rmtree(members)


def minhash_stages(
    work: WorkFolder, texts_of_unit: TextsOfUnit, n_units: int, settings: NearDuplicates, n_tasks: int
) -> list[Stage]:
    """The stages in order; `texts_of_unit(unit)` gives the text of every row of a unit, and is sent to other processes.
    When they are done, `dropped_rows` has the result."""
    return [
        Stage(SIGNATURES, [SignUnits(work, texts_of_unit, n_units, settings)], n_tasks),
        Stage(BUCKETS, [SortBuckets(work, n_units, settings)], n_tasks),
        Stage(CLUSTERS, [KeepFirst(work, n_units, settings)], 1),
    ]


def texts_read(work: WorkFolder) -> TextsOfUnit:
    """The compared texts of the units as stage read has left them."""
    return partial(_texts_of_unit, work)


def _texts_of_unit(work: WorkFolder, unit: int) -> Iterator[str]:
    return map(compared_text, UnitResults(work, unit).read_dialogues())


def dropped_rows(work: WorkFolder, n_units: int) -> Iterator[np.ndarray]:
    """For each unit in order the rows to leave out, int64, ascending."""
    for unit in range(n_units):
        yield np.load(_dropped_file(work.item(CLUSTERS, 0), unit), allow_pickle=False)


def _write_members(pairs: Path, members: Path, n_groups: int) -> int:
    """Append (row, group) to the file of each unit; returns the number of groups so far.

    A bucket's pairs link the rows of equal signature one after the other: (a, b), (b, c) is one group, and a pair that
    does not begin where the one before ended begins the next.
    """
    last = None
    for chunk in _chunks(pairs):
        begins = np.ones(len(chunk), dtype=bool)
        begins[1:] = chunk["first"][1:] != chunk["second"][:-1]
        begins[0] = last is None or chunk["first"][0] != last
        last = chunk["second"][-1]
        group = n_groups - 1 + np.cumsum(begins)
        n_groups = int(group[-1]) + 1
        rows = np.concatenate([chunk["first"][begins], chunk["second"]])
        groups = np.concatenate([group[begins], group])
        order = np.argsort(rows["unit"], kind="stable")
        units, starts = np.unique(rows["unit"][order], return_index=True)
        for unit, part in zip(units, np.split(order, starts[1:]), strict=True):
            records = np.empty(len(part), dtype=_MEMBER)
            records["row"], records["group"] = rows["row"][part], groups[part]
            with open(_members_file(members, int(unit)), "ab") as file:
                file.write(records.tobytes())
    return n_groups


def _chunks(pairs: Path) -> Iterator[np.ndarray]:
    with open(pairs, "rb") as file:
        while len(chunk := np.fromfile(file, dtype=_PAIR, count=_PAIRS_AT_ONCE)):
            yield chunk


def _dropped_of_unit(members: Path, claimed: np.ndarray) -> np.ndarray:
    """The rows of a unit that share a group with a kept row; the groups of the others are claimed."""
    records = np.fromfile(members, dtype=_MEMBER) if members.exists() else np.empty(0, dtype=_MEMBER)
    records = records[np.argsort(records["row"], kind="stable")]
    starts = np.flatnonzero(np.diff(records["row"], prepend=-1))
    edges, groups = [*starts.tolist(), len(records)], records["group"].tolist()
    is_claimed = claimed.data  # (a row has a few groups: array operations on them take seven times as long)
    dropped = []
    for row, (first, end) in zip(records["row"][starts].tolist(), pairwise(edges), strict=True):
        of_row = groups[first:end]
        if any(map(is_claimed.__getitem__, of_row)):
            dropped.append(row)
        else:
            for group in of_row:
                is_claimed[group] = True
    return np.array(dropped, dtype=np.int64)


def _dropped_file(folder: Path, unit: int) -> Path:
    return folder / f"{unit:06d}.npy"


def _members_file(members: Path, unit: int) -> Path:
    return members / f"{unit:05d}"


def _allow_open_files(needed: int) -> None:
    """A bucket's task reads the signatures of all units side by side."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise OSError(
            f"near duplicates: {needed:,} files must be open at once, and the system allows {hard:,} (ulimit -Hn); "
            "raise the limit, or join small files or raise unit_bytes, so that there are fewer units"
        )
    if soft != resource.RLIM_INFINITY and needed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
