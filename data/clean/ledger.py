"""Where every record went, counted."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


def reasons_told(counts: Mapping[str, int]) -> str:
    """Counts by reason, for people, the commonest first: "12 the newest message is too long, 1 ..."."""
    return ", ".join(f"{n:,} {reason}" for reason, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])))


@dataclass
class Ledger:
    """Where every record went: `read` = quarantined + filtered + duplicates + near_duplicates + kept."""

    read: int = 0
    quarantined: int = 0
    filtered: dict[str, int] = field(default_factory=dict)
    duplicates: int = 0
    near_duplicates: int = 0
    kept: int = 0
    blank_messages: int = 0  # messages that say nothing, removed from dialogues
    replies: int = 0  # messages of the characters, in dialogues that pass the filters
    timed_replies: int = 0  # of these, those that have a time
    scrubbed: dict[str, int] = field(default_factory=dict)  # values that were replaced, by kind
    untrained_replies: int = 0  # of the character, which their records keep out of the loss
    of_characters: dict[str, int] = field(default_factory=dict)  # dialogues of each participant in split.characters

    def filter(self, reason: str, count: int = 1) -> None:
        """Count dialogues that were left out for a reason."""
        self.filtered[reason] = self.filtered.get(reason, 0) + count

    def count_scrubbed(self, counts: Mapping[str, int]) -> None:
        """Count values that were replaced."""
        for kind, count in counts.items():
            self.scrubbed[kind] = self.scrubbed.get(kind, 0) + count

    @property
    def scrubbed_told(self) -> str:
        """What was replaced, for people: "2 email, 1 phone"; empty where nothing was."""
        return ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.scrubbed.items()))

    @classmethod
    def total(cls, ledgers: Iterable["Ledger"]) -> "Ledger":
        """The sums over several sources."""
        total = cls()
        for ledger in ledgers:
            total.read += ledger.read
            total.quarantined += ledger.quarantined
            total.duplicates += ledger.duplicates
            total.near_duplicates += ledger.near_duplicates
            total.kept += ledger.kept
            total.blank_messages += ledger.blank_messages
            total.replies += ledger.replies
            total.timed_replies += ledger.timed_replies
            total.untrained_replies += ledger.untrained_replies
            for reason, count in ledger.filtered.items():
                total.filter(reason, count)
            total.count_scrubbed(ledger.scrubbed)
            for name, count in ledger.of_characters.items():
                total.of_characters[name] = total.of_characters.get(name, 0) + count
        return total

    def balance(self) -> None:
        """Assert that no record is lost."""
        gone = self.quarantined + sum(self.filtered.values()) + self.duplicates + self.near_duplicates
        assert self.read == gone + self.kept, f"records are lost: {self}"

    @classmethod
    def from_dict(cls, counts: Mapping[str, Any]) -> "Ledger":
        """What `to_dict` gave."""
        return cls(**{**counts, "filtered": dict(counts["filtered"]), "scrubbed": dict(counts["scrubbed"])})

    def to_dict(self) -> dict[str, Any]:
        return {
            "read": self.read,
            "quarantined": self.quarantined,
            "filtered": dict(sorted(self.filtered.items())),
            "duplicates": self.duplicates,
            "near_duplicates": self.near_duplicates,
            "kept": self.kept,
            "blank_messages": self.blank_messages,
            "replies": self.replies,
            "timed_replies": self.timed_replies,
            "untrained_replies": self.untrained_replies,
            "scrubbed": dict(sorted(self.scrubbed.items())),
            "of_characters": dict(sorted(self.of_characters.items())),
        }
