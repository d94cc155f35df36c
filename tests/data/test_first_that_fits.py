"""The newest messages that fit a token budget, against trying every cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from data.dialogue import Message, encode_prompt, first_that_fits
from data.tokenizer import DialogueTokenizer


@given(texts=st.lists(st.text("ab c", max_size=12), max_size=6), max_tokens=st.integers(0, 60))
def test_first_that_fits(tokenizer: DialogueTokenizer, texts: list[str], max_tokens: int) -> None:
    messages = [Message("Ann", text) for text in texts]
    lengths = [len(encode_prompt(tokenizer, messages[first:], "Ben")) for first in range(len(messages) + 1)]
    fitting = [first for first, length in enumerate(lengths) if length <= max_tokens]
    assert first_that_fits(tokenizer, messages, "Ben", max_tokens) == (fitting[0] if fitting else len(messages))
