"""Best-fit packing of documents (dialogues or pieces of them, data/packed/cut.py) into rows of equal length."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

DOCUMENT = np.dtype([("length", "<i4"), ("dialogue", "<i4"), ("first_message", "<i4"), ("n_repeated", "<i4")])
"""A document: its number of tokens; its dialogue, numbered from 0 within the side; the number of the message (from 0 in
the dialogue) of its first new token; and how many tokens at its start repeat an earlier document as context, without
loss or score."""
NO_DIALOGUE = -1
"""The dialogue number of a row's padding."""


@dataclass(frozen=True, slots=True)
class Document:
    """A dialogue or a piece of one that fits a row: tokens int64, loss_mask uint8, label int8, all of length n; the
    other fields as in DOCUMENT."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    label: np.ndarray
    dialogue: int = 0
    first_message: int = 0
    n_repeated: int = 0


@dataclass(frozen=True, slots=True)
class EncodedCorpus:
    """Concatenated documents: `tokens`, `loss_mask`, `label` of length n_tokens, and `documents` (DOCUMENT)."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    label: np.ndarray
    documents: np.ndarray

    @classmethod
    def of(cls, documents: Iterable[Document], vocab_size: int) -> "EncodedCorpus":
        """Concatenate documents; tokens become uint16, or uint32 above 65,536 pieces."""
        kept = list(documents)
        dtype = token_dtype(vocab_size)
        return cls(
            np.concatenate([d.tokens for d in kept]).astype(dtype) if kept else np.zeros(0, dtype),
            np.concatenate([d.loss_mask for d in kept]) if kept else np.zeros(0, np.uint8),
            np.concatenate([d.label for d in kept]) if kept else np.zeros(0, np.int8),
            np.array([(len(d.tokens), d.dialogue, d.first_message, d.n_repeated) for d in kept], DOCUMENT),
        )

    @classmethod
    def join(cls, parts: Sequence["EncodedCorpus"]) -> "EncodedCorpus":
        """The documents of all parts in order (at least one part)."""
        return cls(*(np.concatenate([getattr(p, name) for p in parts]) for name in cls.__slots__))

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each document, int32."""
        return np.asarray(self.documents["length"])

    def of_documents(self, is_kept: np.ndarray) -> "EncodedCorpus":
        """The documents of a mask, in the same order."""
        if is_kept.all():
            return self
        token_is_kept = np.repeat(is_kept, self.lengths)
        return EncodedCorpus(
            self.tokens[token_is_kept],
            self.loss_mask[token_is_kept],
            self.label[token_is_kept],
            self.documents[is_kept],
        )

    def of_span(self, first: int, end: int) -> "EncodedCorpus":
        """The documents from `first` up to `end`, without copying."""
        edges = np.append(0, np.cumsum(self.lengths, dtype=np.int64))
        tokens = slice(int(edges[first]), int(edges[end]))
        return EncodedCorpus(self.tokens[tokens], self.loss_mask[tokens], self.label[tokens], self.documents[first:end])


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """The smallest integer type for every id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def best_fit(lengths: Sequence[int] | np.ndarray, row_length: int) -> list[list[int]]:
    """Rows of document numbers by best-fit decreasing: each document, longest first, goes to the fullest row with
    enough room. Depends only on the lengths and their order."""
    lengths = np.asarray(lengths, dtype=np.int64)
    assert lengths.size == 0 or (lengths.min() > 0 and lengths.max() <= row_length), "cut documents before packing"
    rows: list[list[int]] = []
    rows_with_room: list[list[int]] = [[] for _ in range(row_length + 1)]
    rooms = 0  # bit r: some row has exactly r tokens of room
    for number in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[number])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = row_length, len(rows)
            rows.append([])
        rows[row].append(number)
        left = room - length
        if left:
            rows_with_room[left].append(row)
            rooms |= 1 << left
    return rows
