"""Base of the formats whose speakers are roles: OpenAI's messages and ShareGPT's conversations."""

from typing import Any, Self

from pydantic import model_validator

from data.format.dialogue import Dialogue
from data.sources.chat_message import supervised
from data.sources.chat_record import participant_ids, take_messages
from data.sources.json_source import JsonFormat
from data.sources.record import RecordError
from data.sources.speaker import RoleNames, check_default_names, check_names


class RoleFormat(JsonFormat):
    """The system prompt is narration; a message's `name`, if given, is its speaker. The character is the last
    assistant. data/sources/record_keys.py lists the keys that are read or rejected; content that is not text (tool
    calls, images) makes a bad record. `participants` are as in chat_jsonl; other keys become metadata of the record or
    the message."""

    user: str = "User"  # default names of the speakers
    assistant: str = "Assistant"

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        check_default_names("user", self.user, "assistant", self.assistant)
        return self

    def dialogue(self, place: str, record: dict[str, Any]) -> Dialogue:
        chat = take_messages(record, RoleNames(self.user, self.assistant))
        character = chat.last_assistant()
        if character is None:
            raise RecordError("no message is by the assistant, whose replies are trained")
        check_names([one.message.speaker for one in chat.messages], character)
        messages = supervised(chat.messages, character, chat.trained)
        people = participant_ids(record.pop("participants", []), character)
        return Dialogue(self._identity(place, record), messages, character, people, record)
