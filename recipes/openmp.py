"""How the threads of PyTorch's operations wait for each other on a CPU."""

import os


def sleep_while_waiting() -> None:
    """Let OpenMP threads sleep instead of spin; a value that the environment has stays.

    A thread that spins keeps its core from the thread it waits for: beside other processes training falls to a
    fraction of its speed. OpenMP reads the variable as torch is imported, so packages call this before they import it.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
