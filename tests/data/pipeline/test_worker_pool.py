"""Results in order, the first error at once, and no waiting for a process that is dead."""

import os
import signal
import time

import pytest

from data.pipeline.failure import StageError
from data.pipeline.worker_pool import WorkerPool


def test_results_come_in_order() -> None:
    with WorkerPool(2) as pool:
        assert pool.map(divmod, [(7, 2), (9, 4), (1, 1)]) == [(3, 1), (2, 1), (1, 0)]
        assert pool.map(len, [("ab",)]) == [2], "the processes are kept"


def test_an_error_ends_it_without_waiting_for_the_others() -> None:
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError), WorkerPool(2) as pool:
        pool.map(_after, [(0.0, 0), (600.0, 1)])
    assert time.monotonic() - began < 300, "the other was killed"


def test_a_killed_process_is_told() -> None:
    with pytest.raises(StageError, match="killed"), WorkerPool(2) as pool:  # noqa: PT012
        pool.map(os.kill, [(0, 0), (0, 0)])
        pool.map(signal.raise_signal, [(signal.SIGKILL,), (signal.SIGKILL,)])


def _after(seconds: float, divisor: int) -> float:
    time.sleep(seconds)
    return 1 / divisor
