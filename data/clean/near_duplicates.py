"""The recipe section of near-duplicate removal, and the text of a dialogue that is compared. data/pipeline/minhash.py
has the stages."""

from pydantic import Field

from data.format.dialogue import NARRATOR, Dialogue
from recipes.loader import Section


class NearDuplicates(Section):
    """Leave out near-duplicates of an earlier dialogue, found with MinHash; narration is ignored.

    Every `n_grams` consecutive words are a shingle; the similarity of two dialogues is the Jaccard similarity of their
    sets of shingles, ignoring case, punctuation, accents and digits. Two dialogues of similarity s are found with
    probability 1 - (1 - s^hashes_per_bucket)^buckets, which rises steeply at (1 / buckets)^(1 / hashes_per_bucket):
    0.72 by default. Dialogues of fewer than `n_grams` words have no shingle; only their exact duplicates are removed.
    """

    # Words of a shingle; longer shingles find fewer duplicates.
    n_grams: int = Field(default=5, ge=1, le=64)
    # More buckets find less similar dialogues, more hashes per bucket the opposite.
    buckets: int = Field(default=14, ge=1, le=1_000)
    hashes_per_bucket: int = Field(default=8, ge=1, le=64)
    seed: int = Field(default=1, ge=0, lt=1 << 32)

    def chance(self, similarity: float) -> float:
        """The probability that two dialogues of this similarity (0 to 1) are found to be near-duplicates."""
        return 1 - (1 - similarity**self.hashes_per_bucket) ** self.buckets

    @property
    def threshold(self) -> float:
        """The similarity at which this probability rises most steeply (approximation)."""
        return (1 / self.buckets) ** (1 / self.hashes_per_bucket)


def compared_text(dialogue: Dialogue) -> str:
    """The compared text of a dialogue: its messages without names, ids and times. Narration is excluded unless the
    narrator is the character, because many short dialogues share one character definition."""
    silent = NARRATOR if dialogue.character != NARRATOR else None
    return "\n".join(message.text for message in dialogue.messages if message.speaker != silent)
