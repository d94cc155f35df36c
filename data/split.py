"""Which dialogues are held out: by time or by a fraction, and never a participant on both sides."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Annotated, Literal

from pydantic import Field

from data.dialogue import Dialogue
from data.stable_hash import stable_fraction, stable_hash
from recipes.loader import Section


class SplitError(ValueError):
    """A split that leaves one side empty; the message says what to change."""


class TimeSplit(Section):
    """Dialogues that begin on `heldout_from` (UTC) or later are held out; undated ones are dropped."""

    kind: Literal["time"]
    heldout_from: date
    # Training dialogues of a participant who is also held out are dropped.
    by_participant: bool = True


class FractionSplit(Section):
    """About this fraction of the dialogues of each source is held out, chosen by a hash."""

    kind: Literal["fraction"]
    heldout: float = Field(gt=0, lt=1)
    # Dialogues that are linked by a participant go to one side together.
    by_participant: bool = True


SplitRule = Annotated[TimeSplit | FractionSplit, Field(discriminator="kind")]


@dataclass(frozen=True, slots=True)
class Split:
    """The two sides in the source's order, and the dialogues on neither, by reason."""

    train: list[Dialogue]
    heldout: list[Dialogue]
    dropped: dict[str, list[Dialogue]]


def split(dialogues: Sequence[Dialogue], rule: TimeSplit | FractionSplit, seed: int) -> Split:
    """Split by the rule. Raises SplitError when one side is left empty."""
    result = _by_time(dialogues, rule) if isinstance(rule, TimeSplit) else _by_fraction(dialogues, rule, seed)
    if dialogues and not (result.train and result.heldout):
        empty = "training" if not result.train else "held-out"
        raise SplitError(
            f"split: of {len(dialogues):,} dialogues none is {empty}"
            f"{''.join(f', {len(dropped):,} dropped ({reason})' for reason, dropped in result.dropped.items())}; "
            f"{_span(dialogues) if isinstance(rule, TimeSplit) else 'change split.heldout or split.by_participant'}"
        )
    return result


def _span(dialogues: Sequence[Dialogue]) -> str:
    starts = [start for start in map(start_time, dialogues) if start is not None]
    if not starts:
        return "no message has a time, so use split.kind fraction"
    first, last = (datetime.fromtimestamp(t, UTC).date() for t in (min(starts), max(starts)))
    return f"they begin from {first} to {last}: change split.heldout_from or split.by_participant"


def start_time(dialogue: Dialogue) -> float | None:
    """Unix seconds of the first dated message."""
    return next((message.time for message in dialogue.messages if message.time is not None), None)


def _by_time(dialogues: Sequence[Dialogue], rule: TimeSplit) -> Split:
    boundary = datetime.combine(rule.heldout_from, datetime.min.time(), UTC).timestamp()
    train: list[Dialogue] = []
    heldout: list[Dialogue] = []
    dropped: dict[str, list[Dialogue]] = defaultdict(list)
    for dialogue in dialogues:
        start = start_time(dialogue)
        if start is None:
            dropped["no time to split by"].append(dialogue)
        else:
            (heldout if start >= boundary else train).append(dialogue)
    if rule.by_participant:
        unseen = {participant for dialogue in heldout for participant in dialogue.participants}
        given, train = train, []
        for dialogue in given:
            is_free = unseen.isdisjoint(dialogue.participants)
            (train if is_free else dropped["participant is held out"]).append(dialogue)
    return Split(train, heldout, dict(dropped))


def _by_fraction(dialogues: Sequence[Dialogue], rule: FractionSplit, seed: int) -> Split:
    if not rule.by_participant:
        chosen = {d.id for d in dialogues if stable_fraction("heldout", seed, d.id) < rule.heldout}
    else:
        chosen = _linked_heldout(dialogues, rule.heldout, seed)
    return Split([d for d in dialogues if d.id not in chosen], [d for d in dialogues if d.id in chosen], {})


def _linked_heldout(dialogues: Sequence[Dialogue], fraction: float, seed: int) -> set[str]:
    """Ids of whole groups of linked dialogues, in the order of a hash, while they fit the fraction of their source."""
    groups: dict[str, list[Dialogue]] = defaultdict(list)
    for dialogue, root in zip(dialogues, _roots(dialogues), strict=True):
        groups[root].append(dialogue)
    sizes = Counter(dialogue.source for dialogue in dialogues)
    room = {source: max(1, round(fraction * size)) for source, size in sizes.items()}
    chosen: set[str] = set()
    for root in sorted(groups, key=lambda root: (stable_hash("heldout", seed, root), root)):
        needed = Counter(dialogue.source for dialogue in groups[root])
        if all(count <= room[source] for source, count in needed.items()):
            chosen.update(dialogue.id for dialogue in groups[root])
            for source, count in needed.items():
                room[source] -= count
    return chosen


def _roots(dialogues: Sequence[Dialogue]) -> list[str]:
    """For each dialogue the smallest node of its group; nodes are participants and, for those without, the dialogue."""
    parent: dict[str, str] = {}

    def find(node: str) -> str:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = node = parent[parent[node]]
        return node

    keys = [[f"p{p}" for p in dialogue.participants] or [f"d{dialogue.id}"] for dialogue in dialogues]
    for nodes in keys:
        for node in nodes:
            first, other = sorted((find(nodes[0]), find(node)))
            parent[other] = first
    return [find(nodes[0]) for nodes in keys]
