"""Runs stages with the datatrove executor of the recipe, until every task has its completion marker."""

import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from loguru import logger
from pydantic import Field

from data.clean.records import CleanError
from data.clean.split import SplitError
from data.format.tokenizer import TokenizerError
from data.packed.shards import ShardError
from data.pipeline.work_folder import FAILURES, StageError
from data.sources.source import SourceError
from recipes.loader import Section

if TYPE_CHECKING:
    from datatrove.executor.base import PipelineExecutor
    from datatrove.pipeline.base import PipelineStep

RECIPE_ERRORS = (SourceError, CleanError, SplitError, TokenizerError, ShardError)
"""Errors that can be fixed in the recipe or its inputs."""
_ROOT = Path(__file__).resolve().parents[2]  # the root that `data` is imported from
_SECONDS_BETWEEN_LOOKS = 2.0
_SECONDS_UNTIL_MISSED = 30.0  # a shared file system may show a marker later than the job leaves the queue


@dataclass(frozen=True, slots=True)
class DataStage:
    """A datatrove pipeline and the number of its tasks."""

    name: str
    pipeline: list["PipelineStep"]
    n_tasks: int


Runner = Callable[[DataStage, Path], "PipelineExecutor"]
"""Runs the incomplete tasks of a stage with a folder of logs. Need not raise if some fail."""


class LocalSettings(Section):
    """Processes of this machine (datatrove's LocalPipelineExecutor). One worker is this process itself."""

    kind: Literal["local"]
    workers: int = Field(default=1, ge=1)

    @contextmanager
    def open(self) -> Iterator[Runner]:
        from datatrove.executor.local import LocalPipelineExecutor

        from data.pipeline.processes import process_pool, run_ranks

        with process_pool(self.workers) as pool:

            def run(stage: DataStage, logs: Path) -> "PipelineExecutor":
                executor = LocalPipelineExecutor(stage.pipeline, stage.n_tasks, logging_dir=str(logs))
                run_ranks(executor, pool)
                return executor

            yield run


class _ClusterSettings(Section):
    """Settings of datatrove's cluster executors, which document these names. All machines share the file system of the
    run_dir and the sources."""

    tasks_per_job: int = Field(default=1, ge=1)
    cpus_per_task: int = Field(default=1, ge=1)

    def arguments(self, stage: DataStage, logs: Path) -> dict[str, Any]:
        """Arguments of both executors."""
        names = ("tasks_per_job", "cpus_per_task", "mem_per_cpu_gb")
        same = {name: getattr(self, name) for name in names}
        return {"pipeline": stage.pipeline, "tasks": stage.n_tasks, "logging_dir": str(logs), **same}


class SlurmSettings(_ClusterSettings):
    """Slurm (datatrove's SlurmPipelineExecutor): a job array for each stage, submitted after the previous stage."""

    kind: Literal["slurm"]
    time: str  # time limit of a job in Slurm's format: "08:00:00"
    partition: str
    workers: int | None = Field(default=None, ge=1)  # concurrent jobs; null: no limit
    mem_per_cpu_gb: int = Field(default=2, ge=1)
    qos: str | None = None
    # Shell commands that set up Python's environment on a node; null: it has the same path there.
    env_command: str | None = None
    sbatch_args: dict[str, str] = Field(default_factory=dict)

    @contextmanager
    def open(self) -> Iterator[Runner]:
        from datatrove.executor.slurm import SlurmPipelineExecutor

        for command in ("sbatch", "squeue", "scancel"):
            if shutil.which(command) is None:
                raise StageError(f"executor.kind slurm needs {command}, which is not on PATH; run this on a login node")
        environment = self.env_command or f'export PATH="{Path(sys.executable).parent}:$PATH"'

        def run(stage: DataStage, logs: Path) -> "PipelineExecutor":
            executor = SlurmPipelineExecutor(
                **self.arguments(stage, logs),
                time=self.time,
                partition=self.partition,
                workers=self.workers or -1,
                qos=self.qos,
                env_command=f'{environment}\nexport PYTHONPATH="{_ROOT}:$PYTHONPATH"',
                sbatch_args=dict(self.sbatch_args),
                job_name=f"dramatis-{stage.name}",
                max_array_size=-1,
            )
            try:
                executor.run()
            except subprocess.CalledProcessError as error:
                raise StageError(f"stage {stage.name}: sbatch refused the job ({error}); see {logs}") from None
            _await_job(executor)
            return executor

        yield run


def _await_job(executor: Any) -> None:
    """Wait until a job array has left the queue or all its tasks are complete. Cancels the job on an exception."""
    missed_since: float | None = None
    try:
        while executor.get_incomplete_ranks(skip_completed=True):
            queued = subprocess.run(["squeue", "-h", "-j", str(executor.job_id)], capture_output=True, text=True)
            if queued.stdout.strip():
                missed_since = None
            elif missed_since is None:
                missed_since = time.monotonic()
            elif time.monotonic() - missed_since > _SECONDS_UNTIL_MISSED:
                return
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    except BaseException:
        subprocess.run(["scancel", str(executor.job_id)], capture_output=True)
        raise


class RaySettings(_ClusterSettings):
    """Ray (datatrove's RayPipelineExecutor)."""

    kind: Literal["ray"]
    address: str | None = None  # of the cluster; null starts Ray on this machine for the run
    workers: int = Field(ge=1)  # concurrent tasks
    mem_per_cpu_gb: float = Field(default=2, gt=0)

    @contextmanager
    def open(self) -> Iterator[Runner]:
        try:
            import ray
        except ModuleNotFoundError:
            raise StageError('executor.kind ray needs Ray; install it with: pip install -e ".[ray]"') from None
        from datatrove.executor.ray import RayPipelineExecutor

        try:
            ray.init(
                address=self.address or "local",
                include_dashboard=False if self.address is None else None,
                num_cpus=self.workers * self.cpus_per_task if self.address is None else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": {"PYTHONPATH": str(_ROOT)}},
            )
        except ConnectionError as error:
            raise StageError(f"executor.address {self.address}: no Ray cluster there ({error})") from None

        def run(stage: DataStage, logs: Path) -> "PipelineExecutor":
            executor = RayPipelineExecutor(**self.arguments(stage, logs), workers=self.workers)
            executor.run()
            return executor

        try:
            yield run
        finally:
            ray.shutdown()


Executor = Annotated[LocalSettings | SlurmSettings | RaySettings, Field(discriminator="kind")]


def run_stage(run: Runner, stage: DataStage, logs: Path) -> None:
    """Run the incomplete tasks of a stage. Raises the error of a task, or StageError for tasks that ended without one.

    datatrove's messages are written to executor.log in `logs`.
    """
    shutil.rmtree(logs / FAILURES, ignore_errors=True)
    logs.mkdir(parents=True, exist_ok=True)
    logger.remove()
    logger.add(logs / "executor.log", level="DEBUG", backtrace=False)
    try:
        executor = run(stage, logs)
    finally:
        logger.remove()
    if left := executor.get_incomplete_ranks(skip_completed=True):
        raise _failure_of(stage, logs, len(left))


def _failure_of(stage: DataStage, logs: Path, n_left: int) -> Exception:
    """The first error written by a task of the stage."""
    for path in sorted((logs / FAILURES).glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        for error in RECIPE_ERRORS:
            if error.__name__ == found["kind"]:
                return error(found["message"])
        return StageError(f"stage {stage.name}: {found['kind']}: {found['message']}; more in {logs}/logs")
    return StageError(
        f"stage {stage.name}: {n_left} of {stage.n_tasks} tasks did not end and left no error (killed? out of memory "
        f"or time?); see {logs}; run the same command again to continue"
    )
