"""The tokenizer: exact round trip, no control id from text, the split the format rests on, honest errors."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.format.encode import CONTROL_SURFACES
from data.format.tokenizer import MODEL_FILE, DialogueTokenizer, TokenizerError, train_tokenizer

pieces_of_text = st.one_of(
    st.text(max_size=8),
    st.sampled_from([*CONTROL_SURFACES, "\u2581", "\u2060", " ", ":", "\n", "\t", "\0", "<0x0A>", "hello"]),
)
texts = st.lists(pieces_of_text, max_size=8).map("".join)
PLANE = 1 << 16
SURROGATES = range(0xD800, 0xE000)
# Every plane as often as the first; hypothesis alone prefers small characters.
of_any_plane = st.text(
    st.integers(0, 16).flatmap(
        lambda plane: st.characters(
            min_codepoint=plane * PLANE, max_codepoint=(plane + 1) * PLANE - 1, exclude_categories=["Cs"]
        )
    ),
    max_size=40,
)


@pytest.fixture(scope="module", params=["most characters", "few characters"])
def either(request: pytest.FixtureRequest, tokenizer: DialogueTokenizer) -> DialogueTokenizer:
    """The usual tokenizer, and one that writes nearly everything in bytes."""
    if request.param == "most characters":
        return tokenizer
    rare = "".join(map(chr, range(0x3A0, 0x3A0 + 100)))
    texts = ["some text that is written often, in few words"] * 90 + [rare]
    return train_tokenizer(texts, None, 340, character_coverage=0.98)


@settings(max_examples=200)
@given(text=st.one_of(texts, of_any_plane))
@example(text="\u2581 a\u2581\u2585\u2047 ")
@example(text="  <|end|>  ")
@example(text="\r\n\0\u2060\u2060 \ufeff\u202e e\u0301\u00e9 \uff21\ufb01 \U0010ffff\ufffd\ufffe\x85\u2028")
@example(text="<0x0A><0xff>\n")
@example(text="")
def test_decode_inverts_encode(either: DialogueTokenizer, text: str) -> None:
    assert either.decode(either.encode(text)) == text


@settings(max_examples=150)
@given(text=st.one_of(texts, of_any_plane))
@example(text="".join(CONTROL_SURFACES))
@example(text="".join(f"<0x{i:02X}>" for i in range(256)))
def test_no_text_yields_a_control_id(either: DialogueTokenizer, text: str) -> None:
    assert all(i > 4 for i in either.encode(text))


def test_every_character_survives_alone_and_beside_its_neighbors(either: DialogueTokenizer) -> None:
    characters = [chr(i) for i in range(17 * PLANE) if i not in SURROGATES]
    for start in range(0, len(characters), PLANE):
        some = characters[start : start + PLANE]
        together = either.encode("".join(some))
        assert either.decode(together) == "".join(some) and min(together) > 4
        ids = either.encode_many(some)
        assert min(map(min, ids)) > 4
        spaced = either.encode(" ".join(some))
        assert either.decode(spaced) == " ".join(some)
    for ids_of_one, character in zip(ids[::64], some[::64], strict=True):
        assert either.decode(ids_of_one) == character


@settings(max_examples=150)
@given(before=texts.map(lambda t: t + ":"), after=texts.map(lambda t: " " + t))
def test_no_piece_crosses_from_a_colon_to_a_space(tokenizer: DialogueTokenizer, before: str, after: str) -> None:
    assert tokenizer.encode(before + after) == tokenizer.encode(before) + tokenizer.encode(after)


@given(batch=st.lists(texts, max_size=5))
def test_encode_many_equals_encode(tokenizer: DialogueTokenizer, batch: list[str]) -> None:
    assert tokenizer.encode_many(batch) == [tokenizer.encode(text) for text in batch]


def test_control_ids_are_dropped_or_shown(tokenizer: DialogueTokenizer) -> None:
    ids = [2, 3, *tokenizer.encode("Ann:"), 4, 0]
    assert tokenizer.decode(ids) == "Ann:"
    assert tokenizer.decode(ids, show_control=True) == "<bos><|message|>Ann:<|end|><pad>"


def test_pieces_list_the_vocabulary(tokenizer: DialogueTokenizer) -> None:
    pieces = tokenizer.pieces()
    assert len(pieces) == tokenizer.vocab_size == 400
    assert tuple(piece.text for piece in pieces[:5]) == CONTROL_SURFACES
    assert [piece.kind for piece in pieces[:5]] == ["control"] * 5
    assert [piece.text for piece in pieces if piece.kind == "byte"] == [f"<0x{b:02X}>" for b in range(256)]
    assert any(piece.text.startswith(" ") for piece in pieces)
    assert not any("\u2581" in piece.text for piece in pieces)


def test_save_and_load(tokenizer: DialogueTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    for path in (tmp_path, tmp_path / MODEL_FILE):
        assert DialogueTokenizer.load(path).model_bytes == tokenizer.model_bytes


def test_training_is_deterministic(tmp_path: Path) -> None:
    sentences = ["a first sentence here", " and a second one", "\n\n a third: 1 2 3"] * 20
    first = train_tokenizer(sentences, tmp_path / "t.model", 300)
    assert first.model_bytes == train_tokenizer(iter(sentences), None, 300).model_bytes
    assert (tmp_path / "t.model").read_bytes() == first.model_bytes


def test_hostile_texts_do_not_stop_training() -> None:
    hostile = ["\0", "a\tb", "\u2581\u2581", "", "x" * 100_000]
    assert train_tokenizer(hostile + ["some ordinary text to learn from"] * 30, None, 280).vocab_size == 280


def test_errors_name_file_and_reason(tmp_path: Path, tokenizer: DialogueTokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"nowhere.*no such file"):
        DialogueTokenizer.load(tmp_path / "nowhere")
    (tmp_path / "broken.model").write_bytes(tokenizer.model_bytes[:2000])
    with pytest.raises(TokenizerError, match=r"broken\.model"):
        DialogueTokenizer.load(tmp_path / "broken.model")
    with pytest.raises(TokenizerError, match="support at most"):
        train_tokenizer(["too little text"] * 3, None, 4096)
    with pytest.raises(TokenizerError, match="alone need"):
        train_tokenizer(["the characters of this sentence"] * 30, None, 265)
    with pytest.raises(TokenizerError, match="no text"):
        train_tokenizer([], None, 4096)
    with pytest.raises(TokenizerError, match="more than 261"):
        train_tokenizer(["text"], None, 100)
    with pytest.raises(TokenizerError, match="outside the vocabulary"):
        tokenizer.decode([tokenizer.vocab_size])


def test_a_foreign_model_is_refused(tmp_path: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a sentence to learn from, with several words"] * 30),
        model_prefix=str(tmp_path / "foreign"),
        vocab_size=22,
        minloglevel=2,
    )
    with pytest.raises(TokenizerError, match="ids 0 to 4"):
        DialogueTokenizer.load(tmp_path / "foreign.model")


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(5, "Input/output error")])
def test_what_stops_the_texts_stops_the_training_as_itself(failure: BaseException) -> None:
    def texts() -> Iterator[str]:
        yield from ["some words"] * 20
        raise failure

    with pytest.raises(type(failure)):
        train_tokenizer(texts(), None, 300)
