"""Ctrl-C ends an entry point with one line and exit code 130, also while its modules are being imported."""

from __future__ import annotations

import os
import sys
from types import TracebackType

EXIT_CODE = 130


def print_interrupt(advice: str = "run the same command again") -> int:
    """Print the line on stderr; returns the exit code."""
    print(f"\ninterrupted; {advice}", file=sys.stderr)
    return EXIT_CODE


def catch_interrupts() -> None:
    """Install a handler that prints one line instead of a traceback for an uncaught Ctrl-C.

    Only under `python -m` while it imports (the module's path has not yet replaced `-m`): an imported library must not
    change how its host process ends.
    """
    if sys.argv[:1] == ["-m"]:
        sys.excepthook = _hook


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        is_first = os.environ.get("RANK", "0") == "0"  # only one rank of a training stage prints
        raise SystemExit(print_interrupt() if is_first else EXIT_CODE)
    sys.__excepthook__(kind, error, trace)
