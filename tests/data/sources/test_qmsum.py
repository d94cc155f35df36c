"""Meetings keep every speaker; transcriber's marks go; people are the same within a series of meetings."""

import json
from pathlib import Path

from data.format.dialogue import NARRATOR, Dialogue, Message
from data.sources.qmsum import QmsumSource
from data.sources.record import Rejected

MEETING = {
    "meeting_transcripts": [
        {"speaker": "Chair", "content": "{vocalsound} Shall we {disfmarker} begin ?"},
        {"speaker": "Hon. Ann Lee (North, Ind.)", "content": "{pause}"},
        {"speaker": "Clerk", "content": "Yes ."},
        {"speaker": "Chair", "content": "Good ."},
    ],
    "topic_list": [{"topic": "Opening", "relevant_text_span": [["0", "2"]]}],
    "general_query_list": [{"query": "Summarize", "answer": "They began."}],
    "specific_query_list": [],
}


def test_meetings(tmp_path: Path) -> None:
    for name in ("ES2002a", "ES2002b", "ES2003a", "covid_1", "covid_12", "Bro004"):
        (tmp_path / f"{name}.json").write_text(json.dumps(MEETING))
    (tmp_path / "broken.json").write_text("{}")
    records = list(QmsumSource(kind="qmsum", path=str(tmp_path)).read())
    meetings = {record.id: record for record in records if isinstance(record, Dialogue)}
    assert meetings["Bro004"].messages == (
        Message(NARRATOR, "A meeting.\nOpening"),
        Message("Chair", "Shall we begin ?"),
        Message("Hon. Ann Lee (North, Ind.)", ""),
        Message("Clerk", "Yes ."),
        Message("Chair", "Good ."),
    )
    assert meetings["Bro004"].character == "Chair"
    assert meetings["Bro004"].metadata["queries"] == MEETING["general_query_list"]
    people = {name: frozenset(meeting.participants) for name, meeting in meetings.items()}
    assert len(people["ES2002a"]) == 3
    assert people["ES2002a"] == people["ES2002b"]
    assert people["covid_1"] == people["covid_12"]
    assert people["ES2002a"].isdisjoint(people["ES2003a"] | people["covid_1"] | people["Bro004"])
    (bad,) = (record for record in records if isinstance(record, Rejected))
    assert bad.file == str(tmp_path / "broken.json")
    assert "meeting_transcripts" in bad.reason
