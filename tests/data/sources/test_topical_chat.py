"""Ratings of turns and of the whole survive; the two agents get names."""

import gzip
import json
from pathlib import Path
from typing import Any

from data.format.dialogue import Dialogue
from data.sources.first_names import FIRST_NAMES
from data.sources.record import Rejected
from data.sources.topical_chat import TopicalChatSource


def turn(agent: str, message: str, rating: str) -> dict[str, Any]:
    return {
        "message": message,
        "agent": agent,
        "sentiment": "Happy",
        "knowledge_source": ["FS1"],
        "turn_rating": rating,
    }


def test_a_conversation_keeps_its_ratings(tmp_path: Path) -> None:
    conversation = {
        "article_url": "https://example.org/a",
        "config": "C",
        "content": [turn("agent_2", "Do you ski?", "Good"), turn("agent_1", "Never.", "Poor")],
        "conversation_rating": {"agent_1": "Excellent", "agent_2": "Passable"},
    }
    broken = {"content": [{"message": "hi"}]}
    path = tmp_path / "valid_rare.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"t_1": conversation, "t_2": broken}).encode()))
    good, bad = TopicalChatSource(kind="topical_chat", path=str(tmp_path)).read()
    assert isinstance(good, Dialogue)
    second, first = (message.speaker for message in good.messages)
    assert first != second
    assert {first, second} <= set(FIRST_NAMES)
    assert good.character in (first, second)
    assert good.messages[1].metadata == {"sentiment": "Happy", "knowledge_source": ["FS1"], "turn_rating": "Poor"}
    assert good.metadata["ratings"] == {first: "Excellent", second: "Passable"}
    assert isinstance(bad, Rejected)
    assert bad.line == "t_2"
    assert "'agent'" in bad.reason
