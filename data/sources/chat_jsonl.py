"""Own chat logs: lines of id, messages (speaker, text, time?, metadata?), character?, participants?, and metadata?."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from data.format.dialogue import NARRATOR, Dialogue
from data.sources.character import any_speaker
from data.sources.chat_message import supervised
from data.sources.chat_record import ChatRecord, participant_ids, take_messages
from data.sources.json_source import JsonFormat, JsonSource
from data.sources.record import RecordError
from data.sources.record_keys import RECORD_ALIASES
from data.sources.speaker import ASSISTANT, SYSTEM, USER, RoleNames, check_names, is_tool, role_of, stripped

_KEYS = (*RECORD_ALIASES, "character", "participants", "metadata")


class ChatJsonlFormat(JsonFormat):
    """One dialogue per record, with the keys and aliases of data/sources/record_keys.py. `participants` are ids of the
    people in it, for splits by participant: a list, or an object from speaker to id, without the character's own id.
    `time` is in unix seconds or ISO 8601; a scene or a character definition is a message by the speaker narrator."""

    kind: Literal["chat_jsonl"]
    # The character of records that name none. null: the assistant if messages have roles, else one of the speakers,
    # chosen by a hash of the id; never a user or a system.
    character: str | None = None
    # Whether a dialogue ends because the partner stopped writing. Set false for excerpts and truncated logs: the last
    # reply then has no engagement label.
    ends_when_partner_leaves: bool = True

    @property
    def end_means_partner_left(self) -> bool:
        return self.ends_when_partner_leaves

    def dialogue(self, place: str, record: dict[str, Any]) -> Dialogue:
        if "id" not in record and "conversation_id" not in record:
            raise RecordError("id is missing: expected a non-empty string")
        identity = self._identity(place, record)
        character = stripped(record.pop("character", None) or self.character)
        names = RoleNames("User", character or "Assistant")
        chat = take_messages(record, names, needs_role=False, keeps_other_keys=False)
        participants, metadata = record.pop("participants", []), record.pop("metadata", {})
        if record:
            raise RecordError(f"unknown key {min(record)[:80]!r}; expected {', '.join(_KEYS)}")
        if not isinstance(metadata, dict):
            raise RecordError(f"metadata is {type(metadata).__name__}: expected an object")
        named = character or chat.last_assistant()
        character = named or _any_speaker(identity, chat)
        check_names([one.message.speaker for one in chat.messages], character)
        messages = supervised(chat.messages, character, chat.trained)
        return Dialogue(identity, messages, character, participant_ids(participants, named), metadata)


class ChatJsonlSource(ChatJsonlFormat, JsonSource):
    """Files with one dialogue per line."""

    suffixes: ClassVar = (".jsonl",)

    kind: Literal["chat_jsonl"]


def _any_speaker(identity: str, chat: ChatRecord) -> str:
    """A speaker without the role of a user or a system and without the name of such a role; one with the name of an
    assistant if there is one."""
    everybody = {one.message.speaker for one in chat.messages} - {NARRATOR}
    people = {one.message.speaker for one in chat.messages if one.role in (USER, SYSTEM)}
    people |= {name for name in everybody if is_tool(name) or role_of(name) in (USER, SYSTEM)}
    people.discard(NARRATOR)
    speakers: Sequence[str] = sorted(everybody - people)
    if not speakers:
        writes = " and ".join(["the narrator", *sorted(people)]) if people else "the narrator"
        raise RecordError(
            f"nobody to train: only {writes} {'write' if people else 'writes'}; name a character, in the record or in "
            "the recipe, or give the replies the role assistant"
        )
    return any_speaker(identity, [name for name in speakers if role_of(name) == ASSISTANT] or speakers)
