"""Dialogues and messages as JSON records and JSON lines."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from data.format.dialogue import Dialogue, DialogueError, Message
from data.sources.chat_message import read_messages, supervised
from data.sources.speaker import RoleNames


def to_json(dialogue: Dialogue) -> bytes:
    """One line of JSON in UTF-8 without line break; the inverse of `from_json`.

    Raises TypeError for metadata that JSON cannot represent, or an integer of more than 64 bits.
    """
    record = {
        "id": dialogue.id,
        "character": dialogue.character,
        "messages": [message_to_record(message) for message in dialogue.messages],
        "participants": list(dialogue.participants),
        "metadata": dict(dialogue.metadata),
        "source": dialogue.source,
    }
    return orjson.dumps(record)


def from_json(line: str | bytes) -> Dialogue:
    """The dialogue of a line written by `to_json`. Raises DialogueError that says what is wrong with the line."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DialogueError(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise DialogueError(f"expected a JSON object, found {type(record).__name__}")
    missing = [key for key in ("id", "character", "messages") if key not in record]
    if missing:
        raise DialogueError(f"missing {', '.join(missing)}; found the keys {sorted(record)}")
    return Dialogue(
        id=record["id"],
        messages=messages_from_records(record["messages"], record["character"]),
        character=record["character"],
        participants=tuple(record.get("participants", ())),
        metadata=record.get("metadata", {}),
        source=record.get("source", ""),
    )


def message_to_record(message: Message) -> dict[str, Any]:
    """The JSON object of a message, without an unknown time or absent metadata."""
    record: dict[str, Any] = {"speaker": message.speaker, "text": message.text}
    if message.time is not None:
        record["time"] = message.time
    if message.metadata is not None:
        record["metadata"] = dict(message.metadata)
    return record


def messages_from_records(records: object, character: str) -> tuple[Message, ...]:
    """Messages from a JSON list of {"speaker", "text", "time"?, "metadata"?}, or their aliases and training flags
    (data/sources/record_keys.py); `character` is the assistant. Raises DialogueError with the message's number."""
    read = read_messages(records, RoleNames("User", character), needs_role=False, keeps_other_keys=False)
    return supervised(read, character, None)


def read_dialogues(path: Path | str) -> Iterator[Dialogue]:
    """Dialogues of a JSONL file in order. Raises DialogueError naming file and line."""
    path = Path(path)
    if not path.is_file():
        raise DialogueError(f"{path}: no such file; expected dialogues as JSON lines")
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield from_json(line)
            except DialogueError as error:
                raise DialogueError(f"{path}:{number}: {error}") from None
