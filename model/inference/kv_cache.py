"""The paged key/value cache: one pool a cache-owning layer, pages with reference counts, and the plan of one step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig


class OutOfPages(RuntimeError):  # noqa: N818 (reads as what happened)
    """The cache has fewer free pages than were asked for."""


class PageAllocator:
    """Free pages and how many holders each taken page has; a page is free again when its last holder lets go."""

    def __init__(self, n_pages: int):
        self.n_pages = n_pages
        self._free = list(range(n_pages - 1, -1, -1))
        self._holders = [0] * n_pages

    @property
    def n_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` pages with one holder each. Raises OutOfPages and takes none when there are not enough."""
        if count > len(self._free):
            raise OutOfPages(f"{count} cache pages asked for, {len(self._free)} of {self.n_pages} are free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        """One more holder for each page."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} is free"
            self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One holder fewer for each page."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} is free"
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)

    def holders(self, page: int) -> int:
        return self._holders[page]


class PagedKVCache:
    """Keys (after norm and rotation) and values of every cache-owning layer, in pages of `page_size` tokens.

    A page number means the same slots in every layer's pool. Layers that share read their owner's pool.
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
        """How many pages hold `n_tokens` tokens."""
        return -(-n_tokens // self.page_size)

    def copy_page(self, source: int, target: int) -> None:
        """Copy a page's slots in every layer: a sequence that forks inside a page needs its own."""
        slots = slice(source * self.page_size, (source + 1) * self.page_size)
        target_slots = slice(target * self.page_size, (target + 1) * self.page_size)
        for pool in (*self.k_SGK.values(), *self.v_SGK.values()):
            pool[target_slots] = pool[slots]


@dataclass(frozen=True)
class CacheStep:
    """New tokens of several sequences, packed, and where their keys and values live.

    tokens_T: the new tokens, sequence after sequence. new_lengths_B: how many each sequence adds (at least one).
    context_lengths_B: how many it has cached already. page_table_BP: its pages, padded with its first page.
    """

    tokens_T: Tensor
    new_lengths_B: Tensor
    context_lengths_B: Tensor
    page_table_BP: Tensor

    @classmethod
    def build(
        cls, sequences: Sequence[tuple[Sequence[int], int, Sequence[int]]], device: torch.device | str = "cpu"
    ) -> CacheStep:
        """From (new tokens, tokens cached already, pages) for each sequence."""
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
    """Which cache slots the queries of a step read, for one kind of layer.

    gather_BM: slots to read (padding repeats a slot that is written, so poison never enters a masked product).
    mask_B1LM: which of these each query sees. flat_T: where packed query t stands in the padded (B, L) layout.
    """

    gather_BM: Tensor
    mask_B1LM: Tensor
    flat_T: Tensor
    n_queries: int


def slots_of(step: CacheStep, positions_BM: Tensor, page_size: int) -> Tensor:
    """Cache slots of these positions of each sequence, shape (B, M)."""
    page_BM = torch.gather(step.page_table_BP, 1, positions_BM // page_size)
    return page_BM * page_size + positions_BM % page_size


def plan_queries(step: CacheStep, page_size: int, window: int | None, last_only: bool) -> QueryPlan:
    """The plan for all new tokens of a step, or for each sequence's last one only (`last_only`)."""
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
        # a padding query may have left the window of every key that exists; its output is dropped
        mask_BLM &= (distance_BLM < window) | (query_position_BL >= total_B[:, None])[:, :, None]

    sequence_T = torch.arange(len(total_B), device=device).repeat_interleave(new_lengths_B)
    starts_B = new_lengths_B.cumsum(0) - new_lengths_B
    offset_T = torch.arange(len(sequence_T), device=device) - starts_B[sequence_T]
    return QueryPlan(gather_BM, mask_BLM[:, None], sequence_T * n_queries + offset_T, n_queries)
