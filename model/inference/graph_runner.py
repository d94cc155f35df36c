"""The runner on a GPU: decoding and prefill as CUDA graphs of fused kernels, whose draws the host reads one step late.

Nothing in a step waits for the host: tokens, positions, page tables, sampling and stops are on the device.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from model.inference.decode_step import DecodeStep, DecodeWeights
from model.inference.kv_cache import PagedKVCache
from model.inference.runner import MAX_PREFILL_TOKENS, Chunk, Draw, Runner
from model.transformer import Transformer

ROW_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
TOKEN_SIZES = (32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
"""Numbers of rows and of prompt tokens that a graph is captured for: with many, at most a third is padding."""


def buckets_of(sizes: Sequence[int], largest: int) -> list[int]:
    """The sizes below `largest`, and `largest`."""
    return [*(size for size in sizes if size < largest), largest]


@dataclass(frozen=True)
class CopiedDraws:
    """Draws of a launch that are being copied to page-locked memory."""

    rows: Sequence[int]
    result_3R: Tensor
    is_copied: torch.cuda.Event
    has_logprobs: bool

    def read(self) -> list[Draw]:
        """See `Draws`."""
        self.is_copied.synchronize()
        tokens, finishes, _ = self.result_3R.tolist()
        logprobs = self.result_3R[2].view(torch.float32).tolist()
        return [
            Draw(row, tokens[row], finishes[row], logprobs[row] if self.has_logprobs else None) for row in self.rows
        ]


class GraphRunner(Runner):
    """A `Runner` whose launches return at once; graphs are captured at their first use, or by `warm_up`.

    deterministic: a reply does not depend on the other rows.
    """

    lag = 1

    def __init__(
        self,
        model: Transformer,
        cache: PagedKVCache,
        n_rows: int,
        max_length: int,
        wants_logprobs: bool,
        deterministic: bool = False,
    ):
        # the tail of a prompt is computed for two rows at least
        super().__init__(model, cache, max(n_rows, 2), max_length, wants_logprobs)
        self.n_rows, self._n_states = n_rows, max(n_rows, 2)
        self.deterministic = deterministic
        self.weights = DecodeWeights(model, max_length)
        self._row_buckets = buckets_of(ROW_SIZES, self._n_states)
        self.max_prefill_tokens = longest_chunk = min(MAX_PREFILL_TOKENS, n_rows * max_length)
        self._token_buckets = buckets_of(TOKEN_SIZES, longest_chunk)
        on_device = partial(torch.zeros, dtype=torch.int32, device=self.device)
        self._result_3R = on_device(3, self._n_states)
        # of a prefill: tokens; starts, cached tokens and rows of the chunks; index, row and length of the last tokens
        self._tokens_T = on_device(longest_chunk)
        self._chunks = on_device(3 * self._n_states + 1)
        self._lasts_3R = on_device(3, self._n_states)
        self._x_TD = torch.zeros(
            longest_chunk, model.config.d_model, dtype=self.weights.embed_VD.dtype, device=self.device
        )
        self._steps: dict[int, DecodeStep] = {}
        self._graphs: dict[tuple[str, int], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        # page-locked copies of the draws: more than can be unread, two launches a step
        self._copies = deque(torch.empty(3, self._n_states, dtype=torch.int32, pin_memory=True) for _ in range(8))

    def warm_up(self) -> None:
        """Capture all graphs, the largest first, whose memory the others share."""
        for kind, buckets, run in (
            ("fresh prefill", self._token_buckets, partial(self._prefill_step, fresh=True)),
            ("prefill", self._token_buckets, self._prefill_step),
            ("finish", self._row_buckets[1:], self._finish_step),
            ("decode", self._row_buckets, self._decode_step),
        ):
            for bucket in reversed(buckets):
                self._graph(kind, bucket, run)

    def prefill(self, chunks: Sequence[Chunk]) -> CopiedDraws | None:
        """See `Runner.prefill`."""
        tokens = np.fromiter(chain.from_iterable(chunk.tokens for chunk in chunks), np.int32)
        n_chunks, n_rows = len(chunks), self._n_states
        packed = np.zeros(3 * n_rows + 1, np.int32)
        packed[1 : n_rows + 1] = len(tokens)
        packed[1 : n_chunks + 1] = np.cumsum([len(chunk.tokens) for chunk in chunks])
        packed[n_rows + 1 : n_rows + 1 + n_chunks] = [chunk.start for chunk in chunks]
        packed[2 * n_rows + 1 : 2 * n_rows + 1 + n_chunks] = [chunk.row for chunk in chunks]
        lasts = [
            (end - 1, chunk.row, chunk.start + len(chunk.tokens))
            for chunk, end in zip(chunks, packed[1:].tolist(), strict=False)
            if chunk.is_last
        ]
        self._send(self._tokens_T[: len(tokens)], tokens)
        self._send(self._chunks, packed)
        if all(chunk.start == 0 for chunk in chunks):
            self._replay("fresh prefill", len(tokens), self._token_buckets, partial(self._prefill_step, fresh=True))
        else:
            self._replay("prefill", len(tokens), self._token_buckets, self._prefill_step)
        if not lasts:
            return None
        padded = np.full((3, n_rows), [[0], [-1], [0]], np.int32)
        padded[:, : len(lasts)] = np.array(lasts, np.int32).T
        self._send(self._lasts_3R, padded)
        self._replay("finish", len(lasts), self._row_buckets[1:], self._finish_step)
        return self._copied([row for _, row, _ in lasts])

    def decode(self, rows: Sequence[int], longest: int) -> CopiedDraws:
        """See `Runner.decode`; other rows are idle."""
        self._replay("decode", max(rows) + 1, self._row_buckets, self._decode_step)
        return self._copied(rows)

    def _prefill_step(self, bucket: int, fresh: bool = False) -> None:
        from model.inference.prefill_step import PrefillStep

        starts_R1, context_R, rows_R = self._chunks.split([self._n_states + 1, self._n_states, self._n_states])
        table_RP = self.page_table_RP[rows_R.long()]
        step = PrefillStep(
            self.weights, self.cache.k_SGK, self.cache.v_SGK, self.cache.page_size, self._x_TD,
            tokens=bucket, sequences=self._n_states, fresh=fresh,
        )  # fmt: skip
        step(self._tokens_T[:bucket], starts_R1, context_R, dict.fromkeys(self.weights.rope_LC, table_RP))

    def _finish_step(self, bucket: int) -> None:
        """The tail layers and the logits of the last tokens of prompts, and the first tokens of their replies."""
        from model.kernels.sample import sample_rows

        index_B, row_B, length_B = (field_R[:bucket].contiguous() for field_R in self._lasts_3R)
        table_BP = self.page_table_RP[row_B.clamp(min=0).long()]
        first_layer = self.model.config.n_layers - self.model.config.n_tail_layers
        logits_BV = self._step_of(bucket).finish(self._x_TD[index_B.long()], first_layer, length_B, table_BP)
        sample_rows(logits_BV, self.rows, self._result_3R, row_B, length_B, self.wants_logprobs)

    def _decode_step(self, bucket: int) -> None:
        from model.kernels.sample import sample_rows

        rows = self.rows
        step = self._step_of(bucket)
        logits_BV = step(rows.token_R[:bucket], rows.length_R[:bucket], self.page_table_RP[:bucket])
        sample_rows(logits_BV, rows, self._result_3R, wants_logprobs=self.wants_logprobs)

    def _step_of(self, bucket: int) -> DecodeStep:
        if bucket not in self._steps:
            self._steps[bucket] = DecodeStep(
                self.model, self.cache.k_SGK, self.cache.v_SGK, self.cache.page_size, rows=bucket,
                width=self.page_table_RP.shape[1], max_length=self.max_length, deterministic=self.deterministic,
                weights=self.weights,
            )  # fmt: skip
        return self._steps[bucket]

    def _replay(self, kind: str, size: int, buckets: Sequence[int], run: Callable[[int], None]) -> None:
        self._graph(kind, buckets[bisect_left(buckets, size)], run).replay()

    def _graph(self, kind: str, bucket: int, run: Callable[[int], None]) -> torch.cuda.CUDAGraph:
        """The graph of `run`, captured at its first use: with idle rows and empty chunks, so that nothing changes."""
        key = (kind, bucket)
        if key not in self._graphs:
            inputs = [self.rows.length_R, self._chunks, self._lasts_3R]
            held = [x.clone() for x in inputs]
            for x in inputs:
                x.zero_()
            self._lasts_3R[1] = -1
            run(bucket)  # compiles kernels
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                run(bucket)
            for x, value in zip(inputs, held, strict=True):
                x.copy_(value)
            self._graphs[key] = graph
        return self._graphs[key]

    def _copied(self, rows: Sequence[int]) -> CopiedDraws:
        self._copies.rotate()
        result_3R = self._copies[0]
        result_3R.copy_(self._result_3R, non_blocking=True)
        is_copied = torch.cuda.Event()
        is_copied.record()
        return CopiedDraws(rows, result_3R, is_copied, self.wants_logprobs)

    @staticmethod
    def _send(target: Tensor, values: np.ndarray) -> None:
        """Copy to the device without waiting for it."""
        target.copy_(torch.from_numpy(values).pin_memory().view_as(target), non_blocking=True)
