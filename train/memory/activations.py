"""Bytes that a block keeps for its backward pass, counted from the architecture.

Fused: the tensors that model/kernels/fused_block.py keeps. Plain: the inputs of every operation, which autograd keeps
(where rms_norm is not a single kernel, as on a CPU, it keeps more). tests/train/memory/test_activations.py compares the
counts with real blocks.
"""

from __future__ import annotations

from model.config import ModelConfig
from model.execution import Recompute


def kept_bytes(config: ModelConfig, layer: int, tokens: int, itemsize: int, recompute: Recompute, fused: bool) -> int:
    """Bytes that one block keeps of a micro-batch between its forward and its backward pass.

    Keys and values of another layer are counted there.
    """
    d_model, d_ff, queries = config.d_model, config.d_ff, config.n_heads * config.d_head
    owns_cache = config.kv_source(layer) == layer
    keys = config.n_kv_heads * config.d_head if owns_cache else 0
    width, width32, constant = d_model + 2 * keys, 0, 0  # the block's input, keys and values as attended to
    if recompute != "block":
        width += queries + 2 * keys + queries + d_model  # projected q, k, v; attention's output, and its projection
        width += 2 * d_ff + d_model  # gate and input; the feed-forward's output
        width32 += config.n_heads + 4  # attention's logsumexp; scales of the norms
        if recompute == "none" or not fused:
            width += 2 * d_model + queries + d_ff  # normed inputs; rotated queries; gated product
        if not fused:
            width += d_model + d_ff  # residual after attention; activated gate
            width32 += config.n_heads + (2 * config.n_kv_heads if owns_cache else 0)  # scales of the heads' norms
            if itemsize == 2:  # float32 rotary tables, rounded anew for queries and for keys
                width += config.d_head * (2 if owns_cache else 1)
            if owns_cache:  # model/attention.py stacks the weights of q, k and v: a copy that autograd keeps
                constant = itemsize * d_model * (config.n_heads + 2 * config.n_kv_heads) * config.d_head
    return tokens * (itemsize * width + 4 * width32) + constant


def backward_bytes(config: ModelConfig, tokens: int, itemsize: int, recompute: Recompute, fused: bool) -> int:
    """Bytes that one block's backward pass adds to what it kept: recomputed tensors, and live gradients.

    Fused, the peak is at attention's kernel: two gradients of hidden states, those of its output and of q, q itself,
    and the kernel's float32 sum for q. Plain, it is at the gate: gradients of gate and input, of the block's output and
    of one hidden state; the gradient of the product replaces the product.
    """
    queries, owner = config.n_heads * config.d_head, config.kv_layers[0]
    widths = 2 * config.d_model + 3 * queries if fused else 2 * config.d_ff + 2 * config.d_model
    gradients = tokens * (itemsize * widths + (4 * queries if fused else 0))
    whole: Recompute = "elementwise" if fused else "none"
    recomputed = kept_bytes(config, owner, tokens, itemsize, whole, fused)
    return max(recomputed - kept_bytes(config, owner, tokens, itemsize, recompute, fused), 0) + gradients
