"""Who writes a message, from its role and its name, and which names of a record cannot be told apart."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from data.format.dialogue import NARRATOR, DialogueError, check_speaker
from data.format.visible_text import visible
from data.sources.record_keys import MESSAGE_ALIASES, name_in, take

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
UNLISTED = "unlisted"  # a role that is not in ROLES, of a message without a name
OPENAI_ROLES = {"system": SYSTEM, "developer": SYSTEM, "user": USER, "assistant": ASSISTANT}
_PUBLISHED = {**OPENAI_ROLES, "human": USER, "prompter": USER, "gpt": ASSISTANT, "chatgpt": ASSISTANT}
ROLES = {**_PUBLISHED, **dict.fromkeys(("bot", "chatbot", "ai", "model", "character", "char"), ASSISTANT)}
"""The meaning of each role's name, in lower case. Those after _PUBLISHED may also be the name of a character."""
TOOL_ROLES = ("tool", "function", "observation", "function_call", "tool_call", "tool_response", "ipython")


@dataclass(frozen=True, slots=True)
class RoleNames:
    """Default speakers of messages with a role and no name; the system's is the narrator."""

    user: str
    assistant: str

    def of(self, role: str) -> str:
        """The speaker of SYSTEM, USER or ASSISTANT."""
        return {SYSTEM: NARRATOR, USER: self.user, ASSISTANT: self.assistant}[role]


def role_of(name: object) -> str | None:
    """The meaning of a role's name, whatever its case: SYSTEM, USER, ASSISTANT, or None if it is no role of a person
    or a model."""
    return ROLES.get(name.strip().lower()) if isinstance(name, str) else None


def is_tool(name: object) -> bool:
    """Whether it is the name of a role of tools."""
    return isinstance(name, str) and name.strip().lower() in TOOL_ROLES


def stripped(name: Any) -> Any:
    """A name without surrounding white space; other values unchanged, for the reader that refuses them."""
    return name.strip() if isinstance(name, str) else name


def take_speaker(record: dict[str, Any], names: RoleNames, needs_role: bool = False) -> tuple[Any, str | None]:
    """Remove the speaker and the role from a message's object; returns the speaker, and SYSTEM, USER, ASSISTANT,
    UNLISTED, or None if the object has only a speaker.

    A role alone that is the name of the character or the narrator is a speaker. Raises DialogueError if both are
    missing, and for an unknown role with a name or with `needs_role`.
    """
    key = name_in(record, "role", MESSAGE_ALIASES)
    speaker = stripped(take(record, "speaker", MESSAGE_ALIASES, stripped))
    role = take(record, "role", MESSAGE_ALIASES, stripped)
    if role is None and speaker is None:
        raise DialogueError(f"no speaker; expected an object with {expected_keys(needs_role)}")
    if not needs_role:
        if role is None:
            return speaker, None
        if speaker is None and _names_a_speaker(role, names):
            return role.strip(), None
        if speaker is None and role_of(role) is None and not is_tool(role):
            return stripped(role), UNLISTED
    known = known_role(role, key)
    return speaker_of(known, speaker, names), known


def _names_a_speaker(role: Any, names: RoleNames) -> bool:
    if not isinstance(role, str):
        return False
    return role.strip() in (names.assistant, NARRATOR) and role.strip().lower() not in _PUBLISHED


def check_roles(roles: Sequence[str | None], speakers: Sequence[str], given: Sequence[Any], character: str) -> None:
    """Raise DialogueError for an UNLISTED role beside known ones: in such a record it is no speaker. `given` are the
    messages' objects.

    A system prompt alone does not make the other messages' roles unknown if the character is among them.
    """
    if UNLISTED not in roles:
        return
    known = {role for role in roles if role not in (None, UNLISTED)}
    if not known or (known == {SYSTEM} and character in speakers):
        return
    number = list(roles).index(UNLISTED)
    key = name_in(given[number], "role", MESSAGE_ALIASES)
    raise DialogueError(
        f"message {number}: {key} is {speakers[number][:40]!r}, and other messages have the role "
        f"{' or '.join(sorted(known))}: expected one of {', '.join(ROLES)}; give somebody's name as speaker, "
        "or name the character"
    )


def check_character(roles: Sequence[str | None], speakers: Sequence[str], character: str) -> None:
    """Raise DialogueError if a message by the user or the system, or, beside an assistant, by another role has the
    character's name."""
    found = {
        role: number
        for number, (role, speaker) in reversed(list(enumerate(zip(roles, speakers, strict=True))))
        if speaker == character
    }
    others = [role for role in found if role in (USER, SYSTEM) or (ASSISTANT in found and role != ASSISTANT)]
    if others:
        named = "assistant" if ASSISTANT in found else "character"
        raise DialogueError(
            f"message {found[others[0]]}: the {others[0] or 'speaker'} has the name of the {named}, {character!r}, and "
            "would be trained as it; give one of the two another name"
        )


def check_names(speakers: Iterable[str], character: str) -> None:
    """Raise DialogueError for a speaker whose name looks like that of the character or the narrator, but is another:
    it would be neither trained nor pinned."""
    folded_character = _folded(character)
    for name in {*speakers, character}:
        folded, other = _folded(name), ""
        if folded == folded_character and name != character:
            other, what = character, "character"
        elif folded == NARRATOR and name != NARRATOR:
            other, what = NARRATOR, "speaker of scenes and definitions"
        if other:
            raise DialogueError(
                f"speakers {name!r} and {other!r}, the {what}, differ only in case, white space or invisible "
                "characters; write them alike if they are one, otherwise rename one"
            )


def check_default_names(user_key: str, user: str, assistant_key: str, assistant: str) -> None:
    """Raise ValueError for a recipe's names of the two roles that cannot be told apart, or a user who is the
    narrator."""
    if user == assistant:
        raise ValueError(f"{user_key} and {assistant_key} are both {user!r}: both would be trained as the character")
    check_user(user)
    check_speaker(assistant)
    check_names([user], assistant)


@lru_cache(4096)
def _folded(name: str) -> str:
    """The name in lower case, without white space and invisible characters."""
    return visible(name).casefold()


def known_role(role: object, key: str, roles: Mapping[str, str] = ROLES) -> str:
    """The meaning of a role, in any case unless `roles` are OpenAI's. Raises DialogueError for an unknown one."""
    found = role.strip().lower() if isinstance(role, str) and roles is not OPENAI_ROLES else role
    if not isinstance(found, str) or found not in roles:
        shown = "missing" if role is None else repr(str(role)[:40])
        raise DialogueError(f"{key} is {shown}: expected one of {', '.join(roles)}")
    return roles[found]


def speaker_of(role: str, name: Any, names: RoleNames) -> Any:
    """The name, or the default of the role. Raises DialogueError for a user with the narrator's name."""
    speaker = names.of(role) if name is None else name  # Message validates it
    if role == USER:
        check_user(speaker)
    return speaker


def check_user(name: Any) -> None:
    """Raise DialogueError for an invalid name, and for the narrator's: what the user writes would be pinned as the
    scene."""
    check_speaker(name)
    if name == NARRATOR:
        raise DialogueError(
            f"the user has the name {NARRATOR!r}, whose messages are the scene; give the user another name, or the "
            "message the role system"
        )


def expected_keys(needs_role: bool) -> str:
    """The keys of a message, for errors."""
    return "role and content" if needs_role else "speaker and text"
