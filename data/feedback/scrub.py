"""Scrubs feedback events as data/clean/scrub.py scrubs dialogues, before turns become pairs and labels."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import groupby

from data.clean.scrub import Scrub, renamed_speakers, scrub_id, scrub_text
from data.feedback.conversation import LoggedTurn
from data.feedback.event import FeedbackEvent


def scrub_turns(logged: Iterable[LoggedTurn], settings: Scrub, counts: Counter[str]) -> list[LoggedTurn]:
    """One user's turns with scrubbed texts, speakers and ids; a speaker keeps one name in a conversation. The user's
    own id is not written anywhere and stays. Adds replacements to `counts`."""
    scrubbed = []
    for _, turns in groupby(sorted(logged, key=_conversation), key=_conversation):
        conversation = list(turns)
        names = (name for turn in conversation for name in _speakers(turn.event))
        speakers = renamed_speakers(dict.fromkeys(names), settings, counts)
        scrubbed += [replace(turn, event=_scrub_event(turn.event, speakers, settings, counts)) for turn in conversation]
    return scrubbed


def _conversation(turn: LoggedTurn) -> str:
    return turn.event.conversation


def _speakers(event: FeedbackEvent) -> Iterable[str]:
    return (*(message.speaker for message in event.messages), event.character)


def _scrub_event(
    event: FeedbackEvent, speakers: Mapping[str, str], settings: Scrub, counts: Counter[str]
) -> FeedbackEvent:
    def clean(text: str) -> str:
        return scrub_text(text, settings, counts)

    def name(speaker: str) -> str:
        return speakers.get(speaker, speaker)

    mentioned: Counter[str] = Counter()  # ids that are counted where they are a turn's own
    return event.model_copy(
        update={
            "conversation": scrub_id(event.conversation, settings, mentioned),
            "turn": scrub_id(event.turn, settings, counts),
            "after": event.after and scrub_id(event.after, settings, mentioned),
            "character": name(event.character),
            "messages": tuple(
                message.model_copy(update={"speaker": name(message.speaker), "text": clean(message.text)})
                for message in event.messages
            ),
            "candidates": tuple(
                candidate.model_copy(update={"text": clean(candidate.text)}) for candidate in event.candidates
            ),
            "edit": event.edit and event.edit.model_copy(update={"text": clean(event.edit.text)}),
        }
    )
