"""Topical-Chat (CDLA-Sharing-1.0): conversations of two about articles they read, rated turn by turn."""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from data.format.dialogue import Dialogue, Message
from data.sources.character import any_speaker
from data.sources.corpus_file import CorpusFile
from data.sources.corpus_source import RecordSource, json_of
from data.sources.first_names import first_names

_OF_A_TURN = ("sentiment", "knowledge_source", "turn_rating")


class TopicalChatSource(RecordSource):
    """The two agents get first names by a hash of the conversation's id; the character is one of them. Sentiment,
    knowledge source and rating are in each message's metadata, the ratings of the conversation in the dialogue's. The
    corpus does not identify people, so there are no participants."""

    suffixes: ClassVar = (".json",)

    kind: Literal["topical_chat"]

    def records(self, file: CorpusFile) -> Iterator[tuple[str, Any]]:
        return iter(json_of(file, dict).items())

    def dialogue(self, file: CorpusFile, place: int | str, record: dict[str, Any]) -> Dialogue:
        identity = str(place)
        agents = sorted({turn["agent"] for turn in record["content"]})
        seats = {agent: f"{identity} {agent}" for agent in agents}
        given = first_names(seats.values())
        names = {agent: given[seat] for agent, seat in seats.items()}
        messages = tuple(
            Message(names[turn["agent"]], turn["message"], metadata={key: turn[key] for key in _OF_A_TURN})
            for turn in record["content"]
        )
        ratings = {names[agent]: rating for agent, rating in record["conversation_rating"].items() if agent in names}
        metadata = {"ratings": ratings, "article_url": record["article_url"], "config": record["config"]}
        return Dialogue(identity, messages, names[any_speaker(identity, agents)], (), metadata)
