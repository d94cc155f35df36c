"""Print errors that all ranks share only once: by rank 0, or by another rank if rank 0 has none."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

SECONDS_FOR_RANK_0 = 10.0
"""How long another rank waits before it exits with an error, for the launcher to end it after rank 0's error."""


@contextmanager
def rank_0_speaks() -> Iterator[None]:
    """Inside (before the ranks join), ranks other than 0 buffer their output.

    A rank that exits with a nonzero code first waits for the launcher to end it. If that does not happen, rank 0 does
    not have the problem (another machine may lack a file), and the rank prints its errors.
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
