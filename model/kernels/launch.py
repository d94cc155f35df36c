"""Launches: grid sizes of kernels that sum over rows, and kernels that start before the one in front of them ends."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

MOST_SUMS = 512
"""Maximum number of programs that each write a partial sum: the rows that `add_rows` reads at once."""


def n_summing_programs(n_blocks: int, programs_a_processor: int, device: torch.device) -> int:
    """Number of programs for n_blocks of work, each of which writes a partial sum."""
    return min(n_blocks, programs_a_processor * n_processors(device), MOST_SUMS)


@cache
def n_processors(device: torch.device, interpreted: int = 1) -> int:
    """Streaming multiprocessors of a GPU; as many as `interpreted` for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else interpreted


def overlapping(device: torch.device) -> dict[str, Any]:
    """Arguments that let a kernel start before the one in front of it ends, where the GPU can (Hopper and later)."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9:
        return {"OVERLAPS": True, "launch_pdl": True}
    return {"OVERLAPS": False}
