"""Bulk tokenization: every distinct word is encoded once, the rest is array arithmetic."""

import re
from collections.abc import Sequence
from itertools import chain

import numpy as np
import pyarrow as pa

from data.format.tokenizer import DialogueTokenizer

_SPACE = ord(" ")
_MAX_REMEMBERED = 1 << 18  # cached words,
_MAX_REMEMBERED_BYTES = 1 << 24  # and their total size; the cache is cleared when it is full


class BulkEncoder:
    """`tokenizer.encode` for many texts at once.

    In a vocabulary trained here, spaces are only at the beginning of a piece (or are the whole piece), so BPE never
    merges across the beginning of spaces: the ids of a text are those of its words, each with the preceding spaces.
    With other vocabularies, texts are encoded whole.
    """

    def __init__(self, tokenizer: DialogueTokenizer) -> None:
        self.tokenizer = tokenizer
        self._splits_at_spaces = not any(re.search("[^ ] ", piece.text) for piece in tokenizer.pieces())
        self._forget()

    def encode(self, texts_B: np.ndarray, n_bytes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`texts_B`: the concatenated texts in UTF-8, uint8; `n_bytes` of each text. Returns the concatenated token
        ids, int32, and the number of ids of each text."""
        text_ends = np.cumsum(n_bytes, dtype=np.int64)
        edges = self._word_edges(texts_B, text_ends)
        words = pa.Array.from_buffers(
            pa.binary(), len(edges) - 1, [None, pa.py_buffer(edges), pa.py_buffer(np.ascontiguousarray(texts_B))]
        ).dictionary_encode()
        numbers = self._numbers_of(words.dictionary.to_pylist())[words.indices.to_numpy(zero_copy_only=False)]
        n_tokens = self._n_ids[numbers]
        token_ends = np.cumsum(n_tokens, dtype=np.int64)
        places = np.repeat(self._starts[numbers] - (token_ends - n_tokens), n_tokens)
        places += np.arange(len(places))
        ends_by_word = np.concatenate([[0], token_ends])
        text_token_ends = ends_by_word[np.searchsorted(edges, text_ends)]
        return self._ids[places], np.diff(text_token_ends, prepend=0)

    def _word_edges(self, texts_B: np.ndarray, text_ends: np.ndarray) -> np.ndarray:
        """The start of every word and the end of the last, int32: at the edges of texts and at the first of several
        spaces."""
        is_edge = np.zeros(len(texts_B) + 1, bool)
        if self._splits_at_spaces and len(texts_B):
            is_space = texts_B == _SPACE
            is_edge[1:-1] = is_space[1:] & ~is_space[:-1]
        is_edge[0] = True
        is_edge[text_ends] = True
        return np.flatnonzero(is_edge).astype(np.int32)

    def _forget(self) -> None:
        self._number_of_word: dict[bytes, int] = {}
        self._n_bytes = 0
        # for each word number: the position of its ids, and how many there are
        self._ids, self._starts, self._n_ids = np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.int64)

    def _numbers_of(self, words: Sequence[bytes]) -> np.ndarray:
        """The numbers of distinct words, int64; new words are encoded and numbered."""
        known = self._number_of_word
        new = [word for word in words if word not in known]
        n_bytes = self._n_bytes + sum(map(len, new))
        if known and (len(known) + len(new) > _MAX_REMEMBERED or n_bytes > _MAX_REMEMBERED_BYTES):
            self._forget()
            return self._numbers_of(words)
        self._n_bytes = n_bytes
        encoded = self.tokenizer.encode_many([word.decode() for word in new])
        n_ids = np.fromiter(map(len, encoded), np.int64, len(encoded))
        starts = len(self._ids) + np.cumsum(n_ids) - n_ids
        known.update(zip(new, range(len(known), len(known) + len(new)), strict=True))
        self._ids = np.append(self._ids, np.fromiter(chain.from_iterable(encoded), np.int32, int(n_ids.sum())))
        self._starts, self._n_ids = np.append(self._starts, starts), np.append(self._n_ids, n_ids)
        return np.fromiter(map(known.__getitem__, words), np.int64, len(words))
