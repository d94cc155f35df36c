"""One step of prompt tokens on a GPU, with fixed buffers and no host synchronization, for CUDA graphs.

Chunks of several prompts are packed; their keys and values go to the paged cache, which may already hold the tokens in
front of them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from model.attention_ops import why_not
from model.config import LayerKind
from model.inference.decode_step import DecodeWeights, LayerWeights


class PrefillStep:
    """The layers that own a cache, for up to `tokens` new tokens of up to `sequences` prompts.

    x_TD: buffer of the last layer's output, which steps of all sizes share. fresh: no prompt has cached tokens, so
    attention reads the new keys and values as they are, with flash-attn-4 where it runs.
    """

    def __init__(
        self,
        weights: DecodeWeights,
        k_pools: Mapping[int, Tensor],
        v_pools: Mapping[int, Tensor],
        page_size: int,
        x_TD: Tensor,
        *,
        tokens: int,
        sequences: int,
        fresh: bool = False,
    ):
        self.weights, self.config = weights, weights.config
        self.k_pools, self.v_pools, self.page_size = k_pools, v_pools, page_size
        self.x_TD = x_TD[:tokens]
        self.sequences = sequences
        self.uses_flash = fresh and why_not("flash_attn_4", x_TD.device, x_TD.dtype) is None
        self.n_layers = self.config.n_layers - self.config.n_tail_layers
        self._index_T = torch.arange(tokens, dtype=torch.int32, device=x_TD.device)

    @torch.no_grad()
    def __call__(
        self, tokens_T: Tensor, starts_B1: Tensor, context_B: Tensor, page_tables: Mapping[LayerKind, Tensor]
    ) -> Tensor:
        """Append packed tokens to their sequences; x_TD after the last layer that owns a cache, before the final norm.

        int32 on the device. starts_B1: where each sequence's tokens begin, and where the last one's end; tokens beyond
        are padding, and sequences beyond the last have none. context_B: cached tokens of each sequence. page_tables:
        (B, P) of each layer kind.
        """
        from model.kernels.gated_product import gated_product
        from model.kernels.norm import add_norm

        weights, eps = self.weights, self.config.norm_eps
        sequence_T = torch.searchsorted(starts_B1[1:], self._index_T, right=True, out_int32=True)
        is_token_T = sequence_T < self.sequences
        sequence_T = sequence_T.clamp(max=self.sequences - 1).long()
        position_T = (self._index_T - starts_B1[sequence_T] + context_B[sequence_T]).where(is_token_T, 0).long()
        lengths_B = context_B + starts_B1[1:] - starts_B1[:-1]
        slots_T: dict[str, Tensor] = {}
        ropes: dict[str, tuple[Tensor, Tensor]] = {}
        for kind, table_BP in page_tables.items():
            page_T = table_BP[sequence_T, position_T // self.page_size].long()
            slot_T = page_T * self.page_size + position_T % self.page_size
            slots_T[kind] = slot_T.where(is_token_T, -1)
            cos_LC, sin_LC = weights.rope_LC[kind]
            ropes[kind] = cos_LC[position_T], sin_LC[position_T]

        self._fresh: dict[int, tuple[Tensor, Tensor]] = {}  # new keys and values of each layer that owns a cache
        x_TD = F.embedding(tokens_T, weights.embed_VD) * weights.embed_scale
        u_TD: Tensor | None = None
        w_u_D: Tensor | None = None
        for layer in weights.layers[: self.n_layers]:
            x_TD, normed_TD, _ = add_norm(x_TD, u_TD, w_u_D, layer.attention_norm_in_D, eps)
            assert normed_TD is not None
            attended_THK = self._attend(
                layer, normed_TD, ropes[layer.kind], slots_T[layer.kind], starts_B1, lengths_B, page_tables[layer.kind]
            )
            u_TD = F.linear(attended_THK.flatten(1), layer.w_o_DX)
            x_TD, normed_TD, _ = add_norm(x_TD, u_TD, layer.attention_norm_out_D, layer.ff_norm_in_D, eps)
            assert normed_TD is not None
            gated_TF = gated_product(normed_TD, layer.w_gate_in_XD)[2]
            u_TD, w_u_D = F.linear(gated_TF, layer.w_out_DF), layer.ff_norm_out_D
        x_TD, _, _ = add_norm(x_TD, u_TD, w_u_D, None, eps)
        return self.x_TD.copy_(x_TD)

    def _attend(
        self, layer: LayerWeights, normed_TD: Tensor, rope: tuple[Tensor, Tensor], slots_T: Tensor, starts_B1: Tensor,
        lengths_B: Tensor, table_BP: Tensor,
    ) -> Tensor:  # fmt: skip
        from model.kernels.cache_write import write_to_cache
        from model.kernels.flash_attention import flash_forward
        from model.kernels.prefill_attention import prefill_attention
        from model.kernels.rotary import normed_heads

        config, pools = self.config, (self.k_pools[layer.source], self.v_pools[layer.source])
        owns_cache = layer.k_norm_K is not None
        q_THK, k_TGK, v_TGK = normed_heads(
            F.linear(normed_TD, layer.w_qkv_XD), layer.q_norm_K, layer.k_norm_K, *rope, config.n_heads,
            config.n_kv_heads if owns_cache else 0, config.norm_eps,
        )  # fmt: skip
        if owns_cache:
            write_to_cache(k_TGK, v_TGK, slots_T, *pools)
            self._fresh[layer.source] = k_TGK, v_TGK
        window = config.window if layer.kind == "S" else None
        if self.uses_flash:
            return flash_forward(q_THK, *self._fresh[layer.source], starts_B1, len(q_THK), window)[0]
        return prefill_attention(q_THK, *pools, table_BP, self.page_size, starts_B1, lengths_B, window)
