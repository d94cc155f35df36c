"""The results of stages: one folder for each item, which exists only when complete."""

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recipes.files import sync_path

WORK = "work"  # inside the run_dir
FAILURES = "failures"  # inside the logs of a stage: the errors of failed tasks
_LOGS = "logs"


class StageError(RuntimeError):
    """A stage that failed for other reasons than the recipe; the message says where to look. Can be run again."""


class WorkFolder:
    """`<run_dir>/work`: `<stage>/<number of the item>/`, and `logs/<stage>/`."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir.absolute()
        self.path = self.run_dir / WORK

    def item(self, stage: str, number: int) -> Path:
        """The folder of an item; it exists only if the item is finished."""
        return self.path / stage / f"{number:06d}"

    def n_done(self, stage: str) -> int:
        """The number of finished items of a stage."""
        try:
            return sum(name[0] != "." for name in os.listdir(self.path / stage))
        except FileNotFoundError:
            return 0

    def logs(self, stage: str, n_tasks: int) -> Path:
        """datatrove's logs and completion markers, which are valid for one number of tasks."""
        return self.path / _LOGS / f"{stage}_{n_tasks}_tasks"

    def remove_leftovers(self) -> None:
        """Remove the partial results of killed processes; only while no task runs."""
        for leftover in self.path.glob("*/.*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def remove(self) -> None:
        """Remove the folder atomically, by renaming it first."""
        going = self.path.with_name(f".{WORK}.removed")
        shutil.rmtree(going, ignore_errors=True)
        if self.path.exists():
            self.path.rename(going)
            shutil.rmtree(going)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder, written under a temporary name and renamed when the block succeeds.

    If two processes write the same folder, such as a job that outlives its submitter, the first one is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            sync_path(file)
        sync_path(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    try:
        temporary.rename(path)
    except OSError:
        if not path.is_dir():
            raise
        shutil.rmtree(temporary)
    sync_path(path.parent)
