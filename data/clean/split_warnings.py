"""Warnings about a split: a participant that links most dialogues, and sides that differ strongly."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from data.clean.split import HELDOUT, TRAIN, FractionSplit, SplitRecords, TimeSplit, groups_of

_Z = 4.0  # standard errors
_SHARE, _FACTOR = 0.15, 1.5  # a large difference of two shares, and ratio of two means


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure of both sides: the sum of `numerator` over that of `denominator`, one number each per dialogue. A share
    is between 0 and 1."""

    name: str
    numerator: np.ndarray
    denominator: np.ndarray
    is_share: bool


@dataclass(frozen=True, slots=True)
class Link:
    """The participant (a hash) in most dialogues, their number, and how many dialogues it links to one side."""

    participant: int
    n_dialogues: int
    n_linked: int
    n_all: int

    def warning(self, name: str) -> str:
        """The warning; `name` identifies the participant."""
        return (
            f"participant {name} takes part in {self.n_dialogues:,} of {self.n_all:,} dialogues; with those that other "
            f"participants link to them, {self.n_linked:,} must be on one side. If it is a character's id, name it in "
            "split.characters as the source has it (scrub may show a hash here): it then links nothing"
        )


def strongest_link(records: SplitRecords) -> Link | None:
    """The participant in most dialogues (of equals the one with the larger group); None if nobody is in two."""
    n = len(records.source)
    dialogue = np.repeat(np.arange(n), records.n_participants)
    once = np.unique(np.stack([records.participants, dialogue.astype(np.uint64)], axis=1), axis=0)
    people, counts = np.unique(once[:, 0], return_counts=True)
    if not len(people) or counts.max() < 2:
        return None
    chosen = people[np.argmax(counts)]
    group = groups_of(records)
    n_linked = np.count_nonzero(group == group[dialogue[np.argmax(records.participants == chosen)]])
    return Link(int(chosen), int(counts.max()), int(n_linked), n)


def is_too_large(link: Link, rule: TimeSplit | FractionSplit) -> bool:
    """Whether the linked dialogues exceed the held-out fraction, or a tenth of all with a split by time."""
    share = rule.heldout if isinstance(rule, FractionSplit) else 0.1
    return rule.by_participant and link.n_linked > max(1, round(share * link.n_all))


def side_measures(
    n_speakers: np.ndarray, n_messages: np.ndarray, n_characters: np.ndarray, n_stay: np.ndarray, n_leave: np.ndarray
) -> tuple[Measure, ...]:
    """The compared measures, from one number for each dialogue."""
    one = np.ones(len(n_speakers))
    return (
        Measure("dialogues of more than two speakers", (n_speakers > 2).astype(float), one, True),
        Measure("messages a dialogue", n_messages, one, False),
        Measure("characters a message", n_characters, n_messages, False),
        Measure("replies after which the partner stays", n_stay, n_stay + n_leave, True),
    )


def side_warnings(measures: tuple[Measure, ...], sides: np.ndarray) -> list[str]:
    """A warning for each measure in which the sides differ strongly and significantly."""
    warnings = []
    for measure in measures:
        figures = _figures(measure, sides)
        if figures and _is_gross(measure, figures["train"], figures["heldout"]) and abs(figures["z"]) > _Z:
            heldout, train = (_shown(measure, figures[side]) for side in ("heldout", "train"))
            warnings.append(
                f"the held-out side differs from the training side: {measure.name}: {heldout} held out, {train} in "
                "training; held-out figures say little about the training data"
            )
    return warnings


def _figures(measure: Measure, sides: np.ndarray) -> Mapping[str, float] | None:
    """The measure of both sides, and their difference in standard errors if dialogues came from one population."""
    both = np.isin(sides, (TRAIN, HELDOUT))
    total = measure.denominator[both].sum()
    if not total:
        return None
    rest = measure.numerator - measure.numerator[both].sum() / total * measure.denominator
    variance, figures = 0.0, {}
    for name, side in (("train", TRAIN), ("heldout", HELDOUT)):
        own = sides == side
        n, weight = np.count_nonzero(own), measure.denominator[own].sum()
        if not weight:
            return None
        figures[name] = float(measure.numerator[own].sum() / weight)
        variance += n * float(np.mean(rest[both] ** 2)) / float(weight) ** 2
    difference = figures["heldout"] - figures["train"]
    return {**figures, "z": difference / variance**0.5 if variance else 0.0}


def _is_gross(measure: Measure, train: float, heldout: float) -> bool:
    if measure.is_share:
        return abs(train - heldout) > _SHARE
    return max(train, heldout) > _FACTOR * min(train, heldout)


def _shown(measure: Measure, value: float) -> str:
    return f"{value:.0%}" if measure.is_share else f"{value:.1f}"
