"""The lines of a feedback log: the documented one is read, and whatever is not one is refused with its reason."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data.feedback.event
from data.feedback.event import Candidate, FeedbackEvent, LoggedMessage, read_event
from data.sources.record import RecordError


def documented() -> dict[str, Any]:
    """The event in the module's documentation."""
    text = data.feedback.event.__doc__ or ""
    return json.loads(text[text.index("    {") : text.index("\n\n|")])


def line(event: object) -> bytes:
    return json.dumps(event).encode()


def test_the_documented_line_is_one() -> None:
    event = read_event(line(documented()))
    assert (event.conversation, event.user, event.turn, event.after) == ("c81", "u17", "t2", "t1")
    assert event.messages == (LoggedMessage(speaker="Tom", text="where were you?", time=1700000000),)
    assert event.candidates[1] == Candidate(text="At sea. Guess!", model="mia-7b-0601", time=1700000011, stars=5)
    assert (event.kept, event.edit, event.wrote_again) == (1, None, 1700000031)
    assert [event.seen_seconds(number) for number in (0, 1)] == [6.5, None]


def test_times_and_keys_of_other_logs_are_read() -> None:
    event = documented()
    expected = read_event(line(event))
    event["messages"] = [{"from": "Tom", "value": "where were you?", "timestamp": "2023-11-14T22:13:20Z"}]
    event["candidates"][0] = {"content": "out", "model": "mia-7b-0601", "created_at": "2023-11-14 22:13:24.5"}
    event |= {"wrote_again": "2023-11-14T22:13:51+00:00", "closed": "2023-11-15T00:13:20+01:00"}
    assert read_event(line(event)) == expected
    event["messages"][0]["from"] = "user"
    assert read_event(line(event)).messages[0].speaker == "User"


def test_roles_and_text_parts_are_read_as_in_every_record() -> None:
    event = documented()
    parts = [{"type": "text", "text": "where"}, {"type": "text", "text": "were you?"}]
    first = event["messages"][0]["time"]
    event["messages"] = [
        {"role": "System", "content": parts, "time": first},
        {"role": "user", "name": "Tom ", "text": parts, "time": first},
        {"role": "model", "value": "out", "time": first},
        {"speaker": " Tom", "text": "in", "time": first},
    ]
    event["character"] = "Mia "
    event["candidates"][0]["text"] = parts
    event["edit"] = {"content": parts, "time": 1700000012}
    made = read_event(line(event))
    both = "where\nwere you?"
    assert [(m.speaker, m.text) for m in made.messages] == [
        ("narrator", both),
        ("Tom", both),
        ("Mia", "out"),
        ("Tom", "in"),
    ]
    assert (made.character, made.candidates[0].text, made.edit and made.edit.text) == ("Mia", both, both)


@pytest.mark.parametrize(
    ("character", "message", "reason"),
    [
        ("User", {"role": "user"}, "message 0: the user has the name of the character, 'User', and would be trained"),
        ("Mia", {"role": "User", "name": "Mia"}, "message 0: the user has the name of the character, 'Mia'"),
        ("Mia", {"role": "system", "speaker": "Mia"}, "message 0: the system has the name of the character, 'Mia'"),
        ("Mia", {"role": "user", "name": "narrator"}, "messages.0: the user has the name 'narrator'"),
        ("Mia", {"speaker": "mia"}, "speakers 'mia' and 'Mia', the character, differ only in case"),
        ("Mia", {"speaker": "Tom", "text": [{"type": "image_url"}]}, "messages.0: text holds {'type': 'image_url'}"),
    ],
)
def test_nobody_but_the_character_is_trained(character: str, message: dict[str, Any], reason: str) -> None:
    event = documented()
    event |= {"character": character, "messages": [{"text": "hi", "time": 1700000000, **message}]}
    with pytest.raises(RecordError) as caught:
        read_event(line(event))
    assert str(caught.value).startswith(reason)


def test_an_unknown_role_beside_a_known_one_is_refused() -> None:
    event = documented()
    event["messages"] = [{"role": role, "text": "x", "time": 1700000000} for role in ("user", "agent")]
    with pytest.raises(RecordError, match="message 1: role is 'agent', and other messages have the role user"):
        read_event(line(event))


def test_every_key_is_documented() -> None:
    table = data.feedback.event.__doc__ or ""
    assert [key for key in FeedbackEvent.model_fields if f"| `{key}`" not in table] == []
    for key in ("stars", "model", "time", "text"):
        assert f"`{key}`" in table


@settings(max_examples=60)
@given(texts=st.lists(st.text(), min_size=3, max_size=3))
def test_texts_are_read_as_they_are(texts: list[str]) -> None:
    event = documented()
    event["messages"][0]["text"], event["candidates"][0]["text"] = texts[:2]
    event["edit"] = {"text": texts[2], "time": 1700000012}
    for encoded in (line(event), json.dumps(event, ensure_ascii=False).encode()):
        read = read_event(encoded)
        assert read.edit is not None
        assert [read.messages[0].text, read.candidates[0].text, read.edit.text] == texts


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (("user",), "", "user is '': expected text that is not blank"),
        (("user",), " \n", "user is ' \\n': expected text that is not blank"),
        (("messages", 0), {"speaker": "Tom", "text": "x", "time": 0, "timestamp": False}, "messages.0: time 0 and"),
        (("after",), 7, "after is 7: expected"),
        (("after",), "t2", "cannot continue itself"),
        (("likes",), 3, "unknown key 'likes'; expected conversation, user"),
        (("candidates", 0, "thumb"), 1, "unknown key 'candidates.0.thumb'"),
        (("candidates",), [], "candidates is []: expected at least 1"),
        (("candidates", 0, "text"), None, "candidates.0.text is None: expected a valid string"),
        (("candidates", 0, "model"), "", "candidates.0.model is ''"),
        (("candidates", 0, "stars"), 6, "candidates.0.stars is 6: expected"),
        (("candidates", 0, "stars"), True, "candidates.0.stars is True"),
        (("candidates", 0, "time"), float("nan"), "not JSON: NaN is no number"),
        (("candidates", 0, "time"), "1700000004", "candidates.0.time is '1700000004'"),
        (("candidates", 0, "time"), 1700000004000, "candidates.0.time is 1700000004000: expected unix seconds"),
        (("closed",), 1700003600 * 10**6, "in microseconds it is in 2023, so divide by 1,000,000"),
        (("wrote_again",), "noon", "wrote_again is 'noon': expected ISO 8601"),
        (("edit",), {"text": "x", "value": "y", "time": 1}, "edit: text 'x' and value 'y' differ"),
        (("messages", 0), {"role": "tool", "text": "x", "time": 1}, "messages.0: role is 'tool': expected one of"),
        (("candidates", 0, "time"), 1699999999, "candidate 0 is at 1699999999.000, before message 0"),
        (("candidates", 0, "text"), "\ud800", 'holds a lone surrogate after \'0}], "candidates": [{"text": "\''),
        (("turn",), "\udc00", "holds a lone surrogate after"),
        (("candidates", 1, "model"), "m\udfff", "holds a lone surrogate after"),
        (("messages", 0, "speaker"), "a:b", "contains ':'"),
        (("messages", 0), "hello", "messages.0 is 'hello'"),
        (("character",), " ", "expected a non-empty name"),
        (("kept",), 2, "kept is 2: expected one of the 2 candidates"),
        (("kept",), -1, "kept is -1"),
        (("kept",), True, "kept is True"),
        (("edit",), {"text": "x", "time": 1700000010}, "expected a time between the kept reply and closed"),
        (("edit",), {"text": "x"}, "missing edit.time"),
        (("wrote_again",), 1700000005, "wrote_again is at 1700000005.000, before candidate 1"),
        (("closed",), 1700000030, "closed is at 1700000030.000, before wrote_again"),
    ],
)
def test_what_is_no_event_is_refused_with_its_reason(path: tuple[Any, ...], value: object, reason: str) -> None:
    event = documented()
    at: Any = event
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    with pytest.raises(RecordError) as caught:
        read_event(line(event))
    assert reason in str(caught.value)


@pytest.mark.parametrize("key", [name for name, field in FeedbackEvent.model_fields.items() if field.is_required()])
def test_a_missing_key_is_named(key: str) -> None:
    event = documented()
    del event[key]
    with pytest.raises(RecordError, match=f"missing {key}"):
        read_event(line(event))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300)
@given(data=st.data())
def test_any_other_json_is_an_event_or_a_reason(data: st.DataObject) -> None:
    event = copy.deepcopy(documented())
    at: Any = event
    while True:
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if not isinstance(at[key], dict | list) or not at[key] or data.draw(st.booleans()):
            at[key] = data.draw(JSON)
            break
        at = at[key]
    try:
        outcome: FeedbackEvent | str = read_event(line(event))
    except RecordError as error:
        outcome = str(error)
    assert isinstance(outcome, FeedbackEvent) or 0 < len(outcome) < 400


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b'{"user": ' * 5000 + b"1" + b"}" * 5000, b'{"user": "\xff"}', b"null", b'{"a": 1e999}', b"\x00"],
)
def test_broken_lines_are_refused(content: bytes) -> None:
    with pytest.raises(RecordError):
        read_event(content)


def test_made_up_events_are_events(make_feedback_log: Callable[..., Any]) -> None:
    for event in make_feedback_log(0, 40).events:
        assert read_event(line(event)).model_dump(mode="json", exclude_unset=True) == event
