"""Packing: nothing that fits is cut, pieces keep tokens and masks, rows are exact, best fit is dense."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data.dialogue import Dialogue, EncodedDialogue, Message, encode_dialogue
from data.packing import Document, EncodedCorpus, best_fit, cut
from data.shards import packed_rows
from data.tokenizer import DialogueTokenizer


@st.composite
def encoded_dialogues(draw: st.DrawFn) -> EncodedDialogue:
    """Made of plain numbers: <bos>=2, then messages <|message|>=3, header 10.., text 100.., <|end|>=4."""
    tokens, trained, label, starts, text_starts = [2], [0], [-1], [], []
    for _ in range(draw(st.integers(1, 6))):
        header, text, character = draw(st.integers(1, 6)), draw(st.integers(1, 30)), draw(st.booleans())
        starts.append(len(tokens))
        text_starts.append(len(tokens) + 1 + header)
        tokens += [3, *range(10, 10 + header), *range(100, 100 + text), 4]
        trained += [0] * (1 + header) + [int(character)] * (text + 1)
        label += [-1] * (1 + header + text) + [1 if character else -1]
    return EncodedDialogue(
        np.array(tokens),
        np.array(trained, np.uint8),
        np.array(label, np.int8),
        np.array(starts),
        np.array(text_starts),
    )


@settings(max_examples=200)
@given(encoded=encoded_dialogues(), row_length=st.integers(8, 64))
def test_cut_keeps_every_token_once(encoded: EncodedDialogue, row_length: int) -> None:
    pieces = cut(encoded, row_length)
    if len(encoded.tokens) <= row_length:
        assert len(pieces) == 1, "a dialogue that fits stays whole"
    tokens, trained, label = [2], [0], [-1]
    for piece in pieces:
        assert 2 <= len(piece.tokens) == len(piece.trained) == len(piece.label) <= row_length
        assert piece.tokens[0] == 2
        body = 1
        if piece.tokens[1] == 3 and tokens[-1] != 4 and len(tokens) > 1:  # a repeated header inside a message
            body = next(i for i in range(2, len(piece.tokens)) if not 10 <= piece.tokens[i] < 100)
            assert not piece.trained[:body].any()
        tokens += piece.tokens[body:].tolist()
        trained += piece.trained[body:].tolist()
        label += piece.label[body:].tolist()
    assert tokens == encoded.tokens.tolist()
    assert trained == encoded.trained.tolist()
    assert label == encoded.label.tolist()


@settings(max_examples=200)
@given(encoded=encoded_dialogues(), row_length=st.integers(8, 64))
def test_only_messages_longer_than_a_row_are_cut_inside(encoded: EncodedDialogue, row_length: int) -> None:
    sizes = np.diff(np.append(encoded.message_starts, len(encoded.tokens)))
    whole = int(np.count_nonzero(sizes <= row_length - 1))
    if whole == len(sizes):
        assert all(piece.tokens[1] == 3 and piece.tokens[-1] == 4 for piece in cut(encoded, row_length))


def test_a_cut_message_keeps_its_speaker(tokenizer: DialogueTokenizer) -> None:
    dialogue = Dialogue("d", (Message("Bob", "hi"), Message("Ann", "so " * 60), Message("Bob", "ok")), "Ann")
    pieces = cut(encode_dialogue(tokenizer, dialogue), row_length=50)
    shown = [tokenizer.decode(piece.tokens.tolist(), show_control=True) for piece in pieces]
    assert shown[0] == "<bos><|message|>Bob: hi<|end|>"
    assert all(text.startswith("<bos><|message|>Ann:") for text in shown[1:-1])
    assert shown[-1] == "<bos><|message|>Bob: ok<|end|>"
    answers = "".join(tokenizer.decode(piece.tokens[piece.trained == 1].tolist()) for piece in pieces)
    assert answers == " " + "so " * 60


@settings(max_examples=200)
@given(lengths=st.lists(st.integers(1, 32), max_size=60))
def test_best_fit_places_each_document_once(lengths: list[int]) -> None:
    rows = best_fit(lengths, 32)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= 32 for row in rows)
    half_empty = [row for row in rows if sum(lengths[i] for i in row) <= 16]
    assert len(half_empty) <= 1, "two rows that fit together were not joined"


def test_best_fit_prefers_the_tightest_row() -> None:
    # 6 and 5 open rows with 4 and 5 left; the 4 belongs in the first, the 5 in the second.
    assert best_fit([5, 6, 4, 5], 10) == [[1, 2], [0, 3]]


def test_rows_have_exact_boundaries() -> None:
    def document(n: int, value: int) -> Document:
        return Document(np.full(n, value), np.ones(n, np.uint8), np.full(n, 1, np.int8))

    corpus = EncodedCorpus.of([document(5, 7), document(3, 8), document(8, 9)], vocab_size=400)
    first, second = packed_rows(corpus, [[2], [0, 1]], 8)
    assert first.tokens_L.tolist() == [9] * 8
    assert first.document_lengths.tolist() == [8], "a full row has no padding document"
    assert second.tokens_L.tolist() == [7] * 5 + [8] * 3
    (padded,) = packed_rows(corpus, [[0]], 8)
    assert padded.tokens_L.tolist() == [7] * 5 + [0] * 3
    assert padded.document_lengths.tolist() == [5, 3]
    assert padded.trained_L.tolist() == [1] * 5 + [0] * 3
    assert padded.label_L.tolist() == [1] * 5 + [-1] * 3
