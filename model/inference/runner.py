"""Runs the model on rows of sequences: prefill of chunks, and decoding of one token a row, over the paged KV cache.

The plain path computes a step with `Transformer.extend`, on any device and in any precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from model.config import ModelConfig
from model.inference.decode_step import unsupported
from model.inference.kv_cache import CacheStep, PagedKVCache
from model.inference.rows import Rows, RowStart, on_device
from model.inference.sampler import advance, sample
from model.transformer import Transformer

MAX_PREFILL_TOKENS = 8192
"""Most prompt tokens of a fused step."""


class RunnerError(ValueError):
    """A path that this model or device cannot take."""


class Chunk(NamedTuple):
    """New tokens of a row's prompt, after `start` tokens that the cache holds; the last chunk draws a token."""

    row: int
    tokens: Sequence[int]
    start: int
    is_last: bool


class Draw(NamedTuple):
    """The next token of a row (NO_TOKEN if none could be drawn), and what becomes of its reply (see `advance`)."""

    row: int
    token: int
    finish: int
    logprob: float | None


class Draws(Protocol):
    """The draws of one launch."""

    def read(self) -> list[Draw]:
        """The draws, once they are computed."""


@dataclass(frozen=True)
class ComputedDraws:
    """Draws of rows in tensors."""

    rows: Sequence[int]
    token_B: Tensor
    finish_B: Tensor
    logprob_B: Tensor | None

    def read(self) -> list[Draw]:
        """See `Draws`."""
        logprobs = [None] * len(self.rows) if self.logprob_B is None else self.logprob_B.tolist()
        return list(map(Draw, self.rows, self.token_B.tolist(), self.finish_B.tolist(), logprobs))


class Runner:
    """A model, its cache, and `n_rows` rows of sequences with their page tables and sampling state.

    A launch that raises leaves the state of all rows as it was, so that it can be repeated with fewer rows.
    """

    lag = 0
    """Steps whose draws may stay unread while the next one is launched."""
    max_prefill_tokens = 2048
    """Most tokens of the chunks of one launch."""
    why_plain: str | None = None
    """Why the fused path is not taken."""

    def __init__(self, model: Transformer, cache: PagedKVCache, n_rows: int, max_length: int, wants_logprobs: bool):
        self.model, self.cache, self.n_rows, self.max_length = model, cache, n_rows, max_length
        self.wants_logprobs = wants_logprobs
        self.device = model.embed_tokens.weight.device
        self.rows = Rows(n_rows, model.config.vocab_size, self.device)
        self.page_table_RP = torch.zeros(n_rows, cache.pages_for(max_length), dtype=torch.int32, device=self.device)

    def warm_up(self) -> None:
        """Prepare what the first launches would otherwise wait for."""

    def start(self, starts: dict[int, RowStart]) -> None:
        """Give idle rows to sequences, whose prompts are to be prefilled."""
        self.rows.assign(starts)

    def clear(self, rows: Sequence[int]) -> None:
        """Make rows idle: their sequences have ended."""
        self.rows.clear(rows)

    def set_pages(self, places: Sequence[tuple[int, int]], pages: Sequence[int]) -> None:
        """Enter pages at (row, number of the page in its sequence)."""
        if places:
            row_N, column_N = on_device(places, torch.int64, self.device).T
            self.page_table_RP[row_N, column_N] = on_device(pages, torch.int32, self.device)

    @torch.no_grad()
    def prefill(self, chunks: Sequence[Chunk]) -> Draws | None:
        """Compute chunks of prompts, and draw the first token of replies whose prompt ends; None without such a one."""
        last = [number for number, chunk in enumerate(chunks) if chunk.is_last]
        lengths = [chunk.start + len(chunk.tokens) for chunk in chunks]
        step = CacheStep(
            torch.tensor(list(chain.from_iterable(chunk.tokens for chunk in chunks)), device=self.device),
            torch.tensor([len(chunk.tokens) for chunk in chunks], device=self.device),
            torch.tensor([chunk.start for chunk in chunks], device=self.device),
            self._pages([chunk.row for chunk in chunks], max(lengths)),
        )
        hidden_BD = self.model.extend(step, self.cache, wants_hidden=bool(last))
        if not last:
            return None
        rows = [chunks[number].row for number in last]
        some = self.rows.select(rows)
        length_B = torch.tensor([lengths[number] for number in last], dtype=torch.int32, device=self.device)
        return self._draw(rows, some, self.model.logits(hidden_BD[last]), length_B)

    @torch.no_grad()
    def decode(self, rows: Sequence[int], longest: int) -> Draws:
        """Draw one more token of these rows, of which the longest has `longest` tokens."""
        some = self.rows.select(rows)
        step = CacheStep(
            some.token_R.long(), torch.ones_like(some.token_R).long(), some.length_R.long() - 1,
            self._pages(rows, longest),
        )  # fmt: skip
        logits_BV = self.model.logits(self.model.extend(step, self.cache))
        return self._draw(rows, some, logits_BV, some.length_R.clone())

    def _pages(self, rows: Sequence[int], longest: int) -> Tensor:
        return self.page_table_RP[torch.tensor(rows, device=self.device), : self.cache.pages_for(longest)].long()

    def _draw(self, rows: Sequence[int], some: Rows, logits_BV: Tensor, length_B: Tensor) -> Draws:
        """Draw the token that follows `length_B` tokens of each row."""
        token_B, logprob_B = sample(logits_BV, some, self.wants_logprobs)
        some.length_R.copy_(length_B)
        finish_B = advance(some, token_B)
        self.rows.update(rows, some)
        return ComputedDraws(rows, token_B, finish_B, logprob_B)


Path = Literal["auto", "fused", "plain"]


def open_runner(
    model: Transformer,
    cache: PagedKVCache,
    n_rows: int,
    max_length: int,
    wants_logprobs: bool = False,
    path: Path = "auto",
    deterministic: bool = False,
) -> Runner:
    """A runner on fused kernels and CUDA graphs, or on the plain path.

    path: "auto" takes the fused one where it can; `Runner.why_plain` says why it is not. deterministic: replies do not
    depend on the batch. Raises RunnerError where "fused" or `deterministic` cannot be had.
    """
    reason = unsupported(model.config, model.embed_tokens.weight.dtype, model.embed_tokens.weight.device)
    if path == "plain" or (path == "auto" and reason is not None):
        if deterministic:
            raise RunnerError(f"deterministic decoding needs the fused path: {reason or 'path is plain'}")
        runner = Runner(model, cache, n_rows, max_length, wants_logprobs)
        runner.why_plain = reason or "asked for"
        return runner
    if reason is not None:
        raise RunnerError(reason)
    from model.inference.graph_runner import GraphRunner  # needs Triton

    return GraphRunner(model, cache, n_rows, max_length, wants_logprobs, deterministic)


def working_bytes(config: ModelConfig, n_rows: int, max_length: int) -> int:
    """Bytes that fused steps in 16 bits need beside weights and cache: activations of a prefill, and logits."""
    n_tokens = min(MAX_PREFILL_TOKENS, n_rows * max_length)
    activations = n_tokens * (3 * config.d_ff + 8 * config.d_model) * 2
    return activations + n_rows * config.vocab_size * (4 + 1) + 2 * max_length * config.d_head * 4
