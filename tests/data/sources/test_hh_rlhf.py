"""hh-rlhf transcripts as dialogues."""

import json
from pathlib import Path

from data.dialogue import Dialogue, Message
from data.sources.hh_rlhf import HhRlhfSource
from data.sources.source import Rejected


def test_chosen_transcripts_become_dialogues(tmp_path: Path) -> None:
    path = tmp_path / "hh.jsonl"
    chosen = "\n\nHuman: Hi, Assistant: are you there?\n\nAssistant: Yes.\nTwo lines."
    path.write_text(json.dumps({"chosen": chosen, "rejected": ""}) + "\n" + json.dumps({"chosen": "Hi"}) + "\n")
    good, bad = HhRlhfSource(kind="hh_rlhf", path=str(path), human="User", assistant="Zed").read()
    messages = (Message("User", "Hi, Assistant: are you there?"), Message("Zed", "Yes.\nTwo lines."))
    assert good == Dialogue("hh.jsonl@0", messages, "Zed")
    assert isinstance(bad, Rejected)
    assert bad.line == 2
