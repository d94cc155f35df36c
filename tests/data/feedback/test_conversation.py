"""Logged turns as conversations: what stood before a candidate is what its reader saw, and no line is lost."""

import json
import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.feedback.conversation import Joined, LoggedTurn, Turn, join_turns
from data.feedback.event import read_event
from data.format.dialogue import NARRATOR

MakeLog = Callable[..., Any]


def join(events: Iterable[dict[str, Any]]) -> Joined:
    return join_turns(
        LoggedTurn(read_event(json.dumps(event).encode()), "log.jsonl", number)
        for number, event in enumerate(events, start=1)
    )


def turns_of(joined: Joined) -> list[Turn]:
    return [turn for conversation in joined.conversations for turn in conversation.turns]


def said(turn: Turn, number: int, max_messages: int | None = None) -> tuple[tuple[str, str], ...]:
    context = turn.context(turn.event.candidates[number].time, max_messages)
    return tuple((message.speaker, message.text) for message in context)


@given(seed=st.integers(0, 10**6))
def test_a_context_is_what_the_reader_saw(make_feedback_log: MakeLog, seed: int) -> None:
    log = make_feedback_log(seed, 4)
    joined = join(log.events)
    assert not joined.rejected and not joined.n_without_context and not joined.n_repeated
    seen = {}
    for turn in turns_of(joined):
        for number, candidate in enumerate(turn.event.candidates):
            event = turn.event
            seen[event.user, event.conversation, event.turn, number] = said(turn, number)
            for other in range(number):
                is_same = turn.edits_seen(candidate.time) == turn.edits_seen(event.candidates[other].time)
                assert is_same or said(turn, number) != said(turn, other) or _edit_changed_nothing(turn)
                assert not is_same or said(turn, number) == said(turn, other)
    assert seen == log.shown_after


def _edit_changed_nothing(turn: Turn) -> bool:
    """Whether some edit before it, which the numbers of edits count, left the text as it was."""
    while turn.edited_before is not None:
        turn = turn.edited_before
        if turn.event.edit and turn.event.edit.text == turn.event.candidates[turn.event.kept].text:
            return True
    return False


@given(seed=st.integers(0, 10**6), most=st.integers(1, 9))
def test_a_bounded_context_is_the_opening_and_the_end(make_feedback_log: MakeLog, seed: int, most: int) -> None:
    for turn in turns_of(join(make_feedback_log(seed, 3).events)):
        whole = said(turn, 0)
        opening = next((i for i, (speaker, _) in enumerate(whole) if speaker != NARRATOR), len(whole))
        expected = whole if len(whole) <= opening + most else (*whole[:opening], *whole[len(whole) - most :])
        assert said(turn, 0, most) == expected


@given(seed=st.integers(0, 10**6))
def test_the_order_of_the_lines_has_no_part_in_it(make_feedback_log: MakeLog, seed: int) -> None:
    events = make_feedback_log(seed, 3).events
    shuffled = random.Random(seed).sample(events, len(events))
    first, second = (
        [(c.user, c.id, [(t.event, t.messages) for t in c.turns], [t.event for t in c.path()]) for c in j.conversations]
        for j in (join(events), join(shuffled))
    )
    assert first == second


@given(seed=st.integers(0, 10**6), data=st.data())
def test_every_line_is_a_turn_or_counted(make_feedback_log: MakeLog, seed: int, data: st.DataObject) -> None:
    """With lines missing, logged twice, changed, and led in circles."""
    events = make_feedback_log(seed, 3).events
    kept = [event for event in events if data.draw(st.integers(0, 9)) > 0]
    for event in list(kept):
        change = data.draw(st.integers(0, 12))
        if change == 0:
            kept.append(event)
        elif change == 1:
            kept.append({**event, "character": "Somebody Else"})
        elif change == 2:
            event["after"] = data.draw(
                st.sampled_from([e["turn"] for e in events if e["turn"] != event["turn"]] or [None])
            )
    joined = join(kept)
    n_turns = len(turns_of(joined))
    assert n_turns + len(joined.rejected) + joined.n_without_context + joined.n_repeated == len(kept)
    for conversation in joined.conversations:
        placed: set[str] = set()
        for turn in conversation.turns:
            assert turn.event.after is None or turn.event.after in placed
            placed.add(turn.event.turn)


def event(turn: str, after: str | None, time: float, **changes: Any) -> dict[str, Any]:
    return {
        "conversation": "c", "user": "u", "turn": turn, "after": after, "character": "Mia",
        "messages": [{"speaker": "Tom", "text": f"to {turn}", "time": time}],
        "candidates": [{"text": f"reply {turn}", "model": "m", "time": time + 1}],
        "kept": 0, "wrote_again": None, "closed": time + 100, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("events", "placed", "reasons", "without_context"),
    [
        ([event("a", None, 0), event("b", "a", 5)], ["a", "b"], [], 0),
        ([event("b", "a", 5), event("c", "b", 9)], [], [], 2),  # the log begins in the middle of the conversation
        ([event("a", None, 0), event("b", "a", 0.5), event("c", "b", 9)], ["a"], ["before the previous reply"], 1),
        ([event("a", None, 0), event("b", "c", 5), event("c", "b", 9)], ["a"], ["lead back to itself"] * 2, 0),
        ([event("b", "c", 5), event("c", "b", 9), event("d", "c", 12)], [], ["lead back to itself"] * 2, 1),
        ([event("a", None, 0), event("a", None, 0, user="v")], ["a", "a"], [], 0),
        ([event("a", None, 0), event("a", None, 1)], ["a"], ["other content at log.jsonl:1"], 0),
    ],
)  # fmt: skip
def test_lines_that_fit_nowhere(
    events: list[dict[str, Any]], placed: list[str], reasons: list[str], without_context: int
) -> None:
    joined = join(events)
    assert [turn.event.turn for turn in turns_of(joined)] == placed
    assert len(joined.rejected) == len(reasons)
    for rejected, reason in zip(joined.rejected, reasons, strict=True):
        assert reason in rejected.reason
        assert rejected.file == "log.jsonl" and rejected.record.startswith('{"conversation":"c"')
    assert joined.n_without_context == without_context


def test_a_line_that_was_logged_twice_counts_once() -> None:
    joined = join([event("a", None, 0), event("a", None, 0)])
    assert (joined.n_repeated, len(turns_of(joined)), joined.rejected) == (1, 1, [])


def test_a_long_conversation_is_no_deep_recursion() -> None:
    events = [event(f"t{i}", f"t{i - 1}" if i else None, 10.0 * i) for i in range(5000)]
    (conversation,) = join(events).conversations
    assert len(conversation.path()) == 5000
    assert len(said(conversation.turns[-1], 0)) == 2 * 5000 - 1
    assert said(conversation.turns[-1], 0, 2) == (("Mia", "reply t4998"), ("Tom", "to t4999"))


def test_the_path_leaves_out_what_was_taken_back() -> None:
    events = [event("a", None, 0), event("b", "a", 5), event("c", "b", 10), event("d", "a", 20), event("e", "d", 30)]
    (conversation,) = join(events).conversations
    assert [turn.event.turn for turn in conversation.path()] == ["a", "d", "e"]
