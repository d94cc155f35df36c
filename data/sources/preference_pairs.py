"""Preference pairs as dialogues: the context and the reply that was preferred, to train on before DPO does."""

from typing import Any, ClassVar, Literal

from data.format.dialogue import Dialogue, Message
from data.sources.chat_message import untrained
from data.sources.json_source import JsonFormat, JsonSource
from data.sources.preferences import pair_from_record
from data.sources.record_keys import take_trained


class PreferencePairsFormat(JsonFormat):
    """A pair a record, as data/sources/preferences.py writes it. The character is the pair's; what is known of the
    pair is in the metadata, its source as `pairs`, the rejected reply as `rejected`."""

    kind: Literal["preference_pairs"]

    def dialogue(self, place: str, record: dict[str, Any]) -> Dialogue:
        trained = take_trained(record)
        pair = pair_from_record(record)
        messages = (*pair.messages, Message(pair.character, pair.chosen))
        if trained is False:
            messages = tuple(untrained(m) if m.speaker == pair.character else m for m in messages)
        known = {"rejected": pair.rejected} | ({"pairs": pair.source} if pair.source else {})
        return Dialogue(pair.id, messages, pair.character, (), {**pair.metadata, **known})


class PreferencePairsSource(PreferencePairsFormat, JsonSource):
    """Files with a pair a line."""

    suffixes: ClassVar = (".jsonl",)

    kind: Literal["preference_pairs"]
