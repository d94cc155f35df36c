"""How PyTorch's CPU threads wait for each other."""

import os


def sleep_while_waiting() -> None:
    """Make OpenMP threads sleep instead of spin while waiting, unless the environment says otherwise.

    A spinning thread keeps its core from the thread it waits for: next to other processes training slows down several
    times. OpenMP reads the variable when torch is imported, so packages call this before importing torch.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
