"""torch.compile for training, block by block, and what is kept of a block for its backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, Literal

import torch
import torch._dynamo
import torch._functorch.config
from torch import nn
from torch.utils.checkpoint import checkpoint

Recompute = Literal["none", "elementwise", "block"]
"""What is computed again in the backward pass instead of being kept, in the order of memory saved and time lost.

elementwise: norms, rotations and the gated product (compiled blocks only); block: all of a block but its input.
"""


def compile_blocks(blocks: Iterable[nn.Module], dynamic: bool, recompute: Recompute) -> None:
    """Compile the forward method of every block; blocks of one form share their code.

    A model has at most four forms (local or global, own or shared cache). The method is compiled, not the module, so
    that an engine's hooks (ZeRO-3 gathers weights in them) stay outside.
    """
    # each form with and without gradients is as many as the default limit allows
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 16)
    # by default the compiler keeps whatever a matrix product of the backward pass reads
    keeps = recompute != "elementwise"
    torch._functorch.config.ban_recompute_materialized_backward = keeps
    torch._functorch.config.ban_recompute_used_far_apart = keeps
    torch._functorch.config.ban_recompute_long_fusible_chains = keeps
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=dynamic)


def checkpoint_blocks(blocks: Iterable[nn.Module]) -> None:
    """Keep only the input of every block (arXiv 1604.06174). Not reentrant: DeepSpeed's ZeRO needs that."""
    for block in blocks:
        block.forward = partial(_checkpointed, block.forward)


def _checkpointed(forward: Any, *inputs: Any) -> Any:
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)
