"""hh-rlhf: JSON lines with two "Human: ... Assistant: ..." transcripts. As a source, the chosen side's dialogues."""

import re
from typing import Any, ClassVar, Literal

from data.dialogue import Dialogue, Message
from data.sources.json_source import JsonSource
from data.sources.source import RecordError

HUMAN, ASSISTANT = "Human", "Assistant"
_TURN = re.compile(rf"(?:^|\n\n)({HUMAN}|{ASSISTANT}):")


class HhRlhfSource(JsonSource):
    """The chosen transcripts of hh-rlhf files. The character is the assistant."""

    suffixes: ClassVar = (".jsonl",)

    kind: Literal["hh_rlhf"]
    human: str = HUMAN  # the names the two speakers get
    assistant: str = ASSISTANT

    def dialogue(self, place: str, record: dict[str, Any]) -> Dialogue:
        names = {HUMAN: self.human, ASSISTANT: self.assistant}
        return Dialogue(place, parse_transcript(transcript_of(record, "chosen"), names), self.assistant)


def transcript_of(record: dict[str, Any], side: str) -> str:
    """The text of one side. Raises RecordError when it is missing."""
    transcript = record.get(side)
    if not isinstance(transcript, str):
        raise RecordError(f"{side} is {type(transcript).__name__}, expected a transcript; found keys {sorted(record)}")
    return transcript


def parse_transcript(transcript: str, names: dict[str, str] | None = None) -> tuple[Message, ...]:
    """Messages of a "\\n\\nHuman: ...\\n\\nAssistant: ..." text, white space around each text removed."""
    parts = _TURN.split(transcript)
    if len(parts) < 3 or parts[0].strip():
        raise RecordError(f"expected a transcript that begins with 'Human:', found {transcript[:60]!r}")
    return tuple(
        Message((names or {}).get(speaker, speaker), text.strip())
        for speaker, text in zip(parts[1::2], parts[2::2], strict=True)
    )
