"""Whether there is anything to train and to measure: looked at before the first step, for what is zero teaches nothing.

A run without targets would end in a loss of 0.000 and weights that weight decay alone has moved.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data.packed.batch import PackedBatch, PackedRows, collate
from data.packed.mixture import MixtureRows

_ROWS_AT_ONCE = 64


class NoTargetsError(ValueError):
    """A side of the data has nothing for the loss; the message has the counts and says what to do."""


@dataclass(frozen=True)
class Targets:
    """What a stage's loss is summed over: how many of each kind a batch holds, and what to do where a kind is missing.

    Every kind must be on both sides: a scorer that saw one class cannot tell two apart.
    """

    counts: Callable[[PackedBatch], dict[str, int]]
    advice: str

    def total(self, batch: PackedBatch) -> int:
        """How many things the loss of a batch sums over."""
        return sum(self.counts(batch).values())


def check_targets(targets: Targets, dataset: PackedRows, heldout: PackedRows, evaluation_rows: np.ndarray) -> None:
    """Raise NoTargetsError unless every kind is among the training rows and among the held-out rows that are evaluated.

    Rows are read until all kinds are found, so that sound data cost a few reads. Each part of a mixture must have
    some target, or its weight has no effect.
    """
    _check("the training side", targets, dataset, [np.arange(dataset.n_rows)])
    if isinstance(dataset, MixtureRows):
        for part in dataset.parts:
            if not any(targets.total(batch) for batch in _batches(part, np.arange(part.n_rows))):
                raise NoTargetsError(
                    f"{part.directory} has nothing to train, so that its weight has no effect; leave it out of the "
                    f"mixture. {targets.advice}"
                )
    others = np.setdiff1d(np.arange(heldout.n_rows), evaluation_rows)
    where = f"the held-out rows of evaluation_rows ({len(evaluation_rows)})"
    _check(where, targets, heldout, [evaluation_rows, others])


def _check(where: str, targets: Targets, rows: PackedRows, groups: Sequence[np.ndarray]) -> None:
    """The first group must have every kind; the others tell whether reading more of them would mend it."""
    found: Counter[str] = Counter()
    for batch in _batches(rows, groups[0]):
        found.update(targets.counts(batch))
        if all(found.values()):
            return
    told = ", ".join(f"{count:,} {kind}" for kind, count in found.items()) or "no rows"
    more = Counter(found)
    for group in groups[1:]:
        for batch in _batches(rows, group):
            more.update(targets.counts(batch))
    if more and all(more.values()):
        raise NoTargetsError(f"nothing to measure in {where}: {told}; other rows hold some, so raise evaluation_rows")
    raise NoTargetsError(f"nothing to train or to measure in {where}: {told}. {targets.advice}")


def _batches(rows: PackedRows, numbers: np.ndarray) -> Iterator[PackedBatch]:
    for at in range(0, len(numbers), _ROWS_AT_ONCE):
        yield collate(rows, numbers[at : at + _ROWS_AT_ONCE])
