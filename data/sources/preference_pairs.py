"""Preference pairs as dialogues: the context and the preferred reply, to train on before DPO."""

from typing import Any, ClassVar, Literal

from data.format.dialogue import Dialogue, Message
from data.sources.chat_message import untrained
from data.sources.json_source import JsonFormat, JsonSource
from data.sources.preferences import check_pair_names, pair_from_record
from data.sources.record_keys import take_trained


class PreferencePairsFormat(JsonFormat):
    """One pair per record, as written by data/sources/preferences.py, with its character. The metadata has the other
    fields of the pair, its source as `pairs`, the rejected reply as `rejected`."""

    kind: Literal["preference_pairs"]

    def dialogue(self, place: str, record: dict[str, Any]) -> Dialogue:
        trained = take_trained(record)
        pair = pair_from_record(record, place)
        check_pair_names(pair)
        messages = (*pair.messages, Message(pair.character, pair.chosen))
        if trained is False:
            messages = tuple(untrained(m) if m.speaker == pair.character else m for m in messages)
        known = {"rejected": pair.rejected} | ({"pairs": pair.source} if pair.source else {})
        return Dialogue(pair.id, messages, pair.character, (), {**pair.metadata, **known})


class PreferencePairsSource(PreferencePairsFormat, JsonSource):
    """Files with one pair per line."""

    suffixes: ClassVar = (".jsonl",)

    kind: Literal["preference_pairs"]
