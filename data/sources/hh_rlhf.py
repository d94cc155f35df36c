"""hh-rlhf: JSON lines with two "Human: ... Assistant: ..." transcripts. As a source, the chosen side."""

import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from data.format.dialogue import Dialogue, Message
from data.sources.chat_message import ChatMessage, supervised
from data.sources.chat_record import take_system
from data.sources.json_source import JsonFormat, JsonSource
from data.sources.record import RecordError
from data.sources.record_keys import refuse_in_record, take_trained
from data.sources.speaker import check_default_names

HUMAN, ASSISTANT = "Human", "Assistant"
_TURN = re.compile(rf"(?:^|\n\n)({HUMAN}|{ASSISTANT}):")


class HhRlhfFormat(JsonFormat):
    """The transcript `chosen` of a record. The character is the assistant. A `system` prompt is the scene, a `prompt`
    that begins the transcript is ignored, and other keys become metadata."""

    kind: Literal["hh_rlhf"]
    human: str = HUMAN  # names of the two speakers
    assistant: str = ASSISTANT

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        check_default_names("human", self.human, "assistant", self.assistant)
        return self

    def dialogue(self, place: str, record: dict[str, Any]) -> Dialogue:
        names = {HUMAN: self.human, ASSISTANT: self.assistant}
        trained = take_trained(record)
        (said,) = take_transcripts(record, ("chosen",), names)
        messages = supervised([ChatMessage(message) for message in said], self.assistant, trained)
        return Dialogue(self._identity(place, record), messages, self.assistant, (), record)


class HhRlhfSource(HhRlhfFormat, JsonSource):
    """Files with a pair of transcripts per line."""

    suffixes: ClassVar = (".jsonl",)

    kind: Literal["hh_rlhf"]


def take_transcripts(
    record: dict[str, Any], sides: Sequence[str], names: dict[str, str] | None = None
) -> list[tuple[Message, ...]]:
    """Remove both transcripts and the prompts of a record; returns the messages of each of `sides`, the system prompt
    first.

    Raises RecordError or DialogueError for an unsupported key, an invalid transcript, and a `prompt` that is not the
    beginning of every side.
    """
    pair: dict[str, Any] = {side: record.pop(side) for side in ("chosen", "rejected") if side in record}
    refuse_in_record(record)
    scene = tuple(one.message for one in take_system(record, ()))
    prompt = record.pop("prompt", None)
    read = []
    for side in sides:
        transcript = transcript_of({**record, **pair}, side)
        read.append((*scene, *parse_transcript(transcript, names)))
        if prompt and not (isinstance(prompt, str) and transcript.lstrip().startswith(prompt.strip())):
            raise RecordError(
                f"prompt is not the beginning of {side}; found {repr(prompt)[:40]}. Put it into the transcripts, or "
                "into system, or remove it"
            )
    return read


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
