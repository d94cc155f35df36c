"""How a model's blocks are run in training: fused or as written, and what is kept of them for the backward pass."""

from __future__ import annotations

from typing import Literal, cast, get_args

import torch
from torch import nn

from model.transformer import Block

Execution = Literal["auto", "fused", "plain"]
Recompute = Literal["none", "elementwise", "block"]
"""What is computed again in the backward pass instead of being kept, in the order of memory saved and time lost.

elementwise: norms, rotations and the gated product (fused blocks only); block: all of a block but its input
(arXiv 1604.06174).
"""


class ExecutionError(ValueError):
    """Blocks cannot be run as asked."""


def why_not_fused(device: torch.device) -> str | None:
    """Why fused blocks cannot run on this device, or None when they can."""
    if device.type != "cuda":
        return f"its kernels need a GPU, not {device.type}"
    try:
        __import__("triton")
    except ImportError as error:
        return f"import triton failed ({error})"
    return None


def shape_blocks(
    blocks: nn.ModuleList, execution: Execution, recompute: Recompute, recompute_blocks: int, device: torch.device
) -> str:
    """Set how every block runs; the first `recompute_blocks` keep only their input. Returns "fused" or "plain".

    Raises ExecutionError where that cannot be.
    """
    assert execution in get_args(Execution) and recompute in get_args(Recompute)
    obstacle = why_not_fused(device)
    if execution == "fused" and obstacle:
        raise ExecutionError(f"engine.blocks=fused cannot run here: {obstacle}. Use engine.blocks=auto")
    fused = execution != "plain" and obstacle is None
    if recompute == "elementwise" and not fused:
        raise ExecutionError(
            "engine.recompute=elementwise needs fused blocks, which do not run here "
            f"({obstacle or 'engine.blocks=plain'}); set engine.recompute to block or none"
        )
    if recompute_blocks > len(blocks):
        raise ExecutionError(f"engine.recompute_blocks={recompute_blocks}: the model has {len(blocks)} blocks")
    for number, module in enumerate(blocks):
        block = cast(Block, module)
        block.fused, block.recompute = fused, "block" if number < recompute_blocks else recompute
    return "fused" if fused else "plain"
