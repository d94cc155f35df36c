"""Preference pairs as dialogues of the context and the reply that was chosen."""

import json
from pathlib import Path

from data.format.dialogue import Dialogue, Message, supervision
from data.sources.preference_pairs import PreferencePairsSource
from data.sources.preferences import NO_CONTEXT, PreferencePair, write_pairs
from data.sources.record import Rejected


def test_context_and_chosen_reply(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    context = (Message("Ann", "Hi", 1.5, {"stars": 5}), Message("Zed", "Yo"), Message("Ann", "Who?"))
    write_pairs(path, [PreferencePair("p1", context, "Zed", "Me.", "Go away.", "feedback", {"rule": "edit"})])
    record = json.loads(path.read_text())
    path.write_text(path.read_text() + '{"id": "p2", "messages": []}\n')
    good, bad = PreferencePairsSource(kind="preference_pairs", path=str(path)).read()
    metadata = {"rule": "edit", "rejected": "Go away.", "pairs": "feedback"}
    assert good == Dialogue("p1", (*context, Message("Zed", "Me.")), "Zed", (), metadata)
    assert isinstance(bad, Rejected)
    assert bad.line == 2
    assert "missing character, chosen, rejected" in bad.reason
    path.write_text(f"{json.dumps(record | {'weight': 0})}\n{json.dumps(record | {'messages': []})}\n")
    untrained, nobody = PreferencePairsSource(kind="preference_pairs", path=str(path)).read()
    assert isinstance(untrained, Dialogue)
    assert supervision(untrained)[0] == [False] * 4 and [m.text for m in untrained.messages][-1] == "Me."
    assert isinstance(nobody, Rejected) and nobody.reason == NO_CONTEXT
