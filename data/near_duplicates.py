"""Near-duplicate removal: which rows of which units say almost what an earlier row says, found with MinHash.

The text is cut into words, every n words in a row are a shingle, and two texts are as similar as their sets of shingles
(Jaccard). The stages are datatrove's; the result depends on the texts, their units and the settings alone, not on the
number of tasks.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from data.dialogue import Dialogue
from recipes.loader import Section

if TYPE_CHECKING:
    from datatrove.pipeline.base import PipelineStep

TextsOfUnit = Callable[[int], Iterable[str]]
_DROPPED = "dropped"


class NearDuplicates(Section):
    """Which dialogues are near-duplicates; of such, the first in the order of the sources is kept.

    Two dialogues of similarity s are found with the chance 1 - (1 - s^hashes_per_bucket)^buckets; the similarity where
    it rises from seldom to almost always is (1 / buckets)^(1 / hashes_per_bucket), 0.72 by the defaults. Dialogues of
    fewer than `n_grams` words have no shingle: exact duplicates alone are removed of them.
    """

    # Words of a shingle: more find less.
    n_grams: int = Field(default=5, ge=1, le=64)
    # More buckets find dialogues that are less similar, more hashes per bucket the opposite. Each bucket is one task.
    buckets: int = Field(default=14, ge=1, le=1_000)
    hashes_per_bucket: int = Field(default=8, ge=1, le=64)
    seed: int = Field(default=1, ge=0, lt=1 << 32)

    def chance(self, similarity: float) -> float:
        """The probability that two texts of a similarity (Jaccard, 0 to 1) are found to be near-duplicates."""
        return 1 - (1 - similarity**self.hashes_per_bucket) ** self.buckets

    @property
    def threshold(self) -> float:
        """The similarity at which that probability rises most steeply, about."""
        return (1 / self.buckets) ** (1 / self.hashes_per_bucket)


@dataclass(frozen=True, slots=True)
class MinhashStage:
    """One stage for an executor. `n_tasks` is what it must run with; None: any number."""

    name: str
    pipeline: list["PipelineStep"]
    n_tasks: int | None


def dialogue_text(dialogue: Dialogue) -> str:
    """What is compared of a dialogue: what is said, whoever says it; names, ids and times make no difference."""
    return "\n".join(message.text for message in dialogue.messages)


def minhash_stages(
    folder: Path, texts_of_unit: TextsOfUnit, n_units: int, settings: NearDuplicates
) -> list[MinhashStage]:
    """The stages in order, each to be run when the one before is done; afterwards `dropped_rows` has the result.

    `texts_of_unit(unit)` gives the texts of a unit's rows in order, one for every row; it is sent to other processes.
    All intermediate files are under `folder`. Run again after an interruption, finished units are not signed again.
    """
    from data.minhash_steps import FirstOfSimilar, PairsOfBucket, UnitSignatures, minhash_config

    config = minhash_config(settings)
    signatures, pairs = folder / "signatures", folder / "pairs"
    return [
        MinhashStage("minhash signatures", [UnitSignatures(signatures, texts_of_unit, n_units, config)], None),
        MinhashStage("minhash buckets", [PairsOfBucket(signatures, pairs, n_units, config)], settings.buckets),
        MinhashStage("minhash clusters", [FirstOfSimilar(pairs, folder / _DROPPED, n_units)], 1),
    ]


def dropped_rows(folder: Path, n_units: int) -> Iterator[np.ndarray]:
    """For each unit in order the rows to leave out (int64, ascending), once the stages are done."""
    for unit in range(n_units):
        yield np.load(dropped_file(folder / _DROPPED, unit), allow_pickle=False)


def dropped_file(directory: Path, unit: int) -> Path:
    """Where the rows of a unit that are left out are written."""
    return directory / f"{unit:05d}.npy"
