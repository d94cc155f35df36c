"""The first error at once, and no waiting for a process that is dead."""

import os
import signal
import time
from pathlib import Path

import pytest
from datatrove.data import DocumentsPipeline
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from data.pipeline.processes import process_pool, run_ranks
from data.pipeline.work_folder import StageError


class Ranks(PipelineStep):
    """Does to each rank what its list says."""

    name, type = "ranks", "test"

    def __init__(self, folder: Path, actions: list[str]) -> None:
        super().__init__()
        self.folder, self.actions = folder, actions

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        action = self.actions[rank]
        if action == "wait":
            time.sleep(600)
        elif action == "die":
            signal.raise_signal(signal.SIGKILL)
        elif action == "fail":
            raise ZeroDivisionError("1 / 0")
        (self.folder / f"{rank}").write_text(f"{os.getpid()}")
        yield from ()


def executor(folder: Path, *actions: str) -> LocalPipelineExecutor:
    folder.mkdir(exist_ok=True)
    step = Ranks(folder, list(actions))
    return LocalPipelineExecutor([step], len(actions), logging_dir=str(folder / "logs"))


def pids(folder: Path) -> set[str]:
    return {path.read_text() for path in folder.glob("[0-9]")}


def test_processes_are_kept_from_stage_to_stage(tmp_path: Path) -> None:
    with process_pool(2) as pool:
        for name in ("a", "b"):
            one = executor(tmp_path / name, "work", "work", "work")
            run_ranks(one, pool)
            assert one.get_incomplete_ranks() == []
    assert len(pids(tmp_path / "a") | pids(tmp_path / "b")) <= 2
    assert str(os.getpid()) not in pids(tmp_path / "a")
    with process_pool(1) as pool:
        run_ranks(executor(tmp_path / "c", "work", "work"), pool)
    assert pids(tmp_path / "c") == {str(os.getpid())}


def test_an_error_ends_it_without_waiting_for_the_others(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError), process_pool(2) as pool:
        run_ranks(executor(tmp_path, "fail", "wait"), pool)
    assert time.monotonic() - began < 300, "the other was killed"


def test_a_killed_process_is_reported(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="killed"), process_pool(2) as pool:
        run_ranks(executor(tmp_path, "die", "wait"), pool)
