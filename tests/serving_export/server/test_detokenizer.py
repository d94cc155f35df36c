"""The stream equals the whole: for any ids, any UTF-8 rubble, any escapes and any stop strings."""

from __future__ import annotations

import functools

from hypothesis import given, settings
from hypothesis import strategies as st

from data.format.encode import CONTROL_SURFACES, WORD_JOINER, decode_reply, encode_reply
from data.format.tokenizer import DialogueTokenizer, train_tokenizer
from serving_export.server.detokenizer import Detokenizer, PieceTable


@functools.cache
def tokenizer() -> DialogueTokenizer:
    texts = ["hello there, how are you today?", "the end of the message", "a <end> <|end|> hello", "żółw ąę"] * 20
    return train_tokenizer(texts, None, vocab_size=300)


def stream_of(ids: list[int], stop: tuple[str, ...] = ()) -> tuple[Detokenizer, list[str]]:
    stream = Detokenizer(PieceTable(tokenizer()), stop)
    return stream, [*(stream.push(token) for token in ids), stream.finish()]


PARTS = [*CONTROL_SURFACES, WORD_JOINER, "<", "|end|>", " ", "é", "漢字", "😀", "hello", "\n"]
TEXT = st.lists(st.sampled_from(PARTS) | st.text(max_size=3)).map("".join)
IDS = st.lists(st.integers(0, 299) | st.integers(5, 260), max_size=25)


@settings(max_examples=300, deadline=None)
@given(ids=IDS)
def test_any_ids_stream_to_their_decoding(ids: list[int]) -> None:
    stream, parts = stream_of(ids)
    assert "".join(parts) == decode_reply(tokenizer(), ids) == stream.text


@settings(deadline=None)
@given(text=TEXT)
def test_replies_come_back_exactly_and_in_whole_characters(text: str) -> None:
    _, parts = stream_of(encode_reply(tokenizer(), text))
    assert "".join(parts) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)


@settings(max_examples=200, deadline=None)
@given(text=st.text("abc<", max_size=20), stop=st.lists(st.text("abc<", min_size=1, max_size=3), max_size=3))
def test_nothing_of_a_stop_string_is_given_out(text: str, stop: list[str]) -> None:
    stream, parts = stream_of(encode_reply(tokenizer(), text), tuple(stop))
    cuts = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    assert "".join(parts) == stream.text == (text[: min(cuts)[1]] if cuts else text)
    assert stream.stopped == bool(cuts)


def test_text_is_not_held_back_without_reason() -> None:
    ids = encode_reply(tokenizer(), "hello, you 漢")
    _, parts = stream_of(ids, ("STOP",))
    given_out = "".join(parts[: len(ids) - 1])
    assert given_out == "hello, you 漢"
    assert parts[-1] == ""
