"""What the kernels' launches have in common."""

from __future__ import annotations

from functools import cache

import torch

MOST_SUMS = 512
"""Programs that each leave a sum: as many as `add_rows` reads at once."""


def n_summing_programs(n_blocks: int, programs_a_processor: int, device: torch.device) -> int:
    """Programs that share n_blocks of work and each leave a sum of theirs."""
    return min(n_blocks, programs_a_processor * _n_processors(device), MOST_SUMS)


@cache
def _n_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
