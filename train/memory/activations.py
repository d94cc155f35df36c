"""What a block keeps for its backward pass, tensor by tensor, in bytes a token.

Fused, it is what model/kernels/fused_block.py holds on to. As written ("plain"), autograd keeps the inputs of every
operation; where rms_norm is no single kernel (on a CPU) it keeps more than is counted here. What is counted is
compared with real blocks in tests/train/memory/test_activations.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.config import ModelConfig
from model.execution import Recompute

_FUSED = frozenset({"none", "elementwise"})
_ALL = _FUSED | {"plain"}
_MADE_AGAIN = frozenset({"none", "plain"})
"""Results of norms, rotations and gates, which `elementwise` makes again."""
_PLAIN = frozenset({"plain"})


@dataclass(frozen=True)
class Kept:
    """A tensor that a block keeps: `width` elements a token in the block's precision, `width32` in float32, by levels.

    A further level of `recompute` is one more name in the sets of the tensors it keeps.
    """

    what: str
    levels: frozenset[str]
    width: int = 0
    width32: int = 0


def kept_tensors(config: ModelConfig, owns_cache: bool, itemsize: int) -> list[Kept]:
    """Everything some level keeps of one block. Keys and values that another layer owns are counted there."""
    queries, d_model, d_ff = config.n_heads * config.d_head, config.d_model, config.d_ff
    keys = config.n_kv_heads * config.d_head if owns_cache else 0
    key_norms = 2 * config.n_kv_heads if owns_cache else 0
    # 16 bits: a plain block rounds the float32 tables anew, for queries and for keys
    tables = config.d_head if itemsize == 2 else 0
    return [
        Kept("block's input", _ALL | {"block"}, d_model),
        Kept("attention's normed input", _MADE_AGAIN, d_model),
        Kept("projected queries, keys and values", _ALL, queries + 2 * keys),
        Kept("rotary tables", _PLAIN, tables * (2 if owns_cache else 1)),
        Kept("rotated queries", _MADE_AGAIN, queries),
        Kept("keys and values as attended to", _ALL | {"block"}, 2 * keys),
        Kept("attention's output", _ALL, queries),
        Kept("its log-normaliser", _ALL, width32=config.n_heads),
        Kept("its projection", _ALL, d_model),
        Kept("residual after attention", _PLAIN, d_model),
        Kept("feed-forward's normed input", _MADE_AGAIN, d_model),
        Kept("gate and input", _ALL, 2 * d_ff),
        Kept("activated gate", _PLAIN, d_ff),
        Kept("gated product", _MADE_AGAIN, d_ff),
        Kept("feed-forward's output", _ALL, d_model),
        Kept("scales of the norms", _ALL, width32=4),
        Kept("scales of the heads' norms", _PLAIN, width32=config.n_heads + key_norms),
    ]


def kept_bytes(config: ModelConfig, layer: int, tokens: int, itemsize: int, recompute: Recompute, fused: bool) -> int:
    """Bytes that one block keeps of a micro-batch between its forward and its backward pass."""
    owns_cache = config.kv_source(layer) == layer
    level = recompute if recompute == "block" or fused else "plain"
    tensors = [kept for kept in kept_tensors(config, owns_cache, itemsize) if level in kept.levels]
    width = sum(itemsize * kept.width + 4 * kept.width32 for kept in tensors)
    return tokens * width + (_stacked_weights(config, itemsize) if owns_cache and level == "plain" else 0)


def backward_bytes(config: ModelConfig, tokens: int, itemsize: int, recompute: Recompute, fused: bool) -> int:
    """Bytes that one block's backward adds to what it kept: what is computed again, and the gradients under way.

    Fused, most at attention's kernel: two gradients of hidden states, those of its output and of q, q itself, and the
    float32 sum that the kernel makes of the latter. Plain, most at the gate: gradients of gate and input, of the
    block's output and of one hidden state; the product's own gradient takes the place of the product.
    """
    queries, owner = config.n_heads * config.d_head, config.kv_layers[0]
    widths = 2 * config.d_model + 3 * queries if fused else 2 * config.d_ff + 2 * config.d_model
    gradients = tokens * (itemsize * widths + (4 * queries if fused else 0))
    whole: Recompute = "elementwise" if fused else "none"
    made_again = kept_bytes(config, owner, tokens, itemsize, whole, fused)
    return max(made_again - kept_bytes(config, owner, tokens, itemsize, recompute, fused), 0) + gradients


def _stacked_weights(config: ModelConfig, itemsize: int) -> int:
    """Query, key and value weights side by side: a copy that autograd keeps (model/attention.py)."""
    return itemsize * config.d_model * (config.n_heads + 2 * config.n_kv_heads) * config.d_head
