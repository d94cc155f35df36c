"""Where the stages leave their results for each other: a folder for each item, which exists only when complete."""

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recipes.files import sync_path

WORK = "work"  # inside the run_dir
FAILURES = "failures"  # inside the logs of a stage: the error of each task that failed
_LOGS = "logs"


class StageError(RuntimeError):
    """A stage that did not end through no fault of the recipe; the message says where to look. Run it again."""


class WorkFolder:
    """`<run_dir>/work`: `<stage>/<number of the item>/`, and `logs/<stage>/`."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir.absolute()
        self.path = self.run_dir / WORK

    def item(self, stage: str, number: int) -> Path:
        """The folder of an item; it exists only when the item is finished."""
        return self.path / stage / f"{number:06d}"

    def n_done(self, stage: str) -> int:
        """How many items of a stage are finished."""
        try:
            return sum(name[0] != "." for name in os.listdir(self.path / stage))
        except FileNotFoundError:
            return 0

    def logs(self, stage: str, n_tasks: int) -> Path:
        """datatrove's logs and completion markers, which hold for one number of tasks."""
        return self.path / _LOGS / f"{stage}_{n_tasks}_tasks"

    def remove_leftovers(self) -> None:
        """Remove what killed processes have left half-written; only while no task runs."""
        for leftover in self.path.glob("*/.*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def remove(self) -> None:
        """Remove it: first its name, so that what is there is never a part of it."""
        going = self.path.with_name(f".{WORK}.removed")
        shutil.rmtree(going, ignore_errors=True)
        if self.path.exists():
            self.path.rename(going)
            shutil.rmtree(going)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder that is written under a name of this process and gets its own only when the block ends well.

    Two processes may write the same one, as when a job runs on after its submitter was killed: the first stays.
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
