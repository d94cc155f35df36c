"""The order of training rows as a pure function of (seed, rows consumed), and the data position in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class DataPositionError(ValueError):
    """A checkpoint's data position that does not match the data."""


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer, a bijection on uint64. NumPy's Generator is not stable across versions."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permutation(n_rows: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of 0..n_rows-1 (int64) that depends only on (seed, epoch)."""
    with np.errstate(over="ignore"):
        key = _mix(np.array([seed], dtype=np.int64).view(np.uint64) * _GOLDEN + np.uint64(1))
        key = _mix(key ^ _mix(np.array([epoch], dtype=np.uint64) * _GOLDEN + np.uint64(2)))
        ranks = _mix(np.arange(n_rows, dtype=np.uint64) * _GOLDEN + key)
    return np.argsort(ranks, kind="stable").astype(np.int64)


class Rows(Protocol):
    """Training data as numbered rows: a packed dataset, or pairs."""

    @property
    def n_rows(self) -> int: ...
    @property
    def row_length(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...


class Order(Protocol):
    """The row order, epoch after epoch: a stateless function of the seed."""

    @property
    def seed(self) -> int: ...
    def epoch(self, n_places: int) -> int: ...
    def rows(self, start: int, count: int) -> np.ndarray: ...


class RowOrder:
    """The row order, epoch after epoch. The only state is a cache of the current epoch's permutation."""

    def __init__(self, n_rows: int, seed: int) -> None:
        if n_rows <= 0:
            raise DataPositionError(
                f"there are {n_rows} rows to train on; check the filters and the split of data.prepare"
            )
        self.n_rows = n_rows
        self.seed = seed
        self._cached: tuple[int, np.ndarray] | None = None

    def _epoch(self, epoch: int) -> np.ndarray:
        if self._cached is None or self._cached[0] != epoch:
            self._cached = (epoch, permutation(self.n_rows, self.seed, epoch))
        return self._cached[1]

    def epoch(self, n_places: int) -> int:
        """How many times every row has been seen."""
        return n_places // self.n_rows

    def rows(self, start: int, count: int) -> np.ndarray:
        """Row numbers (int64) at positions [start, start + count) of the infinite order."""
        assert min(start, count) >= 0, (start, count)
        parts = []
        while count:
            epoch, offset = divmod(start, self.n_rows)
            part = self._epoch(epoch)[offset : offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def rows_of_rank(rows: np.ndarray, rows_per_micro_batch: int, rank: int, world_size: int) -> list[np.ndarray]:
    """A rank's micro-batches of a step. The ranks' first micro-batches are the first rows of the step, and so on, so
    the rows of a step and their order do not depend on the number of ranks."""
    return list(rows.reshape(-1, world_size, rows_per_micro_batch)[:, rank])


@dataclass(frozen=True, slots=True)
class DataPosition:
    """The whole state of the training data. `tokens_consumed` counts whole rows, padding included."""

    seed: int
    epoch: int
    tokens_consumed: int
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataPosition:
        """Inverse of `to_dict`."""
        expected = {"seed": int, "epoch": int, "tokens_consumed": int, "fingerprint": str}
        for key, kind in expected.items():
            if not isinstance(values.get(key), kind):
                raise DataPositionError(f"data position: {key} is {values.get(key)!r}, expected {kind.__name__}")
        return cls(**{key: values[key] for key in expected})


def position_after(n_rows: int, rows: Rows, order: Order) -> DataPosition:
    """The data position after `n_rows` consumed rows."""
    return DataPosition(order.seed, order.epoch(n_rows), n_rows * rows.row_length, rows.fingerprint)
