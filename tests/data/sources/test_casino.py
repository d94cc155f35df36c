"""Negotiations: the character's aims alone are told, deals are spelled out, demographics are gone."""

import json
from pathlib import Path
from typing import Any

from data.format.dialogue import NARRATOR, Dialogue
from data.format.dialogue_json import to_json
from data.sources.casino import CasinoSource
from data.sources.record import Rejected

DEAL = {"issue2youget": {"Food": "1", "Water": "3"}, "issue2theyget": {"Food": "2", "Water": "0"}}


def person(high: str, low: str) -> dict[str, Any]:
    wants = {"High": high, "Medium": "Firewood", "Low": low}
    return {
        "value2issue": wants,
        "value2reason": {priority: f"my {issue} reason " for priority, issue in wants.items()},
        "outcomes": {"points_scored": 19, "satisfaction": "Undecided", "opponent_likeness": "Slightly like"},
        "demographics": {"age": 203, "ethnicity": "martian"},
        "personality": {"svo": "prosocial"},
    }


def event(agent: int, text: str, **task_data: Any) -> dict[str, Any]:
    return {"text": text, "task_data": task_data, "id": f"mturk_agent_{agent}"}


def read(tmp_path: Path, *records: Any) -> list[Any]:
    (tmp_path / "casino.json").write_text(json.dumps(records))
    return list(CasinoSource(kind="casino", path=str(tmp_path)).read())


def record(identity: int) -> dict[str, Any]:
    return {
        "dialogue_id": identity,
        "chat_logs": [
            event(1, "I am thirsty"),
            event(2, "So am I"),
            event(1, "Submit-Deal", **DEAL),
            event(2, "Accept-Deal", data="accept_deal"),
        ],
        "participant_info": {"mturk_agent_1": person("Food", "Water"), "mturk_agent_2": person("Water", "Food")},
        "annotations": [["I am thirsty", "self-need,small-talk"]],
    }


def test_a_negotiation(tmp_path: Path) -> None:
    (dialogue,) = read(tmp_path, record(7))
    assert isinstance(dialogue, Dialogue)
    aims, *said = dialogue.messages
    first, second = said[0].speaker, said[1].speaker
    assert [message.text for message in said] == [
        "I am thirsty",
        "So am I",
        "Submit-Deal: I get 1 food, 3 water; you get 2 food, 0 water",
        "Accept-Deal",
    ]
    assert said[0].metadata == {"strategies": ["self-need", "small-talk"]}
    assert said[1].metadata is None
    assert said[2].metadata == {"deal": DEAL}
    high = {first: "Food", second: "Water"}[dialogue.character]
    assert aims.speaker == NARRATOR
    assert aims.text.startswith(f"{dialogue.character} negotiates")
    assert f"\n{high} (high priority): my {high} reason\n" in aims.text
    people = dialogue.metadata["people"]
    assert people[first]["value2issue"]["High"] == "Food"
    assert people[second]["outcomes"]["satisfaction"] == "Undecided"
    assert b"martian" not in to_json(dialogue)
    assert b"203" not in to_json(dialogue)


def test_either_may_be_the_character(tmp_path: Path) -> None:
    dialogues = read(tmp_path, *(record(number) for number in range(40)))
    assert {d.character == d.messages[1].speaker for d in dialogues} == {True, False}


def test_bad_records_have_their_place(tmp_path: Path) -> None:
    good, bad = read(tmp_path, record(1), {"dialogue_id": 2})
    assert isinstance(good, Dialogue)
    assert isinstance(bad, Rejected)
    assert bad.line == "record 1"
    assert "participant_info" in bad.reason
