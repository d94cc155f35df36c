"""Many texts to token ids at once: every distinct word is encoded once, and the rest is arithmetic on arrays."""

import re
from collections.abc import Sequence
from itertools import chain

import numpy as np
import pyarrow as pa

from data.tokenizer import DialogueTokenizer

_SPACE = ord(" ")
_MAX_REMEMBERED = 1 << 18  # words; more are forgotten and encoded again
_MAX_WORD_BYTES = 64  # a longer one is unlikely to come again


class BulkEncoder:
    """Gives the ids of `tokenizer.encode` for many texts together.

    A piece that holds a space begins with it (spaces alone are pieces too), so no merge of the BPE ever joins what
    stands before a space to that space: a text's ids are those of its words, each with the spaces before it. That
    is looked up in the vocabulary; with one that has other pieces, texts are encoded whole.
    """

    def __init__(self, tokenizer: DialogueTokenizer) -> None:
        self.tokenizer = tokenizer
        self._splits_at_spaces = not any(re.search("[^ ] ", piece.text) for piece in tokenizer.pieces())
        self._known: dict[bytes, list[int]] = {}

    def encode(self, texts_B: np.ndarray, n_bytes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`texts_B`: UTF-8 of all texts, one after the other, uint8; `n_bytes` of each text. Returns their token ids
        one after the other, int32, and the number of each text's."""
        text_ends = np.cumsum(n_bytes, dtype=np.int64)
        edges = self._word_edges(texts_B, text_ends)
        words = pa.Array.from_buffers(
            pa.binary(), len(edges) - 1, [None, pa.py_buffer(edges), pa.py_buffer(np.ascontiguousarray(texts_B))]
        ).dictionary_encode()
        ids, starts = self._ids_of(words.dictionary.to_pylist())
        numbers = words.indices.to_numpy(zero_copy_only=False)
        n_tokens = np.diff(starts)[numbers]
        token_ends = np.cumsum(n_tokens, dtype=np.int64)
        n_total = int(token_ends[-1]) if len(token_ends) else 0
        places = np.arange(n_total) + np.repeat(starts[numbers] - (token_ends - n_tokens), n_tokens)
        ends_by_word = np.concatenate([[0], token_ends])
        text_token_ends = ends_by_word[np.searchsorted(edges, text_ends)]
        return ids[places], np.diff(text_token_ends, prepend=0)

    def _word_edges(self, texts_B: np.ndarray, text_ends: np.ndarray) -> np.ndarray:
        """Where words begin, and the end of the last, int32: at every text's edge, and where spaces begin."""
        is_edge = np.zeros(len(texts_B) + 1, bool)
        if self._splits_at_spaces and len(texts_B):
            is_space = texts_B == _SPACE
            is_edge[1:-1] = is_space[1:] & ~is_space[:-1]
        is_edge[0] = True
        is_edge[text_ends] = True
        return np.flatnonzero(is_edge).astype(np.int32)

    def _ids_of(self, words: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of the words one after the other, int32, and where each word's begin (and the last's end), int64."""
        new = [word for word in words if word not in self._known]
        if len(self._known) + len(new) > _MAX_REMEMBERED:
            self._known.clear()
            new = list(words)
        encoded = self.tokenizer.encode_many([word.decode() for word in new])
        self._known.update(zip(new, encoded, strict=True))
        per_word = [self._known[word] for word in words]
        starts = np.zeros(len(words) + 1, np.int64)
        np.cumsum([len(ids) for ids in per_word], out=starts[1:])
        ids = np.fromiter(chain.from_iterable(per_word), np.int32, count=int(starts[-1]))
        for word in new:
            if len(word) > _MAX_WORD_BYTES:
                del self._known[word]
        return ids, starts
