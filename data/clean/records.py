"""From records to kept dialogues: bad records go to quarantine with a reason, and every record is counted."""

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from data.clean.language import Languages, other_language
from data.clean.ledger import Ledger
from data.clean.quarantine import Quarantine
from data.clean.repetition import Repetition, repeated
from data.clean.scrub import Scrub, scrub
from data.format.dialogue import DAY, NARRATOR, Dialogue, Message, time_precision
from data.format.visible_text import says_nothing
from data.sources.record import LeftOut, Rejected
from recipes.loader import Section

_N_EXAMPLES = 5  # bad records shown in an error


class CleanError(ValueError):
    """Too many bad records, or none left; the message names them and their place."""


class Filters(Section):
    """Dialogues that fail a filter are left out and counted. Narration counts neither as a speaker nor as a message."""

    min_messages: int = Field(default=2, ge=1)
    # null: no limit. Long dialogues are split into rows.
    max_messages: int | None = Field(default=None, ge=1)
    min_speakers: int = Field(default=2, ge=1)
    # Total characters of the messages.
    min_characters: int = Field(default=1, ge=1)
    max_characters: int | None = Field(default=None, ge=1)
    # Characters of the longest message, narration included.
    max_message_characters: int | None = Field(default=None, ge=1)
    languages: Languages | None = None
    repetition: Repetition | None = None

    @model_validator(mode="after")
    def _something_passes(self) -> Self:
        for what in ("messages", "characters"):
            low, high = getattr(self, f"min_{what}"), getattr(self, f"max_{what}")
            if high is not None and low > high:
                raise ValueError(f"min_{what} {low} is over max_{what} {high}: nothing would pass")
        return self


def without_bad(records: Iterable[Dialogue | LeftOut | Rejected], quarantine: Quarantine) -> Iterator[Dialogue]:
    """The dialogues of the records, in order; counts every record in the quarantine's ledger."""
    ledger = quarantine.ledger
    for record in records:
        ledger.read += 1
        if isinstance(record, Dialogue):
            yield record
        elif isinstance(record, LeftOut):
            ledger.filtered[record.reason] += 1
        else:
            quarantine.add(record)


def scrubbed(dialogues: Iterable[Dialogue], rule: Scrub, ledger: Ledger) -> Iterator[Dialogue]:
    """Scrub dialogues and count the replacements by kind."""
    for dialogue in dialogues:
        clean, counts = scrub(dialogue, rule)
        ledger.scrubbed.update(counts)
        yield clean


def passing(dialogues: Iterable[Dialogue], filters: Filters, ledger: Ledger) -> Iterator[Dialogue]:
    """The dialogues that pass the filters, without their blank messages."""
    for given in dialogues:
        dialogue = _without_blanks(given, ledger)
        reason = "nothing visible" if dialogue is None else _reason_against(dialogue, filters)
        if reason:
            ledger.filtered[reason] += 1
        elif dialogue:
            replies = [message for message in dialogue.messages if message.speaker == dialogue.character]
            n_timed = sum(message.time is not None for message in replies)
            precision = time_precision(dialogue) if n_timed else None
            ledger.replies += len(replies)
            ledger.timed_replies += 0 if precision is None else n_timed
            ledger.replies_by_day += n_timed if precision else 0
            yield dialogue


def check_bad_fraction(ledgers: Mapping[str, Ledger], max_bad_fraction: float, quarantine: Path, keep_as: Path) -> None:
    """Raise CleanError if too many records of any one source were quarantined; the quarantine is then kept as
    `keep_as`."""
    for source, ledger in ledgers.items():
        if ledger.quarantined > max_bad_fraction * ledger.read:
            os.replace(quarantine, keep_as)
            with open(keep_as, encoding="utf-8") as file:
                bad = (record for record in map(json.loads, file) if record["source"] == source)
                examples = [f"\n  {b['file']}:{b['line']}: {b['reason']}" for b in islice(bad, _N_EXAMPLES)]
            raise CleanError(
                f"source {source}: {ledger.quarantined:,} of {ledger.read:,} records are bad, more than "
                f"max_bad_fraction {max_bad_fraction:g}; all are in {keep_as}. The first:{''.join(examples)}"
            )


def check_times_for_labels(total: Ledger, continue_within_seconds: float | None) -> None:
    """Raise CleanError if the setting has no effect because no reply has a time, or no answer, or only dates."""
    if continue_within_seconds is None or not total.replies:
        return
    why = ""
    if not total.timed_replies:
        why = (
            f"none of the {total.replies:,} messages of the characters has a time in a dialogue where the partners' "
            "messages have one too. Give the messages of both a time"
        )
    elif continue_within_seconds < DAY and total.replies_by_day == total.timed_replies:
        why = (
            f"all times of the {total.replies:,} messages of the characters and of the answers are at midnight, dates "
            "without a time of day. Give the time of day, or more than 86,400 seconds"
        )
    if why:
        raise CleanError(
            f"continue_within_seconds: {continue_within_seconds:g} has no effect: {why}, or set "
            "continue_within_seconds: null, by which any later message of the partner counts"
        )


def content_key(dialogue: Dialogue) -> bytes:
    """A 16-byte hash of a dialogue's turns and texts; ids, names and times do not matter."""
    order: dict[str, int] = {}
    turns = [order.setdefault(message.speaker, len(order)) for message in dialogue.messages]
    texts = [message.text for message in dialogue.messages]
    shape = array("q", [len(turns), order.get(NARRATOR, -1), *turns, *map(len, texts)])
    return hashlib.sha256(shape.tobytes() + "".join(texts).encode()).digest()[:16]


def _without_blanks(dialogue: Dialogue, ledger: Ledger) -> Dialogue | None:
    """The dialogue without blank messages; None if its character has no other messages.

    A blank message still shows that its sender continued: if no other message shows when, the reply before it gets no
    engagement label.
    """
    if not any(says_nothing(message.text) for message in dialogue.messages):
        return dialogue
    messages: list[Message] = []
    reply: int | None = None  # the latest message, if the character wrote it
    answered_blank: set[int] = set()
    for message in dialogue.messages:
        by_character = message.speaker == dialogue.character
        by_partner = not by_character and message.speaker != NARRATOR
        if says_nothing(message.text):
            if by_partner and reply is not None:
                answered_blank.add(reply)
            continue
        if by_character:
            reply = len(messages)
        elif by_partner:
            reply = None
        messages.append(message)
    ledger.blank_messages += len(dialogue.messages) - len(messages)
    if not any(message.speaker == dialogue.character for message in messages):
        return None
    for number in answered_blank:
        if number == reply or messages[number].time is not None:
            messages[number] = messages[number].without_label()
    return replace(dialogue, messages=tuple(messages))


def _reason_against(dialogue: Dialogue, filters: Filters) -> str | None:
    """The first failed filter; the most expensive ones come last."""
    written = [message for message in dialogue.messages if message.speaker != NARRATOR]
    if len({message.speaker for message in written}) < filters.min_speakers:
        return f"fewer than {filters.min_speakers} speakers"
    if len(written) < filters.min_messages:
        return f"fewer than {filters.min_messages} messages"
    if filters.max_messages is not None and len(written) > filters.max_messages:
        return f"more than {filters.max_messages} messages"
    n_characters = sum(len(message.text) for message in written)
    if n_characters < filters.min_characters:
        return f"fewer than {filters.min_characters} characters"
    if filters.max_characters is not None and n_characters > filters.max_characters:
        return f"more than {filters.max_characters} characters"
    longest = filters.max_message_characters
    if longest is not None and any(len(message.text) > longest for message in dialogue.messages):
        return f"a message over {longest} characters"
    if filters.repetition and (measure := repeated(written, filters.repetition)):
        return f"too much repetition: {measure}"
    if filters.languages and (language := other_language(written, filters.languages)):
        return f"in another language: {language}"
    return None
