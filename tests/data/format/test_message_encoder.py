"""The memory of message ids gives what encoding gives, stays within its bound and encodes a message once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.format.dialogue import DialogueError, Message
from data.format.encode import encode_message, encode_prompt
from data.format.message_encoder import MessageEncoder
from data.format.tokenizer import DialogueTokenizer

TEXTS = st.sampled_from(["", "hello", "<|end|>", "é\u2060", "a: b"])


class Counting(DialogueTokenizer):
    """Counts the messages it encodes."""

    n_encoded = 0

    def encode(self, text: str) -> list[int]:
        self.n_encoded += text.startswith(" ")
        return super().encode(text)


@given(messages=st.lists(st.builds(Message, st.sampled_from(["Ann", "Bob"]), TEXTS)), capacity=st.integers(0, 200))
def test_equals_plain_encoding_within_the_bound(
    tokenizer: DialogueTokenizer, messages: list[Message], capacity: int
) -> None:
    encoder = MessageEncoder(tokenizer, capacity)
    for message in messages:
        assert list(encoder.message(message.speaker, message.text)) == encode_message(tokenizer, message)
        assert [tokenizer.bos_id, *encoder.opening(message.speaker)] == encode_prompt(tokenizer, (), message.speaker)
        assert encoder.size <= capacity


def test_a_message_is_encoded_once(tokenizer: DialogueTokenizer) -> None:
    counting = Counting(tokenizer.model_bytes)
    encoder = MessageEncoder(counting)
    for n in range(1, 20):
        for i in range(n):
            encoder.message("Ann", f"message {i}")
    assert counting.n_encoded == 19


def test_bad_names_and_texts_are_refused(tokenizer: DialogueTokenizer) -> None:
    encoder = MessageEncoder(tokenizer)
    for _ in range(2):
        with pytest.raises(DialogueError, match="contains ':'"):
            encoder.opening("a:b")
        with pytest.raises(DialogueError, match="contains ':'"):
            encoder.message("a:b", "hi")
        with pytest.raises(DialogueError, match="surrogate"):
            encoder.message("a", "\ud800")
