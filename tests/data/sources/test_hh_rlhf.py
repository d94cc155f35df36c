"""hh-rlhf transcripts as dialogues."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.format.dialogue import Dialogue, DialogueError, Message
from data.sources.hh_rlhf import HhRlhfSource
from data.sources.preferences import PreferencePair, pair_from_transcripts
from data.sources.record import RecordError, Rejected


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


BEGINNING = "\n\nHuman: Hi\n\nAssistant:"


def both(tmp_path: Path, **keys: Any) -> tuple[Dialogue | Rejected, PreferencePair | str]:
    """A record as a dialogue and as a pair, or why it is none."""
    record = {"chosen": BEGINNING + " Yes", "rejected": BEGINNING + " No", **keys}
    path = tmp_path / "hh.jsonl"
    path.write_text(json.dumps(record))
    (made,) = HhRlhfSource(kind="hh_rlhf", path=str(path)).read()
    assert isinstance(made, Dialogue | Rejected)
    try:
        return made, pair_from_transcripts(record, "1")
    except (RecordError, DialogueError) as error:
        return made, str(error)


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_the_system_prompt_is_the_scene_of_the_dialogue_and_of_the_pair(tmp_path: Path, key: str) -> None:
    dialogue, pair = both(tmp_path, **{key: "Be brief."}, prompt=BEGINNING, topic="x")
    assert isinstance(dialogue, Dialogue) and isinstance(pair, PreferencePair)
    context = (Message("narrator", "Be brief."), Message("Human", "Hi"))
    assert dialogue.messages == (*context, Message("Assistant", "Yes"))
    assert (pair.messages, pair.chosen, pair.rejected) == (context, "Yes", "No")
    assert dialogue.metadata == {"topic": "x"}


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"prompt": "Hello"}, "prompt is not the beginning of chosen; found 'Hello'"),
        ({"prompt": [{"role": "user", "content": "Hi"}]}, "prompt is not the beginning of chosen"),
        ({"System": "Be brief."}, "System is not read: it differs from system in spelling only"),
        ({"instruction": "Be brief."}, "instruction is not read"),
        ({"system": ["x"]}, "system holds x"),
        ({"metadata": {"engagement_label": 1}}, "metadata.engagement_label is not read: it labels one reply"),
    ],
)
def test_what_the_model_would_not_read_is_refused_in_both(tmp_path: Path, keys: dict[str, Any], reason: str) -> None:
    dialogue, pair = both(tmp_path, **keys)
    assert isinstance(dialogue, Rejected) and isinstance(pair, str)
    assert dialogue.reason.startswith(reason) and pair.startswith(reason)
    empty, pair = both(tmp_path, **{key: "" for key in keys if key != "metadata"})
    assert isinstance(empty, Dialogue) and isinstance(pair, PreferencePair) and len(empty.messages) == 2
