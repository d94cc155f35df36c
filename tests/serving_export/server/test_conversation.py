"""The memory never changes a prompt, except for a reply that was drawn in just this conversation."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.format.dialogue import DialogueError, Message
from data.format.encode import encode_prompt
from data.format.tokenizer import DialogueTokenizer, train_tokenizer
from serving_export.server.conversation import ConversationEncoder, history_digest


@functools.cache
def tokenizer() -> DialogueTokenizer:
    return train_tokenizer(["hello there, how are you today?"] * 20, None, vocab_size=275)


TEXT = st.sampled_from(["", "hello", "<|end|>", "<bos>", "é\u2060", "how are you"])
MESSAGES = st.lists(st.builds(Message, st.sampled_from(["Ann", "Bob", "narrator"]), TEXT), max_size=5)


@settings(deadline=None)
@given(messages=MESSAGES, n_remembered=st.integers(0, 5), salt=st.sampled_from([None, "", "tenant"]))
def test_history_is_the_digest_of_salt_and_ids(messages: list[Message], n_remembered: int, salt: str | None) -> None:
    """However the prompt was put together: encoded, or with ids of remembered replies."""
    encoder = ConversationEncoder(tokenizer())
    for n in range(min(n_remembered, len(messages))):
        before = encoder.encode_prompt(messages[:n], messages[n].speaker, salt)
        encoder.remember_reply(before, spelled(messages[n].text), messages[n].text)
    prompt = encoder.encode_prompt(messages, "Bob", salt)
    assert prompt.history == history_digest(prompt.tokens, salt)
    assert prompt.history != history_digest(prompt.tokens, "other")
    assert prompt.history != history_digest(prompt.tokens[:-1], salt)


@settings(deadline=None)
@given(conversations=st.lists(MESSAGES, min_size=1, max_size=5), capacity=st.sampled_from([0, 60, 10_000]))
def test_equals_plain_encoding(conversations: list[list[Message]], capacity: int) -> None:
    encoder = ConversationEncoder(tokenizer(), capacity)
    for messages in conversations:
        assert encoder.encode_prompt(messages, "Bob").tokens == encode_prompt(tokenizer(), messages, "Bob")
        assert encoder.message_encoder.size <= capacity


def spelled(text: str) -> list[int]:
    """Ids of the text that the tokenizer would not choose: one byte each."""
    first_byte = 5
    return [first_byte + byte for byte in (" " + text).encode()]


def test_reply_is_spliced_as_drawn_in_its_conversation_only() -> None:
    encoder = ConversationEncoder(tokenizer())
    asked = [Message("Ann", "hello")]
    prompt = encoder.encode_prompt(asked, "Bob", "tenant")
    drawn = spelled("how are you")
    assert encoder.remember_reply(prompt, drawn, "how are you")

    following = [*asked, Message("Bob", "how are you"), Message("Ann", "hello")]
    spliced = encoder.encode_prompt(following, "Bob", "tenant")
    assert spliced.tokens[: len(prompt.tokens) + len(drawn) + 1] == [*prompt.tokens, *drawn, tokenizer().end_id]
    assert tokenizer().decode(spliced.tokens, show_control=True) == tokenizer().decode(
        encode_prompt(tokenizer(), following, "Bob"), show_control=True
    )
    # a second reply after a spliced one is found as well
    assert encoder.remember_reply(spliced, spelled("hello"), "hello")
    third = encoder.encode_prompt([*following, Message("Bob", "hello")], "Bob", "tenant")
    assert third.tokens[: len(spliced.tokens) + len(spelled("hello"))] == [*spliced.tokens, *spelled("hello")]

    elsewhere = [
        (following, "other tenant"),
        (following, None),
        ([Message("Ann", "hello!"), *following[1:]], "tenant"),
        ([following[0], Message("Eve", "how are you"), following[2]], "tenant"),
        ([following[0], Message("Bob", "how are you?"), following[2]], "tenant"),
    ]
    for messages, salt in elsewhere:
        assert encoder.encode_prompt(messages, "Bob", salt).tokens == encode_prompt(tokenizer(), messages, "Bob")


def test_text_that_is_not_what_the_ids_say_is_not_remembered() -> None:
    encoder = ConversationEncoder(tokenizer())
    prompt = encoder.encode_prompt([], "Bob")
    assert not encoder.remember_reply(prompt, spelled("hello you"), "hello")
    assert not encoder.remember_reply(prompt, [*spelled("hello"), tokenizer().end_id], "hello")


def test_bad_character() -> None:
    with pytest.raises(DialogueError, match="contains ':'"):
        ConversationEncoder(tokenizer()).encode_prompt([], "a:b")
