"""CaSiNo (CC-BY-4.0): two campsite neighbors with different goals negotiate for food, water and firewood."""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from data.format.dialogue import NARRATOR, Dialogue, Message
from data.sources.character import any_speaker
from data.sources.corpus_file import CorpusFile
from data.sources.corpus_source import RecordSource, json_of
from data.sources.first_names import first_names

_OF_A_PERSON = ("value2issue", "value2reason", "outcomes", "personality")  # without demographics
_PRIORITIES = ("High", "Medium", "Low")


class CasinoSource(RecordSource):
    """The speakers get first names by a hash of the dialogue's id. The character is one of them; the narrator gives
    only the character's goals and reasons, because a serving prompt has no others. A deal is a message that spells it
    out. Goals, outcomes and personality are in the metadata, by name; demographics are not read. The corpus does not
    identify its participants."""

    suffixes: ClassVar = (".json",)

    kind: Literal["casino"]

    def records(self, file: CorpusFile) -> Iterator[tuple[str, Any]]:
        for number, record in enumerate(json_of(file, list)):
            yield f"record {number}", record

    def dialogue(self, file: CorpusFile, place: int | str, record: dict[str, Any]) -> Dialogue:
        identity = str(record["dialogue_id"])
        people = record["participant_info"]
        agents = sorted(people)
        seats = {agent: f"{identity} {agent}" for agent in agents}
        given = first_names(seats.values())
        names = {agent: given[seat] for agent, seat in seats.items()}
        character = any_speaker(identity, sorted({event["id"] for event in record["chat_logs"]}))
        strategies = {text: label.split(",") for text, label in record["annotations"]}
        aims = Message(NARRATOR, _aims(names[character], people[character]))
        said = (_message(names[event["id"]], event, strategies) for event in record["chat_logs"])
        metadata = {names[agent]: {key: people[agent][key] for key in _OF_A_PERSON} for agent in agents}
        return Dialogue(identity, (aims, *said), names[character], (), {"people": metadata})


def _aims(name: str, person: dict[str, Any]) -> str:
    wants = (
        f"{person['value2issue'][priority]} ({priority.lower()} priority): {person['value2reason'][priority].strip()}"
        for priority in _PRIORITIES
    )
    return "\n".join([f"{name} negotiates with a campsite neighbour for extra supplies.", *wants])


def _message(name: str, event: dict[str, Any], strategies: dict[str, list[str]]) -> Message:
    deal = event["task_data"]
    if not deal:
        text = event["text"]
        return Message(name, text, metadata={"strategies": strategies[text]} if text in strategies else None)
    if "issue2youget" not in deal:
        return Message(name, event["text"], metadata={"deal": deal})
    mine, yours = _amounts(deal["issue2youget"]), _amounts(deal["issue2theyget"])
    return Message(name, f"{event['text']}: I get {mine}; you get {yours}", metadata={"deal": deal})


def _amounts(issues: dict[str, str]) -> str:
    return ", ".join(f"{issues[issue]} {issue.lower()}" for issue in sorted(issues))
