"""Conversations in the format of ShareGPT: {"conversations": [{"from": "human", "value": ...}, ...]}."""

from typing import Any, Literal

from data.dialogue import NARRATOR, Dialogue, Message
from data.sources.json_source import JsonSource
from data.sources.source import RecordError


class SharegptSource(JsonSource):
    """A conversation an element of a .json list, or a line of .jsonl. What system says is the narrator's. The character
    is the assistant. Another `from` (a tool's, say) makes a bad record. Other keys of the record become metadata."""

    kind: Literal["sharegpt"]
    user: str = "User"  # the names of the two speakers
    assistant: str = "Assistant"

    def dialogue(self, place: str, record: dict[str, Any]) -> Dialogue:
        given = record.pop("conversations", None)
        if not isinstance(given, list):
            raise RecordError(f"conversations is {type(given).__name__}, expected a list; found keys {sorted(record)}")
        speakers = {"system": NARRATOR, **dict.fromkeys(("human", "user"), self.user)}
        speakers |= dict.fromkeys(("gpt", "chatgpt", "assistant"), self.assistant)
        for number, turn in enumerate(given):
            if turn.get("from") not in speakers:
                raise RecordError(f"turn {number}: from is {turn.get('from')!r}, expected one of {', '.join(speakers)}")
        messages = tuple(Message(speakers[turn["from"]], turn["value"]) for turn in given)
        if not any(message.speaker == self.assistant for message in messages):
            raise RecordError("no turn is from gpt, whose replies are to be trained")
        identity = str(record.pop("id", place))
        return Dialogue(identity, messages, self.assistant, (), record)
