"""The dialogue format: escaping, tokens and masks, continuation labels, JSON lines."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.format.dialogue import LABEL_KEY, Dialogue, DialogueError, Message, continuation_labels, without_end_label
from data.format.dialogue_json import from_json, read_dialogues, to_json
from data.format.encode import (
    CONTROL_SURFACES,
    decode_reply,
    encode_dialogue,
    encode_message,
    encode_prompt,
    encode_reply,
    escape,
    unescape,
)
from data.format.tokenizer import DialogueTokenizer
from tests.written_data import write_dialogues

J = "\u2060"
texts = st.lists(
    st.one_of(st.text(max_size=5), st.sampled_from([*CONTROL_SURFACES, J, "<", "|end|>", "<|", " ", "\u2581"])),
    max_size=8,
).map("".join)
speakers = st.text(st.characters(exclude_characters=":\n\r", exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
    lambda name: bool(name.strip()) and name == name.strip()
)
json_integers = st.integers(-(2**63), 2**64 - 1)
times = st.none() | st.floats(0, 2e9) | st.integers(0, 2_000_000_000)
messages = st.builds(Message, speakers, texts, times, st.none() | st.dictionaries(st.text(max_size=3), json_integers))


@st.composite
def dialogues(draw: st.DrawFn) -> Dialogue:
    drawn = draw(st.lists(messages, min_size=1, max_size=4))
    in_order = iter(sorted(message.time for message in drawn if message.time is not None))
    drawn = [message if message.time is None else replace(message, time=next(in_order)) for message in drawn]
    character = draw(st.sampled_from(drawn)).speaker
    metadata = draw(st.dictionaries(st.text(max_size=4), json_integers | st.text(max_size=4), max_size=3))
    identity, source = draw(st.text(min_size=1, max_size=5)), draw(st.text(max_size=3))
    return Dialogue(identity, tuple(drawn), character, ("p1", "p2"), metadata, source)


@settings(max_examples=200)
@given(text=texts)
@example(text=f"<{J}|end|>")
@example(text=f"{J}<|end|>{J}{J}")
def test_unescape_inverts_escape(text: str) -> None:
    assert unescape(escape(text)) == text


@settings(max_examples=150)
@given(speaker=speakers, text=texts)
def test_an_escaped_message_shows_no_control_surface(speaker: str, text: str) -> None:
    rendered = escape(speaker) + ": " + escape(text)
    assert not any(surface in rendered for surface in CONTROL_SURFACES)


def test_escape_is_what_the_chat_template_says() -> None:
    text = f"hi <|end|> <|message|>Bob: {J} <pad><unk><bos> <b>"
    expected = text.replace(J, J + J)
    for surface in CONTROL_SURFACES:
        expected = expected.replace(surface, surface[0] + J + surface[1:])
    assert escape(text) == expected


@given(text=texts)
def test_decode_reply_inverts_encode_reply(tokenizer: DialogueTokenizer, text: str) -> None:
    ids = encode_reply(tokenizer, text)
    assert ids[-1] == tokenizer.end_id
    assert decode_reply(tokenizer, ids) == text == decode_reply(tokenizer, ids[:-1])


@settings(max_examples=50)
@given(dialogue=dialogues())
def test_training_tokens_are_prompt_and_reply(tokenizer: DialogueTokenizer, dialogue: Dialogue) -> None:
    """At each of the character's messages: the prompt's tokens, then the reply's, and only the reply is trained."""
    encoded = encode_dialogue(tokenizer, dialogue)
    trained = np.zeros(len(encoded.tokens), dtype=np.uint8)
    for i, message in enumerate(dialogue.messages):
        if message.speaker != dialogue.character:
            continue
        prompt = encode_prompt(tokenizer, dialogue.messages[:i], dialogue.character)
        reply = encode_reply(tokenizer, message.text)
        assert encoded.tokens[: len(prompt) + len(reply)].tolist() == prompt + reply
        trained[len(prompt) : len(prompt) + len(reply)] = 1
    assert np.array_equal(encoded.loss_mask, trained)
    assert len(encoded.tokens) == len(encoded.loss_mask) == len(encoded.label)


@settings(max_examples=40)
@given(dialogue=dialogues())
def test_control_tokens_stand_only_where_the_format_puts_them(tokenizer: DialogueTokenizer, dialogue: Dialogue) -> None:
    encoded = encode_dialogue(tokenizer, dialogue)
    tokens = encoded.tokens
    assert tokens[0] == tokenizer.bos_id
    assert np.count_nonzero(tokens <= 4) == 1 + 2 * len(dialogue.messages)
    assert np.array_equal(np.flatnonzero(tokens == tokenizer.message_id), encoded.message_starts)
    ends = np.flatnonzero(tokens == tokenizer.end_id)
    assert encoded.label[ends].tolist() == continuation_labels(dialogue)
    assert np.all(np.delete(encoded.label, ends) == -1)


def test_a_message_reads_as_documented(tokenizer: DialogueTokenizer) -> None:
    ids = encode_message(tokenizer, Message("Ann", "hi <|end|>"))
    assert tokenizer.decode(ids, show_control=True) == f"<|message|>Ann: hi <{J}|end|><|end|>"
    assert ids == [3, *tokenizer.encode(f"Ann: hi <{J}|end|>"), 4]


def talk(*lines: tuple[str, float | None]) -> Dialogue:
    return Dialogue("d", tuple(Message(speaker, "x", time) for speaker, time in lines), character="A")


@pytest.mark.parametrize(
    ("dialogue", "within", "expected"),
    [
        (talk(("A", 0), ("B", 5), ("A", 9)), 10, [1, -1, 0]),
        (talk(("A", 0), ("A", 1), ("B", 5)), 10, [-1, 1, -1]),
        (talk(("A", 0), ("B", 10)), 10, [1, -1]),
        (talk(("A", 0), ("B", 11)), 10, [0, -1]),
        (talk(("A", 0), ("B", 11)), None, [1, -1]),
        (talk(("A", None), ("B", 11)), 10, [-1, -1]),
        (talk(("A", None)), 10, [-1]),
        (talk(("A", None)), None, [0]),
        (talk(("A", 0)), 10, [0]),
        (talk(("B", 0), ("A", 1), ("narrator", 2), ("A", 3), ("narrator", 4), ("B", 5)), 10, [-1, -1, -1, 1, -1, -1]),
        (talk(("A", 0), ("C", 1), ("B", 2), ("A", 3)), 10, [1, -1, -1, 0]),
        # only the character's messages have a time: no evidence
        (talk(("A", 0), ("B", None), ("A", 9)), 10, [-1, -1, -1]),
        (talk(("A", 0), ("B", None), ("A", 9), ("C", 12), ("A", 15)), 10, [-1, -1, 1, -1, 0]),
        (talk(("A", 0), ("B", None), ("narrator", 1), ("A", 9)), 10, [-1, -1, -1, -1]),
        # midnights are dates: the time between two of them is known to a day
        (talk(("A", 0), ("B", 0), ("A", 86400), ("B", 3 * 86400), ("A", 3 * 86400)), 600, [-1, -1, 0, -1, 0]),
        (talk(("A", 0), ("B", 86400), ("A", 86400), ("B", 172800)), 172800, [1, -1, 1, -1]),
        (talk(("A", 0), ("B", 86400), ("A", 86400), ("B", 172801)), 86400, [1, -1, 0, -1]),
        (talk(("A", 0), ("B", 86400)), None, [1, -1]),
    ],
)
def test_continuation_labels(dialogue: Dialogue, within: float | None, expected: list[int]) -> None:
    assert continuation_labels(dialogue, within) == expected


@pytest.mark.parametrize("within", [None, 10])
def test_where_the_end_is_no_evidence_the_last_reply_has_no_label(within: float | None) -> None:
    ended = talk(("A", 0), ("B", 5), ("A", 9), ("narrator", 9))
    assert continuation_labels(ended, within) == [1, -1, 0, -1]
    assert continuation_labels(without_end_label(ended), within) == [1, -1, -1, -1]
    answered = talk(("A", 0), ("B", 5))
    assert without_end_label(answered) == answered
    given = replace(ended, messages=(*ended.messages[:2], Message("A", "x", 9, {LABEL_KEY: 0, "rating": 3})))
    assert continuation_labels(without_end_label(given), within) == [1, -1, 0]
    rated = replace(ended, messages=(*ended.messages[:2], Message("A", "x", 9, {"rating": 3})))
    last = without_end_label(rated).messages[-1]
    assert last.metadata == {"rating": 3, LABEL_KEY: -1} and last.is_trained
    told = Dialogue("d", (Message("B", "x"), Message("narrator", "x")), "narrator")
    assert continuation_labels(told, None) == [-1, 0] and continuation_labels(without_end_label(told)) == [-1, -1]


def supervised(*lines: tuple[str, dict[str, Any] | None]) -> Dialogue:
    return Dialogue("d", tuple(Message(speaker, "x y", None, metadata) for speaker, metadata in lines), character="A")


def test_labels_and_masks_in_the_metadata_stand(tokenizer: DialogueTokenizer) -> None:
    """They replace what would be inferred, at messages that would have no label too, and only there."""
    dialogue = supervised(
        ("A", {"engagement_label": 0}),
        ("A", None),
        ("B", {"rating": 5}),
        ("A", {"engagement_label": 1, "trained": False}),
        ("A", {"engagement_label": -1}),
        ("B", {"engagement_label": None, "trained": None}),
        ("A", {"trained": True, "engagement_label": None}),
    )
    labels = [0, 1, -1, 1, -1, -1, 0]
    assert continuation_labels(dialogue) == labels
    again = from_json(to_json(dialogue))
    assert again == dialogue
    encoded = encode_dialogue(tokenizer, again)
    ends = np.flatnonzero(encoded.tokens == tokenizer.end_id)
    assert encoded.label[ends].tolist() == labels
    assert encoded.loss_mask[ends].tolist() == [1, 1, 0, 0, 1, 0, 1]
    assert [m.is_trained for m in dialogue.messages] == [True, True, True, False, True, True, True]


@pytest.mark.parametrize(
    ("speaker", "metadata", "reason"),
    [
        ("A", {"engagement_label": 2}, "engagement_label is 2: expected 1, 0, or -1 for no label"),
        ("A", {"engagement_label": True}, "engagement_label is True"),
        ("A", {"engagement_label": "1"}, "engagement_label is '1'"),
        ("A", {"trained": 0}, "trained is 0: expected true or false"),
        ("B", {"engagement_label": 1}, "message 0: engagement_label or trained on a message by 'B'"),
        ("B", {"trained": False}, "only those of the character 'A'"),
    ],
)
def test_supervision_that_cannot_be_meant_is_an_error(speaker: str, metadata: dict[str, Any], reason: str) -> None:
    with pytest.raises(DialogueError, match=reason):
        supervised((speaker, metadata), ("A", None))


@settings(max_examples=50)
@given(dialogue=dialogues())
def test_json_round_trip(dialogue: Dialogue) -> None:
    line = to_json(dialogue).decode()
    assert "\n" not in line
    assert from_json(line) == dialogue


def test_files_round_trip_and_errors_name_the_line(tmp_path: Path) -> None:
    both = [
        talk(("A", 0), ("B", 1)),
        talk(
            ("A", 2.5),
        ),
    ]
    write_dialogues(tmp_path / "d.jsonl", both)
    assert list(read_dialogues(tmp_path / "d.jsonl")) == both
    with open(tmp_path / "d.jsonl", "a", encoding="utf-8") as file:
        file.write('{"id": "x", "character": "A", "messages": [{"speaker": "A:", "text": "y"}]}\n')
    with pytest.raises(DialogueError, match=r"d\.jsonl:3: message 0: speaker 'A:'"):
        list(read_dialogues(tmp_path / "d.jsonl"))
    with pytest.raises(DialogueError, match="no such file"):
        list(read_dialogues(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "JSON object"),
        ('{"id": "1"}', "missing character, messages"),
        ('{"id": "1", "character": "A", "messages": []}', "no messages"),
        ('{"id": "1", "character": "A", "messages": {}}', "expected a list"),
        ('{"id": "1", "character": "A", "messages": [1]}', "message 0"),
        ('{"id": "1", "character": "A", "messages": [{"speaker": "A", "text": 3}]}', "text is a value of type int"),
        ('{"id": "1", "character": "A", "messages": [{"speaker": "A", "text": "", "tme": 3}]}', "unknown key 'tme'"),
        ('{"id": "1", "character": "A", "messages": [{"speaker": "A", "text": "", "time": "3"}]}', "time is '3'"),
        ('{"id": "1", "character": "A", "messages": [{"speaker": "A", "text": "", "metadata": 3}]}', "metadata is int"),
        ('{"id": "1", "character": "B", "messages": [{"speaker": "A", "text": ""}]}', "writes nothing"),
        ('{"id": "1", "character": "A", "messages": [{"speaker": "A", "text": "\\ud800"}]}', "lone surrogate"),
        ('{"id": "1", "character": "A", "messages": [{"speaker": " ", "text": ""}]}', "non-empty"),
    ],
)
def test_bad_records_say_what_is_wrong(line: str, reason: str) -> None:
    with pytest.raises(DialogueError, match=reason):
        from_json(line)


@pytest.mark.parametrize("time", [float("nan"), float("inf"), -float("inf"), 10**400, -(10**400), True, "1"])
def test_a_time_that_is_no_moment_is_an_error(time: Any) -> None:
    with pytest.raises(DialogueError, match=r"time is .*: expected (a number of )?unix seconds"):
        Message("A", "x", time)
