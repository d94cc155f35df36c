"""Common parts of the chat formats: the messages and the other fields of a record's object."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from data.format.dialogue import NARRATOR, Message
from data.format.visible_text import says_nothing
from data.sources.chat_message import ChatMessage, read_messages, read_text
from data.sources.record import RecordError
from data.sources.record_keys import RECORD_ALIASES, name_in, refuse_in_record, take, take_trained
from data.sources.speaker import ASSISTANT, SYSTEM, RoleNames, stripped


@dataclass(frozen=True, slots=True)
class ChatRecord:
    """`messages` of a record, the system's first; `trained`: the record's training flag."""

    messages: tuple[ChatMessage, ...]
    trained: bool | None

    def last_assistant(self) -> str | None:
        """The speaker of the assistant's last message, or None."""
        names = [one.message.speaker for one in self.messages if one.role == ASSISTANT]
        return names[-1] if names else None


def take_messages(
    record: dict[str, Any], names: RoleNames, *, needs_role: bool = True, keeps_other_keys: bool = True
) -> ChatRecord:
    """Remove the keys of messages and training flags; other keys remain in the record.

    `prompt` and `completion`, lists of messages, may replace `messages`; replies in the prompt are then not trained.
    Raises RecordError or DialogueError for an invalid record.
    """
    given = take(record, "messages", RECORD_ALIASES)
    n_prompt = 0
    if given is None and "completion" in record:
        prompt, completion = record.pop("prompt", None), record.pop("completion")
        if not isinstance(prompt, list) or not isinstance(completion, list):
            raise RecordError("prompt and completion are read as two lists of messages; write texts as messages")
        given, n_prompt = [*prompt, *completion], len(prompt)
    if given is None:
        raise RecordError(f"no messages; expected messages or conversations, found keys {sorted(record)}")
    refuse_in_record(record)
    if isinstance(record.get("label"), bool):
        raise RecordError("label is not read: a rating of the reply; leave bad replies out by weight: 0")
    trained = take_trained(record)
    read = read_messages(given, names, needs_role=needs_role, keeps_other_keys=keeps_other_keys)
    _check_prompt(record.pop("prompt", None), read)
    context = [replace(one, trained=False) if one.trained is None else one for one in read[:n_prompt]]
    system = take_system(record, read)
    return ChatRecord((*system, *context, *read[n_prompt:]), trained)


def participant_ids(given: Any, character: str | None) -> tuple[str, ...]:
    """The ids of the people, without the character's if the record or the recipe names it. Null and blank ids are
    ignored: they would link everybody who has one."""
    ids = list(given.values()) if isinstance(given, dict) else given
    if not isinstance(ids, list) or not all(one is None or isinstance(one, str) for one in ids):
        raise RecordError(f"participants is {given!r}: expected a list of strings, or an object of speakers and ids")
    own = {stripped(name): one for name, one in given.items()}.get(character) if isinstance(given, dict) else character
    return tuple(one for one in ids if one is not None and one != own and not says_nothing(one))


def _check_prompt(prompt: Any, read: Sequence[ChatMessage]) -> None:
    """Raise RecordError for a `prompt` beside the messages, unless it repeats the first one after the scene."""
    if prompt in (None, "", []):
        return
    first = next((one.message.text.strip() for one in read if one.message.speaker != NARRATOR), None)
    if not isinstance(prompt, str) or prompt.strip() != first:
        raise RecordError(
            f"prompt is not read beside messages; found {repr(prompt)[:40]}. Write it as a message, or remove it"
        )


def take_system(record: dict[str, Any], read: Sequence[ChatMessage]) -> tuple[ChatMessage, ...]:
    """Remove the record's system prompt; returns it as the narrator's message, unless the first message repeats it."""
    key = name_in(record, "system", RECORD_ALIASES)
    given = take(record, "system", RECORD_ALIASES, read_text)
    if given is None or given in ("", []):
        return ()
    text = read_text(given, key)
    first = read[0].message if read else None
    if first is None or first.speaker != NARRATOR:
        return (ChatMessage(Message(NARRATOR, text), SYSTEM),)
    if first.text.strip() != text.strip():
        raise RecordError(f"{key} differs from the first message, which is the system's too; give one of them")
    return ()
