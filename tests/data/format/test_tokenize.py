"""Encoding in bulk gives the ids of encoding text by text, whatever the text and the vocabulary."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data.format.tokenize as tokenize_module
from data.format.tokenize import BulkEncoder
from data.format.tokenizer import DialogueTokenizer

TEXTS = st.lists(
    st.one_of(
        st.text(),
        st.text(alphabet=" ab\u2581\n\t0\u3000<|end|>é😀"),
        st.sampled_from(["", " ", "   ", " hello  how are", "you\0 there ", "x" * 100 + " y", "<|end|> <bos>"]),
    ),
    max_size=12,
)


def encoded(encoder: BulkEncoder, texts: Sequence[str]) -> list[list[int]]:
    raw = [text.encode() for text in texts]
    ids, n_ids = encoder.encode(np.frombuffer(b"".join(raw), np.uint8), np.array([len(text) for text in raw], np.int64))
    return [part.tolist() for part in np.split(ids, np.cumsum(n_ids)[:-1])] if texts else []


@settings(max_examples=300)
@given(texts=TEXTS)
def test_every_text_has_the_ids_it_has_alone(tokenizer: DialogueTokenizer, texts: list[str]) -> None:
    assert encoded(BulkEncoder(tokenizer), texts) == [tokenizer.encode(text) for text in texts]


@settings(max_examples=60)
@given(batches=st.lists(TEXTS, max_size=5))
def test_what_is_remembered_makes_no_difference(tokenizer: DialogueTokenizer, batches: list[list[str]]) -> None:
    encoder = BulkEncoder(tokenizer)
    for texts in batches * 2:
        assert encoded(encoder, texts) == [tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize(("most_words", "most_bytes"), [(10, 1 << 20), (1 << 20, 250)])
def test_few_words_are_remembered(
    tokenizer: DialogueTokenizer, monkeypatch: pytest.MonkeyPatch, most_words: int, most_bytes: int
) -> None:
    monkeypatch.setattr(tokenize_module, "_MAX_REMEMBERED", most_words)
    monkeypatch.setattr(tokenize_module, "_MAX_REMEMBERED_BYTES", most_bytes)
    encoder = BulkEncoder(tokenizer)
    for first in range(0, 60, 7):
        texts = [f"word {number} {'x' * number}" for number in range(first, first + 4)]
        assert encoded(encoder, texts) == [tokenizer.encode(text) for text in texts]
        assert len(encoder._number_of_word) <= most_words
        assert sum(map(len, encoder._number_of_word)) <= most_bytes


def test_pieces_across_spaces_keep_texts_whole(tokenizer: DialogueTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = tokenizer.pieces()
    assert BulkEncoder(tokenizer)._splits_at_spaces, "the pieces of a trained tokenizer begin with their space"
    monkeypatch.setattr(tokenizer, "pieces", lambda: [*pieces, replace(pieces[-1], text="how are")])
    encoder = BulkEncoder(tokenizer)
    assert not encoder._splits_at_spaces
    assert encoded(encoder, ["how are you", "", " a  b"]) == [tokenizer.encode(t) for t in ("how are you", "", " a  b")]
