"""Stage pack: pack groups of documents into rows of shards. Groups have a limited size, which limits memory."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data.packed.packing import EncodedCorpus, best_fit
from data.packed.shards import packed_rows, write_group
from data.pipeline.item_step import ItemStep
from data.pipeline.select import SIDES
from data.pipeline.tokenize import encoded_unit, figures_of
from data.pipeline.tokenizer_stage import made_tokenizer
from data.pipeline.work_folder import WorkFolder
from recipes.files import write_json

PACK = "pack"
_GROUP_FILE = "group.json"


@dataclass(frozen=True, slots=True)
class Group:
    """Documents of a side that are packed together: those whose first token is in a range of the side's tokens."""

    side: str
    first: int
    end: int


def groups_of(n_tokens: dict[str, int], pack_tokens: int) -> list[Group]:
    """The groups of each side, of about `pack_tokens` tokens each."""
    groups = []
    for side, total in n_tokens.items():
        n_groups = max(1, round(total / pack_tokens))
        edges = [number * total // n_groups for number in range(n_groups + 1)]
        groups += [Group(side, first, end) for first, end in pairwise(edges)]
    return groups


class TokenCounts:
    """The number of tokens of each side of each unit."""

    def __init__(self, work: WorkFolder, n_units: int) -> None:
        figures = [figures_of(work, unit) for unit in range(n_units)]
        self._edges = {side: np.cumsum([0, *(unit[side].n_tokens for unit in figures)]) for side in SIDES}

    def groups(self, pack_tokens: int) -> list[Group]:
        """The groups of the run; they depend only on the tokens."""
        return groups_of({side: int(edges[-1]) for side, edges in self._edges.items()}, pack_tokens)

    def units_of(self, group: Group) -> Iterator[tuple[int, int]]:
        """The units that overlap a group's range, with the position of their first token in the side."""
        edges = self._edges[group.side]
        for unit in np.flatnonzero((edges[:-1] < group.end) & (edges[1:] > group.first)).tolist():
            yield unit, int(edges[unit])


class PackGroups(ItemStep):
    """Items are groups."""

    stage = PACK
    counted = "groups"

    def __init__(self, work: WorkFolder, n_units: int, row_length: int, rows_per_shard: int, pack_tokens: int) -> None:
        super().__init__(work)
        self.n_units, self.row_length = n_units, row_length
        self.rows_per_shard, self.pack_tokens = rows_per_shard, pack_tokens

    @cached_property
    def counts(self) -> TokenCounts:
        """Cached for each task."""
        return TokenCounts(self.work, self.n_units)

    def n_items(self) -> int:
        return len(self.counts.groups(self.pack_tokens))

    def do(self, number: int, folder: Path) -> None:
        counts = self.counts
        group = counts.groups(self.pack_tokens)[number]
        vocab_size = made_tokenizer(self.work).vocab_size
        corpus = EncodedCorpus.join(
            [EncodedCorpus.of([], vocab_size)]
            + [
                _documents_from(encoded_unit(self.work, unit, group.side, vocab_size), begin, group)
                for unit, begin in counts.units_of(group)
            ]
        )
        rows = packed_rows(corpus, best_fit(corpus.lengths, self.row_length), self.row_length)
        written = write_group(
            folder, rows, row_length=self.row_length, vocab_size=vocab_size, rows_per_shard=self.rows_per_shard
        )
        assert written["n_tokens"] == len(corpus.tokens), "packing lost tokens"
        write_json(folder / _GROUP_FILE, {"side": group.side, **written})


def _documents_from(corpus: EncodedCorpus, begin: int, group: Group) -> EncodedCorpus:
    """The documents of a unit that begin in the group's range; the unit's tokens begin at `begin`."""
    starts = begin + np.cumsum(corpus.lengths, dtype=np.int64) - corpus.lengths
    first, end = np.searchsorted(starts, [group.first, group.end]).tolist()
    return corpus.of_span(first, end)


def packed_groups(work: WorkFolder, side: str) -> list[tuple[Path, dict[str, Any]]]:
    """The folders of a side's groups in order, with the result of `write_group` for each."""
    found = []
    for number in range(work.n_done(PACK)):
        folder = work.item(PACK, number)
        group = json.loads((folder / _GROUP_FILE).read_text(encoding="utf-8"))
        if group.pop("side") == side:
            found.append((folder, group))
    return found
