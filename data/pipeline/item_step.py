"""Base of our datatrove steps: numbered items of work, each done once by one of the tasks."""

import os
from abc import abstractmethod
from pathlib import Path

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data.pipeline.work_folder import FAILURES, WorkFolder, whole_folder
from recipes.files import write_json


class ItemStep(PipelineStep):
    """The task of rank r of w does the unfinished items among r, r + w, r + 2w, ... A step only writes files; its
    results depend neither on w nor on the order."""

    stage: str  # names its folder of results
    counted: str = "units"
    type = "stage"

    def __init__(self, work: WorkFolder) -> None:
        super().__init__()
        self.name = self.stage
        self.work = work
        self.directory = Path.cwd()  # base of the recipe's relative paths, also for tasks on other machines

    def n_items(self) -> int:
        """The number of items; called after the previous stages are finished."""
        return 1

    @abstractmethod
    def do(self, number: int, folder: Path) -> None:
        """Write the results of an item into its new folder."""

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Do this task's items. An error is also written to FAILURES, for the process that submitted the job."""
        if data:
            yield from data
        os.chdir(self.directory)
        try:
            for number in range(rank, self.n_items(), world_size):
                target = self.work.item(self.stage, number)
                if not target.exists():
                    with self.track_time("item"), whole_folder(target) as folder:
                        self.do(number, folder)
                    self.stat_update("items")
        except Exception as error:
            failures = self.work.logs(self.stage, world_size) / FAILURES
            failures.mkdir(parents=True, exist_ok=True)
            write_json(failures / f"{rank:05d}.json", {"kind": type(error).__name__, "message": str(error)})
            raise
