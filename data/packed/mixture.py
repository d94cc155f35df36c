"""Several data directories mixed by token shares: `data: {kind: mixture, parts: [...]}`.

The order is a pure function of (seed, rows consumed) and needs no table: of the first t rows, floor(t * share) belong
to the first part, of the remaining t' rows floor(t' * share') to the second, and so on (Bresenham's line, part by
part). A part deviates from its share by at most one row for each part before it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from data.clean.stable_hash import stable_hash
from data.packed.packing import NO_DIALOGUE
from data.packed.sampler import DataPositionError, RowOrder, Rows
from data.packed.shards import PackedDataset, ShardError
from recipes.loader import Section
from recipes.run_identity import Location

_UNIT = 1 << 31
"""Shares are multiples of 1/_UNIT, so that products of position and share are exact in 64 bits."""
_MAX_PLACES = 1 << 32


class MixturePart(Section):
    """A directory of data.prepare and its weight."""

    path: Location
    # By tokens; the weights need not sum to one.
    weight: float = Field(gt=0, allow_inf_nan=False)


class MixtureData(Section):
    """Training data of several parts, each read epoch after epoch in its own order."""

    kind: Literal["mixture"]
    parts: Annotated[tuple[MixturePart, ...], Field(min_length=2)]

    @model_validator(mode="after")
    def _distinct(self) -> MixtureData:
        paths = [os.path.realpath(part.path) for part in self.parts]
        for part, path in zip(self.parts, paths, strict=True):
            if paths.count(path) > 1:
                raise ValueError(f"{part.path} is named twice; give it one weight")
        return self


class MixtureRows:
    """The rows of all parts, numbered consecutively. `shares` are of rows, computed from token weights."""

    def __init__(self, parts: Sequence[PackedDataset], weights: Sequence[float]):
        self.parts = tuple(parts)
        first = self.parts[0]
        for part in self.parts[1:]:
            for name in ("tokenizer_sha256", "row_length"):
                ours, theirs = first.manifest[name], part.manifest[name]
                if ours != theirs:
                    raise ShardError(
                        f"{first.directory} has {name} {ours}, {part.directory} {theirs}: prepare all parts of a "
                        "mixture with one tokenizer (tokenizer: {kind: file, path: ...}) and one row_length"
                    )
        for part in self.parts:
            if not part.n_rows:
                raise ShardError(f"{part.directory} holds no rows; leave it out of the mixture")
        self.row_length, self.vocab_size = first.row_length, first.vocab_size
        self._starts = np.cumsum([0] + [part.n_rows for part in self.parts])
        self._first_dialogues = np.cumsum([0] + [part.manifest["n_dialogues"] for part in self.parts])
        self.n_rows = int(self._starts[-1])
        # rows of a less densely packed part hold fewer tokens, so it needs more rows
        rows = [weight * part.n_rows / part.n_tokens for weight, part in zip(weights, self.parts, strict=True)]
        self.shares = tuple(share / sum(rows) for share in rows)

    @property
    def fingerprint(self) -> str:
        """A hash of the parts and of their order."""
        described = [f"{part.fingerprint} {threshold}" for part, threshold in zip(self.parts, _thresholds(self.shares))]
        return hashlib.sha256("\n".join(["mixture", *described]).encode()).hexdigest()

    def gather(self, row_indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """As PackedDataset.gather, rows in the requested order; dialogues are numbered consecutively over the parts."""
        numbers = np.asarray(row_indices, dtype=np.int64)
        owners = np.searchsorted(self._starts, numbers, side="right") - 1
        runs = np.split(np.arange(len(numbers)), np.flatnonzero(np.diff(owners)) + 1) if len(numbers) else []
        parts = [self._gather_of(owners[run[0]], numbers[run]) for run in runs]
        if not parts:
            return self.parts[0].gather([])
        tokens_RL, loss_mask_RL, label_RL, documents = (np.concatenate(pieces) for pieces in zip(*parts, strict=True))
        return tokens_RL, loss_mask_RL, label_RL, documents

    def _gather_of(self, owner: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        *streams, documents = self.parts[owner].gather(numbers - self._starts[owner])
        documents["dialogue"][documents["dialogue"] != NO_DIALOGUE] += self._first_dialogues[owner]
        return streams[0], streams[1], streams[2], documents

    def spread(self, wanted: int) -> np.ndarray:
        """About `wanted` rows for evaluation: each part's share, at least one row, evenly spaced."""
        chosen = []
        for start, part, share in zip(self._starts, self.parts, self.shares):
            count = min(part.n_rows, max(1, round(share * wanted)))
            chosen.append(start + np.linspace(0, part.n_rows - 1, count).round().astype(np.int64))
        return np.concatenate(chosen)


class MixtureOrder:
    """The row order of a mixture. As in RowOrder, the only state is cached permutations."""

    def __init__(self, n_rows: Sequence[int], shares: Sequence[float], seed: int) -> None:
        self.seed = seed
        self._starts = np.cumsum([0, *n_rows[:-1]])
        self._thresholds = _thresholds(shares)
        seeds = [stable_hash("mixture", seed, number) >> 1 for number in range(len(n_rows))]
        self._orders = [RowOrder(n, part_seed) for n, part_seed in zip(n_rows, seeds, strict=True)]

    @classmethod
    def of(cls, rows: MixtureRows, seed: int) -> MixtureOrder:
        """The order of a mixture's rows."""
        return cls([part.n_rows for part in rows.parts], rows.shares, seed)

    def rows(self, start: int, count: int) -> np.ndarray:
        """Row numbers (int64) at positions [start, start + count) of the infinite order."""
        owners = self.parts(start, count)
        found = np.empty(count, np.int64)
        for number, (first, order) in enumerate(zip(self.counts(start), self._orders, strict=True)):
            places = np.flatnonzero(owners == number)
            found[places] = self._starts[number] + order.rows(first, len(places))
        return found

    def parts(self, start: int, count: int) -> np.ndarray:
        """The part (int64) of each of these positions."""
        if start + count > _MAX_PLACES:
            raise DataPositionError(f"a mixture has an order for {_MAX_PLACES:,} rows; use longer rows")
        owners = np.full(count, len(self._thresholds) - 1)
        left, places = np.arange(count), np.arange(start, start + count, dtype=np.uint64)
        for number, threshold in enumerate(self._thresholds[:-1]):
            before, after = (_taken(places + np.uint64(i), threshold) for i in (0, 1))
            is_ours = after > before
            owners[left[is_ours]] = number
            left, places = left[~is_ours], (places - before)[~is_ours]
        return owners

    def counts(self, n_places: int) -> list[int]:
        """The number of the first `n_places` positions that belong to each part."""
        counts = []
        for threshold in self._thresholds[:-1]:
            counts.append(int(_taken(np.uint64(n_places), threshold)))
            n_places -= counts[-1]
        return [*counts, n_places]

    def epoch(self, n_places: int) -> int:
        """How many times every row of every part has been seen."""
        return min(count // order.n_rows for count, order in zip(self.counts(n_places), self._orders, strict=True))


def _taken(places: np.ndarray | np.uint64, threshold: int) -> np.ndarray | np.uint64:
    return (places * np.uint64(threshold)) // np.uint64(_UNIT)


def _thresholds(shares: Sequence[float]) -> list[int]:
    """Each part's share of what the parts before it leave, in units; the last part takes the rest."""
    thresholds, left = [], 1.0
    for share in shares[:-1]:
        thresholds.append(min(_UNIT, round(share / left * _UNIT)))
        left -= share
    return [*thresholds, _UNIT]


def training_order(rows: Rows, seed: int) -> RowOrder | MixtureOrder:
    """The order of training rows."""
    return MixtureOrder.of(rows, seed) if isinstance(rows, MixtureRows) else RowOrder(rows.n_rows, seed)


def open_mixture(data: MixtureData, side: str, verify: Literal["hashes", "sizes"] = "hashes") -> MixtureRows:
    """One side (train, heldout) of all parts. Raises ShardError naming a part that is missing or does not match."""
    parts = [PackedDataset(Path(part.path) / side, verify) for part in data.parts]
    return MixtureRows(parts, [part.weight for part in data.parts])
