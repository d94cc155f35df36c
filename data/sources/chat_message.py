"""The reader of chat messages as JSON objects, for every source of records and for the server."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from data.format.dialogue import TRAINED_KEY, DialogueError, Message, check_times
from data.sources.record_keys import (
    MESSAGE_ALIASES,
    MESSAGE_KEYS,
    REFUSED_IN_MESSAGE,
    name_in,
    refuse,
    refuse_misspelled,
    speaks_of_training,
    take,
    take_trained,
)
from data.sources.speaker import (
    OPENAI_ROLES,
    UNLISTED,
    RoleNames,
    check_character,
    check_roles,
    expected_keys,
    known_role,
    speaker_of,
    take_speaker,
)
from data.sources.unix_time import TimeError, unix_seconds


@dataclass(slots=True)  # not frozen, which takes three times as long to make; there is one per message read
class ChatMessage:
    """A message with its role (None if it has only a speaker), and its training flag."""

    message: Message
    role: str | None = None
    trained: bool | None = None


def openai_message(record: Mapping[str, Any], names: RoleNames) -> Message:
    """The message of an OpenAI role, name and content. Raises DialogueError that names the invalid one."""
    role, name = record.get("role"), record.get("name")
    return Message(speaker_of(known_role(role, "role", OPENAI_ROLES), name, names), read_text(record.get("content")))


def read_text(content: object, key: str = "content") -> str:
    """A message's text; text parts are joined by line breaks, as in vLLM, and no parts give an empty text. Errors call
    it `key`."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        found = "missing" if content is None else f"a value of type {type(content).__name__}"
        raise DialogueError(f"{key} is {found}: expected text or a list of text parts")
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise DialogueError(f"{key} holds {str(part)[:80]}: expected parts {{'type': 'text', 'text': ...}}")
    return "\n".join(part["text"] for part in content)


READ_AS: dict[str, Callable[[Any], Any]] = {"text": read_text, "time": unix_seconds}
"""For keys of a message: the value by which two values of aliases are compared."""


def read_messages(
    given: object, names: RoleNames, *, needs_role: bool, keeps_other_keys: bool
) -> tuple[ChatMessage, ...]:
    """The messages of a list of objects, with the keys of MESSAGE_ALIASES, `metadata` and the training flags.

    Without `needs_role` a message may have only a speaker, and where no message has a known role, unknown ones are
    speakers. Other keys become metadata with `keeps_other_keys`, and are an error otherwise. Raises DialogueError with
    the number of the message.
    """
    if not isinstance(given, list):
        raise DialogueError(f"messages is {type(given).__name__}: expected a list of objects")
    read: list[ChatMessage] = []
    for number, record in enumerate(given):
        try:
            read.append(_read(record, names, needs_role, keeps_other_keys))
        except DialogueError as error:
            raise DialogueError(f"message {number}: {error}") from None
    roles = [one.role for one in read]
    if UNLISTED in roles:
        check_roles(roles, [one.message.speaker for one in read], given, names.assistant)
        read = [replace(one, role=None) if one.role == UNLISTED else one for one in read]
    check_times([one.message for one in read])
    return tuple(read)


def supervised(read: Sequence[ChatMessage], character: str, trained: bool | None) -> tuple[Message, ...]:
    """The messages, with the training flag of each reply or else that of the record.

    Raises DialogueError for a flag to train another speaker, and for a user or a system with the character's name.
    """
    if trained is None and all(one.role is None and one.trained is None for one in read):
        return tuple([one.message for one in read])  # most logs
    check_character([one.role for one in read], [one.message.speaker for one in read], character)
    messages = []
    for number, one in enumerate(read):
        is_character = one.message.speaker == character
        if one.trained and not is_character:
            raise DialogueError(
                f"message {number}: a flag says to train {one.message.speaker!r}; only the character {character!r} is "
                "trained, so remove the flag from other messages"
            )
        is_trained = trained if one.trained is None else one.trained
        messages.append(untrained(one.message) if is_character and is_trained is False else one.message)
    return tuple(messages)


def _read(record: object, names: RoleNames, needs_role: bool, keeps_other_keys: bool) -> ChatMessage:
    if not isinstance(record, dict):
        raise DialogueError(f"expected an object with {expected_keys(needs_role)}, found {str(record)[:80]}")
    if not needs_role and _is_own(record):
        try:
            return ChatMessage(Message(**record))  # the fast path of most logs
        except DialogueError:
            pass  # strip the name, or say what is wrong
    record = dict(record)
    refuse(record, REFUSED_IN_MESSAGE)
    trained = take_trained(record)
    speaker, role = take_speaker(record, names, needs_role)
    text_key, time_key = (name_in(record, key, MESSAGE_ALIASES) for key in ("text", "time"))
    text, time = (take(record, key, MESSAGE_ALIASES, read) for key, read in READ_AS.items())
    metadata = _metadata(record, keeps_other_keys)
    text_key = "content" if text is None and needs_role else text_key
    return ChatMessage(Message(speaker, read_text(text, text_key), _time(time, time_key), metadata), role, trained)


def _is_own(record: dict[str, Any]) -> bool:
    """Whether the object has only a Message's keys with types that need no conversion."""
    time, metadata = record.get("time"), record.get("metadata")
    if len(record) != 2 + (time is not None) + (metadata is not None) or "speaker" not in record:
        return False
    if not isinstance(record.get("text"), str) or isinstance(time, str):
        return False
    return not (isinstance(metadata, dict) and speaks_of_training(metadata))


def _time(value: object, key: str) -> float | None:
    try:
        return None if value is None else unix_seconds(value)
    except TimeError as error:
        raise DialogueError(f"{key} is {error}") from None


def _metadata(record: dict[str, Any], keeps_other_keys: bool) -> dict[str, Any] | None:
    """The metadata of a message's object: its `metadata`, and its other keys."""
    metadata = record.pop("metadata", None)
    if metadata is not None and not isinstance(metadata, dict):
        raise DialogueError(f"metadata is {type(metadata).__name__}: expected an object")
    refuse_misspelled(record, MESSAGE_KEYS)
    if record and not keeps_other_keys:
        known = ", ".join([*MESSAGE_ALIASES, "metadata"])
        raise DialogueError(f"unknown key {min(record)[:80]!r}; expected {known}")
    if twice := sorted(record.keys() & (metadata or {}).keys()):
        raise DialogueError(f"{twice[0]!r} is in the message and in its metadata; give one of them")
    return {**(metadata or {}), **record} or metadata


def untrained(message: Message) -> Message:
    """The message, excluded from SFT's loss."""
    return replace(message, metadata={**(message.metadata or {}), TRAINED_KEY: False})
