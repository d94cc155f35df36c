"""The log format of one turn, a JSON line, and its strict reader.

A turn is a reply of the character: the messages since the previous turn, the candidates that were shown, and how the
user reacted. A line refers to the turn that it continues, so the text of a conversation is logged once:

    {"conversation": "c81", "user": "u17", "turn": "t2", "after": "t1", "character": "Mia",
     "messages": [{"speaker": "Tom", "text": "where were you?", "time": 1700000000}],
     "candidates": [{"text": "out", "model": "mia-7b-0601", "time": 1700000004.5},
                    {"text": "At sea. Guess!", "model": "mia-7b-0601", "time": 1700000011, "stars": 5}],
     "kept": 1, "wrote_again": 1700000031, "closed": 1700003600}

| key            | holds                                                                                              |
|----------------|----------------------------------------------------------------------------------------------------|
| `conversation` | id of the conversation, which belongs to one user; unique among the conversations of a user         |
| `user`         | id of the person to whom the candidates were shown                                                 |
| `turn`         | id of this turn, unique in its conversation                                                        |
| `after`        | the turn whose kept reply this one continues; null for the first of a conversation                 |
| `character`    | the speaker of the candidates; it may change between turns, in a chat with several characters      |
| `messages`     | since the turn `after`, each with `speaker`, `text` and `time`: the user's, those of others, and   |
|                | at the beginning scene, definition (speaker `narrator`) and greeting; may be empty                 |
| `candidates`   | the replies shown, in order; each swipe or regeneration adds one. Each has `text`, `model` (name   |
|                | and version), `time` (when it was completely shown), and optionally the user's `stars`, 1 to 5     |
|                | (thumbs: 5 is up, 1 is down)                                                                       |
| `kept`         | the candidate, counted from 0, on display when the user wrote again or the line was written        |
| `edit`         | `text` and `time`, if the user rewrote the kept reply; the conversation continues with that text   |
| `wrote_again`  | when the user next wrote after this reply; null: not until `closed`                                |
| `closed`       | end of observation: when the line was written                                                      |

Times are unix seconds or ISO 8601. Messages, candidates and edits can have aliases of their keys, as every record
(data/sources/record_keys.py). Once the user has written again, the candidates of a turn are final: going back to swipe
an earlier reply, or to write or edit a message, starts a new turn with the same `after`, since its candidates answer
another context.
"""

import json
import re
import reprlib
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError

from data.format.dialogue import DialogueError, check_speaker
from data.sources.chat_message import READ_AS, read_text
from data.sources.record import RecordError
from data.sources.record_keys import MESSAGE_ALIASES, name_in, rename
from data.sources.source import parse_object
from data.sources.speaker import RoleNames, check_character, check_names, check_roles, stripped, take_speaker
from data.sources.unix_time import unix_seconds
from recipes.loader import Section

Time = Annotated[float, BeforeValidator(unix_seconds)]
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # where lone surrogates can occur


class LoggedMessage(Section):
    """A message between two turns."""

    speaker: str
    text: str
    time: Time


class Candidate(Section):
    """A reply that was shown."""

    text: str
    model: str = Field(min_length=1)
    time: Time
    stars: int | None = Field(default=None, ge=1, le=5)


class Edit(Section):
    """The user's edit of the kept reply."""

    text: str
    time: Time


class FeedbackEvent(Section):
    """One logged turn; the module's docstring documents the keys."""

    conversation: str = Field(min_length=1)
    user: str = Field(pattern=r"\S")  # a blank id would merge all users who have it
    turn: str = Field(min_length=1)
    after: str | None
    character: str
    messages: tuple[LoggedMessage, ...] = Field(strict=False)
    candidates: tuple[Candidate, ...] = Field(min_length=1, strict=False)
    kept: int = Field(ge=0)
    edit: Edit | None = None
    wrote_again: Time | None
    closed: Time

    def seen_seconds(self, number: int) -> float | None:
        """Seconds until the next candidate was shown; None for the last one."""
        if number + 1 == len(self.candidates):
            return None
        return self.candidates[number + 1].time - self.candidates[number].time


def read_event(line: bytes) -> FeedbackEvent:
    """The event of a line. Raises RecordError that says what the line is instead."""
    record = parse_object(line)
    if _SURROGATE.search(line):
        _check_encodable(record)
    _rename(record)
    try:
        event = FeedbackEvent.model_validate(record)
    except ValidationError as error:
        raise RecordError(_explain(error)) from None
    try:
        _check(event)
    except DialogueError as error:
        raise RecordError(str(error)) from None
    return event


def _rename(record: dict[str, Any]) -> None:
    """Rename aliases of the keys of messages, candidates and the edit, and convert roles to speakers and text parts to
    text, as in every record."""
    parts = {f"{key}.{i}": part for key in ("messages", "candidates") for i, part in _numbered(record.get(key))}
    for place, part in [*parts.items(), ("edit", record.get("edit"))]:
        if not isinstance(part, dict):
            continue
        try:
            text_key = name_in(part, "text", MESSAGE_ALIASES)
            rename(part, READ_AS, MESSAGE_ALIASES)
            if isinstance(part.get("text"), list):
                part["text"] = read_text(part["text"], text_key)
        except DialogueError as error:
            raise RecordError(f"{place}: {error}") from None
    if isinstance(record.get("character"), str):
        record["character"] = record["character"].strip()
    messages, character = record.get("messages"), record.get("character")
    if isinstance(messages, list) and all(isinstance(part, dict) for part in messages):
        _name_speakers(messages, character if isinstance(character, str) else "")


def _name_speakers(messages: list[dict[str, Any]], character: str) -> None:
    """Replace names and roles of messages by speakers. Raises RecordError for a role that is not known, and for a user
    or a system with the name of the character, or one like it."""
    given, names = [dict(part) for part in messages], RoleNames("User", character)
    roles: list[str | None] = []
    for i, part in enumerate(messages):
        role = None
        if not part.keys().isdisjoint({"name", "role", "from"}):
            try:
                part["speaker"], role = take_speaker(part, names)
            except DialogueError as error:
                raise RecordError(f"messages.{i}: {error}") from None
        elif "speaker" in part:
            part["speaker"] = stripped(part["speaker"])
        roles.append(role)
    speakers: list[Any] = [part.get("speaker") for part in messages]
    if not all(isinstance(speaker, str) for speaker in speakers):
        return  # the schema says which is none
    try:
        check_roles(roles, speakers, given, character)
        check_character(roles, speakers, character)
        check_names(speakers, character)
    except DialogueError as error:
        raise RecordError(str(error)) from None


def _numbered(parts: object) -> Iterator[tuple[int, Any]]:
    yield from enumerate(parts if isinstance(parts, list) else ())


def _check_encodable(record: dict[str, Any]) -> None:
    text = json.dumps(record, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        before = text[max(0, error.start - 30) : error.start]
        raise RecordError(f"holds a lone surrogate after {before!r}: not Unicode text") from None


def _check(event: FeedbackEvent) -> None:
    """Checks beyond types: valid speakers, `kept` exists, and nothing precedes its cause."""
    check_speaker(event.character)
    for message in event.messages:
        check_speaker(message.speaker)
    if event.kept >= len(event.candidates):
        raise RecordError(f"kept is {event.kept}: expected one of the {len(event.candidates)} candidates, from 0")
    if event.after == event.turn:
        raise RecordError(f"after is {event.after!r}: a turn cannot continue itself")
    latest, what = float("-inf"), ""
    for name, time in _times(event):
        if time < latest:
            raise RecordError(f"{name} is at {time:.3f}, before {what} at {latest:.3f}")
        latest, what = time, name
    if event.edit and not event.candidates[event.kept].time <= event.edit.time <= event.closed:
        raise RecordError(f"edit is at {event.edit.time:.3f}: expected a time between the kept reply and closed")


def _times(event: FeedbackEvent) -> Iterator[tuple[str, float]]:
    """Check the order of times."""
    yield from ((f"message {number}", message.time) for number, message in enumerate(event.messages))
    yield from ((f"candidate {number}", candidate.time) for number, candidate in enumerate(event.candidates))
    if event.wrote_again is not None:
        yield "wrote_again", event.wrote_again
    yield "closed", event.closed


def _explain(error: ValidationError) -> str:
    """The first problem: key, what was found, what was expected."""
    first: Any = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"missing {key}"
    if first["type"] == "value_error":  # of a time
        return f"{key} is {first['ctx']['error']}"
    if first["type"] == "extra_forbidden":
        known = ", ".join(FeedbackEvent.model_fields) if "." not in key else "the keys of data/feedback/event.py"
        return f"unknown key {key!r}; expected {known}"
    expected = first["msg"].removeprefix("Input should be ").removeprefix("Input should ")
    if first["type"] == "string_pattern_mismatch":
        expected = "text that is not blank"
    elif first["type"] in ("too_short", "string_too_short"):
        expected = f"at least {first['ctx']['min_length']}"
    return f"{key} is {reprlib.repr(first['input'])}: expected {expected[0].lower()}{expected[1:]}"
