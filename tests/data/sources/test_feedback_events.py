"""Feedback events as dialogues: the conversations as they ended, every line accounted for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.format.dialogue import Dialogue
from data.sources.feedback_events import FeedbackEventsSource
from data.sources.record import LeftOut, Rejected, SourceError


def event(turn: str, after: str | None, time: float, **changes: Any) -> dict[str, Any]:
    return {
        "conversation": "c", "user": "u", "turn": turn, "after": after, "character": "Mia",
        "messages": [{"speaker": "Tom", "text": f"to {turn}", "time": time}],
        "candidates": [{"text": "no", "model": "m", "time": time + 1}, {"text": turn, "model": "m", "time": time + 2}],
        "kept": 1, "wrote_again": None, "closed": time + 100, **changes,
    }  # fmt: skip


def read(tmp_path: Path, *lines: object) -> list[Dialogue | LeftOut | Rejected]:
    path = tmp_path / "log.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return list(FeedbackEventsSource(kind="feedback_events", path=str(path)).read())


def test_a_conversation_is_what_was_kept(tmp_path: Path) -> None:
    edited = event("b", "a", 10, edit={"text": "b\u2028!", "time": 13})
    (dialogue,) = read(tmp_path, edited, event("a", None, 0, character="Mia"))
    assert isinstance(dialogue, Dialogue)
    said = [(m.speaker, m.text, m.time) for m in dialogue.messages]
    assert said == [("Tom", "to a", 0), ("Mia", "a", 2), ("Tom", "to b", 10), ("Mia", "b\u2028!", 12)]
    assert dialogue.messages[1].metadata == {"model": "m"}
    assert dialogue.messages[3].metadata == {"model": "m", "edited": True}
    assert not any(message.is_supervised for message in dialogue.messages)
    assert dialogue.character == "Mia"
    (participant,) = dialogue.participants
    assert len(participant) == 16 and participant != "u"


def test_every_line_is_in_a_dialogue_or_has_a_reason(tmp_path: Path) -> None:
    first = event("a", None, 0)
    records = read(
        tmp_path, first, first, event("b", "a", 5), event("c", "a", 20), event("e", "d", 30), "{}", "nothing"
    )
    reasons = [record.reason for record in records if isinstance(record, LeftOut)]
    assert reasons == [
        "a line that was logged before",
        "what it continues is not in the log, or is quarantined",
        "a turn that was taken back",
    ]
    bad = [(record.line, record.reason) for record in records if isinstance(record, Rejected)]
    assert [line for line, _ in bad] == [6, 7]
    assert "missing conversation" in bad[0][1] and "not JSON" in bad[1][1]
    (dialogue,) = [record for record in records if isinstance(record, Dialogue)]
    assert [m.text for m in dialogue.messages] == ["to a", "a", "to c", "c"]


def test_made_up_logs_are_read_whole(tmp_path: Path, make_feedback_log: Callable[..., Any]) -> None:
    log = make_feedback_log(2, 20)
    records = read(tmp_path, *log.events)
    assert not [record for record in records if isinstance(record, Rejected)]
    conversations = {(e["user"], e["conversation"]) for e in log.events}
    assert sum(isinstance(record, Dialogue) for record in records) == len(conversations)
    ids = [record.id for record in records if isinstance(record, Dialogue)]
    assert len(set(ids)) == len(ids)


def test_a_missing_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file"):
        FeedbackEventsSource(kind="feedback_events", path=str(tmp_path / "none")).files()
