"""Conversations in the format of the OpenAI chat API: {"messages": [{"role": ..., "content": ...}, ...]}."""

from typing import Any, Literal

from data.dialogue import NARRATOR, Dialogue, Message
from data.sources.json_source import JsonSource
from data.sources.source import RecordError


class OpenaiMessagesSource(JsonSource):
    """A conversation a line of .jsonl, or an element of a .json list. What system and developer say is the narrator's;
    a message's `name`, where given, is its speaker. The character is the assistant. What is not text (tool calls and
    results, images) makes a bad record. Other keys of the record become metadata."""

    kind: Literal["openai_messages"]
    user: str = "User"  # the names of the speakers that have none
    assistant: str = "Assistant"

    def dialogue(self, place: str, record: dict[str, Any]) -> Dialogue:
        given = record.pop("messages", None)
        if not isinstance(given, list):
            raise RecordError(f"messages is {type(given).__name__}, expected a list; found keys {sorted(record)}")
        speakers = {"system": NARRATOR, "developer": NARRATOR, "user": self.user, "assistant": self.assistant}
        messages = []
        character = None
        for number, message in enumerate(given):
            role = message.get("role")
            if role not in speakers:
                raise RecordError(f"message {number}: role is {role!r}, expected one of {', '.join(speakers)}")
            speaker = message.get("name") or speakers[role]
            character = speaker if role == "assistant" else character
            messages.append(Message(speaker, _text(number, message)))
        if character is None:
            raise RecordError("no message has the role assistant, whose replies are to be trained")
        identity = str(record.pop("id", place))
        return Dialogue(identity, tuple(messages), character, (), record)


def _text(number: int, message: dict[str, Any]) -> str:
    """The content: a string, or a list of parts of type text."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    kinds = [part.get("type") for part in content or ()]
    if not kinds or set(kinds) != {"text"}:
        raise RecordError(f"message {number}: content is {kinds or content!r}, expected text")
    return "".join(part["text"] for part in content or ())
