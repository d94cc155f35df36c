"""Worker processes: Ctrl-C waits until every one of them is known, so that each can be killed."""

import signal
import socket
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from data.pipeline.processes import _submit


def test_ctrl_c_while_workers_start_is_handled_when_all_have_started() -> None:
    """The signal reaches another thread, which a mask of the main thread does not prevent."""
    ended, started = threading.Event(), []
    other = threading.Thread(target=ended.wait)
    other.start()
    arrival, notice = socket.socketpair()
    notice.setblocking(False)
    fd_before = signal.set_wakeup_fd(notice.fileno())

    def submit(run: Any, executor: Any, rank: int) -> int:
        assert other.ident is not None
        if rank == 0:
            signal.pthread_kill(other.ident, signal.SIGINT)
            assert arrival.recv(1) == bytes([signal.SIGINT]), "it has arrived, but not been handled"
        started.append(rank)
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()), "workers inherit it"
        return rank

    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            _submit(SimpleNamespace(submit=submit), None, [0, 1, 2])  # type: ignore[arg-type]
    finally:
        signal.set_wakeup_fd(fd_before)
        ended.set()
        other.join()
    assert started == [0, 1, 2]
    assert signal.getsignal(signal.SIGINT) is before
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
