"""Ctrl-C ends an entry point with one line and exit code 130, also while its modules are still being imported."""

from __future__ import annotations

import os
import sys
from types import TracebackType

EXIT_CODE = 130


def print_interrupt(advice: str = "run the same command again") -> int:
    """Print the one line on stderr; the exit code."""
    print(f"\ninterrupted; {advice}", file=sys.stderr)
    return EXIT_CODE


def catch_interrupts() -> None:
    """From here on, a Ctrl-C that nothing catches is told by `print_interrupt` instead of a traceback.

    Where `python -m` has only begun to import (it has not yet put the module's path in place of `-m`): a library that
    is imported must not change how its host ends.
    """
    if sys.argv[:1] == ["-m"]:
        sys.excepthook = _hook


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        is_first = os.environ.get("RANK", "0") == "0"  # of the ranks of a training stage
        raise SystemExit(print_interrupt() if is_first else EXIT_CODE)
    sys.__excepthook__(kind, error, trace)
