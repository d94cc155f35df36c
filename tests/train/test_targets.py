"""A run with nothing to train or to measure ends before its first step, with the counts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from data.packed.batch import PackedBatch
from data.packed.mixture import MixtureRows
from data.packed.packing import DOCUMENT
from train.deepspeed.world import World
from train.engagement import LABELS
from train.sft import REPLY_TOKENS
from train.stage import packed_stage
from train.targets import NoTargetsError, Targets, _batches, check_targets

L = 8


class Rows:
    """Rows of one document each: `trained` and `label` of every row's last token."""

    def __init__(self, trained: Sequence[int], label: Sequence[int], directory: str = "rows"):
        self.trained, self.label, self.directory = list(trained), list(label), Path(directory)
        self.n_rows, self.row_length, self.fingerprint, self.vocab_size = len(self.trained), L, "f", 99
        self.n_tokens = L * self.n_rows
        self.manifest = {"tokenizer_sha256": "t", "row_length": L, "n_dialogues": self.n_rows}

    def gather(self, numbers: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        shape = (len(numbers), L)
        trained, label = np.zeros(shape, np.uint8), np.full(shape, -1, np.int8)
        trained[:, -1] = [self.trained[number] for number in numbers]
        label[:, -1] = [self.label[number] for number in numbers]
        documents = np.zeros(len(numbers), DOCUMENT)
        documents["length"] = L
        return np.full(shape, 7), trained, label, documents


def check(targets: Targets, train: Rows, heldout: Rows, evaluated: Sequence[int]) -> None:
    check_targets(targets, train, heldout, np.array(evaluated))


def test_sound_data_pass() -> None:
    check(REPLY_TOKENS, Rows([0, 1], [-1, -1]), Rows([1, 0], [-1, -1]), [0])
    check(LABELS, Rows([0] * 3, [-1, 0, 1]), Rows([0] * 2, [1, 0]), [0, 1])


@pytest.mark.parametrize(
    ("targets", "train", "heldout", "message"),
    [
        (REPLY_TOKENS, [0, 0], [1, 1], "in the training side: 0 trained tokens.*trained: false"),
        (REPLY_TOKENS, [1, 0], [0, 0], r"in the held-out rows of evaluation_rows \(2\): 0 trained tokens"),
        (LABELS, [1, 1], [0, 1], "training side: 2 partner continues, 0 partner leaves.*continue_within_seconds"),
        (LABELS, [-1, -1], [0, 1], "training side: 0 partner continues, 0 partner leaves"),
        (LABELS, [0, 1], [0, 0], r"evaluation_rows \(2\): 0 partner continues, 2 partner leaves"),
    ],
)
def test_what_is_missing_is_counted(targets: Targets, train: list[int], heldout: list[int], message: str) -> None:
    sides = [Rows(v, [-1] * 2) if targets is REPLY_TOKENS else Rows([1] * 2, v) for v in (train, heldout)]
    with pytest.raises(NoTargetsError, match=message):
        check(targets, *sides, [0, 1])


def test_where_more_rows_would_do_the_message_says_so() -> None:
    with pytest.raises(NoTargetsError, match=r"in .*rows \(1\): 1 partner continues, 0 .*raise evaluation_rows"):
        check(LABELS, Rows([0] * 2, [0, 1]), Rows([0] * 3, [1, 1, 0]), [0])


@pytest.mark.parametrize("n_rows", [1, 63, 64, 65, 130])
def test_what_stands_in_any_row_is_found(n_rows: int) -> None:
    for place in {0, n_rows // 2, n_rows - 1}:
        one = Rows([int(row == place) for row in range(n_rows)], [-1] * n_rows)
        check(REPLY_TOKENS, one, one, range(n_rows))
        check(REPLY_TOKENS, MixtureRows([one, one], [1.0, 1.0]), one, [place])  # type: ignore[arg-type, list-item]
        others = [row for row in range(n_rows) if row != place]
        with pytest.raises(NoTargetsError, match="0 trained.*other rows have some" if others else "no rows"):
            check(REPLY_TOKENS, one, one, others)


def test_no_rows_are_an_error() -> None:
    good = Rows([1], [0])
    for train, heldout, evaluated in ((Rows([], []), good, [0]), (good, Rows([], []), [])):
        with pytest.raises(NoTargetsError, match=r"no targets in .*: no rows\. "):
            check(REPLY_TOKENS, train, heldout, evaluated)


def test_the_rows_that_are_not_evaluated_are_counted_with_those_that_are() -> None:
    """Of two kinds each stands on one side: together they have both."""
    check(LABELS, Rows([0] * 2, [0, 1]), Rows([0] * 3, [1, 0, -1]), [0, 1])
    with pytest.raises(NoTargetsError, match="raise evaluation_rows"):
        check(LABELS, Rows([0] * 2, [0, 1]), Rows([0] * 3, [1, 0, -1]), [0, 2])
    with pytest.raises(NoTargetsError, match=r"1 partner continues, 0 partner leaves\. "):
        check(LABELS, Rows([0] * 2, [0, 1]), Rows([0] * 3, [1, -1, 1]), [0, 1])


def test_the_total_is_the_sum_of_all_kinds() -> None:
    batch = next(iter(_batches(Rows([0] * 3, [0, 1, 1]), np.arange(3))))  # type: ignore[arg-type]
    assert LABELS.counts(batch) == {"partner continues": 2, "partner leaves": 1} and LABELS.total(batch) == 3


def test_each_part_of_a_mixture_has_something_to_train() -> None:
    good, empty = Rows([1, 1], [0, 1], "good"), Rows([0] * 200, [-1] * 200, "empty")
    heldout = Rows([1], [0])
    check(REPLY_TOKENS, MixtureRows([good, good], [1.0, 1.0]), heldout, [0])  # type: ignore[arg-type, list-item]
    with pytest.raises(NoTargetsError, match=r"empty has no targets.*remove it from the mixture"):
        check(REPLY_TOKENS, MixtureRows([good, empty], [1.0, 1.0]), heldout, [0])  # type: ignore[arg-type, list-item]


def test_sound_data_cost_a_few_reads() -> None:
    read = 0

    def counts(batch: PackedBatch) -> dict[str, int]:
        nonlocal read
        read += 1
        return {"tokens": 1}

    check(
        Targets(counts, lambda dialogue, within: {}, ""),
        Rows([1] * 10_000, [-1] * 10_000),
        Rows([1] * 500, [-1] * 500),
        range(500),
    )
    assert read == 2


@pytest.mark.parametrize(("asked", "rank", "printed"), [(500, 0, True), (500, 1, False), (6, 0, False), (3, 0, False)])
def test_fewer_held_out_rows_than_asked_for_are_a_line(
    asked: int, rank: int, printed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    heldout = Rows([1] * 6, [1] * 6, "heldout")
    world = World(rank, 2, torch.device("cpu"))
    packed_stage(Rows([1] * 6, [1] * 6), heldout, asked, 2, world, REPLY_TOKENS)  # type: ignore[arg-type]
    line = "evaluation_rows: 500 asked for, 6 held-out rows found; all are used\n"
    assert capsys.readouterr().out == (line if printed else "")
