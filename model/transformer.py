"""The decoder: sandwich-norm blocks over packed documents (training) or over a paged KV cache (generation)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from model.attention import Attention, KeyValue, Rope, store
from model.attention_ops import BACKENDS, AttentionOp, Backend, Documents, choose_backend
from model.config import LayerKind, ModelConfig
from model.feed_forward import FeedForward
from model.inference.kv_cache import CacheStep, PagedKVCache, QueryPlan, plan_queries
from model.norm import RMSNorm
from model.rope import rope_tables


class Embedding(nn.Module):
    """Tied token embeddings: scaled by sqrt(d_model) at the input, unscaled at the output."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.scale = math.sqrt(config.d_model)
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.d_model))

    def forward(self, tokens_T: Tensor) -> Tensor:
        # rounded to the weight's dtype, as stock engines do; on the host, since item() of a device tensor synchronizes
        scale = torch.tensor(self.scale, dtype=self.weight.dtype, device="cpu").item()
        if hasattr(self.weight, "main_grad"):
            return _EmbeddedTokens.apply(tokens_T, self.weight, scale)
        return F.embedding(tokens_T, self.weight) * scale


class _EmbeddedTokens(torch.autograd.Function):
    """Scaled embedding lookup that adds its gradient to the engine's float32 `main_grad`, only in the tokens' rows."""

    @staticmethod
    def forward(ctx: Any, tokens_T: Tensor, weight_VD: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(tokens_T)
        ctx.weight_VD, ctx.scale = weight_VD, scale
        return F.embedding(tokens_T, weight_VD) * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[None, None, None]:
        (tokens_T,) = ctx.saved_tensors
        ctx.weight_VD.main_grad.index_add_(0, tokens_T, grad_TD.float(), alpha=ctx.scale)
        return None, None, None


class Block(nn.Module):
    """x + norm(attention(norm(x))), then the same with the feed-forward: four norms ("sandwich")."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        # two residual additions per layer: the variance of their sum does not depend on depth (see initialize)
        residual_scale = config.d_model**0.125 / math.sqrt(2 * config.n_layers)
        self.attention_norm_in = RMSNorm(config.d_model, config.norm_eps)
        self.attention_norm_out = RMSNorm(config.d_model, config.norm_eps, residual_scale)
        self.ff_norm_in = RMSNorm(config.d_model, config.norm_eps)
        self.ff_norm_out = RMSNorm(config.d_model, config.norm_eps, residual_scale)
        self.attention = Attention(config, layer)
        self.feed_forward = FeedForward(config)
        self.fused, self.recompute = False, "none"  # see model.execution

    def forward(
        self, x_TD: Tensor, rope: Rope, shared: KeyValue | None, documents: Documents, attend: AttentionOp
    ) -> tuple[Tensor, KeyValue]:
        """(output_TD, (k_TGK, v_TGK)) for packed documents. `shared`: keys and values of another layer to read."""
        if self.fused:
            from model.kernels.fused_block import fused_block  # needs Triton

            return fused_block(self, x_TD, rope, shared, documents, attend)
        if self.recompute == "block" and torch.is_grad_enabled():
            inputs = (x_TD, rope, shared, documents, attend)
            # non-reentrant, as DeepSpeed's ZeRO requires
            return checkpoint(self._plain, *inputs, use_reentrant=False, preserve_rng_state=False)
        return self._plain(x_TD, rope, shared, documents, attend)

    def _plain(
        self, x_TD: Tensor, rope: Rope, shared: KeyValue | None, documents: Documents, attend: AttentionOp
    ) -> tuple[Tensor, KeyValue]:
        attended_TD, key_value = self.attention(self.attention_norm_in(x_TD), rope, shared, documents, attend)
        return self.add(x_TD, attended_TD), key_value

    def add(self, x_TD: Tensor, attended_TD: Tensor) -> Tensor:
        """The block's two residual additions, given the attention's output."""
        x_TD = x_TD + self.attention_norm_out(attended_TD)
        return x_TD + self.ff_norm_out(self.feed_forward(self.ff_norm_in(x_TD)))


class Transformer(nn.Module):
    """The decoder of `config`, initialized from `seed`, with parameters in `dtype`."""

    def __init__(
        self, config: ModelConfig, attention: Backend = "auto", seed: int = 0, dtype: torch.dtype = torch.float32
    ):
        super().__init__()
        self.config = config
        self.attention_backend: Backend = attention
        device = torch.get_default_device()
        with torch.device("meta"):
            self.embed_tokens = Embedding(config)
            self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
            self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        if device.type != "meta":
            self.initialize(seed, device, dtype)

    def initialize(self, seed: int, device: torch.device, dtype: torch.dtype) -> None:
        """Initialize: matrices with std 1/sqrt(fan_in), norms with their scale, embeddings with std d_model^(-5/8).

        Since embeddings are tied, the logit of the current token is sqrt(d_model) times the cosine between its
        embedding and the last hidden state. If embeddings were as large as the sum of the layers' outputs, a wide model
        would initially predict that every token repeats (loss 23 instead of 9 at width 1024). With inputs at scale
        d_model^(-1/8) and the layers' outputs at d_model^(1/8), the initial loss is near ln(vocab_size) at any width.
        """
        generator = torch.Generator(device).manual_seed(seed)
        for module in self.modules():
            if not isinstance(module, RMSNorm | nn.Linear | Embedding):
                continue
            # drawn in float32, so that the values do not depend on dtype; one tensor at a time, to save memory
            weight = torch.empty(module.weight.shape, dtype=torch.float32, device=device)
            if isinstance(module, RMSNorm):
                weight.fill_(module.initial_scale)
            else:
                exponent = -0.5 if isinstance(module, nn.Linear) else -0.625
                weight.normal_(0, weight.shape[1] ** exponent, generator=generator)
            module.weight = nn.Parameter(weight.to(dtype))

    def forward(self, tokens_T: Tensor, documents: Documents) -> Tensor:
        """hidden_TD after the final norm, for packed documents."""
        x_TD = self.embed_tokens(tokens_T)
        backend = choose_backend(self.attention_backend, x_TD.device, x_TD.dtype)
        attend = BACKENDS[backend]
        ropes = self._ropes(documents.positions_T)
        stored: dict[int, KeyValue] = {}
        for layer, block, kind in self._layers():
            source = self.config.kv_source(layer)
            x_TD, stored[layer] = block(x_TD, ropes[kind], stored.get(source), documents, attend)
        return self.final_norm(x_TD)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """logits_TV from final hidden states, softcapped where the config says so."""
        logits_TV = F.linear(hidden_TD, self.embed_tokens.weight)
        cap = self.config.final_logit_softcap
        return logits_TV if cap is None else torch.tanh(logits_TV / cap) * cap

    def _layers(self) -> Iterator[tuple[int, Block, LayerKind]]:
        for layer, (block, kind) in enumerate(zip(self.blocks, self.config.layer_kinds, strict=True)):
            yield layer, cast(Block, block), kind

    @torch.no_grad()
    def extend(self, step: CacheStep, cache: PagedKVCache, wants_hidden: bool = True) -> Tensor:
        """Append new tokens to cached sequences. Returns hidden_BD (final norm applied) of the last new tokens.

        Tail layers have no cache, so they run for the last token of each sequence only, and not at all for a chunk in
        the middle of a prompt (`wants_hidden` false), which returns no rows.
        """
        config = self.config
        sequence_T = torch.arange(len(step.new_lengths_B), device=step.tokens_T.device)
        sequence_T = sequence_T.repeat_interleave(step.new_lengths_B)
        ends_B = step.new_lengths_B.cumsum(0)
        starts_T = (ends_B - step.new_lengths_B)[sequence_T]
        offset_T = torch.arange(len(starts_T), device=starts_T.device) - starts_T
        positions_T = step.context_lengths_B[sequence_T] + offset_T
        page_T = step.page_table_BP[sequence_T, positions_T // cache.page_size]
        slots_T = page_T * cache.page_size + positions_T % cache.page_size

        x_TD = self.embed_tokens(step.tokens_T)
        ropes = self._ropes(positions_T)
        plans = self._plans(step, cache.page_size, last_only=False)
        for layer, block, kind in self._layers():
            if layer == config.n_layers - config.n_tail_layers:
                if not wants_hidden:
                    return x_TD[:0]
                x_TD = x_TD[ends_B - 1]
                ropes = {name: (cos_TK[ends_B - 1], sin_TK[ends_B - 1]) for name, (cos_TK, sin_TK) in ropes.items()}
                plans = self._plans(step, cache.page_size, last_only=True)
            source = config.kv_source(layer)
            pools = (cache.k_SGK[source], cache.v_SGK[source])
            normed_TD = block.attention_norm_in(x_TD)
            if block.attention.owns_cache:
                store(pools, block.attention.key_value(normed_TD, ropes[kind]), slots_T)
            x_TD = block.add(x_TD, block.attention.read_cache(normed_TD, ropes[kind], pools, plans[kind]))
        return self.final_norm(x_TD if config.n_tail_layers else x_TD[ends_B - 1])

    def _plans(self, step: CacheStep, page_size: int, last_only: bool) -> dict[str, QueryPlan]:
        windows = self._windows()
        return {kind: plan_queries(step, page_size, window, last_only) for kind, window in windows.items()}

    def _windows(self) -> dict[str, int | None]:
        return {kind: self.config.window if kind == "S" else None for kind in sorted(set(self.config.layer_kinds))}

    def _ropes(self, positions_T: Tensor) -> dict[str, Rope]:
        thetas = {"S": self.config.rope_theta_local, "G": self.config.rope_theta_global}
        return {
            kind: rope_tables(positions_T, self.config.d_head, thetas[kind]) for kind in set(self.config.layer_kinds)
        }
