"""datatrove's executor for one machine, run by our processes."""

import contextlib
import copy
import os
from pathlib import Path
from typing import Any

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.stats import PipelineStats
from loguru import logger

from data.pipeline.worker_pool import WorkerPool


class LocalExecutor(LocalPipelineExecutor):
    """LocalPipelineExecutor but for who calls it a rank at a time. Its own `run` waits forever for a worker that was
    killed, its workers live on when it is killed, and each of its runs starts processes anew, one for a single worker
    too. Without a `pool` everything happens in this process."""

    def __init__(
        self, pipeline: list[PipelineStep], tasks: int, workers: int, logs: Path, pool: WorkerPool | None
    ) -> None:
        super().__init__(list(pipeline), tasks=tasks, workers=workers, logging_dir=str(logs))
        self._pool = pool

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}

    def run(self) -> None:
        """Run the tasks that are not completed. Raises the first error of one."""
        ranks = self.get_incomplete_ranks()
        if not ranks:
            return
        stats = self._pool.map(_run_rank, [(self, rank) for rank in ranks]) if self._pool else map(self.run_rank, ranks)
        merged = sum(stats, start=PipelineStats())
        with self.logging_dir.open("stats.json", "wt") as file:
            merged.save_to_disk(file)

    def run_rank(self, rank: int) -> PipelineStats:
        """One task, with fresh statistics. It logs to its file alone: datatrove would log to the terminal too."""
        own = copy.copy(self)
        own.pipeline = copy.deepcopy(self.pipeline)
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
                return own._run_for_rank(rank)
        finally:
            logger.remove()


def _run_rank(executor: LocalExecutor, rank: int) -> PipelineStats:
    return executor.run_rank(rank)
