"""Rows of random tokens in documents of random lengths, for speed measurements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from data.clean.stable_hash import stable_hash
from data.format.dialogue import NO_LABEL
from data.packed.packing import DOCUMENT
from recipes.loader import Section

_FIRST_TEXT_ID = 8
"""lower ids are control tokens"""


class SyntheticData(Section):
    """A token source without files: `data: {kind: synthetic, ...}` in place of a directory."""

    kind: Literal["synthetic"]
    row_length: Annotated[int, Field(ge=16)]
    median_document_length: PositiveInt | None
    """Log-normal document lengths with this median and sigma 1; null: one document per row."""
    n_rows: PositiveInt = 100_000
    seed: NonNegativeInt = 0


class SyntheticRows:
    """The rows of a SyntheticData: a pure function of their numbers, so that a resumed run sees the same rows."""

    def __init__(self, settings: SyntheticData, vocab_size: int):
        self._settings, self.vocab_size = settings, vocab_size
        self.n_rows, self.row_length = settings.n_rows, settings.row_length
        self.fingerprint = f"{stable_hash(settings.model_dump_json()):016x}"

    def gather(self, row_indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """tokens_RL int64, loss_mask_RL uint8 (ones), label_RL int8 (none), and documents, as shards give them; a row
        is one dialogue."""
        rows = [self._row(int(number)) for number in row_indices]
        tokens_RL = np.stack([tokens_L for tokens_L, _ in rows])
        documents = np.concatenate([np.zeros(len(lengths), DOCUMENT) for _, lengths in rows])
        documents["length"] = np.concatenate([lengths for _, lengths in rows])
        documents["dialogue"] = np.repeat(np.asarray(row_indices), [len(lengths) for _, lengths in rows])
        return tokens_RL, np.ones(tokens_RL.shape, np.uint8), np.full(tokens_RL.shape, NO_LABEL, np.int8), documents

    def _row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.Generator(np.random.Philox(key=[self._settings.seed, number]))
        tokens_L = rng.integers(_FIRST_TEXT_ID, self.vocab_size, self.row_length)
        lengths, left, median = [], self.row_length, self._settings.median_document_length
        while left:
            length = left if median is None else min(left, max(8, int(median * rng.lognormal())))
            lengths.append(length)
            left -= length
        return tokens_L, np.array(lengths, np.int32)
