"""Ctrl-C ends an entry point with one line and exit code 130, also while its modules are being imported."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import NoReturn

EXIT_CODE = 130


def print_interrupt(advice: str = "run the same command again") -> int:
    """Print the line on stderr; returns the exit code."""
    print(f"\ninterrupted; {advice}", file=sys.stderr)
    # Python kills itself with SIGINT at its end if a KeyboardInterrupt left the exec() of a string (the last one
    # counts), as dataclasses and named tuples use it while they are defined
    exec("")
    return EXIT_CODE


def catch_interrupts() -> None:
    """Print one line instead of a traceback for an uncaught Ctrl-C.

    Only under `python -m` while it imports packages (the module's path has not yet replaced `-m`): an imported library
    must not change how its host process ends.
    """
    if sys.argv[:1] != ["-m"]:
        return
    sys.excepthook = _hook
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Exit at once while the main module imports: libraries swallow exceptions there (torch those of NumPy's import),
    and the command would go on. Later the same as Python's own handler."""
    if hasattr(sys.modules["__main__"], "main"):
        raise KeyboardInterrupt
    _exit_at_once()


def exit_on_interrupt() -> None:
    """Let Ctrl-C exit at once, for a command that writes no files and runs code that may swallow exceptions."""
    if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, _interrupt):
        signal.signal(signal.SIGINT, lambda number, frame: _exit_at_once())


def _exit_at_once() -> NoReturn:
    code = _print_on_first_rank()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        raise SystemExit(_print_on_first_rank())
    sys.__excepthook__(kind, error, trace)


def _print_on_first_rank() -> int:
    """Print the line, on one rank of a training stage only; returns the exit code."""
    return print_interrupt() if os.environ.get("RANK", "0") == "0" else EXIT_CODE
