"""How a model's blocks are run in training: fused or as written, and what is kept of them for the backward pass."""

from __future__ import annotations

from typing import Literal, cast, get_args

import torch
from torch import nn

from model.attention_ops import Backend, faster_backend
from model.obstacle import Obstacle, import_obstacle
from model.transformer import Block

Execution = Literal["auto", "fused", "plain"]
Recompute = Literal["none", "elementwise", "block"]
"""What is computed again in the backward pass instead of being kept, in the order of memory saved and time lost.

elementwise: norms, rotations and the gated product (fused blocks only); block: all of a block but its input
(arXiv 1604.06174).
"""


class ExecutionError(ValueError):
    """Blocks cannot be run as asked."""


def why_not_fused(device: torch.device) -> Obstacle | None:
    """Why fused blocks cannot run on this device, or None when they can."""
    if device.type != "cuda":
        return Obstacle("unfit", f"its kernels need a GPU, not {device.type}")
    return import_obstacle("triton", "pip install triton, in the version that this torch names")


def what_slows(
    attention: Backend, chosen: str, blocks: Execution, execution: str, device: torch.device, dtype: torch.dtype
) -> list[str]:
    """What this machine could run faster, and why it does not: a sentence for each."""
    told = []
    faster = faster_backend(chosen, device, dtype) if attention == "auto" else None
    if faster:
        told.append(f"attention could be {faster[0]}, which is faster, but: {faster[1]}")
    obstacle = why_not_fused(device)
    if blocks == "auto" and obstacle and obstacle.kind != "unfit":
        told.append(f"blocks could be fused, which is faster, but: {obstacle}")
    if execution == "fused":
        from model.kernels.gated_product import why_not_in_one

        obstacle = why_not_in_one(device, dtype)
        if obstacle and obstacle.kind != "unfit":
            told.append(f"the gated product is two kernels, which costs 2% of the speed: {obstacle}")
    return [f"{text}. python -m model.doctor checks every kernel" for text in told]


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
