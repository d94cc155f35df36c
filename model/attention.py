"""Multi-query attention with learned query/key norms, a weightless value norm, and shared KV caches."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.attention_ops import AttentionOp, Documents
from model.config import ModelConfig
from model.inference.kv_cache import QueryPlan
from model.norm import RMSNorm, rms_normalize
from model.rope import rotate

KeyValue = tuple[Tensor, Tensor]
Rope = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """One layer's attention. A layer that reads another layer's cache has no key and value weights."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.d_head = config.n_heads, config.n_kv_heads, config.d_head
        self.eps = config.norm_eps
        self.window = config.window if config.layer_kinds[layer] == "S" else None
        self.owns_cache = config.kv_source(layer) == layer
        # in this order, so that they are one matrix in an engine's flat buffer
        self.w_q = nn.Linear(config.d_model, config.n_heads * config.d_head, bias=False)
        if self.owns_cache:
            self.w_k = nn.Linear(config.d_model, config.n_kv_heads * config.d_head, bias=False)
            self.w_v = nn.Linear(config.d_model, config.n_kv_heads * config.d_head, bias=False)
            self.k_norm = RMSNorm(config.d_head, config.norm_eps)
        self.w_o = nn.Linear(config.n_heads * config.d_head, config.d_model, bias=False)
        # attention has no other scale, so it starts at 1/sqrt(d_head)
        self.q_norm = RMSNorm(config.d_head, config.norm_eps, initial_scale=1 / math.sqrt(config.d_head))

    def queries(self, x_TD: Tensor, rope: Rope) -> Tensor:
        """q_THK: projected, normalized, rotated."""
        return self._normed_queries(self.w_q(x_TD), rope)

    def key_value(self, x_TD: Tensor, rope: Rope) -> KeyValue:
        """k_TGK (normalized, rotated) and v_TGK (normalized): what the cache stores."""
        return self._normed_key_value(self.w_k(x_TD), self.w_v(x_TD), rope)

    def _project(self, x_TD: Tensor, rope: Rope, shared: KeyValue | None) -> tuple[Tensor, KeyValue]:
        """Queries, keys and values in one product, since the key matrix of a single head is too narrow for a GPU."""
        if shared is not None:
            return self.queries(x_TD, rope), shared
        weights = [self.w_q.weight, self.w_k.weight, self.w_v.weight]
        q_TX, k_TX, v_TX = F.linear(x_TD, torch.cat(weights)).split([len(weight) for weight in weights], dim=-1)
        return self._normed_queries(q_TX, rope), self._normed_key_value(k_TX, v_TX, rope)

    def _normed_queries(self, q_TX: Tensor, rope: Rope) -> Tensor:
        return rotate(self.q_norm(q_TX.unflatten(-1, (self.n_heads, self.d_head))), *rope)

    def _normed_key_value(self, k_TX: Tensor, v_TX: Tensor, rope: Rope) -> KeyValue:
        k_TGK, v_TGK = (x_TX.unflatten(-1, (self.n_kv_heads, self.d_head)) for x_TX in (k_TX, v_TX))
        return rotate(self.k_norm(k_TGK), *rope), rms_normalize(v_TGK, self.eps)

    def forward(
        self, x_TD: Tensor, rope: Rope, shared: KeyValue | None, documents: Documents, attend: AttentionOp
    ) -> tuple[Tensor, KeyValue]:
        """(output_TD, (k_TGK, v_TGK)) for packed documents, as in training.

        shared: keys and values of the layer that this one reads, if it has none of its own.
        """
        q_THK, key_value = self._project(x_TD, rope, shared)
        out_THK = attend(q_THK, *key_value, documents, self.window)
        return self.w_o(out_THK.flatten(1)), key_value

    def read_cache(self, x_TD: Tensor, rope: Rope, pools: KeyValue, plan: QueryPlan) -> Tensor:
        """Attention of new tokens over the cache slots of `plan`. A group's query heads are rows of one product."""
        n_sequences, group = len(plan.gather_BM), self.n_heads // self.n_kv_heads
        q_THK = self.queries(x_TD, rope)
        q_BLHK = q_THK.new_zeros(n_sequences * plan.n_queries, self.n_heads, self.d_head)
        q_BLHK[plan.flat_T] = q_THK
        q_BLHK = q_BLHK.view(n_sequences, plan.n_queries, self.n_heads, self.d_head)
        q_BGRK = q_BLHK.unflatten(2, (self.n_kv_heads, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        k_BGMK, v_BGMK = (pool_SGK[plan.gather_BM].transpose(1, 2) for pool_SGK in pools)
        mask_B1RM = plan.mask_B1LM.repeat(1, 1, group, 1) if plan.n_queries > 1 else plan.mask_B1LM
        out_BGRK = F.scaled_dot_product_attention(q_BGRK, k_BGMK, v_BGMK, attn_mask=mask_B1RM, scale=1.0)
        out_BLHK = out_BGRK.unflatten(2, (group, plan.n_queries)).permute(0, 3, 1, 2, 4)
        return self.w_o(out_BLHK.reshape(n_sequences * plan.n_queries, -1)[plan.flat_T])


def store(pools: KeyValue, key_value: KeyValue, slots_T: Tensor) -> None:
    """Write new keys and values to their cache slots."""
    with torch.no_grad():
        for pool_SGK, new_TGK in zip(pools, key_value, strict=True):
            pool_SGK.index_copy_(0, slots_T, new_TGK.to(pool_SGK.dtype))
