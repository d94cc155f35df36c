"""What a block keeps for its backward pass, counted on real blocks: run eagerly, compiled, and recomputed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config as partitioner
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.decomposition import select_decomp_table

from model.attention_ops import Documents
from model.compilation import Recompute, checkpoint_blocks, compile_blocks
from model.config import ModelConfig, TailSharing
from model.transformer import Block
from train.activations import kept_bytes

TOKENS, N_LAYERS = 1024, 6
CONFIG = ModelConfig(
    vocab_size=64, d_model=256, n_layers=N_LAYERS, n_heads=8, n_kv_heads=1, d_head=32, d_ff=704, layers="SG", window=8,
    kv_sharing=TailSharing(kind="tail", n_layers=2), max_length=TOKENS,
)  # fmt: skip
OWN, SHARED = 0, N_LAYERS - 1


@torch.library.custom_op("dramatis_test::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keeps what flash attention keeps (model/flash_attention.py); what it computes does not matter here."""
    return q.clone(), torch.zeros(q.shape[1], q.shape[0])


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("dramatis_test::attention_backward", mutates_args=())
def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.clone(), k.clone(), v.clone()


@backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


attention.register_autograd(
    lambda ctx, grad, _: backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output),
)


def bytes_kept(block: nn.Module, layer: int, dtype: torch.dtype) -> int:
    """Bytes of all distinct tensors kept by a block's forward: not parameters, nor what another layer owns."""
    x_TD = torch.randn(TOKENS, CONFIG.d_model, dtype=dtype, requires_grad=True)
    rope = torch.randn(TOKENS, CONFIG.d_head // 2), torch.randn(TOKENS, CONFIG.d_head // 2)
    documents = Documents.from_lengths([TOKENS])
    shared = None
    if layer == SHARED:
        k_TGK, v_TGK = (torch.randn(TOKENS, 1, CONFIG.d_head, dtype=dtype, requires_grad=True) for _ in "kv")
        shared = (k_TGK, v_TGK)
    others = [*block.parameters(), *rope, *(shared or ()), documents.padded_boundaries, documents.boundaries]
    foreign = {tensor.untyped_storage().data_ptr() for tensor in others}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x_TD, rope, shared, documents, lambda q, k, v, documents, window: attention(q, k, v)[0])
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in foreign)


@pytest.fixture
def as_the_partitioner_saves(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[nn.Module, Recompute], None]]:
    """Compile with inductor's partitioner and decompositions but without its code generation."""
    real, names = torch.compile, ("materialized_backward", "used_far_apart", "long_fusible_chains")
    before = {f"ban_recompute_{name}": getattr(partitioner, f"ban_recompute_{name}") for name in names}
    backend: Any = aot_autograd(
        fw_compiler=lambda graph, inputs: make_boxed_func(graph),
        bw_compiler=lambda graph, inputs: make_boxed_func(graph),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: real(function, dynamic=dynamic, backend=backend))
    torch._dynamo.reset()
    yield lambda block, recompute: compile_blocks([block], dynamic=False, recompute=recompute)
    torch._dynamo.reset()
    for name, value in before.items():
        setattr(partitioner, name, value)


@pytest.mark.parametrize("layer", [OWN, SHARED])
@pytest.mark.parametrize("recompute", ["none", "elementwise"])
def test_a_compiled_block_keeps_what_is_counted(
    as_the_partitioner_saves: Callable[[nn.Module, Recompute], None], recompute: Recompute, layer: int
) -> None:
    block = Block(CONFIG, layer).to(torch.bfloat16)
    as_the_partitioner_saves(block, recompute)
    expected = kept_bytes(CONFIG, layer, TOKENS, 2, recompute, compiled=True)
    # the partitioner may keep the shared float32 rotary tables instead of its own rounded ones (1%)
    assert bytes_kept(block, layer, torch.bfloat16) == pytest.approx(expected, rel=0.015)


@pytest.mark.parametrize("layer", [OWN, SHARED])
def test_an_eager_block_keeps_what_is_counted_and_its_norms_inputs(layer: int) -> None:
    """On a CPU rms_norm is several operations: it keeps x / rms(x) of every norm besides (one kernel on a GPU)."""
    expected = kept_bytes(CONFIG, layer, TOKENS, 4, "none", compiled=False)
    queries, keys = CONFIG.n_heads * CONFIG.d_head, CONFIG.d_head if layer == OWN else 0
    expected += TOKENS * 4 * (4 * CONFIG.d_model + queries + keys)
    assert bytes_kept(Block(CONFIG, layer), layer, torch.float32) == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize("layer", [OWN, SHARED])
def test_a_checkpointed_block_keeps_its_input(layer: int) -> None:
    """Its keys and values are outputs: they live while another layer's checkpoint holds them as its inputs."""
    block = Block(CONFIG, layer)
    checkpoint_blocks([block])
    outputs = TOKENS * 4 * 2 * CONFIG.d_head if layer == OWN else 0
    expected = kept_bytes(CONFIG, layer, TOKENS, 4, "block", compiled=True) - outputs
    assert bytes_kept(block, layer, torch.float32) == expected
