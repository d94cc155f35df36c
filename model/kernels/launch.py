"""What the kernels' launches have in common."""

from __future__ import annotations

from functools import cache

import torch


@cache
def n_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
