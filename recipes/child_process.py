"""Run stages as children: stopped when we are asked to stop, killed when we are killed, its memory measured."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

import psutil

_PR_SET_PDEATHSIG = 1
_SECONDS_BETWEEN_LOOKS = 1.0


@dataclass(frozen=True)
class Ended:
    """How a child ended. `code` is negative for a signal; `peak_bytes` is the most its process tree held at once."""

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
    """A running child with a session of its own, so that a Ctrl-C in the terminal reaches it once, through `look`.

    `log`: a file that takes its output, or None where it shares ours.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: IO[bytes] | None = None,
    ):
        self._began = time.monotonic()
        self._passed_on = self._peak = 0
        self.process = subprocess.Popen(
            list(command), env=dict(environment), start_new_session=True, preexec_fn=_dies_with(os.getpid()),
            stdout=log, stderr=log,
        )  # fmt: skip

    def look(self, stops: StopRequests, measure: bool = True) -> Ended | None:
        """How it ended, or None while it runs; a first stop request is passed on, a second one kills.

        `measure` its memory too (it takes milliseconds).
        """
        code = self.process.poll()
        if code is not None:
            return Ended(code, time.monotonic() - self._began, self._peak)
        if len(stops.received) > self._passed_on:
            if self._passed_on:
                _kill_tree(self.process.pid)
            else:
                _signal_group(self.process.pid, stops.received[0])
            self._passed_on += 1  # one at a time: a second request may have come while the first was passed on
        if measure:
            self._peak = max(self._peak, _tree_bytes(self.process.pid))
        return None


def run_child(command: Sequence[str], environment: Mapping[str, str], stops: StopRequests) -> Ended:
    """Run `command` to its end. The first stop request is passed on, a second one kills."""
    child = Child(command, environment)
    while (ended := child.look(stops)) is None:
        try:
            child.process.wait(_SECONDS_BETWEEN_LOOKS)
        except subprocess.TimeoutExpired:
            continue
    return ended


def _dies_with(parent: int) -> Callable[[], None] | None:
    """Linux: what a child does first so that a kill -9 of its parent ends it too."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)

    def tie() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)

    return tie


def _kill_tree(pid: int) -> None:
    for process in _tree(pid):
        try:
            process.kill()
        except psutil.Error:
            continue
    _signal_group(pid, signal.SIGKILL)


def _signal_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return


def _tree(pid: int, recursive: bool = True) -> list[psutil.Process]:
    """The process and its children; empty when it is gone."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=recursive)]
    except psutil.Error:
        return []


def _tree_bytes(pid: int) -> int:
    """Memory of the tree; pages that processes share count once (Linux; elsewhere once for each)."""
    total = 0
    for process in _tree(pid):
        try:
            total += getattr(process.memory_full_info(), "pss", 0) or process.memory_info().rss
        except psutil.Error:
            continue
    return total
