"""Times and disconnects survive; what is not said to the other is not a message; silent dialogues are left out."""

import json
from pathlib import Path
from typing import Any

from data.clean.scrub import HashedIds, Scrub, scrub
from data.format.dialogue import NARRATOR, Dialogue, Message
from data.format.dialogue_json import to_json
from data.sources.record import LeftOut, Rejected
from data.sources.star import StarSource


def event(agent: str, action: str, text: str, time: int, **more: Any) -> dict[str, Any]:
    return {"Agent": agent, "Action": action, "Text": text, "UnixTime": time} | more


SAID = [
    event("UserGuide", "instruct", "Be late.", 90),
    event("User", "utter", "I missed my bus", 100),
    event("Wizard", "request_suggestions", "Oh", 110),
    {"Agent": "KnowledgeBase", "Action": "return_item", "Item": {}},
    event("Wizard", "pick_suggestion", "Which line?", 120, ActionLabel="bus_ask_line"),
]


def record(events: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "DialogueID": 12,
        "AnonymizedUserWorkerID": "u-1",
        "AnonymizedWizardWorkerID": "w-2",
        "CompletionLevel": "EarlyDisconnectDuringDialogue",
        "Scenario": {"Domains": ["bus"], "UserTask": "Catch it.", "WizardTask": "Sell tickets."},
        "Events": events,
        "UserQuestionnaire": [{"Question": "Was it calm?", "Answer": False}],
        "WizardQuestionnaire": None,
    }


def read(tmp_path: Path, *records: Any) -> list[Any]:
    for number, content in enumerate(records):
        (tmp_path / f"{number}.json").write_text(json.dumps(content))
    return list(StarSource(kind="star", path=str(tmp_path)).read())


def test_what_is_said_and_what_is_known(tmp_path: Path) -> None:
    (dialogue,) = read(tmp_path, record(SAID))
    assert isinstance(dialogue, Dialogue)
    assert dialogue.messages == (
        Message(NARRATOR, "Sell tickets."),
        Message("User", "I missed my bus", 100),
        Message("Wizard", "Which line?", 120, {"action": "pick_suggestion", "label": "bus_ask_line"}),
    )
    assert (dialogue.id, dialogue.character) == ("12", "Wizard")
    assert dialogue.metadata["completion"] == "EarlyDisconnectDuringDialogue"
    assert dialogue.metadata["user_answers"] == {"Was it calm?": False}
    assert dialogue.metadata["wizard_answers"] == {}


def test_workers_are_hashed_and_by_the_recipe_once_more(tmp_path: Path) -> None:
    """The same worker has the same hash as user and as wizard, also after the recipe's rule."""
    swapped = record(SAID) | {"AnonymizedUserWorkerID": "w-2", "AnonymizedWizardWorkerID": "u-1"}
    dialogues = read(tmp_path, record(SAID), swapped)
    rule = Scrub(ids=HashedIds(salt="a salt of tests"))
    for one, other in (dialogues, [scrub(dialogue, rule)[0] for dialogue in dialogues]):
        people = {one.participants[0], other.participants[0]}
        assert len(people) == 2
        assert one.metadata["wizard"]["worker_id"] == other.participants[0] not in ("w-2", *one.participants)
        assert b"u-1" not in to_json(one) and b"w-2" not in to_json(one)
    assert {d.participants for d in dialogues}.isdisjoint(scrub(d, rule)[0].participants for d in dialogues)


def test_silent_and_disordered_dialogues(tmp_path: Path) -> None:
    alone, silent, disordered, broken = read(
        tmp_path, record(SAID[:2]), record(SAID[:1]), record(SAID[::-1]), {"Events": 3}
    )
    assert isinstance(alone, Dialogue)
    assert alone.character == "User"
    assert silent == LeftOut("nobody speaks")
    assert isinstance(disordered, Rejected)
    assert "20 s before" in disordered.reason
    assert isinstance(broken, Rejected)
    assert broken.file == str(tmp_path / "3.json")
