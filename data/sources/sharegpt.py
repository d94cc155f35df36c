"""Conversations in the format of ShareGPT: {"conversations": [{"from": "human", "value": ...}, ...]}."""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from data.dialogue import NARRATOR, Dialogue, Message
from data.sources.corpus_file import CorpusFile
from data.sources.corpus_source import RecordSource, json_records, object_of
from data.sources.source import RecordError


class SharegptSource(RecordSource):
    """A conversation an element of a .json list, or a line of .jsonl. What system says is the narrator's. The character
    is the assistant. Another `from` (a tool's, say) makes a bad record. Other keys of the record become metadata."""

    suffixes: ClassVar = (".json", ".jsonl")

    kind: Literal["sharegpt"]
    user: str = "User"  # the names of the two speakers
    assistant: str = "Assistant"

    def records(self, file: CorpusFile) -> Iterator[tuple[int, Any]]:
        return json_records(file)

    def dialogue(self, file: CorpusFile, place: int | str, record: Any) -> Dialogue:
        fields = object_of(record)
        given = fields.pop("conversations", None)
        if not isinstance(given, list):
            raise RecordError(f"conversations is {type(given).__name__}, expected a list; found keys {sorted(fields)}")
        speakers = {"system": NARRATOR, **dict.fromkeys(("human", "user"), self.user)}
        speakers |= dict.fromkeys(("gpt", "chatgpt", "assistant"), self.assistant)
        for number, turn in enumerate(given):
            if turn.get("from") not in speakers:
                raise RecordError(f"turn {number}: from is {turn.get('from')!r}, expected one of {', '.join(speakers)}")
        messages = tuple(Message(speakers[turn["from"]], turn["value"]) for turn in given)
        if not any(message.speaker == self.assistant for message in messages):
            raise RecordError("no turn is from gpt, whose replies are to be trained")
        identity = str(fields.pop("id", f"{file.name}:{place}"))
        return Dialogue(identity, messages, self.assistant, (), fields)
