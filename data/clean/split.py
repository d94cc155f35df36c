"""The held-out split: by time or by fraction, optionally with no participant on both sides."""

import math
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from data.format.dialogue import Dialogue
from recipes.loader import Section

TRAIN, HELDOUT, UNDATED, SPANNING, SHARED = range(5)
DROPPED = {
    UNDATED: "no time",
    SPANNING: "continues after heldout_from",
    SHARED: "participant is held out",
}
"""dialogues on neither side, with the reason"""


class SplitError(ValueError):
    """A split with an empty side; the message says what to change."""


class TimeSplit(Section):
    """Hold out dialogues that begin on `heldout_from` (UTC) or later. Undated dialogues and those that span the date
    are dropped, and so are earlier dialogues with the id of a held-out one."""

    kind: Literal["time"]
    heldout_from: date
    # Drop training dialogues of participants that are also held out.
    by_participant: bool = True
    # Participant ids of characters, as in the sources: they do not link dialogues.
    characters: tuple[str, ...] = ()


class FractionSplit(Section):
    """Hold out about this fraction of each source's dialogues, chosen by a hash of the id. Dialogues with the same id
    (pieces of a conversation) go to the same side."""

    kind: Literal["fraction"]
    heldout: float = Field(gt=0, lt=1)
    # Dialogues that share a participant go to the same side.
    by_participant: bool = True
    # Participant ids of characters, as in the sources: they do not link dialogues.
    characters: tuple[str, ...] = ()


SplitRule = Annotated[TimeSplit | FractionSplit, Field(discriminator="kind")]


@dataclass(frozen=True, slots=True)
class SplitRecords:
    """What a split depends on, for n dialogues: `source` number, `start_time` and `end_time` in unix seconds (nan:
    none), `heldout_hash` uint64 (of seed and id), `n_participants`, and `participants` uint64, their concatenated
    hashes."""

    source: np.ndarray
    start_time: np.ndarray
    end_time: np.ndarray
    heldout_hash: np.ndarray
    n_participants: np.ndarray
    participants: np.ndarray


def split(records: SplitRecords, rule: TimeSplit | FractionSplit) -> np.ndarray:
    """TRAIN, HELDOUT or one of DROPPED for each dialogue, int8. Raises SplitError if a side is empty."""
    sides = _by_time(records, rule) if isinstance(rule, TimeSplit) else _by_fraction(records, rule)
    if len(sides) and not ((sides == TRAIN).any() and (sides == HELDOUT).any()):
        empty = "held-out" if (sides == TRAIN).any() else "training"
        dropped = {reason: np.count_nonzero(sides == side) for side, reason in DROPPED.items()}
        raise SplitError(
            f"split: of {len(sides):,} dialogues none is {empty}"
            f"{''.join(f', {count:,} dropped ({reason})' for reason, count in dropped.items() if count)}; "
            f"{_span(records) if isinstance(rule, TimeSplit) else 'change split.heldout or split.by_participant'}"
        )
    return sides


def _span(records: SplitRecords) -> str:
    starts = records.start_time[~np.isnan(records.start_time)]
    if not len(starts):
        return "no message has a time, so use split.kind fraction"
    first, last = (datetime.fromtimestamp(float(t), UTC).date() for t in (starts.min(), starts.max()))
    return f"they begin from {first} to {last}: change split.heldout_from or split.by_participant"


def time_span(dialogue: Dialogue) -> tuple[float, float]:
    """Unix seconds of the first and the last message; nan without times."""
    times = [message.time for message in dialogue.messages if message.time is not None]
    return (min(times), max(times)) if times else (math.nan, math.nan)


def _by_time(records: SplitRecords, rule: TimeSplit) -> np.ndarray:
    boundary = datetime.combine(rule.heldout_from, datetime.min.time(), UTC).timestamp()
    sides = np.full(len(records.source), TRAIN, np.int8)
    sides[records.end_time >= boundary] = SPANNING
    sides[records.start_time >= boundary] = HELDOUT
    sides[np.isnan(records.start_time)] = UNDATED
    is_continued = np.isin(records.heldout_hash, records.heldout_hash[sides == HELDOUT])
    sides[is_continued & (sides == TRAIN)] = SPANNING
    if rule.by_participant:
        dialogue = _dialogue_of_participant(records)
        unseen = np.unique(records.participants[sides[dialogue] == HELDOUT])
        shared = np.unique(dialogue[np.isin(records.participants, unseen)])
        sides[shared[sides[shared] == TRAIN]] = SHARED
    return sides


def _dialogue_of_participant(records: SplitRecords) -> np.ndarray:
    return np.repeat(np.arange(len(records.source)), records.n_participants)


def _by_fraction(records: SplitRecords, rule: FractionSplit) -> np.ndarray:
    if rule.by_participant:
        is_heldout = _linked_heldout(records, rule.heldout)
    else:
        is_heldout = (records.heldout_hash >> np.uint64(11)).astype(float) / (1 << 53) < rule.heldout
    return np.where(is_heldout, HELDOUT, TRAIN).astype(np.int8)


def _linked_heldout(records: SplitRecords, fraction: float) -> np.ndarray:
    """Select whole groups of linked dialogues in hash order while they fit the fraction of their source."""
    group = groups_of(records)
    n_sources = int(records.source.max(initial=0)) + 1
    room = np.maximum(1, np.round(fraction * np.bincount(records.source, minlength=n_sources))).astype(np.int64)
    # dialogues of each source in a group: the pairs (group, source) ordered by group
    pairs, counts = np.unique(group * n_sources + records.source, return_counts=True)
    group_of_pair, source_of_pair = np.divmod(pairs, n_sources)
    fits = np.ones(int(group.max(initial=-1)) + 1, bool)
    fits[group_of_pair[counts > room[source_of_pair]]] = False
    edges = np.searchsorted(group_of_pair, np.arange(len(fits) + 1))
    # the minimum hash of its dialogues would favor large groups, so it is hashed again
    smallest = np.full(len(fits), np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(smallest, group, records.heldout_hash)
    candidates = np.flatnonzero(fits)
    chosen = np.zeros(len(fits), bool)
    for number in candidates[np.lexsort((smallest[candidates], _mixed(smallest[candidates])))].tolist():
        needed, sources = counts[edges[number] : edges[number + 1]], source_of_pair[edges[number] : edges[number + 1]]
        if (needed <= room[sources]).all():
            chosen[number] = True
            room[sources] -= needed
            if not room.any():
                break
    return chosen[group]


def groups_of(records: SplitRecords) -> np.ndarray:
    """The group number of each dialogue: dialogues are linked by their participants, and by equal ids."""
    n = len(records.source)
    people, person = np.unique(records.participants, return_inverse=True)
    ids, identity = np.unique(records.heldout_hash, return_inverse=True)
    dialogue = np.concatenate([_dialogue_of_participant(records), np.arange(n)])
    linking = np.concatenate([n + person, n + len(people) + identity])
    n_nodes = n + len(people) + len(ids)
    links = coo_array((np.ones(len(dialogue), np.int8), (dialogue, linking)), shape=(n_nodes, n_nodes))
    _, labels = connected_components(links, directed=False)
    return np.unique(labels[:n], return_inverse=True)[1]


def _mixed(hashes: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014), a bijection that scrambles the order."""
    mixed = hashes.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
