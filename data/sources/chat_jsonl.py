"""Own chat logs: lines of id, messages (speaker, text, time?, metadata?), character?, participants?, and metadata?."""

from typing import Any, ClassVar, Literal

from data.dialogue import NARRATOR, Dialogue, check_times
from data.dialogue_json import messages_from_records
from data.sources.character import any_speaker
from data.sources.json_source import JsonFormat, JsonSource
from data.sources.record import RecordError

_KEYS = {"id", "messages", "character", "participants", "metadata"}


class ChatJsonlFormat(JsonFormat):
    """One dialogue a record. `participants` are ids of the people who wrote, for splits by participant; `time` is in
    unix seconds; a scene or a character definition is a message by the speaker narrator."""

    kind: Literal["chat_jsonl"]
    # The character of records that name none: this speaker; null chooses one of the speakers by a hash of the id.
    character: str | None = None

    def dialogue(self, place: str, record: dict[str, Any]) -> Dialogue:
        unknown = sorted(set(record) - _KEYS)
        if unknown:
            raise RecordError(f"unknown key {unknown[0]!r}; expected {', '.join(sorted(_KEYS))}")
        messages = messages_from_records(record.get("messages"))
        check_times(messages)
        identity = record.get("id")
        if not isinstance(identity, str) or not identity:
            raise RecordError(f"id is {identity!r}: expected a non-empty string")
        participants = record.get("participants") or []
        if not isinstance(participants, list) or not all(isinstance(p, str) for p in participants):
            raise RecordError(f"participants is {participants!r}: expected a list of strings")
        metadata = record.get("metadata") or {}
        if not isinstance(metadata, dict):
            raise RecordError(f"metadata is {type(metadata).__name__}: expected an object")
        character = record.get("character") or self.character
        if character is None:
            speakers = sorted({m.speaker for m in messages} - {NARRATOR})
            if not speakers:
                raise RecordError("nobody but the narrator writes; name a character")
            character = any_speaker(identity, speakers)
        return Dialogue(identity, messages, character, tuple(participants), metadata)


class ChatJsonlSource(ChatJsonlFormat, JsonSource):
    """Files with one dialogue a line."""

    suffixes: ClassVar = (".jsonl",)

    kind: Literal["chat_jsonl"]
