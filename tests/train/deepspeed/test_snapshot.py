"""A snapshot is a true copy: what training does next is not in it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from train.checkpoint.hashed_file import file_hash
from train.deepspeed import host_memory
from train.deepspeed.engine import _random_state, _set_random_state
from train.deepspeed.host_memory import HostMemory
from train.deepspeed.snapshot import Snapshot
from train.deepspeed.world import World


def test_what_is_written_is_what_was_there(tmp_path: Path) -> None:
    weights, counter = torch.arange(6.0).view(2, 3), {"step": 3, "beta": (0.9, 0.95)}
    snapshot = Snapshot(HostMemory())
    state = {"module": OrderedDict(a=weights, transposed=weights.T), "list": [weights, "text"], "group": counter}
    snapshot.save(state, "./optimizer/state.pt")
    kept = snapshot.tensor(weights)
    snapshot.finish()
    weights.zero_()
    counter["step"] = 4
    file = tmp_path / "optimizer" / "state.pt"
    assert snapshot.write(tmp_path, threading.Event()) == {file: file_hash(file)}
    found = torch.load(tmp_path / "optimizer" / "state.pt", weights_only=True)
    expected = torch.arange(6.0).view(2, 3)
    assert torch.equal(kept, expected)
    assert torch.equal(found["module"]["a"], expected)
    assert torch.equal(found["module"]["transposed"], expected.T)
    assert found["list"][0].data_ptr() == found["module"]["a"].data_ptr(), "shared tensors stay shared"
    assert found["group"] == {"step": 3, "beta": (0.9, 0.95)}


def test_what_is_no_tensor_is_copied_too(tmp_path: Path) -> None:
    snapshot, counts = Snapshot(HostMemory()), np.arange(3)
    snapshot.save({"counts": counts}, "state.pt")
    counts[:] = 9
    snapshot.write(tmp_path, threading.Event())
    assert torch.load(tmp_path / "state.pt", weights_only=False)["counts"].tolist() == [0, 1, 2]


def test_views_of_one_memory_are_copies_of_their_own() -> None:
    whole, snapshot = torch.arange(6.0), Snapshot(HostMemory())
    views = [whole, whole.view(2, 3), whole[:2], whole[::2], whole.view(torch.int32)]
    assert all(torch.equal(snapshot.tensor(view), view) for view in views)


def test_buffers_are_returned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_SMALLEST", 1)
    memory = HostMemory()
    snapshot = Snapshot(memory)
    snapshot.copy(torch.ones(4))
    snapshot.release()
    snapshot.release()
    one, other = memory.copy(torch.full((4,), 1.0)), memory.copy(torch.full((4,), 2.0))
    assert (one.tolist(), other.tolist()) == ([1.0] * 4, [2.0] * 4)


def test_a_copy_that_fails_is_told_when_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(memory: HostMemory, source: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(HostMemory, "copy", no_memory)
    snapshot = Snapshot(HostMemory())
    snapshot.save({"a": torch.ones(2)}, "state.pt")
    with pytest.raises(RuntimeError, match="allocate memory"):
        snapshot.write(tmp_path, threading.Event())


def test_a_checkpoint_restores_the_random_state_or_seeds_each_rank_by_its_own_number() -> None:
    """After a change of the number of ranks all start from rank 0's state, and must not draw the same numbers."""
    torch.manual_seed(5)
    state = _random_state()
    drawn = torch.rand(3)

    def drawn_after(rank: int, size: int, is_resharded: bool) -> list[float]:
        torch.manual_seed(0)
        _set_random_state(state, World(rank, size, torch.device("cpu")), is_resharded)
        return torch.rand(3).tolist()

    assert drawn_after(1, 2, is_resharded=False) == drawn.tolist()
    places = [(0, 2), (1, 2), (0, 3), (2, 3)]
    resharded = [drawn_after(*place, is_resharded=True) for place in places]
    assert len({tuple(numbers) for numbers in [*resharded, drawn.tolist()]}) == len(places) + 1
    assert [drawn_after(*place, is_resharded=True) for place in places] == resharded
