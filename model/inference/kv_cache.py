"""The paged KV cache: a pool for each layer that owns one, and the slots that a step of the plain path reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
from model.inference.blocks import PageAllocator


class PagedKVCache:
    """Keys (after norm and rotation) and values of every cache-owning layer, in pages of `page_size` tokens.

    A page number addresses the same slots in every layer's pool. Sharing layers read their owner's pool.
    """

    def __init__(
        self,
        config: ModelConfig,
        n_pages: int,
        page_size: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.page_size = page_size
        self.allocator = PageAllocator(n_pages)
        shape = (n_pages * page_size, config.n_kv_heads, config.d_head)
        self.k_SGK = {layer: torch.zeros(shape, dtype=dtype, device=device) for layer in config.kv_layers}
        self.v_SGK = {layer: torch.zeros(shape, dtype=dtype, device=device) for layer in config.kv_layers}

    def pages_for(self, n_tokens: int) -> int:
        """Number of pages for `n_tokens` tokens."""
        return -(-n_tokens // self.page_size)


@dataclass(frozen=True)
class CacheStep:
    """New tokens of several sequences, packed, and their pages.

    tokens_T: new tokens, concatenated. new_lengths_B: number of new tokens of each sequence (at least one).
    context_lengths_B: number of tokens already cached. page_table_BP: pages, padded with the first page.
    """

    tokens_T: Tensor
    new_lengths_B: Tensor
    context_lengths_B: Tensor
    page_table_BP: Tensor

    @classmethod
    def build(
        cls, sequences: Sequence[tuple[Sequence[int], int, Sequence[int]]], device: torch.device | str = "cpu"
    ) -> CacheStep:
        """From (new tokens, number of cached tokens, pages) of each sequence."""
        widest = max(len(pages) for _, _, pages in sequences)
        table = [[*pages, *[pages[0]] * (widest - len(pages))] for _, _, pages in sequences]
        return cls(
            torch.tensor([token for tokens, _, _ in sequences for token in tokens], device=device),
            torch.tensor([len(tokens) for tokens, _, _ in sequences], device=device),
            torch.tensor([cached for _, cached, _ in sequences], device=device),
            torch.tensor(table, device=device),
        )


@dataclass(frozen=True)
class QueryPlan:
    """The cache slots that the queries of a step read, for one kind of layer.

    gather_BM: slots to read; padding repeats a written slot, so that masked products never read NaN. mask_B1LM: the
    slots each query attends to. flat_T: index of packed query t in the padded (B, L) layout.
    """

    gather_BM: Tensor
    mask_B1LM: Tensor
    flat_T: Tensor
    n_queries: int


def slots_of(step: CacheStep, positions_BM: Tensor, page_size: int) -> Tensor:
    """Cache slots (B, M) of these positions of each sequence."""
    page_BM = torch.gather(step.page_table_BP, 1, positions_BM // page_size)
    return page_BM * page_size + positions_BM % page_size


def plan_queries(step: CacheStep, page_size: int, window: int | None, last_only: bool) -> QueryPlan:
    """The plan for all new tokens of a step, or with `last_only` for each sequence's last one."""
    device = step.tokens_T.device
    new_lengths_B = torch.ones_like(step.new_lengths_B) if last_only else step.new_lengths_B
    total_B = step.context_lengths_B + step.new_lengths_B
    first_query_B = total_B - new_lengths_B
    n_queries = int(new_lengths_B.max())

    oldest_B = torch.zeros_like(total_B) if window is None else (first_query_B - window + 1).clamp(min=0)
    n_memory = int((total_B - oldest_B).max())
    key_position_BM = oldest_B[:, None] + torch.arange(n_memory, device=device)
    exists_BM = key_position_BM < total_B[:, None]
    gather_BM = slots_of(step, torch.where(exists_BM, key_position_BM, oldest_B[:, None]), page_size)

    query_position_BL = first_query_B[:, None] + torch.arange(n_queries, device=device)
    distance_BLM = query_position_BL[:, :, None] - key_position_BM[:, None, :]
    mask_BLM = (distance_BLM >= 0) & exists_BM[:, None, :]
    if window is not None:
        # let padding queries beyond the window attend to something: a fully masked row gives NaN; it is discarded
        mask_BLM &= (distance_BLM < window) | (query_position_BL >= total_B[:, None])[:, :, None]

    sequence_T = torch.arange(len(total_B), device=device).repeat_interleave(new_lengths_B)
    starts_B = new_lengths_B.cumsum(0) - new_lengths_B
    offset_T = torch.arange(len(sequence_T), device=device) - starts_B[sequence_T]
    return QueryPlan(gather_BM, mask_BLM[:, None], sequence_T * n_queries + offset_T, n_queries)
