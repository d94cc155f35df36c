"""The reference serving engine: continuous batching over a paged cache, with prefixes reused from turn to turn.

One thread owns the model and the cache; `submit` may be called from any thread.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from model.inference.generate import NO_TOKEN, Sampling, sample, uniform
from model.inference.kv_cache import CacheStep, PagedKVCache
from model.transformer import Transformer
from serving_export.server.prefix_cache import PrefixCache

EngineFinish = Literal["stop", "length", "cancelled", "error"]

_LOG = logging.getLogger(__name__)


class PromptError(ValueError):
    """A prompt that this engine can never answer."""


class QueueFull(RuntimeError):  # noqa: N818 (reads as what happened)
    """As many requests are waiting as the engine accepts."""


@dataclass(frozen=True)
class Event:
    """One step of a generation: a token (None in an end without one) and, in the last event, why it ended.

    `n_cached` is how many tokens of the prompt came from the prefix cache. `error` says what happened where
    `finish_reason` is "error".
    """

    token: int | None
    finish_reason: EngineFinish | None
    n_cached: int
    error: str | None = None


@dataclass
class EngineCounters:
    """Totals since start."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    preemptions: int = 0


class Generation:
    """A submitted request. `cancel` may be called from any thread, any number of times."""

    def __init__(
        self, number: int, prompt: list[int], sampling: Sampling, salt: str | None, emit: Callable[[Event], None]
    ):
        self.number = number
        self.n_prompt = len(prompt)
        self.sampling = sampling
        self.salt = salt
        self.emit = emit
        self.cancelled = False
        self.tokens = list(prompt)  # prompt, then what was drawn
        self.pages: list[int] = []
        self.n_computed = 0  # tokens whose keys and values are in `pages`
        self.n_cached: int | None = None  # of the prompt, at the first admission

    @property
    def n_pending(self) -> int:
        """Tokens still to be computed; one means that it decodes."""
        return len(self.tokens) - self.n_computed

    @property
    def n_generated(self) -> int:
        return len(self.tokens) - self.n_prompt

    def cancel(self) -> None:
        """Ask the engine to stop and free the pages; the last event then says "cancelled"."""
        self.cancelled = True


class Engine:
    """Continuous batching: every step prefills a chunk of new prompts, then decodes one token for all the others.

    Out of pages, it evicts cached prefixes, then lets new requests wait, then preempts the youngest running request,
    whose tokens are computed again later; what was drawn is never drawn anew.
    A request that fails ends alone: the others of its batch are computed without it.
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
        self._inbox: deque[Generation] = deque()
        self._waiting: deque[Generation] = deque()
        self._running: list[Generation] = []  # oldest first
        self._wake = threading.Condition()
        self._stopping = False
        self._refusing = False
        self._thread: threading.Thread | None = None

    @property
    def max_length(self) -> int:
        """Most tokens (prompt and reply) of one request: what the model knows and the cache holds."""
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
        """Cache pages that running requests hold, each counted once; what only the prefix cache holds is not."""
        return len(set(itertools.chain.from_iterable(tuple(g.pages) for g in tuple(self._running))))

    def start(self) -> None:
        """Run the loop in a thread of its own until `stop`."""
        assert self._thread is None, "the engine runs already"
        self._stopping = self._refusing = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def refuse_all(self) -> None:
        """Cancel whatever is left and refuse what comes; the loop goes on until `stop`."""
        with self._wake:
            self._refusing = True

    def stop(self) -> None:
        """Cancel whatever is left and end the loop's thread."""
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
        self, prompt: Sequence[int], sampling: Sampling, emit: Callable[[Event], None], salt: str | None = None
    ) -> Generation:
        """Queue a prompt. `emit` is called on the engine's thread for every token and must not block.

        Prefixes are shared only between requests of the same `salt`. Raises PromptError or QueueFull.
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
            generation = Generation(next(self._numbers), list(prompt), sampling, salt, emit)
            self._inbox.append(generation)
            self._wake.notify()
        return generation

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._stopping or self._inbox or self._waiting or self._running):
                    self._wake.wait()
                if self._stopping:
                    return
            try:
                self.step()
            except Exception as error:  # scheduling failed, which is nobody's request: the service goes on
                _LOG.exception("the engine's scheduling failed; its requests are ended")
                for generation in self._running[:] or list(self._waiting)[:1]:
                    self._end(generation, "error", error=_described(error))

    def step(self) -> bool:
        """Admit, prefill a chunk, decode one token for everyone; False when there is nothing left to do."""
        self._drain_inbox()
        self._drop_cancelled()
        self._admit()
        self._advance(self._next_chunks())
        decoding = self._with_room([g for g in self._running if g.n_pending == 1])
        self._advance([(generation, 1) for generation in decoding])
        return bool(self._running or self._waiting or self._inbox)

    def _drain_inbox(self) -> None:
        while self._inbox:
            self._waiting.append(self._inbox.popleft())

    def _drop_cancelled(self) -> None:
        for generation in [*self._running, *self._waiting]:
            if generation.cancelled or self._refusing:
                self._end(generation, "cancelled")

    def _admit(self) -> None:
        """Move waiting requests in, in order, while their tokens and one more page for each running request fit."""
        while self._waiting and len(self._running) < self.max_running:
            generation = self._waiting[0]
            pages = self.prefix_cache.match(generation.tokens, generation.salt)
            missing = self.cache.pages_for(len(generation.tokens)) - len(pages)
            if not self._make_room(missing, spare=len(self._running)):
                self.cache.allocator.release(pages)
                return
            self._waiting.popleft()
            generation.n_computed = len(pages) * self.cache.page_size
            generation.pages = pages + self.cache.allocator.allocate(missing)
            if generation.n_cached is None:
                generation.n_cached = generation.n_computed
                self.prefix_cache.count_lookup(generation.n_computed, generation.n_prompt)
                self.counters.prompt_tokens += generation.n_prompt
            self._running.append(generation)

    def _make_room(self, count: int, spare: int = 0) -> bool:
        """Evict cached prefixes until `count` pages are free; False, evicting none, when they and `spare` never fit."""
        n_free = self.cache.allocator.n_free
        n_missing = max(count + spare - n_free, 0)
        if self.prefix_cache.n_evictable(n_missing) < n_missing:
            return False
        self.prefix_cache.evict(max(count - n_free, 0))
        return True

    def _next_chunks(self) -> list[tuple[Generation, int]]:
        """Which prompts to prefill in this step, and how many tokens of each, oldest first."""
        budget = self.prefill_tokens_per_step
        chunks: list[tuple[Generation, int]] = []
        for generation in self._running:
            if generation.n_pending > 1 and budget > 0:
                length = min(generation.n_pending, budget)
                chunks.append((generation, length))
                budget -= length
        return chunks

    def _with_room(self, decoding: list[Generation]) -> list[Generation]:
        """Those that have a page for their next token, after preempting the youngest where pages ran out."""
        for generation in decoding:
            while generation in self._running and len(generation.pages) < self.cache.pages_for(len(generation.tokens)):
                if self._make_room(1):
                    generation.pages += self.cache.allocator.allocate(1)
                else:
                    self._preempt(self._running[-1])
        return [generation for generation in decoding if generation in self._running]

    def _preempt(self, generation: Generation) -> None:
        self._running.remove(generation)
        self._release(generation)
        self._waiting.appendleft(generation)
        self.counters.preemptions += 1

    def _advance(self, chunks: list[tuple[Generation, int]]) -> None:
        """Compute the next tokens of each and draw one for those that have no more to compute.

        Where that fails, each is computed alone, which finds and ends the ones that cannot be.
        """
        if not chunks:
            return
        drawn = None
        try:
            drawn = self._compute(chunks)
        except Exception as error:
            if len(chunks) == 1:
                self._fail(chunks[0][0], error)
                return
        if drawn is None:
            for chunk in chunks:
                self._advance([chunk])
            return
        for generation, length in chunks:
            generation.n_computed += length
        for generation, token in drawn:
            try:
                self._take(generation, token)
            except Exception as error:
                self._fail(generation, error)

    def _fail(self, generation: Generation, error: Exception) -> None:
        _LOG.error("request %d failed and is ended", generation.number, exc_info=error)
        self._end(generation, "error", error=_described(error))

    @torch.no_grad()
    def _compute(self, chunks: list[tuple[Generation, int]]) -> list[tuple[Generation, int]]:
        """(generation, drawn token) of those that the chunks complete. Changes no generation, so it can be repeated."""
        sequences = [(g.tokens[g.n_computed : g.n_computed + length], g.n_computed, g.pages) for g, length in chunks]
        hidden_BD = self.model.extend(CacheStep.build(sequences, self.device), self.cache)
        drawing = [(row, g) for row, (g, length) in enumerate(chunks) if g.n_pending == length]
        if not drawing:
            return []
        logits_BV = self.model.logits(hidden_BD[[row for row, _ in drawing]])
        uniforms = [uniform(g.sampling.seed, g.n_generated) for _, g in drawing]
        token_B, _ = sample(logits_BV, [g.sampling for _, g in drawing], uniforms)
        return [(g, token) for (_, g), token in zip(drawing, token_B.tolist(), strict=True)]

    def _take(self, generation: Generation, token: int) -> None:
        """Append a drawn token, and end the generation where it is the last or there was none to draw."""
        if token == NO_TOKEN:
            place = f"token {generation.n_generated} of the reply"
            message = f"the model's logits for {place} are not finite numbers, so none can be drawn"
            _LOG.error("request %d is ended: %s", generation.number, message)
            self._end(generation, "error", error=message)
            return
        if generation.n_generated == 0:  # the prompt is whole: others with the same beginning may read it
            self.prefix_cache.insert(generation.tokens, generation.pages, generation.salt)
        generation.tokens.append(token)
        self.counters.generated_tokens += 1
        if token in generation.sampling.stop_ids:
            self._end(generation, "stop", token)
        elif generation.n_generated >= generation.sampling.max_new_tokens:
            self._end(generation, "length", token)
        else:
            self._emit(generation, token, None)

    def _end(
        self, generation: Generation, reason: EngineFinish, token: int | None = None, error: str | None = None
    ) -> None:
        if generation in self._running:
            self._running.remove(generation)
        else:
            self._waiting.remove(generation)
        if reason == "error":
            # what its pages hold is not certain: a cached prefix among them would fail every request that begins so
            self.prefix_cache.forget(generation.tokens, generation.salt)
            self.cache.allocator.release(generation.pages)
            generation.pages, generation.n_computed = [], 0
        else:
            self._release(generation)
        self.counters.cancelled += reason == "cancelled"
        self.counters.failed += reason == "error"
        self.counters.finished += reason in ("stop", "length")
        self._emit(generation, token, reason, error)

    def _release(self, generation: Generation) -> None:
        """Give the pages up, leaving the full ones to the prefix cache."""
        computed = generation.tokens[: generation.n_computed]
        self.prefix_cache.insert(computed, generation.pages, generation.salt)
        self.cache.allocator.release(generation.pages)
        generation.pages, generation.n_computed = [], 0

    def _emit(
        self, generation: Generation, token: int | None, reason: EngineFinish | None, error: str | None = None
    ) -> None:
        try:
            generation.emit(Event(token, reason, generation.n_cached or 0, error))
        except Exception:  # a listener that is gone (a closed event loop) is as good as cancelled
            _LOG.debug("a listener failed", exc_info=True)
            generation.cancelled = True


def _described(error: Exception) -> str:
    return f"the engine failed ({type(error).__name__}); its log says why"
