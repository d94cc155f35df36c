"""hh-rlhf: JSON lines with two "Human: ... Assistant: ..." transcripts. As a source, the chosen side's dialogues."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from data.dialogue import Dialogue, DialogueError, Message
from data.sources.source import DialogueSource, RecordError, Rejected, beginning, find_files, parse_object, read_lines

HUMAN, ASSISTANT = "Human", "Assistant"
_TURN = re.compile(rf"(?:^|\n\n)({HUMAN}|{ASSISTANT}):")


class HhRlhfSource(DialogueSource):
    """The chosen transcripts of hh-rlhf files. The character is the assistant."""

    kind: Literal["hh_rlhf"]
    path: str  # a .jsonl or .jsonl.gz file, or a directory of them
    human: str = HUMAN  # the names the two speakers get
    assistant: str = ASSISTANT

    def files(self) -> list[Path]:
        return find_files(self.path)

    def read(self) -> Iterator[Dialogue | Rejected]:
        names = {HUMAN: self.human, ASSISTANT: self.assistant}
        for path in self.files():
            for number, line in read_lines(path):
                try:
                    messages = parse_transcript(transcript_of(parse_object(line), "chosen"), names)
                    yield Dialogue(f"{path.name}:{number}", messages, self.assistant)
                except (RecordError, DialogueError) as error:
                    yield Rejected(str(path), number, str(error), beginning(line))


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
