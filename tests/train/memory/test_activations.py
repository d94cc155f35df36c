"""What a block keeps for its backward pass, counted on real blocks: as written, fused, and recomputed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.attention_ops import Documents
from model.config import ModelConfig, TailSharing
from model.execution import Recompute
from model.kernels import fused_block
from model.kernels.norm import Scales
from model.transformer import Block
from train.memory.activations import kept_bytes

TOKENS, N_LAYERS = 64, 6
CONFIG = ModelConfig(
    vocab_size=64, d_model=256, n_layers=N_LAYERS, n_heads=8, n_kv_heads=1, d_head=32, d_ff=704, layers="SG", window=8,
    kv_sharing=TailSharing(kind="tail", n_layers=2), max_length=TOKENS,
)  # fmt: skip
OWN, SHARED = 0, N_LAYERS - 1


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None) -> Tensor:
    """Keeps what flash attention keeps (model/kernels/flash_attention.py); what it computes does not matter here."""
    return _Attention.apply(q, k, v)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.clone()
        ctx.save_for_backward(q, k, v, out, torch.zeros(q.shape[1], q.shape[0]))
        return out


def inputs_of(layer: int, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, Tensor], Any, Documents]:
    """A block's input, rotary tables, shared keys and values (or None), and documents."""
    x_TD = torch.randn(TOKENS, CONFIG.d_model, dtype=dtype, requires_grad=True)
    rope = torch.randn(TOKENS, CONFIG.d_head // 2), torch.randn(TOKENS, CONFIG.d_head // 2)
    k_TGK, v_TGK = (torch.randn(TOKENS, 1, CONFIG.d_head, dtype=dtype, requires_grad=True) for _ in "kv")
    return x_TD, rope, (k_TGK, v_TGK) if layer == SHARED else None, Documents.from_lengths([TOKENS])


def storage_bytes(tensors: Iterable[Tensor], foreign: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages of `tensors`, without those of `foreign` ones."""
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    others = {tensor.untyped_storage().data_ptr() for tensor in foreign}
    return sum(size for address, size in held.items() if address not in others)


def bytes_kept(block: nn.Module, layer: int, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps of a plain block's forward: not parameters, nor what another layer owns."""
    x_TD, rope, shared, documents = inputs_of(layer, dtype)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x_TD, rope, shared, documents, attention)
    return storage_bytes(kept, [*block.parameters(), *rope, *(shared or ())])


@pytest.mark.parametrize("layer", [OWN, SHARED])
@pytest.mark.parametrize("recompute", ["none", "elementwise", "block"])
def test_a_fused_block_keeps_what_is_counted(monkeypatch: pytest.MonkeyPatch, recompute: Recompute, layer: int) -> None:
    normalizer_HT = torch.zeros(CONFIG.n_heads, TOKENS)
    outputs: list[Tensor] = []

    def attend_with_backward(attend: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Any]:
        outputs.append(q.clone())
        return outputs[-1], lambda *gradients: None

    monkeypatch.setattr(fused_block, "attend_with_backward", attend_with_backward)
    block = Block(CONFIG, layer)
    block.fused, block.recompute = True, recompute
    x_TD, rope, shared, documents = inputs_of(layer, torch.float32)
    out_TD, _ = block(x_TD, rope, shared, documents, attention)
    context: Any = out_TD.grad_fn
    values = [] if context.kept is None else list(vars(context.kept).values())
    values += [scale for value in values if isinstance(value, Scales) for scale in vars(value).values()]
    held = [value for value in values if isinstance(value, Tensor)]
    held += [tensor for tensor in context.saved_tensors if tensor is not None]
    held += [] if recompute == "block" else [*outputs, normalizer_HT]
    expected = kept_bytes(CONFIG, layer, TOKENS, 4, recompute, fused=True)
    assert storage_bytes(held, [*block.parameters(), *rope, *(shared or ())]) == expected


@pytest.mark.parametrize("layer", [OWN, SHARED])
def test_a_plain_block_keeps_what_is_counted_and_its_norms_inputs(layer: int) -> None:
    """On a CPU rms_norm is several operations: it keeps x / rms(x) of every norm besides (one kernel on a GPU)."""
    expected = kept_bytes(CONFIG, layer, TOKENS, 4, "none", fused=False)
    queries, keys = CONFIG.n_heads * CONFIG.d_head, CONFIG.d_head if layer == OWN else 0
    expected += TOKENS * 4 * (4 * CONFIG.d_model + queries + keys)
    assert bytes_kept(Block(CONFIG, layer), layer, torch.float32) == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize("layer", [OWN, SHARED])
def test_a_checkpointed_block_keeps_its_input(layer: int) -> None:
    """Its keys and values are outputs: they live while another layer's checkpoint holds them as its inputs."""
    block = Block(CONFIG, layer)
    block.recompute = "block"
    outputs = TOKENS * 4 * 2 * CONFIG.d_head if layer == OWN else 0
    expected = kept_bytes(CONFIG, layer, TOKENS, 4, "block", fused=False) - outputs
    assert bytes_kept(block, layer, torch.float32) == expected
