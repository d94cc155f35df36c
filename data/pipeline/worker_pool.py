"""Processes for tasks: they end with the process that started them, and the death of one is noticed."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, connection, get_context, parent_process
from types import TracebackType
from typing import Any

from data.pipeline.failure import StageError

_PRELOADED = ["data.pipeline.local_executor", "data.pipeline.merge"]  # imported once, not by every process


class WorkerPool:
    """At most `n_workers` processes, started when first needed and kept until the end of the `with`."""

    def __init__(self, n_workers: int) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self._executor = ProcessPoolExecutor(n_workers, context, initializer=_start_worker)
        self._others = set(active_children())

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is not None:
            for child in set(active_children()) - self._others:
                child.kill()  # rather than wait for what it is doing
        self._executor.shutdown(wait=True, cancel_futures=True)

    def map(self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The results of all calls, in order; the first exception of one as soon as it happens. Raises StageError when
        a process dies."""
        try:
            futures = self._submit(function, calls)
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            return [future.result() for future in futures]
        except BrokenProcessPool:
            raise StageError(
                "a worker process was killed (out of memory?); run the same command again to continue, with fewer "
                "workers if it repeats"
            ) from None

    def _submit(self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Future[Any]]:
        try:
            with _interrupts_held():  # processes are started here
                return [self._executor.submit(function, *call) for call in calls]
        except (EOFError, ConnectionError) as error:  # what starts the processes was killed itself
            raise BrokenProcessPool from error


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Block SIGINT: processes started meanwhile keep it blocked, so that Ctrl-C is the parent's alone."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker() -> None:
    """End with the parent even when it is killed."""
    parent = parent_process()
    assert parent is not None, "only a child process is a worker"
    sentinel = parent.sentinel

    def follow_parent() -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
