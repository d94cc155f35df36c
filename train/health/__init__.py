"""Faults of a running job: stuck ranks, bad steps, signals, and who reports them."""
