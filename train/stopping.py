"""How a run is asked to end: SIGTERM, Ctrl-C, and the end of its launcher."""

from __future__ import annotations

import ctypes
import signal
import sys


class StopRequest:
    """Set by SIGTERM or Ctrl-C; a second Ctrl-C leaves at once."""

    def __init__(self) -> None:
        self._requested = self.by_keyboard = False
        signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGINT, self._handle)

    def requested(self) -> bool:
        return self._requested

    def _handle(self, number: int, frame: object) -> None:
        if self._requested and number == signal.SIGINT:
            sys.exit(130)
        self._requested, self.by_keyboard = True, number == signal.SIGINT


def die_with_parent() -> None:
    """On Linux, end with the launcher: a killed torchrun must not leave ranks that hold the run directory."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
