"""The memory estimate of a training step, before anything runs."""
