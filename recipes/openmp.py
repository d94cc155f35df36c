"""How PyTorch's CPU threads wait for each other."""

import os

SPINS = 20_000
"""About half a millisecond. Longer than the gaps between the operations of a small model, so that threads on idle cores
are still awake (90 to 96% of the speed of libgomp's 300,000 spins); short enough that a thread whose partner is not
running gives up its core (3 times the default's speed beside six busy processes). See BENCHMARKS.md."""


def limit_spinning() -> None:
    """Let OpenMP threads spin for a short time, then sleep; values that the environment has stay.

    A spinning thread keeps its core from the thread it waits for: next to other processes training slows down several
    times. OpenMP reads the variable when torch is imported, so packages call this before importing torch.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
