"""hh-rlhf transcripts as dialogues."""

import json
from pathlib import Path

from data.format.dialogue import Dialogue, Message
from data.sources.hh_rlhf import HhRlhfSource
from data.sources.record import Rejected


def test_chosen_transcripts_become_dialogues(tmp_path: Path) -> None:
    path = tmp_path / "hh.jsonl"
    chosen = "\n\nHuman: Hi, Assistant: are you there?\n\nAssistant: Yes.\nTwo lines."
    path.write_text(json.dumps({"chosen": chosen, "rejected": ""}) + "\n" + json.dumps({"chosen": "Hi"}) + "\n")
    good, bad = HhRlhfSource(kind="hh_rlhf", path=str(path), human="User", assistant="Zed").read()
    messages = (Message("User", "Hi, Assistant: are you there?"), Message("Zed", "Yes.\nTwo lines."))
    assert good == Dialogue("hh.jsonl@0", messages, "Zed")
    assert isinstance(bad, Rejected)
    assert bad.line == 2


def test_flags_in_metadata_keep_the_assistant_out_of_the_loss(tmp_path: Path) -> None:
    path = tmp_path / "hh.jsonl"
    record = {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes", "metadata": {"weight": 0}}
    path.write_text(f"{json.dumps(record)}\n{json.dumps({**record, 'weight': 1})}\n")
    untrained, bad = HhRlhfSource(kind="hh_rlhf", path=str(path)).read()
    assert isinstance(untrained, Dialogue) and not untrained.messages[1].is_trained
    assert isinstance(bad, Rejected) and "weight and metadata.weight contradict" in bad.reason
