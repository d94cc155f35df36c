"""Packing of encoded dialogues into rows of one length: long ones are cut at message boundaries, then best fit."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from data.dialogue import NO_LABEL, EncodedDialogue


@dataclass(frozen=True, slots=True)
class Document:
    """A dialogue, or a piece of one, that fits in a row: tokens int64, trained uint8, label int8, all of length n."""

    tokens: np.ndarray
    trained: np.ndarray
    label: np.ndarray


@dataclass(frozen=True, slots=True)
class EncodedCorpus:
    """Documents one after the other: `tokens`, `trained` and `label` of length n_tokens, `lengths` of n_documents."""

    tokens: np.ndarray
    trained: np.ndarray
    label: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, documents: Iterable[Document], vocab_size: int) -> "EncodedCorpus":
        """Concatenate documents; tokens become uint16, or uint32 above 65,536 pieces."""
        kept = list(documents)
        dtype = token_dtype(vocab_size)
        return cls(
            np.concatenate([d.tokens for d in kept]).astype(dtype) if kept else np.zeros(0, dtype),
            np.concatenate([d.trained for d in kept]) if kept else np.zeros(0, np.uint8),
            np.concatenate([d.label for d in kept]) if kept else np.zeros(0, np.int8),
            np.array([len(d.tokens) for d in kept], dtype=np.int32),
        )

    @classmethod
    def join(cls, parts: Sequence["EncodedCorpus"]) -> "EncodedCorpus":
        """The documents of all parts in order (at least one part)."""
        return cls(*(np.concatenate([getattr(p, name) for p in parts]) for name in cls.__slots__))

    def of_documents(self, is_kept: np.ndarray) -> "EncodedCorpus":
        """Some of the documents (a mask), in the same order."""
        if is_kept.all():
            return self
        token_is_kept = np.repeat(is_kept, self.lengths)
        return EncodedCorpus(
            self.tokens[token_is_kept],
            self.trained[token_is_kept],
            self.label[token_is_kept],
            self.lengths[is_kept],
        )

    def of_span(self, first: int, end: int) -> "EncodedCorpus":
        """The documents from `first` up to `end`, without copying."""
        edges = np.append(0, np.cumsum(self.lengths, dtype=np.int64))
        tokens = slice(int(edges[first]), int(edges[end]))
        return EncodedCorpus(self.tokens[tokens], self.trained[tokens], self.label[tokens], self.lengths[first:end])


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """The smallest type on disk that holds every id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def cut(encoded: EncodedDialogue, row_length: int) -> list[Document]:
    """The dialogue as documents of at most `row_length` tokens, each of which starts with `<bos>`.

    A dialogue that fits stays whole. A longer one is cut between messages; only a message that alone exceeds a row is
    cut inside its text, and its next piece repeats `<|message|>speaker:` (untrained) so that its writer stays known.
    """
    assert row_length >= 4, "a row holds at least <bos>, <|message|>, one token and <|end|>"
    n = len(encoded.tokens)
    if n <= row_length:
        return [Document(encoded.tokens, encoded.trained, encoded.label)]
    edges = np.append(encoded.message_starts, n)
    pieces: list[Document] = []
    start = 0  # message number
    while start < len(edges) - 1:
        end = int(np.searchsorted(edges, edges[start] + row_length - 1, side="right")) - 1
        if end > start:
            pieces.append(_piece(encoded, [(int(edges[start]), int(edges[end]), True)]))
            start = end
        else:
            pieces += _cut_message(encoded, start, int(edges[start]), int(edges[start + 1]), row_length)
            start += 1
    return pieces


def _cut_message(encoded: EncodedDialogue, number: int, first: int, end: int, row_length: int) -> list[Document]:
    header_end = int(encoded.text_starts[number])
    if header_end - first > (row_length - 1) // 2:
        header_end = first  # a name longer than half a row is not worth repeating
    position = first + row_length - 1
    pieces = [_piece(encoded, [(first, position, True)])]
    room = row_length - 1 - (header_end - first)
    while position < end:
        stop = min(position + room, end)
        pieces.append(_piece(encoded, [(first, header_end, False), (position, stop, True)]))
        position = stop
    return pieces


def _piece(encoded: EncodedDialogue, spans: list[tuple[int, int, bool]]) -> Document:
    """`<bos>` and the spans (first, end, supervised?) of the dialogue."""
    tokens, trained, label = [encoded.tokens[:1]], [encoded.trained[:1]], [encoded.label[:1]]
    for first, end, supervised in spans:
        tokens.append(encoded.tokens[first:end])
        trained.append(encoded.trained[first:end] if supervised else np.zeros(end - first, np.uint8))
        label.append(encoded.label[first:end] if supervised else np.full(end - first, NO_LABEL, np.int8))
    return Document(np.concatenate(tokens), np.concatenate(trained), np.concatenate(label))


def best_fit(lengths: Sequence[int] | np.ndarray, row_length: int) -> list[list[int]]:
    """Rows of document numbers, by best fit decreasing: each document, longest first, goes to the fullest row that
    still has room. Depends on the lengths and their order alone."""
    lengths = np.asarray(lengths, dtype=np.int64)
    assert lengths.size == 0 or (lengths.min() > 0 and lengths.max() <= row_length), "cut documents before packing"
    rows: list[list[int]] = []
    rows_with_room: list[list[int]] = [[] for _ in range(row_length + 1)]
    rooms = 0  # bit r is set when some row has exactly r tokens of room
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
