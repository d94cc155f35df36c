"""Preference pairs for DPO: a context and two replies of the character, as JSON lines, or hh-rlhf files.

Every reader rejects and counts the same pairs (`reason_against_context`, `reason_against_pair`); too many of them are
an error.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data.clean.ledger import reasons_text
from data.clean.quarantine import general_reason
from data.clean.stable_hash import stable_hash
from data.format.dialogue import NARRATOR, DialogueError, Message, check_speaker
from data.format.dialogue_json import message_to_record, messages_from_records
from data.format.visible_text import says_nothing, visible
from data.sources.chat_message import ChatMessage, read_messages
from data.sources.hh_rlhf import ASSISTANT, take_transcripts
from data.sources.record import RecordError
from data.sources.record_keys import refuse_in_record, take_trained
from data.sources.source import parse_object, read_lines
from data.sources.speaker import ASSISTANT as ASSISTANT_ROLE
from data.sources.speaker import USER, RoleNames, check_names, stripped
from recipes.files import atomic_file

SAYS_NOTHING = "a blank reply"
SAME_REPLY = "both replies are the same"
OTHER_CONTEXT = "the sides differ before the last reply"
NO_CONTEXT = "only the character and the narrator write before the reply"
BLANK_NEWEST = "the message before the reply is blank"
NOT_TRAINED = "its record excludes it from training"
REPEATED = "the same pair again"
CONTRADICTED = "another pair of the same context prefers the other reply"
_TRL_NAMES = RoleNames("User", "Assistant")
_N_PLACES = 5  # rejected records shown
_REQUIRED = ("id", "messages", "character", "chosen", "rejected")
_OPTIONAL = ("source", "metadata")


class PreferenceError(ValueError):
    """Unreadable preference pairs; the message names file and line."""


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two replies of `character` to the same context `messages`; people or a scorer preferred `chosen`."""

    id: str
    messages: tuple[Message, ...]
    character: str
    chosen: str
    rejected: str
    source: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_speaker(self.character)
        for side, text in (("chosen", self.chosen), ("rejected", self.rejected)):
            if not isinstance(text, str):
                raise DialogueError(f"{side} is {type(text).__name__}: expected a string")
            Message(self.character, text)
        reason = reason_against_context(self.messages, self.character)
        if reason := reason or reason_against_pair(self.chosen, self.rejected):
            raise DialogueError(reason)

    @property
    def group(self) -> str:
        """The cluster of dependent pairs: those of one user or, without users, of one context."""
        user = self.metadata.get("user")
        if user is not None and not says_nothing(str(user)):
            return f"user {user}"
        return f"context {self.context_hash}"

    @property
    def context_hash(self) -> int:
        """A hash of the speakers and texts before the reply."""
        return stable_hash(*(text for message in self.messages for text in (message.speaker, message.text)))

    @property
    def continues(self) -> bool:
        """Whether the previous message is by the character itself."""
        return self.messages[-1].speaker == self.character


@dataclass(slots=True)
class PairFile:
    """The usable pairs of a file, its number of records, and the rejected ones: their number by reason, and the first
    places."""

    path: Path
    pairs: list[PreferencePair] = field(default_factory=list)
    n_records: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    first_refused: list[str] = field(default_factory=list)

    def refuse(self, line: int, reason: str) -> None:
        """Count a record; reasons that differ only in their values are one."""
        self.refused[general_reason(reason)] += 1
        if len(self.first_refused) < _N_PLACES:
            self.first_refused.append(f"{self.path}:{line}: {reason}")

    @property
    def report(self) -> str:
        """The counts and the first places, as text."""
        text = f"{self.path}: {len(self.pairs):,} pairs of {self.n_records:,} records"
        if not self.refused:
            return text
        places = "".join(f"\n  {place}" for place in self.first_refused)
        return f"{text}; left out: {reasons_text(self.refused)}. The first:{places}"


def reason_against_pair(chosen: str, rejected: str) -> str | None:
    """Why two replies are not a preference: one is blank, or they look the same."""
    if says_nothing(chosen) or says_nothing(rejected):
        return SAYS_NOTHING
    return SAME_REPLY if visible(chosen) == visible(rejected) else None


def reason_against_context(messages: Sequence[Message], character: str) -> str | None:
    """Why messages are not a context: a speaker other than the character and the narrator must have a non-blank
    message, and the newest message must not be blank. It may be the character's own."""
    others = (message.text for message in messages if message.speaker not in (character, NARRATOR))
    if all(map(says_nothing, others)):
        return NO_CONTEXT
    return BLANK_NEWEST if says_nothing(messages[-1].text) else None


def distinct_pairs(pairs: Iterable[PreferencePair]) -> tuple[list[PreferencePair], Counter[str]]:
    """The pairs without duplicates (the first stays) and without contradictory ones of one context, and the number of
    each that are left out. Texts that differ only in white space are equal."""
    first: dict[tuple[Any, ...], PreferencePair] = {}
    left_out: Counter[str] = Counter()
    for pair in pairs:
        key = (pair.context_hash, pair.character, visible(pair.chosen), visible(pair.rejected))
        left_out[REPEATED] += first.setdefault(key, pair) is not pair
    kept = [pair for (*context, chosen, rejected), pair in first.items() if (*context, rejected, chosen) not in first]
    left_out[CONTRADICTED] = len(first) - len(kept)
    return kept, +left_out


def pair_to_json(pair: PreferencePair) -> str:
    """One line of JSON."""
    record = {
        "id": pair.id,
        "messages": [message_to_record(m) for m in pair.messages],
        "character": pair.character,
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "source": pair.source,
        "metadata": dict(pair.metadata),
    }
    return json.dumps(record, ensure_ascii=False, allow_nan=False)


def write_pairs(path: Path | str, pairs: Iterable[PreferencePair]) -> None:
    """Write one pair per line, atomically."""
    with atomic_file(Path(path), "w") as file:
        for pair in pairs:
            file.write(pair_to_json(pair) + "\n")


def read_pairs(path: Path | str) -> list[PreferencePair]:
    """The pairs of a file written by `write_pairs`. Raises PreferenceError with file and line, or SourceError."""
    pairs = []
    for number, line in read_lines(Path(path)):
        try:
            pairs.append(pair_from_record(parse_object(line)))
        except (RecordError, DialogueError) as error:
            raise PreferenceError(f"{path}:{number}: {error}") from None
    return pairs


def read_pair_file(path: Path | str, file_format: Literal["jsonl", "hh_rlhf"], max_refused_fraction: float) -> PairFile:
    """The usable pairs of a file of records (.gz too).

    Raises PreferenceError with reasons and first places if there are none, or if more than the fraction are rejected;
    SourceError if the file cannot be read.
    """
    found = PairFile(Path(path))
    make = pair_from_record if file_format == "jsonl" else pair_from_transcripts
    for number, line in read_lines(found.path):
        found.n_records += 1
        try:
            record = parse_object(line)
            if take_trained(record) is False:
                raise RecordError(NOT_TRAINED)
            pair = make(record, f"{found.path.name}:{number}")
            check_pair_names(pair)
            found.pairs.append(pair)
        except (RecordError, DialogueError) as error:
            found.refuse(number, str(error))
    n_refused = found.n_records - len(found.pairs)
    if not found.pairs:
        raise PreferenceError(f"no usable pair. {found.report}" if n_refused else f"{path}: no records, expected pairs")
    if n_refused > max_refused_fraction * found.n_records:
        raise PreferenceError(
            f"{n_refused / found.n_records:.1%} of the records are left out, more than max_bad_fraction "
            f"{max_refused_fraction:g}; fix them, or raise it. {found.report}"
        )
    return found


def pair_from_transcripts(record: dict[str, Any], identity: str) -> PreferencePair:
    """The pair of an hh-rlhf record. Raises RecordError or DialogueError for an invalid one."""
    chosen, rejected = take_transcripts(record, ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1] or {chosen[-1].speaker, rejected[-1].speaker} != {ASSISTANT}:
        raise RecordError(SAME_REPLY if chosen == rejected else OTHER_CONTEXT)
    return PreferencePair(identity, chosen[:-1], ASSISTANT, chosen[-1].text, rejected[-1].text, source="hh_rlhf")


def check_pair_names(pair: PreferencePair) -> None:
    """Raise DialogueError for a speaker of the context whose name looks like the character's or the narrator's."""
    check_names([message.speaker for message in pair.messages], pair.character)


def pair_from_record(record: dict[str, Any], place: str = "") -> PreferencePair:
    """The pair of a line's object, with its own id; without one, as TRL's pairs are, the id is `place`. Raises
    RecordError or DialogueError for an invalid one."""
    if "messages" not in record and "character" not in record and {"chosen", "rejected"} <= record.keys():
        return _trl_pair(record, place)
    missing = [key for key in _REQUIRED if key not in record]
    unknown = sorted(set(record) - set(_REQUIRED) - set(_OPTIONAL))
    if missing or unknown:
        problem = f"missing {', '.join(missing)}" if missing else f"unknown key {unknown[0]!r}"
        raise RecordError(
            f"{problem}; expected {', '.join(_REQUIRED)} and optionally {', '.join(_OPTIONAL)}, or TRL's prompt, "
            "chosen and rejected"
        )
    identity, metadata = record["id"], record.get("metadata") or {}
    if not isinstance(identity, str | int) or not isinstance(metadata, Mapping):
        raise RecordError(f"id is {identity!r}, metadata {metadata!r}: expected a string and an object"[:200])
    refuse_in_record({"metadata": metadata})
    character = stripped(record["character"])
    messages = messages_from_records(record["messages"], character)
    source = record.get("source") or ""
    return PreferencePair(str(identity), messages, character, record["chosen"], record["rejected"], source, metadata)


def _trl_pair(record: dict[str, Any], place: str) -> PreferencePair:
    """A pair in the format of Hugging Face's TRL: `prompt`, `chosen` and `rejected` are texts or lists of messages; a
    list of a side ends with its reply, and may repeat the prompt or replace it. Other keys become metadata."""
    record = dict(record)
    given = {key: record.pop(key, None) for key in ("prompt", "chosen", "rejected")}
    refuse_in_record(record)
    read = {key: _trl_messages(key, value) for key, value in given.items() if value is not None}
    prompt = read.pop("prompt", ())
    (before, chosen), (other, rejected) = (_context_and_reply(key, read[key], prompt) for key in ("chosen", "rejected"))
    if before != other:
        raise RecordError(OTHER_CONTEXT)
    identity, metadata = record.pop("id", None), record.pop("metadata", None) or {}
    return PreferencePair(
        place if identity is None else str(identity), before, chosen.speaker, chosen.text, rejected.text, "trl",
        {**record, **metadata},
    )  # fmt: skip


def _trl_messages(key: str, given: Any) -> tuple[ChatMessage, ...]:
    if isinstance(given, str):
        if key == "prompt" and "\n\nAssistant:" in given:
            raise RecordError("prompt is a transcript; write it as a list of messages with role and content")
        role = USER if key == "prompt" else ASSISTANT_ROLE
        return (ChatMessage(Message(_TRL_NAMES.of(role), given), role),)
    if not isinstance(given, list) or not given:
        raise RecordError(f"{key} is {repr(given)[:40]}: expected a text or a list of messages with role and content")
    try:
        return read_messages(given, _TRL_NAMES, needs_role=True, keeps_other_keys=True)
    except DialogueError as error:
        raise RecordError(f"{key}: {error}") from None


def _context_and_reply(
    key: str, side: tuple[ChatMessage, ...], prompt: tuple[ChatMessage, ...]
) -> tuple[tuple[Message, ...], Message]:
    """The messages before the reply of a side, and the reply."""
    *before, reply = side
    if reply.role != ASSISTANT_ROLE:
        raise RecordError(f"{key} ends with a message of the {reply.role}; expected the assistant's reply")
    repeats = [one.message for one in before[: len(prompt)]] == [one.message for one in prompt]
    context = before if repeats else [*prompt, *before]
    return tuple(one.message for one in context), reply.message


def hold_out(groups: Sequence[str], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """The numbers of the held-out pairs, about `fraction` of all, and of the others; `groups` are those of the pairs.

    Whole groups are drawn while they fit.
    """
    members: dict[str, list[int]] = {}
    for number, group in enumerate(groups):
        members.setdefault(group, []).append(number)
    room = round(len(groups) * fraction)
    heldout: list[int] = []
    rest: list[int] = []
    of_group = list(members.values())
    for number in np.random.default_rng(seed).permutation(len(of_group)):
        fits = len(of_group[number]) <= room - len(heldout)
        (heldout if fits else rest).extend(of_group[number])
    return heldout, rest
