"""Counts of the speakers in a set of dialogues: the names that a model trained on them has seen."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from data.format.dialogue import NARRATOR, Dialogue
from data.format.dialogue_json import read_dialogues

_DIALOGUES_AT_MOST = 50_000  # enough for the most frequent names


@dataclass(frozen=True)
class SpeakerNames:
    """The number of dialogues of each character, and for each character the number of dialogues with each other
    speaker."""

    characters: Counter[str]
    partners: dict[str, Counter[str]]

    def commonest(self) -> tuple[str, str] | None:
        """(partner, character): the most frequent character and its most frequent partner; None if there is no
        partner."""
        for character, _ in sorted(self.characters.items(), key=lambda item: (-item[1], item[0])):
            partners = self.partners.get(character)
            if partners:
                return min(partners, key=lambda name: (-partners[name], name)), character
        return None


def count_names(dialogues: Iterable[Dialogue]) -> SpeakerNames:
    """Count the names in dialogues, without the narrator."""
    characters: Counter[str] = Counter()
    partners: dict[str, Counter[str]] = {}
    for dialogue in dialogues:
        characters[dialogue.character] += 1
        others = {message.speaker for message in dialogue.messages} - {dialogue.character, NARRATOR}
        partners.setdefault(dialogue.character, Counter()).update(others)
    return SpeakerNames(characters, partners)


def names_trained_on(data: str | Path) -> SpeakerNames:
    """The names on the training side of a data directory; empty if it has no dialogues file."""
    path = Path(data) / "dialogues" / "train.jsonl"
    return count_names(islice(read_dialogues(path), _DIALOGUES_AT_MOST) if path.is_file() else ())
