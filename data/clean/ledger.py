"""Counts of records by outcome."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


def reasons_text(counts: Mapping[str, int]) -> str:
    """Counts by reason, most frequent first: "12 the newest message is too long, 1 ..."."""
    return ", ".join(f"{n:,} {reason}" for reason, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])))


@dataclass
class Ledger:
    """Counts of records by outcome: `read` = quarantined + filtered + duplicates + near_duplicates + kept."""

    read: int = 0
    quarantined: int = 0
    filtered: Counter[str] = field(default_factory=Counter)  # by reason
    duplicates: int = 0
    near_duplicates: int = 0
    kept: int = 0
    blank_messages: int = 0  # removed from dialogues
    replies: int = 0  # messages of the characters, in dialogues that pass the filters
    timed_replies: int = 0  # those with a time, in dialogues where the partners' messages have times too
    replies_by_day: int = 0  # of these, those in dialogues whose times are dates without a time of day
    untrained_replies: int = 0  # those that their records exclude from the loss
    scrubbed: Counter[str] = field(default_factory=Counter)  # values that were replaced, by kind
    of_characters: Counter[str] = field(default_factory=Counter)  # dialogues of each participant in split.characters

    @property
    def scrubbed_text(self) -> str:
        """The replaced values, such as "2 email, 1 phone"; empty if there are none."""
        return ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.scrubbed.items()))

    @classmethod
    def total(cls, ledgers: Iterable["Ledger"]) -> "Ledger":
        """The sums over several sources."""
        total = cls()
        for ledger in ledgers:
            for name in vars(total):
                setattr(total, name, getattr(total, name) + getattr(ledger, name))
        return total

    def balance(self) -> None:
        """Assert that no record is lost."""
        gone = self.quarantined + self.filtered.total() + self.duplicates + self.near_duplicates
        assert self.read == gone + self.kept, f"records are lost: {self}"

    @classmethod
    def from_dict(cls, counts: Mapping[str, Any]) -> "Ledger":
        """The inverse of `to_dict`."""
        values: dict[str, Any] = {
            name: Counter(value) if isinstance(value, dict) else value for name, value in counts.items()
        }
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with sorted keys."""
        values = vars(self).items()
        return {name: dict(sorted(value.items())) if isinstance(value, Counter) else value for name, value in values}
