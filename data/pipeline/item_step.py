"""What our datatrove steps share: numbered items of work, of which a task does its share and none is done twice."""

import os
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data.pipeline.failure import write_failure
from data.pipeline.work_folder import WorkFolder, whole_folder


class ItemStep(PipelineStep):
    """The task of rank r of w does the items r, r + w, r + 2w, ... that are not finished yet. A step leaves files and
    passes nothing on; its results depend neither on w nor on the order."""

    stage: str  # names its folder of results
    counted: str = "units"
    type = "stage"

    def __init__(self, work: WorkFolder) -> None:
        super().__init__()
        self.name = self.stage
        self.work = work
        self.directory = Path.cwd()  # paths of the recipe start here, on whatever machine a task runs

    @abstractmethod
    def n_items(self) -> int:
        """Asked for when the stage runs: the stages before are finished then."""

    @abstractmethod
    def do(self, number: int, folder: Path) -> None:
        """Write the results of an item into its new folder."""

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Do this task's items. Whatever goes wrong is written down for whoever waits for the stage."""
        if data:
            yield from data
        os.chdir(self.directory)
        with _failure_written(self.work.logs(self.stage, world_size), rank):
            for number in range(rank, self.n_items(), world_size):
                target = self.work.item(self.stage, number)
                if not target.exists():
                    with self.track_time("item"), whole_folder(target) as folder:
                        self.do(number, folder)
                    self.stat_update("items")

    def result(self, stage: str, number: int) -> Path:
        """The folder of results of an item of an earlier stage."""
        return self.work.item(stage, number)


@contextmanager
def _failure_written(logs: Path, rank: int) -> Iterator[Any]:
    try:
        yield
    except Exception as error:
        write_failure(logs, rank, error)
        raise
