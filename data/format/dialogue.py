"""Messages and dialogues, and their supervision: which messages SFT trains, and the engagement labels.

A scene or a character definition is a message by the speaker `narrator`. data/format/encode.py has the token form.

Two metadata keys override the supervision of a character's message: `engagement_label` is 1, 0, or -1 for no label
(see `continuation_labels`), and `trained: false` excludes it from SFT's loss, such as a reply that the user rejected.
On messages of other speakers they are an error. Null is the same as absent: Parquet does not distinguish the two.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from data.sources.unix_time import EARLIEST, LATEST, TimeError, unix_seconds

NARRATOR = "narrator"
SPEAKER_END = ":"  # after the speaker's name, which must not contain it
NO_LABEL = -1
DAY = 86_400.0  # seconds
LABEL_KEY, TRAINED_KEY = "engagement_label", "trained"  # of a message's metadata


class DialogueError(ValueError):
    """An invalid message or dialogue; the message names the value and what was expected."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message. `time` is in unix seconds, None without a clock; `metadata` is other information of the source, such
    as a rating."""

    speaker: str
    text: str
    time: float | None = None
    metadata: Mapping[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        check_speaker(self.speaker)
        if not isinstance(self.text, str):
            raise DialogueError(f"text is {type(self.text).__name__}: expected a string")
        if not self.text.isascii():
            _check_encodable("text", self.text)
        if self.time is not None and not (type(self.time) is float and EARLIEST <= self.time < LATEST):
            _check_time(self.time)
        if self.metadata is not None and not isinstance(self.metadata, Mapping):
            raise DialogueError(f"metadata is {type(self.metadata).__name__}: expected an object")
        if self.metadata:
            _check_supervision(self.metadata)

    @property
    def is_supervised(self) -> bool:
        """Whether the metadata overrides the supervision."""
        metadata = self.metadata or {}
        return any(metadata.get(key) is not None for key in (LABEL_KEY, TRAINED_KEY))

    def without_label(self) -> "Message":
        """The message without an inferred engagement label: only one in its metadata counts."""
        metadata = self.metadata or {}
        if metadata.get(LABEL_KEY) is not None:
            return self
        return replace(self, metadata={**metadata, LABEL_KEY: NO_LABEL})

    @property
    def is_trained(self) -> bool:
        """Whether SFT trains it if the character wrote it."""
        return not self.metadata or self.metadata.get(TRAINED_KEY) is not False


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A conversation. `character` is the speaker whose replies SFT trains; `participants` are the source's ids of the
    people in it; `source` is the name of the source in the recipe."""

    id: str
    messages: tuple[Message, ...]
    character: str
    participants: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id:
            raise DialogueError(f"id is {self.id!r}: expected a non-empty string")
        if not self.messages:
            raise DialogueError(f"dialogue {self.id!r} has no messages")
        check_speaker(self.character)
        speakers = {message.speaker for message in self.messages}
        if self.character not in speakers:
            raise DialogueError(
                f"dialogue {self.id!r}: character {self.character!r} writes nothing; speakers: {sorted(speakers)}"
            )
        for message in [message for message in self.messages if message.metadata]:
            if message.is_supervised and message.speaker != self.character:
                raise DialogueError(
                    f"message {self.messages.index(message)}: {LABEL_KEY} or {TRAINED_KEY} on a message by "
                    f"{message.speaker!r}; only those of the character {self.character!r} are supervised"
                )


def check_speaker(name: object) -> None:
    """Raise DialogueError for an invalid speaker's name."""
    if not isinstance(name, str):
        raise DialogueError(f"speaker is {name!r}: expected a non-empty name")
    _check_name(name)


@lru_cache(4096)  # a dialogue has few speakers and many messages
def _check_name(name: str) -> None:
    if not name.strip():
        raise DialogueError(f"speaker is {name!r}: expected a non-empty name")
    if name != name.strip():
        raise DialogueError(f"speaker {name!r} has white space around it: it would be another speaker; remove it")
    if SPEAKER_END in name or "\n" in name or "\r" in name:
        raise DialogueError(f"speaker {name!r} contains ':' or a line break; rename the speaker in the source")
    _check_encodable("speaker", name)


def check_times(messages: Sequence[Message]) -> None:
    """Raise DialogueError for a message that is older than an earlier one."""
    latest = -math.inf
    for number, message in enumerate(messages):
        if message.time is None:
            continue
        if message.time < latest:
            raise DialogueError(
                f"message {number}: its time is {latest - message.time:g} s before an earlier message's"
            )
        latest = message.time


def _check_time(time: object) -> None:
    if not isinstance(time, int | float):
        raise DialogueError(f"time is {time!r}: expected a number of unix seconds")
    try:
        unix_seconds(time)
    except TimeError as error:
        raise DialogueError(f"time is {error}") from None


def _check_supervision(metadata: Mapping[str, Any]) -> None:
    label = metadata.get(LABEL_KEY)
    if label is not None and (isinstance(label, bool) or label not in (0, 1, NO_LABEL)):
        raise DialogueError(f"metadata.{LABEL_KEY} is {label!r}: expected 1, 0, or {NO_LABEL} for no label")
    trained = metadata.get(TRAINED_KEY)
    if trained is not None and not isinstance(trained, bool):
        raise DialogueError(f"metadata.{TRAINED_KEY} is {trained!r}: expected true or false")


def _check_encodable(what: str, text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DialogueError(f"{what} holds a lone surrogate at character {error.start}: not Unicode text") from None


def n_opening_messages(messages: Sequence[Message]) -> int:
    """The number of the narrator's messages before the first other message: a scene or character definition."""
    return next((i for i, message in enumerate(messages) if message.speaker != NARRATOR), len(messages))


def continuation_labels(dialogue: Dialogue, within_seconds: float | None = None) -> list[int]:
    """For each message: does the partner write again after it? 1, 0, or -1 for no label.

    Labels are at the last message of each turn of the character; narration is not a turn. If nothing follows the last
    message, the partner left, unless the source's records end for other reasons (`without_end_label`). With
    `within_seconds`, a partner who answers later counts as gone, and an unknown time gives -1, also at the last
    message (see `time_precision`). An `engagement_label` in a message's metadata overrides all of this.
    """
    labels = [NO_LABEL] * len(dialogue.messages)
    precision = None if within_seconds is None else time_precision(dialogue)
    following: Message | None = None
    for i in range(len(dialogue.messages) - 1, -1, -1):
        message = dialogue.messages[i]
        if not _is_turn(dialogue, i):
            continue
        if message.speaker == dialogue.character and (following is None or following.speaker != dialogue.character):
            labels[i] = _continues(message, following, within_seconds, precision)
        if message.metadata and message.metadata.get(LABEL_KEY) is not None:
            labels[i] = int(message.metadata[LABEL_KEY])
        following = message
    return labels


def _continues(
    message: Message, following: Message | None, within_seconds: float | None, precision: float | None
) -> int:
    if within_seconds is None:
        return int(following is not None)
    if message.time is None or precision is None:
        return NO_LABEL
    if following is None:
        return 0
    if following.time is None:
        return NO_LABEL
    gap = following.time - message.time
    if gap + precision <= within_seconds:
        return 1
    return 0 if gap - precision > within_seconds else NO_LABEL


def time_precision(dialogue: Dialogue) -> float | None:
    """By how many seconds the time between two messages may be wrong: DAY where all known times are midnights (dates
    without a time of day), otherwise 0. None where no label can follow from the times: the character's messages have
    none, or only they have one."""
    own_timed = others_timed = has_others = False
    n_timed, are_midnights = 0, True
    for message in dialogue.messages:
        is_timed = message.time is not None
        if message.speaker == dialogue.character:
            own_timed = own_timed or is_timed
        elif message.speaker != NARRATOR:
            has_others, others_timed = True, others_timed or is_timed
        else:
            continue
        if message.time is not None:
            n_timed, are_midnights = n_timed + 1, are_midnights and not message.time % DAY
        if own_timed and others_timed and not are_midnights:
            return 0.0
    if not own_timed or (has_others and not others_timed):
        return None
    return DAY if n_timed > 1 and are_midnights else 0.0


def without_end_label(dialogue: Dialogue) -> Dialogue:
    """The dialogue of a source whose records do not end because the partner left: no label is inferred at the
    character's last message if nobody writes after it."""
    last = next((i for i in range(len(dialogue.messages) - 1, -1, -1) if _is_turn(dialogue, i)), None)
    if last is None or dialogue.messages[last].speaker != dialogue.character:
        return dialogue
    messages = list(dialogue.messages)
    messages[last] = messages[last].without_label()
    return replace(dialogue, messages=tuple(messages))


def _is_turn(dialogue: Dialogue, number: int) -> bool:
    """Whether a message is part of a turn: narration is not, unless the narrator is the character."""
    return dialogue.character == NARRATOR or dialogue.messages[number].speaker != NARRATOR


def supervision(dialogue: Dialogue, within_seconds: float | None = None) -> tuple[list[bool], list[int]]:
    """Whether SFT trains each message, and its continuation label."""
    is_trained = [message.speaker == dialogue.character and message.is_trained for message in dialogue.messages]
    return is_trained, continuation_labels(dialogue, within_seconds)
