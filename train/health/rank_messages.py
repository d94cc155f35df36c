"""What all ranks would say alike is said once: by rank 0, or by another one when that has not ended by then."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

SECONDS_FOR_RANK_0 = 10.0
"""What another rank waits, when it has to end, for rank 0 to speak and the launcher to end them all."""


@contextmanager
def rank_0_speaks() -> Iterator[None]:
    """Inside, before the ranks have joined, ranks other than 0 print nothing; on leaving by SystemExit it is too late.

    A rank that leaves with an exit code other than 0 waits for the launcher to end it, and else prints what it had to
    say: then rank 0 does not have its problem, on another machine, say.
    """
    rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    if rank == 0:
        yield
        return
    errors = io.StringIO()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(errors):
            yield
    except SystemExit as left:
        if left.code:
            time.sleep(SECONDS_FOR_RANK_0 * (1 + local_rank))
            sys.stderr.write(errors.getvalue())
        raise
