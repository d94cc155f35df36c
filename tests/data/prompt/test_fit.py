"""Prompts of limited length: what is pinned stays, the oldest goes, and each message is encoded once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.format.dialogue import NARRATOR, Message
from data.format.encode import encode_prompt
from data.format.tokenizer import DialogueTokenizer
from data.prompt.fit import NEWEST_TOO_LONG, REPLY_TOO_LONG, SCENE_TOO_LONG, TOGETHER_TOO_LONG, fit_prompt
from data.sources.record import LeftOut

TEXTS = st.text("ab c", max_size=12)


def keeps(messages: Sequence[Message], character: str) -> list[tuple[Message, ...]]:
    """Every allowed choice of messages, the longest first: the plain reading of the rule."""
    opening = 0
    while opening < len(messages) and messages[opening].speaker == NARRATOR:
        opening += 1
    rest = messages[opening:]
    said = [i for i, message in enumerate(rest) if message.speaker != NARRATOR or character == NARRATOR]
    newest = said[-1] if said else len(rest)
    return [(*messages[:opening], *rest[first:]) for first in range(newest + 1)]


@given(
    messages=st.lists(st.builds(Message, st.sampled_from(["Ann", "Ben", NARRATOR]), TEXTS), max_size=7),
    character=st.sampled_from(["Ben", NARRATOR]),
    max_tokens=st.integers(0, 70),
    reply_tokens=st.integers(0, 20),
)
def test_the_longest_allowed_choice_that_fits(
    tokenizer: DialogueTokenizer, messages: list[Message], character: str, max_tokens: int, reply_tokens: int
) -> None:
    room = max_tokens - reply_tokens
    choices = [kept for kept in keeps(messages, character) if len(encode_prompt(tokenizer, kept, character)) <= room]
    found = fit_prompt(tokenizer, messages, character, max_tokens, reply_tokens)
    if not choices:
        assert isinstance(found, LeftOut)
        return
    assert not isinstance(found, LeftOut)
    assert found.messages == choices[0] and found.n_cut == len(messages) - len(choices[0])
    assert found.tokens == encode_prompt(tokenizer, choices[0], character)


TALK = [Message("Ann", "good bread"), Message("Ben", "yes thank you"), Message("Ann", "and tomorrow")]
SCENE = [Message(NARRATOR, "Ben is a baker"), Message(NARRATOR, "It rains")]
NOTE = Message(NARRATOR, "It is late")


def fitted(tokenizer: DialogueTokenizer, messages: Sequence[Message], wanted: Sequence[Message], less: int = 0) -> Any:
    """What is kept of `messages` where there is room for `wanted`, less some tokens."""
    return fit_prompt(tokenizer, messages, "Ben", len(encode_prompt(tokenizer, wanted, "Ben")) - less)


def test_the_scene_and_the_newest_message_stay_and_the_middle_goes(tokenizer: DialogueTokenizer) -> None:
    found = fitted(tokenizer, [*SCENE, *TALK], [*SCENE, *TALK[1:]])
    assert found.messages == (*SCENE, *TALK[1:]) and found.n_cut == 1
    found = fitted(tokenizer, [*SCENE, *TALK, NOTE], [*SCENE, TALK[2], NOTE])
    assert found.messages == (*SCENE, TALK[2], NOTE)
    event = Message(NARRATOR, "A cat comes in")
    assert fitted(tokenizer, [*TALK[:2], event, TALK[2]], [TALK[2]]).messages == (TALK[2],)


@pytest.mark.parametrize(
    ("messages", "reply_tokens", "reason"),
    [
        (TALK, 0, NEWEST_TOO_LONG),
        ([TALK[2], NOTE], 0, NEWEST_TOO_LONG),
        ([*SCENE, *TALK], 0, TOGETHER_TOO_LONG),
        ([*SCENE, TALK[2], NOTE], 0, TOGETHER_TOO_LONG),
        (SCENE, 0, SCENE_TOO_LONG),
        ([], 1, REPLY_TOO_LONG),
    ],
)
def test_a_prompt_that_would_lose_a_pinned_message_is_none(
    tokenizer: DialogueTokenizer, messages: list[Message], reply_tokens: int, reason: str
) -> None:
    pinned = (
        [*(m for m in messages if m in SCENE), *messages[messages.index(TALK[2]) :]]
        if TALK[2] in messages
        else messages
    )
    room = len(encode_prompt(tokenizer, pinned, "Ben")) + reply_tokens
    assert not isinstance(fit_prompt(tokenizer, messages, "Ben", room, reply_tokens), LeftOut)
    assert fit_prompt(tokenizer, messages, "Ben", room - 1, reply_tokens) == LeftOut(reason)


@pytest.mark.parametrize("newest", [TALK[2:], [TALK[2], NOTE]])
def test_the_reason_names_the_part_that_is_too_long(tokenizer: DialogueTokenizer, newest: list[Message]) -> None:
    """From the size at which all fits down, it is both together, and the one or the other where it fits nowhere."""
    scene, alone, both = (len(encode_prompt(tokenizer, m, "Ben")) for m in (SCENE, newest, [*SCENE, *newest]))
    for size in range(len(encode_prompt(tokenizer, [], "Ben")), both):
        found = fit_prompt(tokenizer, [*SCENE, *TALK[:2], *newest], "Ben", size)
        expected = SCENE_TOO_LONG if size < scene else NEWEST_TOO_LONG if size < alone else TOGETHER_TOO_LONG
        assert found == LeftOut(expected)


def test_each_message_is_encoded_once_and_none_beyond_the_cut(tokenizer: DialogueTokenizer) -> None:
    class Counting:
        bos_id, message_id, end_id = tokenizer.bos_id, tokenizer.message_id, tokenizer.end_id
        decode = staticmethod(tokenizer.decode)
        seen: ClassVar[Counter[str]] = Counter()

        def encode(self, text: str) -> list[int]:
            return self.encode_many([text])[0]

        def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
            self.seen.update(texts)
            return tokenizer.encode_many(texts)

    messages = [Message("Ann", f"message {number}") for number in range(500)]
    room = len(encode_prompt(tokenizer, messages[-9:], "Ben"))
    found = fit_prompt(Counting(), messages, "Ben", room)
    assert not isinstance(found, LeftOut) and found.messages == tuple(messages[-9:])
    bodies = {text: count for text, count in Counting.seen.items() if "message" in text}
    assert bodies == {f" message {number}": 1 for number in range(490, 500)}


def test_a_narrator_that_replies_may_lose_all_but_its_newest_message(tokenizer: DialogueTokenizer) -> None:
    talk = [Message("Ann", "good bread"), SCENE[1], NOTE]
    found = fit_prompt(tokenizer, talk, NARRATOR, len(encode_prompt(tokenizer, [NOTE], NARRATOR)))
    assert not isinstance(found, LeftOut) and found.messages == (NOTE,)
