"""Reading is measured over whole steps of an epoch, and data that is too small says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from data.format.dialogue import Dialogue
from data.packed.shards import PackedDataset
from eval.speed.shard_reading import main, seconds_of_epoch


def test_an_epoch_is_read(
    dataset_of: Callable[[list[Dialogue]], Path], dialogues: list[Dialogue], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = dataset_of(dialogues)
    directory.rename(directory.parent / "train")
    dataset = PackedDataset(directory.parent / "train")
    seconds, n_tokens = seconds_of_epoch(dataset, 2, 2)
    assert seconds > 0
    assert n_tokens == dataset.n_rows // 4 * 4 * dataset.row_length > 0
    assert main([str(directory.parent), "--rows", "1", "--micro-batches", "2"]) == 0
    assert "60,000" in capsys.readouterr().out
    assert main([str(directory.parent), "--rows", "1000"]) == 2
    assert "lower --rows" in capsys.readouterr().err.replace("\n", " ")
