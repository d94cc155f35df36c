"""What a block keeps for its backward pass, tensor by tensor, in bytes a token.

Compiled, it is what torch.compile's partitioner saves of the block as one graph. Run operation by operation ("eager")
autograd also keeps the residual between attention and feed-forward and the activated gate, since each operation keeps
its own inputs; where rms_norm is no single kernel (on a CPU) it keeps more than is counted here. What is counted is
compared with real blocks in tests/train/test_activations.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.compilation import Recompute
from model.config import ModelConfig

_COMPILED = frozenset({"none", "elementwise"})
_ALL = _COMPILED | {"eager"}
_INPUTS_OF_PRODUCTS = frozenset({"none", "eager"})
"""Results of norms and gates, which `elementwise` makes again."""


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
    # 16 bits: every block rounds the float32 tables anew (run eagerly, for queries and for keys)
    tables = config.d_head if itemsize == 2 else 0
    return [
        Kept("block's input", _ALL | {"block"}, d_model),
        Kept("attention's normed input", _INPUTS_OF_PRODUCTS, d_model),
        Kept("projected queries, keys and values", _ALL, queries + 2 * keys),
        Kept("rotary tables", _ALL, tables),
        Kept("rotary tables for keys", frozenset({"eager"}), tables if owns_cache else 0),
        Kept("rotated queries", _ALL, queries),
        Kept("keys and values as attended to", _ALL | {"block"}, 2 * keys),
        Kept("attention's output", _ALL, queries),
        Kept("its log-normaliser", _ALL, width32=config.n_heads),
        Kept("its projection", _ALL, d_model),
        Kept("residual after attention", frozenset({"eager"}), d_model),
        Kept("feed-forward's normed input", _INPUTS_OF_PRODUCTS, d_model),
        Kept("gate and input", _ALL, 2 * d_ff),
        Kept("activated gate", frozenset({"eager"}), d_ff),
        Kept("gated product", _INPUTS_OF_PRODUCTS, d_ff),
        Kept("feed-forward's output", _ALL, d_model),
        Kept("scales of the norms", _ALL, width32=4 + config.n_heads + key_norms),
    ]


def kept_bytes(
    config: ModelConfig, layer: int, tokens: int, itemsize: int, recompute: Recompute, compiled: bool
) -> int:
    """Bytes that one block keeps of a micro-batch between its forward and its backward pass."""
    owns_cache = config.kv_source(layer) == layer
    level = recompute if recompute == "block" or compiled else "eager"
    tensors = [kept for kept in kept_tensors(config, owns_cache, itemsize) if level in kept.levels]
    width = sum(itemsize * kept.width + 4 * kept.width32 for kept in tensors)
    return tokens * width + (_fused_weights(config, itemsize) if owns_cache and level != "block" else 0)


def backward_bytes(config: ModelConfig, tokens: int, itemsize: int, recompute: Recompute, compiled: bool) -> int:
    """Bytes that one block's backward adds to what it kept: what is computed again, and the gradients under way.

    Most at the gate: gradients of gate and input, of the block's output and of one hidden state; the product's own
    gradient takes the place of the product.
    """
    gradients = tokens * itemsize * (2 * config.d_ff + 2 * config.d_model)
    owner = config.kv_layers[0]
    kept = kept_bytes(config, owner, tokens, itemsize, recompute, compiled)
    return kept_bytes(config, owner, tokens, itemsize, "none", compiled) - kept + gradients


def _fused_weights(config: ModelConfig, itemsize: int) -> int:
    """Query, key and value weights side by side: a copy that the backward pass reads (model/attention.py)."""
    return itemsize * config.d_model * (config.n_heads + 2 * config.n_kv_heads) * config.d_head
