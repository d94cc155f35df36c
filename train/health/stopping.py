"""Stop requests: SIGTERM, Ctrl-C, and the death of the launcher."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class StopRequest:
    """Handles SIGTERM, SIGHUP and Ctrl-C. Inside `polled` it sets a flag; outside, and on a second Ctrl-C, it raises
    KeyboardInterrupt."""

    def __init__(self) -> None:
        self._requested = self.by_keyboard = self._is_polled = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._handle)

    def requested(self) -> bool:
        return self._requested

    @contextmanager
    def polled(self) -> Iterator[None]:
        """Inside, the caller polls `requested`."""
        self._is_polled = True
        try:
            yield
        finally:
            self._is_polled = False

    def end(self) -> None:
        """Call when the run is over: ignore SIGTERM and SIGHUP (which a launcher sends after another rank's failure),
        and let Ctrl-C kill the process without a traceback."""
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def _handle(self, number: int, frame: object) -> None:
        again = self._requested and number == signal.SIGINT
        self._requested, self.by_keyboard = True, number == signal.SIGINT
        if again or not self._is_polled:
            raise KeyboardInterrupt


def die_with_parent() -> None:
    """On Linux, die with the parent: a killed torchrun must not leave ranks that lock the run directory."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
