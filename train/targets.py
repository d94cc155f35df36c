"""Check before the first step that training and held-out rows have targets.

A run without targets would report a loss of 0.000, and only weight decay would change its weights.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data.format.dialogue import Dialogue
from data.packed.batch import PackedBatch, PackedRows, collate
from data.packed.mixture import MixtureRows

_ROWS_AT_ONCE = 64


class NoTargetsError(ValueError):
    """Training or held-out rows have no targets; the message has the counts and says what to do."""


@dataclass(frozen=True)
class Targets:
    """What a stage's loss sums over: counts of each kind in a batch, and what to do if a kind is missing.

    Both sides of the data need every kind: a classifier needs both classes.
    """

    counts: Callable[[PackedBatch], dict[str, int]]
    of_dialogue: Callable[[Dialogue, float | None], dict[str, int]]
    """The same kinds of a dialogue and `continue_within_seconds`, before the data is prepared; kinds may be omitted."""
    advice: str

    def total(self, batch: PackedBatch) -> int:
        """Number of terms in the loss of a batch."""
        return sum(self.counts(batch).values())


def check_targets_of_dialogues(
    targets: Targets, sides: Mapping[str, Iterable[Dialogue]], continue_within_seconds: float | None
) -> None:
    """Raise NoTargetsError unless the dialogues of each side have targets of every kind."""
    for where, dialogues in sides.items():
        found: Counter[str] = Counter()
        for dialogue in dialogues:
            for kind, count in targets.of_dialogue(dialogue, continue_within_seconds).items():
                found[kind] += count
            if found and all(found.values()):
                break
        else:
            counts = ", ".join(f"{count:,} {kind}" for kind, count in found.items()) or "no dialogues"
            raise NoTargetsError(f"no targets on {where}: {counts}. {targets.advice}")


def check_targets(targets: Targets, dataset: PackedRows, heldout: PackedRows, evaluation_rows: np.ndarray) -> None:
    """Raise NoTargetsError unless training rows and evaluated held-out rows have targets of every kind.

    Reads rows until all kinds are found, usually a few. Each part of a mixture must have targets, or its weight has no
    effect.
    """
    _check("the training side", targets, dataset, [np.arange(dataset.n_rows)])
    if isinstance(dataset, MixtureRows):
        for part in dataset.parts:
            if not any(targets.total(batch) for batch in _batches(part, np.arange(part.n_rows))):
                raise NoTargetsError(
                    f"{part.directory} has no targets, so its weight has no effect; remove it from the mixture. "
                    f"{targets.advice}"
                )
    others = np.setdiff1d(np.arange(heldout.n_rows), evaluation_rows)
    where = f"the held-out rows of evaluation_rows ({len(evaluation_rows)})"
    _check(where, targets, heldout, [evaluation_rows, others])


def _check(where: str, targets: Targets, rows: PackedRows, groups: Sequence[np.ndarray]) -> None:
    """Raise unless the first group has every kind; the other groups show whether more rows would help."""
    found: Counter[str] = Counter()
    for batch in _batches(rows, groups[0]):
        found.update(targets.counts(batch))
        if all(found.values()):
            return
    counts = ", ".join(f"{count:,} {kind}" for kind, count in found.items()) or "no rows"
    more = Counter(found)
    for group in groups[1:]:
        for batch in _batches(rows, group):
            more.update(targets.counts(batch))
    if more and all(more.values()):
        raise NoTargetsError(f"no targets in {where}: {counts}; other rows have some, so raise evaluation_rows")
    raise NoTargetsError(f"no targets in {where}: {counts}. {targets.advice}")


def _batches(rows: PackedRows, numbers: np.ndarray) -> Iterator[PackedBatch]:
    for at in range(0, len(numbers), _ROWS_AT_ONCE):
        yield collate(rows, numbers[at : at + _ROWS_AT_ONCE])
