"""No text of a stranger reaches the terminal as a command."""

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from data.inspect.terminal_text import visible


@given(text=st.text() | st.text(alphabet=st.characters(max_codepoint=0xFF)))
def test_no_control_character_is_left(text: str) -> None:
    shown = visible(text)
    assert not [c for c in shown if unicodedata.category(c) == "Cc" and c not in "\n\t"]
    assert not [
        c
        for c in shown
        if unicodedata.bidirectional(c) in {"RLO", "LRO", "RLE", "LRE", "PDF", "RLI", "LRI", "FSI", "PDI"}
    ]
    assert visible(shown) == shown


def test_the_rest_stays() -> None:
    text = "naïve \u65e5\u672c \U0001f44d\u200d\tx\n"
    assert visible(text) == text
    assert visible("\x1b[2J\x9b\u202e") == "\u241b[2J\\x9b\\u202e"
