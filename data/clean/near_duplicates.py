"""Which dialogues count as near-duplicates: the recipe's section, and what of a dialogue is compared. The stages that
find them are in data/pipeline/minhash.py."""

from pydantic import Field

from data.format.dialogue import NARRATOR, Dialogue
from recipes.loader import Section


class NearDuplicates(Section):
    """Dialogues in which is said almost what one before them says are left out, found with MinHash; what the narrator
    tells makes no difference.

    Every `n_grams` words in a row are a shingle, and the similarity of two dialogues is that of their sets of shingles
    (Jaccard: common over all); case, punctuation, accents and the digits of numbers make no difference. Two of
    similarity s are found with the chance 1 - (1 - s^hashes_per_bucket)^buckets. Where it rises from seldom to almost
    always is (1 / buckets)^(1 / hashes_per_bucket): 0.72 by the defaults. Dialogues of fewer than `n_grams` words have
    no shingle; of them exact duplicates alone are removed.
    """

    # Words of a shingle; with more words fewer are found.
    n_grams: int = Field(default=5, ge=1, le=64)
    # More buckets find dialogues that are less similar, more hashes per bucket the opposite.
    buckets: int = Field(default=14, ge=1, le=1_000)
    hashes_per_bucket: int = Field(default=8, ge=1, le=64)
    seed: int = Field(default=1, ge=0, lt=1 << 32)

    def chance(self, similarity: float) -> float:
        """The probability that two dialogues of a similarity (0 to 1) are found to be near-duplicates."""
        return 1 - (1 - similarity**self.hashes_per_bucket) ** self.buckets

    @property
    def threshold(self) -> float:
        """About the similarity at which that probability rises most steeply."""
        return (1 / self.buckets) ** (1 / self.hashes_per_bucket)


def compared_text(dialogue: Dialogue) -> str:
    """What is compared of a dialogue: what is said, whoever says it; names, ids and times make no difference. Nor does
    what the narrator tells, unless as the character: many short dialogues have the definition of one character."""
    silent = NARRATOR if dialogue.character != NARRATOR else None
    return "\n".join(message.text for message in dialogue.messages if message.speaker != silent)
