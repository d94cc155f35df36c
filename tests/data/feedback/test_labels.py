"""Labels for the scorer: what each rule says of a reply, and that dialogues carry them where they belong."""

import json
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.feedback.conversation import Conversation, LoggedTurn, join_turns
from data.feedback.event import read_event
from data.feedback.labels import (
    LabelSettings,
    capped,
    conversation_dialogue,
    reply_dialogue,
    stands_alone,
    verdicts,
)
from data.format.dialogue import LABEL_KEY, TRAINED_KEY, continuation_labels

MakeLog = Callable[..., Any]
WITHIN = 100.0


def conversations(events: Iterable[dict[str, Any]]) -> list[Conversation]:
    lines = (LoggedTurn(read_event(json.dumps(event).encode()), "log", number) for number, event in enumerate(events))
    return join_turns(lines).conversations


def talk(*changes: dict[str, Any], closed: float = 5000.0) -> Conversation:
    """One conversation of a turn every ten seconds; the last is followed by nothing until `closed`."""
    events = []
    for number, change in enumerate(changes):
        now = 10.0 * number
        event: dict[str, Any] = {
            "conversation": "c", "user": "u", "turn": f"t{number}", "after": f"t{number - 1}" if number else None,
            "character": "Mia", "messages": [{"speaker": "Tom", "text": f"hi {number}", "time": now}],
            "candidates": [{"text": f"a{number}", "model": "m", "time": now + 1}], "kept": 0,
            "wrote_again": now + 10 if number + 1 < len(changes) else None, "closed": closed,
        }  # fmt: skip
        events.append(event | change)
    (conversation,) = conversations(events)
    return conversation


def labels_of(conversation: Conversation, **changes: Any) -> list[int | str | None]:
    """The label of each reply shown, or the reason why it has none."""
    settings = LabelSettings(within_seconds=WITHIN, **changes)
    return [v.reason if v.label is None else v.label for v in verdicts(conversation, settings)]


def swiped(*times: float, kept: int = 1, **changes: Any) -> dict[str, Any]:
    shown = [{"text": f"s{i}", "model": "m", "time": time} for i, time in enumerate(times)]
    return {"candidates": shown, "kept": kept, **changes}


PLAIN: dict[str, Any] = {}
UNWATCHED, ENDS, LAST = "not watched long enough", "the log ends too early", "among the last replies of a session"


@pytest.mark.parametrize(
    ("conversation", "settings", "expected"),
    [
        (talk(PLAIN, PLAIN, PLAIN), {}, [1, 1, 0]),
        (talk(PLAIN, PLAIN, PLAIN), {"last_replies": 2}, [1, 0, 0]),
        (talk(PLAIN, PLAIN, PLAIN), {"last_replies": 2, "last_replies_are": "unlabeled"}, [1, LAST, LAST]),
        (talk(PLAIN, PLAIN, PLAIN), {"last_replies": 5}, [0, 0, 0]),
        # the product stopped watching before the user can be called gone
        (talk(PLAIN, PLAIN, PLAIN, closed=120.9), {}, [1, 1, UNWATCHED]),
        (talk(PLAIN, PLAIN, PLAIN, closed=121), {}, [1, 1, 0]),
        (talk(PLAIN, PLAIN, PLAIN, closed=120.9), {"last_replies": 2}, [1, UNWATCHED, UNWATCHED]),
        # the user wrote on, but the log holds no further turn
        (talk(PLAIN, {"wrote_again": 12}), {}, [1, 1]),
        (talk(PLAIN, {"wrote_again": 12}), {"last_replies": 2}, [1, ENDS]),
        # a session ends where the user comes back too late
        (talk(PLAIN, {"wrote_again": 200}), {}, [1, 0]),
        (talk(PLAIN, {"wrote_again": 200}), {"last_replies": 2}, [0, 0]),
        (talk(PLAIN, {"wrote_again": 111}), {}, [1, 1]),
        # asked for another, and wrote on
        (talk(swiped(1, 5), PLAIN), {}, [0, 1, 0]),
        (talk(swiped(1, 5), PLAIN), {"not_kept_are": "unlabeled"}, ["not kept", 1, 0]),
        (talk(swiped(1, 5), PLAIN), {"min_seen_seconds": 4.5}, ["swiped away unread", 1, 0]),
        (talk(swiped(1, 3, 8, kept=1), PLAIN), {}, [0, "kept after looking at others", 0, 0]),
        (
            talk({"candidates": [{"text": "s", "model": "m", "time": t} for t in (1, 5)], "kept": 1}, PLAIN),
            {},
            ["the same text as the kept reply", 1, 0],
        ),
        # the clock starts at the last reply on display
        (talk(PLAIN, swiped(11, 15, wrote_again=115)), {}, [1, 0, 1]),
        (talk({"edit": {"text": "x", "time": 2}}, PLAIN), {}, [0, 0]),
        (talk({"edit": {"text": "x", "time": 2}}, PLAIN), {"edited_are": "unlabeled"}, ["edited", 0]),
        (talk({"edit": {"text": "x", "time": 30}}, PLAIN), {}, [0, "an earlier reply was edited later"]),
        (talk({"character": "Rex"}, PLAIN, PLAIN), {}, ["by another character than the dialogue's", 1, 0]),
        (talk(PLAIN, PLAIN, {"after": "t0"}), {}, [1, "taken back", 0]),
        (talk({"candidates": [{"text": "\n", "model": "m", "time": 1}]}, PLAIN), {}, ["a blank reply", 0]),
    ],
)
def test_rules(conversation: Conversation, settings: dict[str, Any], expected: list[Any]) -> None:
    assert labels_of(conversation, **settings) == expected


def dialogues(conversation: Conversation, **changes: Any) -> tuple[Any, list[Any]]:
    found = list(verdicts(conversation, LabelSettings(within_seconds=WITHIN, **changes)))
    labels = {(v.turn.event.turn, v.number): v.label for v in found if v.label is not None}
    whole = conversation_dialogue(conversation, "p", labels)
    return whole, [reply_dialogue(v, "p", None) for v in found if stands_alone(v)]


def test_dialogues_carry_the_labels() -> None:
    greeting = [{"speaker": "Mia", "text": "welcome", "time": 0}, {"speaker": "Tom", "text": "hi", "time": 0}]
    edited = {"edit": {"text": "better", "time": 12}}
    whole, replies = dialogues(talk(swiped(1, 5, messages=greeting), edited, PLAIN))
    assert [m.text for m in whole.messages] == ["welcome", "hi", "s1", "hi 1", "better", "hi 2", "a2"]
    assert continuation_labels(whole) == [-1, -1, 1, -1, -1, -1, 0]
    assert [m.is_trained for m in whole.messages] == [True] * 7
    assert whole.messages[4].metadata == {LABEL_KEY: -1, "model": "m", "edited": True}
    assert [[m.text for m in d.messages] for d in replies] == [
        ["welcome", "hi", "s0"], ["welcome", "hi", "s1", "hi 1", "a1"]
    ]  # fmt: skip
    for reply in replies:
        labels = continuation_labels(reply)
        assert labels[:-1] == [-1] * (len(labels) - 1) and labels[-1] == 0
        assert [m.text for m in reply.messages if m.is_trained and m.speaker == "Mia"] == []
        assert reply.messages[-1].metadata == {LABEL_KEY: 0, TRAINED_KEY: False, "model": "m"}
        assert reply.participants == whole.participants == ("p",)
    assert len({whole.id, *(reply.id for reply in replies)}) == 3


@given(seed=st.integers(0, 10**6), most=st.none() | st.integers(1, 5), k=st.integers(1, 3))
def test_every_reply_has_one_verdict_and_every_label_one_place(
    make_feedback_log: MakeLog, seed: int, most: int | None, k: int
) -> None:
    log = make_feedback_log(seed, 1)
    settings = LabelSettings(within_seconds=WITHIN, last_replies=k, max_per_user=most)
    given_verdicts = {c.id: list(verdicts(c, settings)) for c in conversations(log.events)}
    flat = [verdict for part in given_verdicts.values() for verdict in part]
    final = capped(flat, settings.max_per_user, "u", 0)
    assert len(final) == len(log.shown_after)
    n_labels = sum(v.label is not None for v in flat)
    assert sum(v.label is not None for v in final) == (n_labels if most is None else min(most, n_labels))
    rest = iter(final)
    for conversation in conversations(log.events):
        part = [next(rest) for _ in given_verdicts[conversation.id]]
        labels = {(v.turn.event.turn, v.number): v.label for v in part if v.label is not None}
        whole = conversation_dialogue(conversation, "p", labels)
        alone = [reply_dialogue(v, "p", 4) for v in part if stands_alone(v)]
        placed = sorted(label for d in (whole, *alone) for label in continuation_labels(d) if label >= 0)
        assert placed == sorted(labels.values())
        for verdict in part:
            event = verdict.turn.event
            if verdict.label == 1:
                assert verdict.number == event.kept == len(event.candidates) - 1 and event.edit is None
                assert event.wrote_again is not None
                assert event.wrote_again - event.candidates[-1].time <= WITHIN
            assert verdict.label is not None or verdict.reason


@given(seed=st.integers(0, 10**6))
def test_the_dialogue_is_the_transcript_at_the_end(make_feedback_log: MakeLog, seed: int) -> None:
    """Of the latest turn's last candidate, what its reader saw before it is how the dialogue begins."""
    log = make_feedback_log(seed, 3)
    for conversation in conversations(log.events):
        event = conversation.path()[-1].event
        shown = log.shown_after[event.user, event.conversation, event.turn, len(event.candidates) - 1]
        dialogue = conversation_dialogue(conversation, "p", {})
        assert [(m.speaker, m.text) for m in dialogue.messages[:-1]] == list(shown)
        assert dialogue.messages[-1].text == (event.edit.text if event.edit else event.candidates[event.kept].text)
