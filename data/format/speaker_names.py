"""Who speaks in a set of dialogues, by how often: the names that a model of them has seen."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from data.format.dialogue import NARRATOR, Dialogue
from data.format.dialogue_json import read_dialogues

_DIALOGUES_AT_MOST = 50_000  # enough to know the commonest names


@dataclass(frozen=True)
class SpeakerNames:
    """How many dialogues each speaker is in as the character, and in how many each other speaker writes to whom."""

    characters: Counter[str]
    partners: dict[str, Counter[str]]

    def commonest(self) -> tuple[str, str] | None:
        """(partner, character): the commonest character, and who speaks to it in most dialogues; None where nobody
        speaks to anybody."""
        for character, _ in sorted(self.characters.items(), key=lambda item: (-item[1], item[0])):
            partners = self.partners.get(character)
            if partners:
                return min(partners, key=lambda name: (-partners[name], name)), character
        return None


def count_names(dialogues: Iterable[Dialogue]) -> SpeakerNames:
    """The names in these dialogues; the narrator is nobody."""
    characters: Counter[str] = Counter()
    partners: dict[str, Counter[str]] = {}
    for dialogue in dialogues:
        characters[dialogue.character] += 1
        others = {message.speaker for message in dialogue.messages} - {dialogue.character, NARRATOR}
        partners.setdefault(dialogue.character, Counter()).update(others)
    return SpeakerNames(characters, partners)


def names_trained_on(data: str | Path) -> SpeakerNames:
    """The names on the training side of a data directory; none where it has no such file."""
    path = Path(data) / "dialogues" / "train.jsonl"
    return count_names(islice(read_dialogues(path), _DIALOGUES_AT_MOST) if path.is_file() else ())
