"""How blocks run in training: fused or plain, and what is recomputed in the backward pass."""

from __future__ import annotations

from typing import Literal, cast, get_args

import torch
from torch import nn

from model.attention_ops import Backend, faster_backend
from model.obstacle import Obstacle, import_obstacle
from model.transformer import Block

Execution = Literal["auto", "fused", "plain"]
Recompute = Literal["none", "elementwise", "block"]
"""What the backward pass recomputes, in order of memory saved and time lost.

elementwise: norms, rotations and the gated product (fused blocks only). block: everything except the block's input
(arXiv 1604.06174).
"""


class ExecutionError(ValueError):
    """Blocks cannot run as requested."""


def why_not_fused(device: torch.device) -> Obstacle | None:
    """Why fused blocks cannot run on this device, or None."""
    if device.type != "cuda":
        return Obstacle("unfit", f"its kernels need a GPU, not {device.type}")
    return import_obstacle("triton", "pip install triton, in the version that this torch names")


def what_slows(
    attention: Backend, chosen: str, blocks: Execution, execution: str, device: torch.device, dtype: torch.dtype
) -> list[str]:
    """A sentence for each faster kernel that this machine could run, with why it does not."""
    sentences = []
    faster = faster_backend(chosen, device, dtype) if attention == "auto" else None
    if faster:
        sentences.append(f"attention {faster[0]} would be faster, but: {faster[1]}")
    obstacle = why_not_fused(device)
    if blocks == "auto" and obstacle and obstacle.kind != "unfit":
        sentences.append(f"fused blocks would be faster, but: {obstacle}")
    if execution == "fused":
        from model.kernels.gated_product import why_not_in_one

        obstacle = why_not_in_one(device, dtype)
        if obstacle and obstacle.kind != "unfit":
            sentences.append(f"the gated product runs as two kernels, which is 2% slower: {obstacle}")
    return [f"{text}. python -m model.doctor checks every kernel" for text in sentences]


def shape_blocks(
    blocks: nn.ModuleList, execution: Execution, recompute: Recompute, recompute_blocks: int, device: torch.device
) -> str:
    """Configure every block; the first `recompute_blocks` keep only their input. Returns "fused" or "plain".

    Raises ExecutionError when the blocks cannot run like that here.
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
