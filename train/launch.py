"""Start the ranks of a training stage: `python -m train.launch --nproc-per-node 2 -m train.pretrain RECIPE`.

Takes torchrun's options. Unlike torchrun it exits with the ranks' exit code and prints no traceback of its own, since a
failing rank prints the reason. Ctrl-C and SIGTERM are forwarded to the ranks, which save and stop.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence

import psutil
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from recipes.interrupt import EXIT_CODE as INTERRUPTED
from recipes.loader import print_error
from recipes.stage_errors import USER_ERROR

_QUIET = ("torch.distributed.elastic.multiprocessing", "torch.distributed.elastic.agent", "torch.distributed.run")
"""Loggers that repeat what a rank has printed."""


def exit_code(failures: Sequence[ProcessFailure]) -> int:
    """The exit code of a failed job: that of a user error or an interrupt, else of the rank that failed first."""
    codes = [failure.exitcode for failure in sorted(failures, key=lambda failure: failure.timestamp)]
    for code in (USER_ERROR, INTERRUPTED):
        if code in codes:
            return code
    return codes[0] if codes[0] > 0 else 128 - codes[0]


def pass_on(number: int, frame: object) -> None:
    """Forward a signal to the ranks, which have sessions of their own."""
    for rank in psutil.Process().children():
        try:
            rank.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    arguments = torchrun.parse_args(list(sys.argv[1:] if argv is None else argv))
    arguments.signals_to_handle = "SIGQUIT"  # keep our handlers of the others
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, pass_on)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        torchrun.run(arguments)
    except ChildFailedError as error:
        for rank, failure in sorted(error.failures.items()):
            if failure.exitcode < 0 and exit_code(list(error.failures.values())) != USER_ERROR:
                name = signal.Signals(-failure.exitcode).name
                print(f"rank {rank} (pid {failure.pid}) was killed by {name}", file=sys.stderr)
        return exit_code(list(error.failures.values()))
    except ValueError as error:  # contradicting options
        print_error(error)
        return USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
