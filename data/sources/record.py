"""The results of reading a source: valid dialogues, records left out, and records rejected with a reason."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from data.format.dialogue import Dialogue, DialogueError

MAX_CHARACTERS = 8 * 2**20  # largest message
MAX_DEPTH = 64  # of metadata: JSON readers and writers fail at about a thousand
_SHOWN_CHARACTERS = 500  # of a bad record, and of the reason
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
_BESIDE_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_DIGITS = bytes(ord("0") if chr(byte).isdigit() and byte < 128 else ord(" ") for byte in range(256))
_LONG_NUMBER = b"0" * 19
# What a malformed record raises.
_MALFORMED = (KeyError, TypeError, AttributeError, IndexError, ValueError, ArithmeticError, RecursionError)


class SourceError(ValueError):
    """A source that cannot be read at all; the message names the file or package and what to do."""


class RecordError(ValueError):
    """A record that cannot be a dialogue, with the reason. It is quarantined."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A record that is excluded from training on purpose; counted by its reason."""

    reason: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record that could not become a dialogue: its place, the reason, and its beginning."""

    file: str
    line: int | str  # the line of a text file, or the key of the record
    reason: str
    record: str


def read_record(
    make: Callable[[], Dialogue | LeftOut], file: str, line: Callable[[], int | str], record: Any
) -> Dialogue | LeftOut | Rejected:
    """The result of `make`, or the rejection; its place and text are only computed then."""
    try:
        made = make()
        if isinstance(made, Dialogue):
            check_dialogue(made)
        return made
    except (DialogueError, RecordError) as error:
        return rejected(file, line(), str(error), record)
    except SourceError:
        raise
    except _MALFORMED as error:
        return rejected(file, line(), f"not a record of this source: {error!r}", record)


def rejected(file: str, line: int | str, reason: str, record: Any) -> Rejected:
    """A record's rejection as writable text."""
    place = beginning(line) if isinstance(line, str) else line
    return Rejected(_writable(file), place, beginning(reason), beginning(record))


def beginning(record: Any) -> str:
    """The beginning of a bad record, for the quarantine file."""
    if isinstance(record, bytes):
        text = record[: 4 * _SHOWN_CHARACTERS].decode("utf-8", "replace")
    elif isinstance(record, str):
        text = record
    else:
        try:
            text = json.dumps(record, ensure_ascii=False, default=str)
        except (ValueError, TypeError, RecursionError):
            text = f"({type(record).__name__} that cannot be shown)"
    return _writable(text.rstrip("\r\n")[:_SHOWN_CHARACTERS])


def check_dialogue(dialogue: Dialogue) -> None:
    """Raise RecordError unless the dialogue can be written as UTF-8 JSON and has plausible sizes."""
    for number, message in enumerate(dialogue.messages):
        if len(message.text) > MAX_CHARACTERS:
            raise RecordError(f"message {number}: {len(message.text):,} characters; the limit is {MAX_CHARACTERS:,}")
    of_messages = [message.metadata for message in dialogue.messages if message.metadata is not None]
    if not dialogue.metadata and not of_messages and "".join((dialogue.id, *dialogue.participants)).isascii():
        return
    if _is_plain([dialogue.id, dialogue.participants, dialogue.metadata, of_messages]):
        return
    _check_value("id", dialogue.id)
    _check_value("participants", dialogue.participants)
    _check_value("metadata", dialogue.metadata)
    for number, message in enumerate(dialogue.messages):
        _check_value(f"message {number}: metadata", message.metadata)


def _is_plain(value: Any) -> bool:
    """A fast check that implies `_check_value`."""
    try:
        written = _ENCODER.encode(value).encode()
    except (TypeError, ValueError, RecursionError):
        return False
    brackets = written.translate(None, _BESIDE_BRACKETS)
    for _ in range(MAX_DEPTH):
        if not brackets:
            break
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")  # of the innermost level
    return not brackets and _LONG_NUMBER not in written.translate(_DIGITS)


def _check_value(what: str, value: Any, depth: int = 0) -> None:
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise RecordError(f"{what} holds a lone surrogate: not Unicode text")
    elif isinstance(value, bool) or value is None:
        pass
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**64:
            raise RecordError(f"{what} holds an integer of more than 64 bits")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise RecordError(f"{what} holds {value}: expected a finite number")
    elif depth >= MAX_DEPTH:
        raise RecordError(f"{what} is nested more than {MAX_DEPTH} levels deep")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise RecordError(f"{what} has the key {key!r}: expected a string")
            _check_value(what, key, depth + 1)
            _check_value(what, item, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_value(what, item, depth + 1)
    else:
        raise RecordError(f"{what} holds a {type(value).__name__}, which JSON cannot represent")


def _writable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")
