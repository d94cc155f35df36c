"""Local worker processes for the tasks of a stage.

datatrove's LocalPipelineExecutor.run hangs if a worker is killed, leaves its workers running when it is killed itself,
and starts new processes for every stage. So its tasks are called from our pool.
"""

import contextlib
import copy
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context, parent_process
from types import FrameType
from typing import Any

from datatrove.executor.local import LocalPipelineExecutor
from loguru import logger

from data.pipeline.work_folder import StageError

_PRELOADED = ["data.pipeline.processes", "data.pipeline.merge"]  # imported once, in the fork server


@contextlib.contextmanager
def process_pool(n_workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """A pool whose processes exit with this one, even if it is killed; None for one worker, which is this process."""
    if n_workers == 1:
        yield None
        return
    context = get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    others = set(active_children())
    pool = ProcessPoolExecutor(n_workers, context, initializer=_exit_with_parent)
    try:
        yield pool
    except BaseException:
        for child in set(active_children()) - others:
            child.kill()  # without waiting for its task
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def run_ranks(executor: LocalPipelineExecutor, pool: ProcessPoolExecutor | None) -> None:
    """Run the incomplete ranks. Raises the first exception immediately, StageError if a process dies."""
    ranks = executor.get_incomplete_ranks()
    if pool is None:
        for rank in ranks:
            run_rank(copy.deepcopy(executor), rank)  # each rank needs its own statistics
        return
    try:
        futures = _submit(pool, executor, ranks)
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            future.result()
    except BrokenProcessPool:
        raise StageError(
            "a worker process was killed (out of memory?); run the same command again to continue, with fewer "
            "workers if it repeats"
        ) from None


def run_rank(executor: LocalPipelineExecutor, rank: int) -> None:
    """Run one task with logs in its file only: datatrove also logs to the terminal."""
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            executor._run_for_rank(rank)
    finally:
        logger.remove()


def _submit(pool: ProcessPoolExecutor, executor: LocalPipelineExecutor, ranks: list[int]) -> list[Future[Any]]:
    try:
        with _deferred_interrupts():  # processes are started here
            return [pool.submit(run_rank, executor, rank) for rank in ranks]
    except (EOFError, ConnectionError) as error:  # the fork server was killed
        raise BrokenProcessPool from error


@contextlib.contextmanager
def _deferred_interrupts() -> Iterator[None]:
    """Handle Ctrl-C at the end of the block. Processes that start in it inherit the blocked SIGINT, so that it reaches
    the parent only. A process whose start was interrupted would be unknown, hence not killed, and print a traceback for
    the semaphores that the parent removes."""
    arrived: list[tuple[int, FrameType | None]] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: arrived.append((number, frame)))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # of this thread: others still receive it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
        if arrived and callable(handler):
            handler(*arrived[0])


def _exit_with_parent() -> None:
    def wait_for_parent() -> None:
        parent = parent_process()
        assert parent is not None, "runs in worker processes only"
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_for_parent, daemon=True).start()
