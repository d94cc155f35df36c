"""hh-rlhf: JSON lines with two "Human: ... Assistant: ..." transcripts. As a source, the chosen side."""

import re
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from data.format.dialogue import Dialogue, Message
from data.sources.chat_message import ChatMessage, supervised
from data.sources.json_source import JsonFormat, JsonSource
from data.sources.record import RecordError
from data.sources.record_keys import REFUSED_IN_RECORD, refuse, take_trained

HUMAN, ASSISTANT = "Human", "Assistant"
REFUSED = {key: why for key, why in REFUSED_IN_RECORD.items() if key not in ("chosen", "rejected")}
_TURN = re.compile(rf"(?:^|\n\n)({HUMAN}|{ASSISTANT}):")


class HhRlhfFormat(JsonFormat):
    """The transcript `chosen` of a record. The character is the assistant. Other keys become metadata."""

    kind: Literal["hh_rlhf"]
    human: str = HUMAN  # names of the two speakers
    assistant: str = ASSISTANT

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        if self.human == self.assistant:
            raise ValueError(f"human and assistant are both {self.human!r}: both would be trained as the character")
        return self

    def dialogue(self, place: str, record: dict[str, Any]) -> Dialogue:
        names = {HUMAN: self.human, ASSISTANT: self.assistant}
        read = [ChatMessage(message) for message in parse_transcript(transcript_of(record, "chosen"), names)]
        messages = supervised(read, self.assistant, take_trained(record))
        identity = self._identity(place, record)
        refuse(record, REFUSED)
        metadata = {key: value for key, value in record.items() if key not in ("chosen", "rejected")}
        return Dialogue(identity, messages, self.assistant, (), metadata)


class HhRlhfSource(HhRlhfFormat, JsonSource):
    """Files with a pair of transcripts per line."""

    suffixes: ClassVar = (".jsonl",)

    kind: Literal["hh_rlhf"]


def transcript_of(record: dict[str, Any], side: str) -> str:
    """The text of one side. Raises RecordError if it is missing."""
    transcript = record.get(side)
    if not isinstance(transcript, str):
        raise RecordError(f"{side} is {type(transcript).__name__}, expected a transcript; found keys {sorted(record)}")
    return transcript


def parse_transcript(transcript: str, names: dict[str, str] | None = None) -> tuple[Message, ...]:
    """Messages of a "\\n\\nHuman: ...\\n\\nAssistant: ..." text, each stripped of surrounding white space."""
    parts = _TURN.split(transcript)
    if len(parts) < 3 or parts[0].strip():
        raise RecordError(f"expected a transcript that begins with 'Human:', found {transcript[:60]!r}")
    return tuple(
        Message((names or {}).get(speaker, speaker), text.strip())
        for speaker, text in zip(parts[1::2], parts[2::2], strict=True)
    )
