"""The demo's corpus, on sessions in its format: names, scene, times, ratings, and what a missing package says."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from data.clean.stable_hash import pseudonym
from data.format.dialogue import NARRATOR, Dialogue, Message
from data.format.dialogue_json import to_json
from data.sources.chitchat import ChitchatSource
from data.sources.first_names import FIRST_NAMES, first_names
from data.sources.record import Rejected, SourceError

U1, U2 = pseudonym("chitchat", "u1"), pseudonym("chitchat", "u2")


def session(**changes: Any) -> dict[str, Any]:
    def sent(text: str, second: int, sender: str) -> dict[str, str]:
        return {"text": text, "timestamp": f"2018-05-02T19:38:{second:02}Z", "sender": sender}

    return {
        "messages": [[sent("Hello", 15, "u1"), sent("How are you?", 20, "u1")], [sent("fine", 29, "u2")]],
        "ratings": {"witty": 10, "upbeat": 5},
        "start": "2018-05-03T01:38:01Z",
        "prompt": "What did you learn?",
    } | changes


def read(tmp_path: Path, sessions: Any, **settings: Any) -> list[Dialogue | Rejected]:
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps(sessions))
    return list(ChitchatSource(kind="chitchat", path=str(path), **settings).read())


def test_a_session_becomes_a_dialogue(tmp_path: Path) -> None:
    (dialogue,) = read(tmp_path, {"s": session()}, names="ids")
    assert isinstance(dialogue, Dialogue)
    start = 1525289895.0  # 2018-05-02T19:38:15Z
    assert dialogue.messages == (
        Message(NARRATOR, "What did you learn?"),
        Message(U1, "Hello", start),
        Message(U1, "How are you?", start + 5),
        Message(U2, "fine", start + 14),
    )
    assert dialogue.character in (U1, U2)
    assert dialogue.participants == (U1, U2)
    assert b'"u' not in to_json(dialogue)
    assert dialogue.metadata["ratings"] == {"witty": 10}, "5 is where the slider stands: no rating"


def test_choices_of_the_recipe(tmp_path: Path) -> None:
    sessions = {"a": session(), "b": session(prompt=""), "c": session(ratings=None)}
    named = [d for d in read(tmp_path, sessions) if isinstance(d, Dialogue)]
    assert [d.messages[0].speaker == NARRATOR for d in named] == [True, False, True]
    speakers = {d.messages[-1].speaker for d in named}
    assert len(speakers) == 1, "a participant keeps the name in every dialogue"
    assert speakers <= set(FIRST_NAMES)
    plain = [d for d in read(tmp_path, sessions, topic_as_scene=False) if isinstance(d, Dialogue)]
    assert all(d.messages[0].speaker != NARRATOR for d in plain)


def test_names_are_distinct_in_a_dialogue() -> None:
    for crowd in (2, 30, 150):
        names = first_names(f"user {i}" for i in range(crowd))
        assert len(set(names.values())) == crowd
    assert first_names(["x", "y"]) == first_names(["y", "x", "y"])


def test_characters_are_spread_over_both(tmp_path: Path) -> None:
    dialogues = read(tmp_path, {str(i): session() for i in range(60)}, names="ids")
    assert 15 < sum(isinstance(d, Dialogue) and d.character == U1 for d in dialogues) < 45


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (session(messages=[]), "no messages"),
        (session(messages=[[{"text": "x"}]]), "KeyError"),
        ([], "not a record"),
        (session(messages=[[{"text": "x", "sender": "a", "timestamp": "May"}]]), "ISO 8601"),
        (session(messages=[[{"text": None, "sender": "a", "timestamp": "2018-05-02T19:38:15Z"}]]), "text is NoneType"),
    ],
)
def test_bad_sessions_are_rejected_with_their_id(tmp_path: Path, bad: Any, reason: str) -> None:
    good, rejected = read(tmp_path, {"good": session(), "bad": bad})
    assert isinstance(good, Dialogue)
    assert isinstance(rejected, Rejected)
    assert rejected.line == "bad"
    assert reason in rejected.reason


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SourceError, match=r'pip install -e "\.\[demo\]"'):
        ChitchatSource(kind="chitchat").files()
    with pytest.raises(SourceError, match="no such file"):
        ChitchatSource(kind="chitchat", path=str(tmp_path / "none.json")).files()
    (bad,) = read(tmp_path, [])
    assert isinstance(bad, Rejected)
    assert "holds a list" in bad.reason
