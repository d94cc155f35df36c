"""The exported tokenizer.json gives our ids for every text, and its text comes back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from data.format.encode import CONTROL_SURFACES, escape
from data.format.tokenizer import DialogueTokenizer, train_tokenizer
from serving_export.export.tokenizer_json import merges, tokenizer_config, tokenizer_json

HOSTILE = [
    "▁ ▁▁",
    "\u2060",
    "   \n\n\t ",
    "<0x0A>",
    "\x00a",
    "🤦🏽‍♂️",
    "e\u0301\u202e",
    " " * 300,
    "a" * 5000,
    "1234 0x1F",
    "\r\n",
    "\ufeff",
]


@pytest.fixture(scope="module")
def exported(tokenizer: DialogueTokenizer) -> Tokenizer:
    return Tokenizer.from_str(tokenizer_json(tokenizer))


@pytest.fixture(scope="module")
def of_few_characters() -> DialogueTokenizer:
    """Writes nearly everything in bytes."""
    rare = "".join(map(chr, range(0x3A0, 0x3A0 + 100)))
    texts = ["some text that is written often, in few words"] * 90 + [rare]
    return train_tokenizer(texts, None, 340, character_coverage=0.98)


def assert_equal_ids(ours: DialogueTokenizer, exported: Tokenizer, text: str) -> None:
    text = escape(text)
    ids = exported.encode(text, add_special_tokens=False).ids
    assert ids == ours.encode(text)
    assert exported.decode(ids, skip_special_tokens=False) == text


def test_hostile_texts(tokenizer: DialogueTokenizer, exported: Tokenizer) -> None:
    for text in [*HOSTILE, *CONTROL_SURFACES, "".join(CONTROL_SURFACES), "<<|end|>|end|>"]:
        assert_equal_ids(tokenizer, exported, text)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"])) | st.text("Hello thrainyo42 \u2060▁<|end>:.ß", max_size=60)
)
def test_equal_ids_for_any_text(tokenizer: DialogueTokenizer, exported: Tokenizer, text: str) -> None:
    assert_equal_ids(tokenizer, exported, text)


def test_every_character_has_equal_ids(tokenizer: DialogueTokenizer, of_few_characters: DialogueTokenizer) -> None:
    for ours in (tokenizer, of_few_characters):
        exported = Tokenizer.from_str(tokenizer_json(ours))
        characters = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
        for start in range(0, len(characters), 8_192):
            assert_equal_ids(ours, exported, " ".join(characters[start : start + 8_192]))


@settings(max_examples=150, deadline=None)
@given(text=st.text() | st.text("some writen \0\r\n\u2060<|end>:.ß", max_size=60))
def test_equal_ids_where_most_is_bytes(of_few_characters: DialogueTokenizer, text: str) -> None:
    exported = Tokenizer.from_str(tokenizer_json(of_few_characters))
    assert_equal_ids(of_few_characters, exported, text)
    assert min(exported.encode(escape(text), add_special_tokens=False).ids, default=5) > 4


def test_control_tokens_are_read_from_unescaped_text_only(tokenizer: DialogueTokenizer, exported: Tokenizer) -> None:
    for token_id, surface in enumerate(CONTROL_SURFACES):
        assert exported.encode(surface).ids == [token_id]
        assert token_id not in exported.encode(escape(surface)).ids


def test_every_merge_gives_a_piece(tokenizer: DialogueTokenizer) -> None:
    known = {piece.text for piece in tokenizer.pieces()}
    found = merges(tokenizer.pieces())
    assert found
    assert all(left + right in known for left, right in found)


def test_transformers_adds_nothing(tokenizer: DialogueTokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    (tmp_path / "tokenizer.json").write_text(tokenizer_json(tokenizer))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(256)))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "Hello  there ,  don 't . ▁"
    assert loaded(text)["input_ids"] == tokenizer.encode(text)
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (2, 4, 0)
    assert loaded.vocab_size == tokenizer.vocab_size == len(loaded)
