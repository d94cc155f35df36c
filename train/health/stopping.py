"""How a run is asked to end: SIGTERM, Ctrl-C, and the end of its launcher."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class StopRequest:
    """SIGTERM, SIGHUP or Ctrl-C: noted inside `polled` until asked for; elsewhere, with nothing to save, the end.

    There it raises KeyboardInterrupt at once, as a second Ctrl-C does anywhere.
    """

    def __init__(self) -> None:
        self._requested = self.by_keyboard = self._is_polled = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._handle)

    def requested(self) -> bool:
        return self._requested

    @contextmanager
    def polled(self) -> Iterator[None]:
        """While inside, `requested` is looked at often enough."""
        self._is_polled = True
        try:
            yield
        finally:
            self._is_polled = False

    def end(self) -> None:
        """The run is over, and the process about to end: a launcher that stops the ranks of a failed job changes
        nothing, and Ctrl-C ends it without a traceback."""
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def _handle(self, number: int, frame: object) -> None:
        again = self._requested and number == signal.SIGINT
        self._requested, self.by_keyboard = True, number == signal.SIGINT
        if again or not self._is_polled:
            raise KeyboardInterrupt


def die_with_parent() -> None:
    """On Linux, end with the launcher: a killed torchrun must not leave ranks that hold the run directory."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
