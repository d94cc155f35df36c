"""Checkpoints are whole or absent, damage is found by hash, and the one before it is used."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from data.packed.sampler import DataPosition
from train.checkpoint.checkpoint import CheckpointError, Checkpoints, CheckpointState, Write, _Pending, damage
from train.checkpoint.hashed_file import file_hash, hashed_file
from train.deepspeed.world import World

ALONE = World(0, 1, torch.device("cpu"))


def state(step: int, max_steps: int = 0) -> CheckpointState:
    position = DataPosition(seed=1, epoch=0, tokens_consumed=step * 8, fingerprint="f")
    return CheckpointState(step, position, 1, max_steps, 4, ("a spike",), {"loss": [1.5]})


def write(staging: Path, abandoned: threading.Event) -> dict[Path, str]:
    (staging / "optimizer").mkdir()
    file = staging / "optimizer" / "state.pt"
    file.write_bytes(bytes(range(200)))
    return {file: file_hash(file)}


def save(checkpoints: Checkpoints, step: int, write: Write = write) -> None:
    checkpoints.save(state(step), lambda: write)
    checkpoints.finish()


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=2, world=ALONE, console=Console(quiet=True))


def test_newest_of_a_bounded_number(checkpoints: Checkpoints) -> None:
    assert checkpoints.newest() is None
    for step in (5, 10, 15):
        save(checkpoints, step)
    found = checkpoints.newest()
    assert found is not None
    assert found[1] == state(15)
    names = sorted(path.name for path in checkpoints.directory.iterdir())
    assert names == ["latest", "step_00000010", "step_00000015"]
    assert (checkpoints.directory / "latest").read_text() == "step_00000015\n"


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "manifest"])
def test_a_damaged_checkpoint_is_passed_over(checkpoints: Checkpoints, harm: str) -> None:
    for step in (5, 10):
        save(checkpoints, step)
    newest = checkpoints.directory / "step_00000010"
    file = newest / "optimizer" / "state.pt"
    content = bytearray(file.read_bytes())
    if harm == "flip":
        content[77] ^= 1
        file.write_bytes(content)
    elif harm == "truncate":
        file.write_bytes(content[:50])
    elif harm == "remove":
        file.unlink()
    else:
        (newest / "manifest.json").write_text("{")
    assert damage(newest) is not None
    found = checkpoints.newest()
    assert found is not None
    assert found[1].step == 5


def test_all_damaged_is_an_error(checkpoints: Checkpoints) -> None:
    save(checkpoints, 5)
    (checkpoints.directory / "step_00000005" / "optimizer" / "state.pt").unlink()
    with pytest.raises(CheckpointError, match="every checkpoint"):
        checkpoints.newest()


def test_a_write_that_fails_leaves_the_old_checkpoint(checkpoints: Checkpoints) -> None:
    save(checkpoints, 5)

    def full_disk(staging: Path, abandoned: threading.Event) -> dict[Path, str]:
        write(staging, abandoned)
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left on device"):
        save(checkpoints, 10, full_disk)
    found = checkpoints.newest()
    assert found is not None
    assert found[1].step == 5
    assert not list(checkpoints.directory.glob(".writing*"))


def test_training_goes_on_while_files_are_written(checkpoints: Checkpoints) -> None:
    save(checkpoints, 5)
    released = threading.Event()

    def slow_disk(staging: Path, abandoned: threading.Event) -> dict[Path, str]:
        released.wait(60)
        return write(staging, abandoned)

    checkpoints.save(state(10), lambda: slow_disk)
    assert checkpoints.report() == (1.0, 0.0)
    checkpoints.advance(*checkpoints.report())
    found = checkpoints.newest()
    assert found is not None
    assert found[1].step == 5, "what is not complete is not read"
    released.set()
    checkpoints.save(state(15), lambda: write)  # waits for the one before
    assert (checkpoints.directory / "latest").read_text() == "step_00000010\n"
    checkpoints.finish()
    assert (checkpoints.directory / "latest").read_text() == "step_00000015\n"


def test_an_abandoned_save_makes_way_for_the_next(checkpoints: Checkpoints) -> None:
    save(checkpoints, 5)

    def endless(staging: Path, abandoned: threading.Event) -> dict[Path, str]:
        with hashed_file(staging / "state.pt", abandoned) as file:
            while True:
                file.write(b"x")

    checkpoints.save(state(10), lambda: endless)
    checkpoints.abandon()
    assert checkpoints.report() == (0.0, 0.0)
    save(checkpoints, 11)
    checkpoints.abandon()  # nothing is pending
    names = sorted(path.name for path in checkpoints.directory.iterdir())
    assert names == ["latest", "step_00000005", "step_00000011"]


def test_a_save_that_is_written_cannot_be_abandoned(checkpoints: Checkpoints) -> None:
    checkpoints.save(state(5), lambda: write)
    while checkpoints.report()[0]:
        time.sleep(0.01)
    checkpoints.advance(*checkpoints.report())
    checkpoints.abandon()
    checkpoints.finish()
    found = checkpoints.newest()
    assert found is not None
    assert found[1] == state(5)


def test_a_failure_in_the_background_ends_the_training(checkpoints: Checkpoints) -> None:
    def full_disk(staging: Path, abandoned: threading.Event) -> dict[Path, str]:
        raise OSError(28, "No space left on device")

    checkpoints.save(state(10), lambda: full_disk)
    while checkpoints.report()[0]:
        checkpoints.advance(*checkpoints.report())
    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpoints.advance(*checkpoints.report())
    assert not list(checkpoints.directory.iterdir())


def test_a_checkpoint_passed_over_as_damaged_does_not_outlive_the_next_save(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1, world=ALONE, console=Console(quiet=True))
    save(checkpoints, 10)
    (checkpoints.directory / "step_00000010" / "optimizer" / "state.pt").write_bytes(b"")
    save(checkpoints, 8)
    found = checkpoints.newest()
    assert found is not None
    assert found[1] == state(8)
    assert [path.name for path in checkpoints.directory.glob("step_*")] == ["step_00000008"]


def test_half_written_directories_are_never_read(checkpoints: Checkpoints) -> None:
    save(checkpoints, 5)
    half = checkpoints.directory / ".writing_step_00000010"
    write_into = half / "optimizer"
    write_into.mkdir(parents=True)
    found = checkpoints.newest()
    assert found is not None
    assert found[1].step == 5
    save(checkpoints, 10)
    assert not half.exists()


@pytest.mark.parametrize("last_done", ["rename", "latest"])
def test_the_last_save_of_all_is_completed_by_a_resume(checkpoints: Checkpoints, last_done: str) -> None:
    """A process killed in it leaves its checkpoint in place, and the rest to be done by one that never saves again."""
    for step in (5, 10):
        save(checkpoints, step)
    shutil.copytree(checkpoints.directory / "step_00000010", checkpoints.directory / "step_00000015")
    if last_done == "latest":
        (checkpoints.directory / "latest").write_text("step_00000015\n")
        (checkpoints.directory / ".removing_step_00000000").mkdir()
    found = checkpoints.newest()
    assert found is not None
    checkpoints.tidy(found[0])
    names = sorted(path.name for path in checkpoints.directory.iterdir())
    assert names == ["latest", "step_00000010", "step_00000015"]
    assert (checkpoints.directory / "latest").read_text() == "step_00000015\n"


@pytest.mark.parametrize(
    ("longer", "expected", "there"),
    [(20, 20, [7, 15, 20]), (40, 7, [7, 15, 20])],
    ids=["the same number of steps", "more steps"],
)
def test_a_longer_run_starts_before_the_rate_fell(tmp_path: Path, longer: int, expected: int, there: list[int]) -> None:
    """Half of a run's steps are stable: of 20, the checkpoint of step 7 is the last that a longer run comes by."""

    def opened(max_steps: int) -> Checkpoints:
        return Checkpoints(tmp_path, 2, ALONE, Console(quiet=True), max_steps, lambda steps: steps // 2)

    first = opened(20)
    for step in (3, 7, 12, 15, 20):
        first.save(state(step, 20), lambda: write)
        first.finish()
    assert [int(path.name.removeprefix("step_")) for path in sorted(tmp_path.glob("step_*"))] == there
    second = opened(longer)
    found = second.newest()
    assert found is not None
    assert found[1].step == expected
    if longer > 20:
        second.save(state(10, longer), lambda: write)
        second.finish()
        assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_00000007", "step_00000010"]


def test_a_longer_run_continues_from_the_last_stable_step_itself(tmp_path: Path) -> None:
    def opened(max_steps: int) -> Checkpoints:
        return Checkpoints(tmp_path, 2, ALONE, Console(quiet=True), max_steps, lambda steps: steps // 2)

    first = opened(20)
    for step in (10, 11):
        first.save(state(step, 20), lambda: write)
        first.finish()
    found = opened(40).newest()
    assert found is not None
    assert found[1].step == 10


def two_ranks_write(directory: Path) -> Checkpoints:
    """step_00000005 as two ranks write it: each its own file, then rank 0 completes it."""
    ranks = [
        Checkpoints(directory, keep=2, world=World(rank, 2, torch.device("cpu")), console=Console(quiet=True))
        for rank in range(2)
    ]
    pending = _Pending(state(5), directory / ".writing_step_00000005", directory / "step_00000005", None)
    ranks[0]._make_room(pending.staging)
    for rank, one in enumerate(ranks):

        def write_share(staging: Path, abandoned: threading.Event, rank: int = rank) -> dict[Path, str]:
            (staging / "optimizer").mkdir(exist_ok=True)
            with hashed_file(staging / "optimizer" / f"rank_{rank}.pt", abandoned) as file:
                file.write(bytes(range(50)))
            return {staging / "optimizer" / f"rank_{rank}.pt": file.hash}

        one._write_part(pending, write_share)
    ranks[0]._complete(pending)
    return ranks[0]


@pytest.mark.parametrize("name", ["optimizer/rank_0.pt", "optimizer/rank_1.pt", "state.json", "manifest.json"])
def test_a_flipped_byte_is_found_in_each_file_of_two_ranks(tmp_path: Path, name: str) -> None:
    two_ranks_write(tmp_path)
    checkpoint = tmp_path / "step_00000005"
    assert damage(checkpoint) is None
    files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert files == {"optimizer/rank_0.pt", "optimizer/rank_1.pt", "state.json", "manifest.json"}
    content = bytearray((checkpoint / name).read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / name).write_bytes(content)
    assert damage(checkpoint) is not None


def test_everything_is_synced_before_the_rename_and_the_rename_before_latest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, replace, rename = os.fsync, os.replace, Path.rename

    def recorded_fsync(descriptor: int) -> None:
        order.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def recorded_replace(source: Path, target: Path) -> None:
        order.append(f"rename {Path(target).name}")
        replace(source, target)

    def recorded_rename(source: Path, target: Path) -> Path:
        order.append(f"rename {Path(target).name}")
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    monkeypatch.setattr(Path, "rename", recorded_rename)
    two_ranks_write(tmp_path)
    in_place = order.index("rename step_00000005")
    before, after = order[:in_place], order[in_place + 1 :]
    for name in ("rank_0.pt", "rank_1.pt", ".state.json.partial", ".manifest.json.partial", "optimizer"):
        assert f"sync {name}" in before, name
    assert before.index("rename manifest.json") < len(before) - 1 - before[::-1].index("sync .writing_step_00000005")
    assert after == [f"sync {tmp_path.name}", "sync .latest.partial", "rename latest", f"sync {tmp_path.name}"]


def test_an_old_checkpoint_is_renamed_and_synced_before_its_files_go(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, rmtree = os.fsync, shutil.rmtree

    def recorded_fsync(descriptor: int) -> None:
        order.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def recorded_rmtree(path: Path, **options: Any) -> None:
        order.append(f"remove {Path(path).name}")
        rmtree(path, **options)

    for step in (1, 2):
        save(checkpoints, step)
    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(shutil, "rmtree", recorded_rmtree)
    save(checkpoints, 3)
    removed = order.index("remove .removing_step_00000001")
    assert order[removed - 1] == f"sync {checkpoints.directory.name}"
