"""Which texts say nothing: by Unicode's properties, not by what `str.strip` knows."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.format.visible_text import says_nothing, visible

NOTHING = [
    "", " ", "\t\r\n", "\u00a0\u2003\u3000", "\u200b", "\u200c\u200d", "\u2060", "\ufeff", "\u00ad", "\u034f", "\u061c",
    "\u115f\u1160", "\u17b4\u17b5", "\u180b\u180e", "\u2028", "\u2061\u2064", "\u2800", "\u3164", "\uffa0", "\ufe0f",
    "\U000e0100", "\U000e0041", "\U0001d159", "\ufffc", "\x00\x1b", "\u0301", " \u200b\n\u3164",
]  # fmt: skip
SOMETHING = [
    "a", ".", "\u200b.", "0", "…", "é", "e\u0301", "日", "ہ", "한", "❤\ufe0f", "👨\u200d👩\u200d👧", "1\ufe0f\u20e3",
    "🏴\U000e0067\U000e007f", "\u0600", "न\u200d", "\ufffd", "\U0001f3fb", "♪",
]  # fmt: skip


@pytest.mark.parametrize("text", NOTHING)
def test_nothing(text: str) -> None:
    assert says_nothing(text)
    assert not says_nothing(text + "a") and not says_nothing("a" + text)


@pytest.mark.parametrize("text", SOMETHING)
def test_something(text: str) -> None:
    assert not says_nothing(text) and visible(text)


@given(st.text())
def test_letters_and_digits_say_something_and_spaces_and_controls_do_not(text: str) -> None:
    categories = {unicodedata.category(character) for character in text}
    if says_nothing(text):
        assert not categories & {"Ll", "Lu", "Lt", "Nd", "Nl", "Sm", "Sc", "Po", "Pd"}
    if categories <= {"Zs", "Zl", "Zp", "Cc"}:
        assert says_nothing(text) and not visible(text)


@given(st.lists(st.sampled_from("ab日é"), min_size=1), st.sampled_from(NOTHING[:-2]))
def test_what_cannot_be_seen_makes_no_difference(letters: list[str], unseen: str) -> None:
    assert visible(unseen.join(letters)) == visible("".join(letters))
    assert visible("e\u0301") == visible("é") != visible("e")
