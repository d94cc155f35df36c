"""Preference pairs for DPO: a context and two replies of the character, as JSON lines, and hh-rlhf files as such."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.atomic_file import atomic_file
from data.dialogue import DialogueError, Message, check_speaker
from data.dialogue_json import message_to_record, messages_from_records
from data.sources.hh_rlhf import ASSISTANT, parse_transcript, transcript_of
from data.sources.record import RecordError
from data.sources.source import parse_object, read_lines
from data.stable_hash import stable_hash

_REQUIRED = ("id", "messages", "character", "chosen", "rejected")
_OPTIONAL = ("source", "metadata")


class PreferenceError(ValueError):
    """Preference pairs that cannot be read; the message names file and line."""


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two replies of `character` to the same context `messages`; people, or a scorer, preferred `chosen`."""

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
        if self.chosen == self.rejected:
            raise DialogueError(f"pair {self.id!r}: chosen and rejected are the same text")


    @property
    def group(self) -> str:
        """Pairs of one user, or where users are not known of one context, are not independent of each other."""
        user = self.metadata.get("user")
        if user:
            return f"user {user}"
        texts = (text for message in self.messages for text in (message.speaker, message.text))
        return f"context {stable_hash(*texts)}"


@dataclass(frozen=True, slots=True)
class HhRlhfPairs:
    """The usable pairs of an hh-rlhf file, and how many records are not."""

    pairs: list[PreferencePair]
    n_records: int
    n_identical: int
    n_context_differs: int  # the sides differ before the last reply
    n_empty_reply: int


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
    """Write one pair a line; the file appears whole or not at all."""
    with atomic_file(Path(path), "w") as file:
        for pair in pairs:
            file.write(pair_to_json(pair) + "\n")


def read_pairs(path: Path | str) -> list[PreferencePair]:
    """The pairs of a JSONL file (.gz too). Raises PreferenceError naming file and line, SourceError for the file."""
    pairs = []
    for number, line in read_lines(Path(path)):
        try:
            pairs.append(pair_from_record(parse_object(line)))
        except (RecordError, DialogueError) as error:
            raise PreferenceError(f"{path}:{number}: {error}") from None
    return pairs


def pair_from_record(record: dict[str, Any]) -> PreferencePair:
    """The pair of a line's object. Raises RecordError or DialogueError saying why it is none."""
    missing = [key for key in _REQUIRED if key not in record]
    unknown = sorted(set(record) - set(_REQUIRED) - set(_OPTIONAL))
    if missing or unknown:
        problem = f"missing {', '.join(missing)}" if missing else f"unknown key {unknown[0]!r}"
        raise RecordError(f"{problem}; expected {', '.join(_REQUIRED)} and optionally {', '.join(_OPTIONAL)}")
    return PreferencePair(**{**record, "messages": messages_from_records(record["messages"], record["character"])})


def hold_out(groups: Sequence[str], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the held-out pairs, about `fraction` of all, and of the others, of pairs given by their groups.

    Whole groups are drawn, each where it still fits.
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


def load_hh_rlhf(path: Path | str) -> HhRlhfPairs:
    """Read an hh-rlhf file, leaving out records whose sides are identical, part before the last reply, or are empty.

    Raises PreferenceError naming file and line where a record is not two transcripts.
    """
    path = Path(path)
    pairs: list[PreferencePair] = []
    n_records = n_identical = n_context_differs = n_empty_reply = 0
    for number, line in read_lines(path):
        n_records += 1
        try:
            record = parse_object(line)
            chosen, rejected = (parse_transcript(transcript_of(record, side)) for side in ("chosen", "rejected"))
        except (RecordError, DialogueError) as error:
            raise PreferenceError(f"{path}:{number}: {error}") from None
        if chosen == rejected:
            n_identical += 1
        elif chosen[:-1] != rejected[:-1] or {chosen[-1].speaker, rejected[-1].speaker} != {ASSISTANT}:
            n_context_differs += 1
        elif not chosen[-1].text or not rejected[-1].text:
            n_empty_reply += 1
        else:
            identity = f"{path.name}:{number}"
            pairs.append(
                PreferencePair(identity, chosen[:-1], ASSISTANT, chosen[-1].text, rejected[-1].text, source="hh_rlhf")
            )
    return HhRlhfPairs(pairs, n_records, n_identical, n_context_differs, n_empty_reply)
