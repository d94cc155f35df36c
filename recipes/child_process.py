"""Run one stage as a child: stopped when we are asked to stop, killed when we are killed, its memory measured."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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


def run_child(
    command: Sequence[str], environment: Mapping[str, str], stops: StopRequests, distributed: bool = False
) -> Ended:
    """Run `command` to its end. The first stop request is passed on, a second one kills.

    The child has a session of its own, so that a Ctrl-C in the terminal reaches it once, through here. Of a
    `distributed` child (torchrun) the ranks are asked instead of the launcher, which would give them 30 seconds.
    """
    began = time.monotonic()
    passed_on, peak = 0, 0
    child = subprocess.Popen(
        list(command), env=dict(environment), start_new_session=True, preexec_fn=_dies_with(os.getpid())
    )
    while child.poll() is None:
        if len(stops.received) > passed_on:
            if passed_on:
                _kill_tree(child.pid)
            else:
                _ask_to_stop(child.pid, stops.received[0], distributed)
            passed_on = len(stops.received)
        peak = max(peak, _tree_bytes(child.pid))
        try:
            child.wait(_SECONDS_BETWEEN_LOOKS)
        except subprocess.TimeoutExpired:
            continue
    return Ended(child.returncode, time.monotonic() - began, peak)


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


def _ask_to_stop(pid: int, number: int, distributed: bool) -> None:
    ranks = _tree(pid, recursive=False)[1:] if distributed else []
    for rank in ranks:
        try:
            rank.send_signal(signal.SIGTERM)
        except psutil.Error:
            continue
    if not ranks:
        _signal_group(pid, signal.SIGTERM if distributed else number)


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
