"""The order of rows: a pure function of (seed, rows consumed), whatever the ranks, micro-batches and restarts."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.sampler import DataPosition, DataPositionError, RowOrder, permutation
from data.shards import PackedDataset

WriteRows = Callable[..., Path]


@given(n_rows=st.integers(1, 50), seed=st.integers(-(2**31), 2**63 - 1), epoch=st.integers(0, 5))
def test_every_epoch_is_a_permutation(n_rows: int, seed: int, epoch: int) -> None:
    assert sorted(permutation(n_rows, seed, epoch)) == list(range(n_rows))
    assert np.array_equal(RowOrder(n_rows, seed).rows(epoch * n_rows, n_rows), permutation(n_rows, seed, epoch))


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


@given(
    n_rows=st.integers(1, 20),
    start=st.integers(0, 60),
    world_size=st.sampled_from([1, 2, 3, 4]),
    micro_steps=st.sampled_from([1, 2, 3]),
)
def test_world_size_and_micro_batch_do_not_change_the_order(
    n_rows: int, start: int, world_size: int, micro_steps: int
) -> None:
    order, count = RowOrder(n_rows, 5), 24
    per_micro_step = count // micro_steps - (count // micro_steps) % world_size
    consumed = [
        order.rank_rows(start + m * per_micro_step, per_micro_step, rank, world_size)
        for m in range(micro_steps)
        for rank in range(world_size)
    ]
    assert np.array_equal(np.concatenate(consumed), order.rows(start, per_micro_step * micro_steps))


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


def test_position_round_trip_and_epoch(write_rows: WriteRows) -> None:
    dataset = PackedDataset(write_rows(n_rows=7))
    position = DataPosition.start(dataset, seed=3)
    for _ in range(5):
        position = position.advanced(dataset, 3)
    assert (position.tokens_consumed, position.epoch) == (15 * 16, 2)
    assert DataPosition.from_dict(position.to_dict()) == position
    assert position.rows_consumed(dataset) == 15


def test_positions_of_other_data_are_refused(write_rows: WriteRows) -> None:
    dataset, other = PackedDataset(write_rows(name="a")), PackedDataset(write_rows(name="b", seed=1))
    with pytest.raises(DataPositionError, match="same data"):
        DataPosition.start(other, 0).rows_consumed(dataset)
    with pytest.raises(DataPositionError, match="multiple"):
        DataPosition(0, 0, 5, dataset.fingerprint).rows_consumed(dataset)
    with pytest.raises(DataPositionError, match="tokens_consumed is None"):
        DataPosition.from_dict({"seed": 0, "epoch": 0})
    with pytest.raises(DataPositionError, match="0 rows"):
        RowOrder(0, 1)
