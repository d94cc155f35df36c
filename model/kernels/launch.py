"""Grid sizes of kernels that sum over rows."""

from __future__ import annotations

from functools import cache

import torch

MOST_SUMS = 512
"""Maximum number of programs that each write a partial sum: the rows that `add_rows` reads at once."""


def n_summing_programs(n_blocks: int, programs_a_processor: int, device: torch.device) -> int:
    """Number of programs for n_blocks of work, each of which writes a partial sum."""
    return min(n_blocks, programs_a_processor * _n_processors(device), MOST_SUMS)


@cache
def _n_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
