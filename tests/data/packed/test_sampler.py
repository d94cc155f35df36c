"""The order of rows: a pure function of (seed, rows consumed), whatever the ranks, micro-batches and restarts."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.packed.sampler import DataPosition, DataPositionError, RowOrder, permutation, position_after, rows_of_rank


@given(n_rows=st.integers(1, 50), seed=st.integers(-(2**31), 2**63 - 1), epoch=st.integers(0, 5))
def test_every_epoch_is_a_permutation(n_rows: int, seed: int, epoch: int) -> None:
    assert sorted(permutation(n_rows, seed, epoch)) == list(range(n_rows))
    assert np.array_equal(RowOrder(n_rows, seed).rows(epoch * n_rows, n_rows), permutation(n_rows, seed, epoch))


@dataclass(frozen=True)
class Numbered:
    """Rows that are nothing but numbers."""

    n_rows: int
    row_length: int = 16
    fingerprint: str = "f"


@given(
    n_rows=st.integers(1, 20),
    seed=st.integers(0, 100),
    start=st.integers(0, 60),
    counts=st.lists(st.integers(0, 30), max_size=5),
)
def test_restarts_do_not_change_the_order(n_rows: int, seed: int, start: int, counts: list[int]) -> None:
    whole = RowOrder(n_rows, seed).rows(start, sum(counts))
    parts, position = [np.zeros(0, np.int64)], start
    for count in counts:
        parts.append(RowOrder(n_rows, seed).rows(position, count))  # a fresh object each time, as after a restart
        position += count
    assert np.array_equal(np.concatenate(parts), whole)


@given(n_steps=st.integers(1, 4), world_size=st.integers(1, 5), micro_batch=st.integers(1, 4))
def test_a_steps_rows_in_order_whatever_the_ranks(n_steps: int, world_size: int, micro_batch: int) -> None:
    """Micro-step after micro-step, the ranks' shares one after the other are the rows; every share has one size."""
    rows = np.arange(100, 100 + n_steps * world_size * micro_batch)
    shares = [rows_of_rank(rows, micro_batch, rank, world_size) for rank in range(world_size)]
    assert {len(share) for share in shares} == {n_steps}
    in_order = [batch for micro_step in zip(*shares, strict=True) for batch in micro_step]
    assert {len(batch) for batch in in_order} == {micro_batch}
    assert np.concatenate(in_order).tolist() == rows.tolist()


@given(n_rows=st.integers(1, 20), seed=st.integers(0, 9), consumed=st.integers(0, 90))
def test_a_position_says_how_often_every_row_was_seen(n_rows: int, seed: int, consumed: int) -> None:
    data = Numbered(n_rows)
    position = position_after(consumed, data, RowOrder(n_rows, seed))
    assert position.tokens_consumed == consumed * data.row_length
    seen = np.bincount(RowOrder(n_rows, position.seed).rows(0, consumed), minlength=n_rows)
    # the epoch is the number of whole passes: every row that often, and some of them once more
    assert set(seen) <= {position.epoch, position.epoch + 1} and seen.min() == position.epoch
    assert DataPosition.from_dict(json.loads(json.dumps(position.to_dict()))) == position


def test_order_is_fixed_for_ever() -> None:
    """Changing these numbers breaks the resume of every existing checkpoint."""
    assert permutation(10, seed=0, epoch=0).tolist() == [8, 6, 1, 9, 2, 4, 5, 0, 3, 7]
    assert permutation(10, seed=0, epoch=1).tolist() == [9, 1, 2, 0, 8, 7, 6, 4, 3, 5]
    assert permutation(10, seed=1, epoch=0).tolist() == [8, 4, 9, 0, 1, 7, 2, 3, 5, 6]


def test_orders_look_random() -> None:
    orders = np.array([permutation(8, seed, epoch) for seed in range(200) for epoch in range(5)])
    counts = np.array([np.bincount(orders[:, place], minlength=8) for place in range(8)])
    assert counts.sum() == 8000
    assert np.all(np.abs(counts - 125) < 60), "some row prefers some place"


def test_damaged_positions_and_empty_data_are_named() -> None:
    with pytest.raises(DataPositionError, match="tokens_consumed is None"):
        DataPosition.from_dict({"seed": 0, "epoch": 0})
    with pytest.raises(DataPositionError, match="0 rows"):
        RowOrder(0, 1)
