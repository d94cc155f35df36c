"""Who runs the stages: datatrove's executor that the recipe names, until every task has left its completion marker."""

import logging
import shutil
import subprocess
import sys
import time
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from loguru import logger
from pydantic import Field

from data.pipeline.failure import StageError, failure_of, forget_failures
from recipes.loader import Section

if TYPE_CHECKING:
    from datatrove.executor.base import PipelineExecutor
    from datatrove.pipeline.base import PipelineStep

_ROOT = Path(__file__).resolve().parents[2]  # what `data` is imported from
_SECONDS_BETWEEN_LOOKS = 2.0
_SECONDS_UNTIL_MISSED = 30.0  # a shared file system may show a marker later than the queue loses the job


@dataclass(frozen=True, slots=True)
class Stage:
    """A datatrove pipeline and the number of its tasks."""

    name: str
    pipeline: list["PipelineStep"]
    n_tasks: int


class Runner(Protocol):
    """Runs the tasks of a stage that are not completed. It need not raise where some fail."""

    def __call__(self, stage: Stage, logs: Path) -> "PipelineExecutor": ...


class _Settings(Section):
    kind: str

    @property
    @abstractmethod
    def n_workers(self) -> int | None:
        """How many tasks run at once; None: no limit."""

    @abstractmethod
    def open(self) -> Any:
        """A context manager that gives a Runner."""


class LocalSettings(_Settings):
    """Processes of this machine (datatrove's LocalPipelineExecutor). One worker is this process itself."""

    kind: Literal["local"]
    workers: int = Field(default=1, ge=1)

    @property
    def n_workers(self) -> int:
        return self.workers

    @contextmanager
    def open(self) -> Iterator[Runner]:
        from data.pipeline.local_executor import LocalExecutor
        from data.pipeline.worker_pool import WorkerPool

        with ExitStack() as opened:
            pool = opened.enter_context(WorkerPool(self.workers)) if self.workers > 1 else None

            def run(stage: Stage, logs: Path) -> "PipelineExecutor":
                executor = LocalExecutor(stage.pipeline, stage.n_tasks, self.workers, logs, pool)
                executor.run()
                return executor

            yield run


class SlurmSettings(_Settings):
    """Jobs of a Slurm cluster (datatrove's SlurmPipelineExecutor, which explains these names): a job array a stage,
    each submitted when the one before is done. All nodes share the file system of the run_dir and the sources."""

    kind: Literal["slurm"]
    time: str  # limit of a job, as Slurm writes it: "08:00:00"
    partition: str
    workers: int | None = Field(default=None, ge=1)  # jobs that run at once; null: no limit
    tasks_per_job: int = Field(default=1, ge=1)
    cpus_per_task: int = Field(default=1, ge=1)
    mem_per_cpu_gb: int = Field(default=2, ge=1)
    qos: str | None = None
    # Shell commands that make this Python's environment on a node; null: it is found under the same path there.
    env_command: str | None = None
    sbatch_args: dict[str, str] = Field(default_factory=dict)

    @property
    def n_workers(self) -> int | None:
        return self.workers

    @contextmanager
    def open(self) -> Iterator[Runner]:
        from datatrove.executor.slurm import SlurmPipelineExecutor

        for command in ("sbatch", "squeue", "scancel"):
            if shutil.which(command) is None:
                raise StageError(f"executor.kind slurm needs {command}, which is not on PATH; run this on a login node")
        environment = self.env_command or f'export PATH="{Path(sys.executable).parent}:$PATH"'

        def run(stage: Stage, logs: Path) -> "PipelineExecutor":
            executor = SlurmPipelineExecutor(
                stage.pipeline,
                tasks=stage.n_tasks,
                time=self.time,
                partition=self.partition,
                workers=self.workers or -1,
                tasks_per_job=self.tasks_per_job,
                cpus_per_task=self.cpus_per_task,
                mem_per_cpu_gb=self.mem_per_cpu_gb,
                qos=self.qos,
                env_command=f'{environment}\nexport PYTHONPATH="{_ROOT}:$PYTHONPATH"',
                sbatch_args=dict(self.sbatch_args),
                job_name=f"dramatis-{stage.name.replace(' ', '-')}",
                max_array_size=-1,
                logging_dir=str(logs),
            )
            try:
                executor.run()
            except subprocess.CalledProcessError as error:
                raise StageError(f"stage {stage.name}: sbatch refused the job ({error}); see {logs}") from None
            _await_job(executor)
            return executor

        yield run


def _await_job(executor: Any) -> None:
    """Wait until a job array has left the queue, or all its tasks their markers. The job goes when we do."""
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


class RaySettings(_Settings):
    """Tasks of a Ray cluster (datatrove's RayPipelineExecutor, which explains these names). The run_dir and the sources
    lie on a file system that all nodes share."""

    kind: Literal["ray"]
    address: str | None = None  # of the cluster; null starts one on this machine for the run
    workers: int = Field(ge=1)  # tasks that run at once
    tasks_per_job: int = Field(default=1, ge=1)
    cpus_per_task: int = Field(default=1, ge=1)
    mem_per_cpu_gb: float = Field(default=2, gt=0)

    @property
    def n_workers(self) -> int:
        return self.workers

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

        def run(stage: Stage, logs: Path) -> "PipelineExecutor":
            executor = RayPipelineExecutor(
                stage.pipeline,
                tasks=stage.n_tasks,
                workers=self.workers,
                tasks_per_job=self.tasks_per_job,
                cpus_per_task=self.cpus_per_task,
                mem_per_cpu_gb=self.mem_per_cpu_gb,
                logging_dir=str(logs),
            )
            executor.run()
            return executor

        try:
            yield run
        finally:
            ray.shutdown()


Executor = Annotated[LocalSettings | SlurmSettings | RaySettings, Field(discriminator="kind")]


def run_stage(run: Runner, stage: Stage, logs: Path) -> None:
    """Run what is left of a stage. Raises the error of a task, or StageError where tasks ended without a word.

    What datatrove has to say meanwhile is written to executor.log in `logs`.
    """
    forget_failures(logs)
    logs.mkdir(parents=True, exist_ok=True)
    logger.remove()
    logger.add(logs / "executor.log", level="DEBUG", backtrace=False)
    try:
        executor = run(stage, logs)
    finally:
        logger.remove()
    if left := executor.get_incomplete_ranks(skip_completed=True):
        raise failure_of(stage.name, logs, len(left), stage.n_tasks)
