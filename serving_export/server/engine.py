"""The reference serving engine: continuous batching over a paged KV cache with a prefix cache.

One thread owns the model and the caches; `submit` may be called from any thread.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from model.inference.generate import NO_TOKEN, Sampling, sample, uniform
from model.inference.kv_cache import CacheStep, PagedKVCache
from model.transformer import Transformer
from serving_export.server.detokenizer import Detokenizer
from serving_export.server.prefix_cache import PrefixCache
from serving_export.server.request import Event, FinishReason, PromptError, QueueFull, Request

_LOG = logging.getLogger(__name__)


@dataclass
class EngineCounters:
    """Totals since start."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    preemptions: int = 0


class Engine:
    """Continuous batching: every step prefills a chunk of new prompts, then decodes one token of every other request.

    When pages run out, it evicts cached prefixes, then keeps new requests waiting, then preempts the youngest running
    request, which is recomputed later with the tokens generated so far.
    A request that fails ends alone: the rest of its batch is computed again without it.
    """

    def __init__(
        self,
        model: Transformer,
        n_pages: int,
        page_size: int = 16,
        max_running: int = 64,
        max_waiting: int = 1024,
        prefill_tokens_per_step: int = 512,
    ):
        assert n_pages > 0 and max_running > 0 and prefill_tokens_per_step > 0
        self.model = model
        weight_VD = model.embed_tokens.weight
        self.device = weight_VD.device
        self.cache = PagedKVCache(model.config, n_pages, page_size, weight_VD.dtype, self.device)
        self.prefix_cache = PrefixCache(self.cache.allocator, page_size)
        self.counters = EngineCounters()
        self.max_running, self.max_waiting = max_running, max_waiting
        self.prefill_tokens_per_step = prefill_tokens_per_step
        self._numbers = itertools.count()
        self._inbox: deque[Request] = deque()
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []  # oldest first
        self._wake = threading.Condition()
        self._stopping = False
        self._refusing = False
        self._thread: threading.Thread | None = None

    @property
    def max_length(self) -> int:
        """Most tokens (prompt and reply) of one request: limited by the model's max_length and by the cache."""
        return min(self.model.config.max_length, self.cache.allocator.n_pages * self.cache.page_size)

    @property
    def is_alive(self) -> bool:
        """Whether the loop's thread runs."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def n_running(self) -> int:
        return len(self._running)

    @property
    def n_waiting(self) -> int:
        return len(self._waiting) + len(self._inbox)

    def n_pages_in_use(self) -> int:
        """Cache pages of running requests, shared pages counted once; pages that only the prefix cache holds are not
        in use."""
        return len(set(itertools.chain.from_iterable(tuple(r.pages) for r in tuple(self._running))))

    def start(self) -> None:
        """Run the loop in its own thread until `stop`."""
        assert self._thread is None, "the engine runs already"
        self._stopping = self._refusing = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def refuse_all(self) -> None:
        """Cancel all requests and refuse new ones; the loop keeps running until `stop`."""
        with self._wake:
            self._refusing = True

    def stop(self) -> None:
        """Cancel all requests and end the loop's thread."""
        self.refuse_all()
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._drain_inbox()
        self._drop_cancelled()

    def submit(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        emit: Callable[[Event], None],
        salt: str | None = None,
        detokenizer: Detokenizer | None = None,
    ) -> Request:
        """Queue a prompt. `emit` is called on the engine's thread for every token and must not block.

        Prefixes are shared only between requests with the same `salt`. Without a `detokenizer` events have no text.
        Raises PromptError or QueueFull.
        """
        vocab_size = self.model.config.vocab_size
        if not prompt or not all(0 <= token < vocab_size for token in prompt):
            raise PromptError(f"a prompt needs at least one token, each from 0 to {vocab_size - 1}")
        room = self.max_length - len(prompt)
        if room < 1:
            raise PromptError(
                f"the conversation has {len(prompt)} tokens; at most {self.max_length - 1} leave room for a reply"
            )
        if sampling.max_new_tokens < 1:
            raise PromptError(f"max_new_tokens is {sampling.max_new_tokens}; expected at least 1")
        sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        with self._wake:
            if self._refusing:
                raise QueueFull("the engine is shutting down")
            if self.n_waiting >= self.max_waiting:
                raise QueueFull(f"{self.max_waiting} requests are waiting already")
            request = Request(next(self._numbers), list(prompt), sampling, emit, salt, detokenizer)
            self._inbox.append(request)
            self._wake.notify()
        return request

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._stopping or self._inbox or self._waiting or self._running):
                    self._wake.wait()
                if self._stopping:
                    return
            try:
                self.step()
            except Exception as error:  # in scheduling, so no single request is to blame; the service goes on
                _LOG.exception("the engine's scheduling failed; its requests are ended")
                for request in self._running[:] or list(self._waiting)[:1]:
                    self._end(request, "error", error=_described(error))

    def step(self) -> bool:
        """Admit, prefill a chunk, decode one token of every other request; False when no request is left."""
        self._drain_inbox()
        self._drop_cancelled()
        self._admit()
        self._advance(self._next_chunks())
        decoding = self._with_room([r for r in self._running if r.n_pending == 1])
        self._advance([(request, 1) for request in decoding])
        return bool(self._running or self._waiting or self._inbox)

    def _drain_inbox(self) -> None:
        while self._inbox:
            self._waiting.append(self._inbox.popleft())

    def _drop_cancelled(self) -> None:
        for request in [*self._running, *self._waiting]:
            if request.is_cancelled or self._refusing:
                self._end(request, "cancelled")

    def _admit(self) -> None:
        """Admit waiting requests in order while their tokens and one more page for each running request fit."""
        while self._waiting and len(self._running) < self.max_running:
            request = self._waiting[0]
            pages = self.prefix_cache.match(request.tokens, request.salt)
            missing = self.cache.pages_for(len(request.tokens)) - len(pages)
            if not self._make_room(missing, spare=len(self._running)):
                self.cache.allocator.release(pages)
                return
            self._waiting.popleft()
            request.n_computed = len(pages) * self.cache.page_size
            request.pages = pages + self.cache.allocator.allocate(missing)
            if request.n_cached is None:
                request.n_cached = request.n_computed
                self.prefix_cache.count_lookup(request.n_computed, request.n_prompt)
                self.counters.prompt_tokens += request.n_prompt
            self._running.append(request)

    def _make_room(self, count: int, spare: int = 0) -> bool:
        """Evict cached prefixes until `count` pages are free; False, evicting none, if `count + spare` do not fit."""
        n_free = self.cache.allocator.n_free
        n_missing = max(count + spare - n_free, 0)
        if self.prefix_cache.n_evictable(n_missing) < n_missing:
            return False
        self.prefix_cache.evict(max(count - n_free, 0))
        return True

    def _next_chunks(self) -> list[tuple[Request, int]]:
        """Which prompts to prefill in this step, and how many tokens of each, oldest first."""
        budget = self.prefill_tokens_per_step
        chunks: list[tuple[Request, int]] = []
        for request in self._running:
            if request.n_pending > 1 and budget > 0:
                length = min(request.n_pending, budget)
                chunks.append((request, length))
                budget -= length
        return chunks

    def _with_room(self, decoding: list[Request]) -> list[Request]:
        """The requests that have a page for their next token, after preempting the youngest if pages ran out."""
        for request in decoding:
            while request in self._running and len(request.pages) < self.cache.pages_for(len(request.tokens)):
                if self._make_room(1):
                    request.pages += self.cache.allocator.allocate(1)
                else:
                    self._preempt(self._running[-1])
        return [request for request in decoding if request in self._running]

    def _preempt(self, request: Request) -> None:
        self._running.remove(request)
        self._release(request)
        self._waiting.appendleft(request)
        self.counters.preemptions += 1

    def _advance(self, chunks: list[tuple[Request, int]]) -> None:
        """Compute the next tokens of each request, and sample one for those with all their tokens computed.

        If the batch fails, each request is computed alone, and those that fail again are ended.
        """
        if not chunks:
            return
        sampled = None
        try:
            sampled = self._compute(chunks)
        except Exception as error:
            if len(chunks) == 1:
                self._fail(chunks[0][0], error)
                return
        if sampled is None:
            for chunk in chunks:
                self._advance([chunk])
            return
        for request, length in chunks:
            request.n_computed += length
        for request, token in sampled:
            try:
                self._append(request, token)
            except Exception as error:
                self._fail(request, error)

    def _fail(self, request: Request, error: Exception) -> None:
        _LOG.error("request %d failed and is ended", request.number, exc_info=error)
        self._end(request, "error", error=_described(error))

    @torch.no_grad()
    def _compute(self, chunks: list[tuple[Request, int]]) -> list[tuple[Request, int]]:
        """(request, sampled token) of the requests that `chunks` complete. Changes no request: it can be repeated."""
        sequences = [(r.tokens[r.n_computed : r.n_computed + length], r.n_computed, r.pages) for r, length in chunks]
        hidden_BD = self.model.extend(CacheStep.build(sequences, self.device), self.cache)
        complete = [(row, r) for row, (r, length) in enumerate(chunks) if r.n_pending == length]
        if not complete:
            return []
        logits_BV = self.model.logits(hidden_BD[[row for row, _ in complete]])
        uniforms = [uniform(r.sampling.seed, r.n_generated) for _, r in complete]
        token_B, _ = sample(logits_BV, [r.sampling for _, r in complete], uniforms)
        return [(r, token) for (_, r), token in zip(complete, token_B.tolist(), strict=True)]

    def _append(self, request: Request, token: int) -> None:
        """Append a sampled token; end the request if it is the last one or if none could be sampled."""
        if token == NO_TOKEN:
            place = f"token {request.n_generated} of the reply"
            message = f"the model's logits for {place} are not finite numbers, so none can be drawn"
            _LOG.error("request %d is ended: %s", request.number, message)
            self._end(request, "error", error=message)
            return
        if request.n_generated == 0:  # the whole prompt is computed: other requests may share its pages
            self.prefix_cache.insert(request.tokens, request.pages, request.salt)
        request.tokens.append(token)
        self.counters.generated_tokens += 1
        text = "" if request.detokenizer is None else request.detokenizer.push(token)
        if token in request.sampling.stop_ids or (request.detokenizer is not None and request.detokenizer.stopped):
            self._end(request, "stop", token, text)
        elif request.n_generated >= request.sampling.max_new_tokens:
            self._end(request, "length", token, text)
        else:
            self._emit(request, Event(token, text, None))

    def _end(
        self,
        request: Request,
        reason: FinishReason,
        token: int | None = None,
        text: str = "",
        error: str | None = None,
    ) -> None:
        if request in self._running:
            self._running.remove(request)
        else:
            self._waiting.remove(request)
        if reason == "error":
            # its pages may hold wrong values: cached, they would break every request with the same prefix
            self.prefix_cache.forget(request.tokens, request.salt)
            self.cache.allocator.release(request.pages)
            request.pages, request.n_computed = [], 0
        else:
            self._release(request)
        self.counters.cancelled += reason == "cancelled"
        self.counters.failed += reason == "error"
        self.counters.finished += reason in ("stop", "length")
        if request.detokenizer is not None:
            text += request.detokenizer.finish()
        request.finish_reason = reason
        self._emit(request, Event(token, text, reason, error))

    def _release(self, request: Request) -> None:
        """Release the pages, leaving the full ones to the prefix cache."""
        computed = request.tokens[: request.n_computed]
        self.prefix_cache.insert(computed, request.pages, request.salt)
        self.cache.allocator.release(request.pages)
        request.pages, request.n_computed = [], 0

    def _emit(self, request: Request, event: Event) -> None:
        try:
            request.emit(event)
        except Exception:  # the receiver is gone (a closed event loop)
            _LOG.debug("a receiver of events failed", exc_info=True)
            request.is_cancelled = True


def _described(error: Exception) -> str:
    return f"the engine failed ({type(error).__name__}); its log says why"
