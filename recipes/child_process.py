"""Child processes: a stop request is forwarded to them, they die with their parent, and their memory is measured."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import IO

import psutil

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Ended:
    """How a child ended. `code` is negative for a signal; `peak_bytes` is the largest memory of its process tree."""

    code: int
    seconds: float
    peak_bytes: int


class StopRequests:
    """Ctrl-C, SIGTERM and SIGHUP received by this process, in order."""

    def __init__(self) -> None:
        self.received: list[int] = []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, frame: self.received.append(number))


class Child:
    """A running child in a session of its own: a Ctrl-C in the terminal reaches it once, through `poll`.

    `log`: the file for its output; None shares ours.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: IO[bytes] | None = None):
        self._began = time.monotonic()
        self._n_forwarded = self._peak_bytes = 0
        self.process = subprocess.Popen(
            list(command), env=dict(environment), start_new_session=True, stdout=log, stderr=log,
            preexec_fn=partial(_die_with, os.getpid()) if sys.platform == "linux" else None,
        )  # fmt: skip

    @property
    def seconds(self) -> float:
        """Since its start."""
        return time.monotonic() - self._began

    def poll(self, stops: StopRequests, measure: bool = True) -> Ended | None:
        """How it ended, or None while it runs. Forwards the first stop request, and kills on the second.

        `measure`: whether to sample its memory, which takes milliseconds.
        """
        code = self.process.poll()
        if code is not None:
            return Ended(code, self.seconds, self._peak_bytes)
        if len(stops.received) > self._n_forwarded:  # one a call: a second may arrive while the first is forwarded
            if self._n_forwarded:
                for process in _tree(self.process.pid):  # ranks may be in sessions of their own
                    with suppress(psutil.Error):
                        process.kill()
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL if self._n_forwarded else stops.received[0])
            self._n_forwarded += 1
        if measure:
            self._peak_bytes = max(self._peak_bytes, sum(map(_bytes, _tree(self.process.pid))))
        return None


def run_child(command: Sequence[str], environment: Mapping[str, str], stops: StopRequests) -> Ended:
    """Run `command` to its end."""
    child = Child(command, environment)
    while (ended := child.poll(stops)) is None:
        try:
            child.process.wait(_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    return ended


def _die_with(parent: int) -> None:
    """Linux, in the child before exec: a kill -9 of the parent kills it too."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os._exit(1)


def _tree(pid: int) -> list[psutil.Process]:
    """The process and its descendants; empty when it is gone."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def _bytes(process: psutil.Process) -> int:
    """Resident memory; a page that n processes share counts 1/n in each (PSS, on Linux)."""
    with suppress(psutil.Error):
        return getattr(process.memory_full_info(), "pss", 0) or process.memory_info().rss
    return 0
