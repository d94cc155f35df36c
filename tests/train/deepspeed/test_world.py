"""What ranks agree on, with their number simulated in this process."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from train.deepspeed import background, universal
from train.deepspeed.background import on_main
from train.deepspeed.engine import CheckpointStateError
from train.deepspeed.universal import universal_form
from train.deepspeed.world import World

ALONE = World(0, 1, torch.device("cpu"))


@pytest.mark.parametrize(
    ("texts", "expected"),
    [([None, "b", "c"], "rank 1: b"), (["a", "b", None], "rank 0: a"), ([None, "", None], "")],
)
def test_the_text_is_that_of_the_lowest_rank_that_has_one(
    monkeypatch: pytest.MonkeyPatch, texts: list[str | None], expected: str
) -> None:
    def gather(gathered: list[Any], mine: str | None, group: Any = None) -> None:
        gathered[:] = texts

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert World(2, 3, torch.device("cpu")).first_text(texts[2]) == expected


def test_sums_are_over_all_ranks_and_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    def add_the_other(total: torch.Tensor, group: Any = None) -> None:
        assert total.dtype == torch.float64
        total += torch.tensor([10.0, 20.0], dtype=torch.float64)

    monkeypatch.setattr(torch.distributed, "all_reduce", add_the_other)
    world = World(0, 2, torch.device("cpu"))
    world.progress.moved = 0.0
    assert world.sum([1.0, 2.0]) == [11.0, 22.0]
    assert world.progress.moved > 0
    world.progress.moved = 0.0
    sums = world.sum_later({"loss": torch.tensor(2.0), "accuracy": torch.tensor(1.0)})
    assert world.progress.moved == 0
    assert sums() == {"loss": 22.0, "accuracy": 11.0}
    assert world.progress.moved > 0
    assert World(0, 1, torch.device("cpu")).sum([1.0, 2.0]) == [1.0, 2.0]


def test_an_action_that_outlasts_a_poll_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "POLL_SECONDS", 0.001)
    polls, ended = [0], threading.Event()

    class Polled(World):
        def sum(self, values: list[float]) -> list[float]:
            polls[0] += 1
            if polls[0] == 5:
                ended.set()
            return values

    def action() -> float:
        ended.wait(60)
        return 7.0

    assert on_main(Polled(0, 1, torch.device("cpu")), action) == (7.0, None)
    assert polls[0] > 5


@pytest.mark.parametrize("error", [OSError("full"), ValueError("full"), KeyError("full")])
def test_any_error_of_an_action_is_returned(error: Exception) -> None:
    def action() -> float:
        raise error

    value, failure = on_main(ALONE, action)
    assert (value, failure) == (0.0, f"{type(error).__name__}: {error}")


@pytest.mark.parametrize("fails", ["never", "conversion", "load"])
def test_the_converted_state_is_removed_after_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    def convert(checkpoint: Path, directory: Path) -> None:
        directory.mkdir()
        if fails == "conversion":
            raise RuntimeError("no space")

    monkeypatch.setattr(universal, "_convert", convert)
    checkpoint, raised = tmp_path / "step_00000002", (CheckpointStateError, ValueError)
    checkpoint.mkdir()
    try:
        with universal_form(checkpoint, ALONE, Console(quiet=True)) as directory:
            assert directory.is_dir()
            if fails == "load":
                raise ValueError
    except raised:
        assert fails != "never"
    else:
        assert fails == "never"
    assert list(tmp_path.iterdir()) == [checkpoint]
