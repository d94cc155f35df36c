"""The lengths of documents: bins that hold every length once, quantiles, and a picture."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from data.inspect.lengths import length_bins, length_table, write_histogram


@given(row_length=st.integers(16, 100_000))
def test_every_length_falls_in_one_bin(row_length: int) -> None:
    edges = length_bins(row_length)
    assert edges[0] == 1 and edges[-1] == row_length + 1
    assert np.all(np.diff(edges) >= 1) and len(edges) <= 41
    # the last edge of a histogram counts in: no length may lie on it
    counts, _ = np.histogram(np.arange(1, row_length + 1), edges)
    assert counts.sum() == row_length and np.array_equal(counts, np.diff(edges))


def test_quantiles_are_lengths_that_occur() -> None:
    table = length_table({"train": np.array([3, 5, 64, 64]), "heldout": np.zeros(0, np.int32)}, 64)
    console = Console(width=100)
    with console.capture() as printed:
        console.print(table)
    rows = [[cell.strip() for cell in line.split("│")[1:4]] for line in printed.get().splitlines() if "│" in line]
    assert rows == [
        ["shortest", "3", "0"], ["5%", "3", "0"], ["median", "5", "0"], ["95%", "64", "0"], ["longest", "64", "0"],
        ["as long as a row (64)", "50.0%", "-"],
    ]  # fmt: skip


@pytest.mark.parametrize("values", [[], [1], [64] * 9, [1, 2, 3, 4, 64]])
def test_any_lengths_can_be_drawn(tmp_path: Path, values: list[int]) -> None:
    path = tmp_path / "new" / "lengths.png"
    write_histogram(path, {"train": np.array(values, np.int32), "heldout": np.array([7], np.int32)}, 64)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [found.name for found in path.parent.iterdir()] == ["lengths.png"]
