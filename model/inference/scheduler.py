"""Continuous batching: which sequences a step computes, on which cache pages, and what waits, gives way or ends."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from model.inference.prefix_cache import PrefixCache
from model.inference.request import Request
from model.inference.rows import RowStart
from model.inference.runner import Chunk, Draws, Runner
from model.inference.sampler import CONTINUES, FAILED, STOPPED

FinishReason = Literal["stop", "length", "cancelled", "error"]


class Step(NamedTuple):
    """The next token of a request and, with the last one, why the reply ends; a request that fails has no token.

    error: what a launch raised, or None if the logits are not finite.
    """

    request: Request
    token: int | None
    logprob: float | None
    finish_reason: FinishReason | None
    error: Exception | None = None


@dataclass
class SchedulerCounters:
    """Totals since start."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    preemptions: int = 0


class Scheduler:
    """Runs requests on a `Runner`: every step prefills a chunk of new prompts and decodes a token of all other replies.

    When pages run out, it evicts cached prefixes, then keeps new requests waiting, then preempts the youngest running
    request, which is recomputed later with the tokens generated so far. A request that fails ends alone: a launch that
    raises is repeated for each of its requests. Not thread-safe.
    """

    def __init__(self, runner: Runner, prefill_tokens_per_step: int | None, deliver: Callable[[Step], None]):
        """prefill_tokens_per_step: beside replies that are being decoded, whose next token waits for them; without any,
        a step computes as many as the runner can. None: no reply is decoded before all admitted prompts are computed,
        which takes the least time in all. deliver: called with every token as soon as it is known; it may `end`
        requests.
        """
        assert prefill_tokens_per_step is None or prefill_tokens_per_step > 0
        self._deliver = deliver
        self.runner, self.cache = runner, runner.cache
        self.prefix_cache = PrefixCache(runner.cache.allocator, runner.cache.page_size)
        self.prefill_tokens_per_step = prefill_tokens_per_step
        self.counters = SchedulerCounters()
        self.running: dict[Request, None] = {}  # oldest first
        self._waiting: dict[Request, None] = {}  # in order; a dict, so that any can leave at once
        self._preempted: deque[Request] = deque()  # before those that wait
        self._free_rows = list(range(runner.n_rows))
        self._ended_rows: list[int] = []  # still active on the device
        # not yet in the runner's page tables
        self._new_places: list[tuple[int, int]] = []
        self._new_pages: list[int] = []
        self._in_flight: deque[tuple[list[Request], Draws]] = deque()

    @property
    def n_waiting(self) -> int:
        return len(self._waiting) + len(self._preempted)

    @property
    def waiting(self) -> list[Request]:
        """Requests in the order in which they are admitted."""
        return [*self._preempted, *self._waiting]

    @property
    def unfinished(self) -> list[Request]:
        """Running and waiting requests."""
        return [*self.running, *self.waiting]

    @property
    def has_work(self) -> bool:
        return bool(self.running or self._waiting or self._preempted or self._in_flight)

    def add(self, request: Request) -> None:
        """Queue a request. Its prompt and reply fit the runner's max_length and the cache."""
        self._waiting[request] = None

    def end(self, request: Request, reason: FinishReason) -> None:
        """Remove a request, leaving its full pages to the prefix cache unless it failed."""
        if reason == "error":
            # its pages may hold wrong values: cached, they would break every request with the same prefix
            self.prefix_cache.forget(request.tokens, request.salt)
        if request.row is not None:
            self._release(request, keeps_prefix=reason != "error")
        elif request in self._waiting:
            del self._waiting[request]
        else:
            self._preempted.remove(request)
        request.has_ended = True
        self.counters.cancelled += reason == "cancelled"
        self.counters.failed += reason == "error"
        self.counters.finished += reason in ("stop", "length")

    def step(self) -> None:
        """Launch a step, and deliver the tokens of those before it."""
        self._admit()
        n_before = len(self._in_flight)
        chunks = self._next_chunks()
        self._launch(chunks, self._prefill)
        if not chunks or self.prefill_tokens_per_step is not None:
            decoding = [r for r in self.running if r.has_prompt and r.n_launched < r.sampling.max_new_tokens]
            self._launch(self._with_room(decoding), self._decode)
        launched = [*self._in_flight][n_before:]
        # the host reads what the device has done while the device does the next
        while self._in_flight and (not launched or self._in_flight[0] is not launched[0]):
            self._collect()

    def _admit(self) -> None:
        """Admit waiting requests in order while their tokens and one more page for each running request fit."""
        starts: dict[int, RowStart] = {}
        while self._free_rows and self.n_waiting:
            request = self._preempted[0] if self._preempted else next(iter(self._waiting))
            if request.after is not None and not request.after.has_ended and not request.after.n_generated:
                break  # its prompt is about to be cached
            pages = self.prefix_cache.match(request.tokens, request.salt)
            missing = self.cache.pages_for(len(request.tokens)) - len(pages)
            if not self._make_room(missing, spare=len(self.running)):
                self.cache.allocator.release(pages)
                break
            if self._preempted:
                self._preempted.popleft()
            else:
                del self._waiting[request]
            request.row = heapq.heappop(self._free_rows)
            request.has_prompt, request.n_launched = False, request.n_generated
            request.n_computed = len(pages) * self.cache.page_size
            request.pages = []
            self._append_pages(request, pages + self.cache.allocator.allocate(missing))
            if request.n_cached is None:
                request.n_cached = request.n_computed
                self.prefix_cache.count_lookup(request.n_computed, request.n_prompt)
                self.counters.prompt_tokens += request.n_prompt
            n_left = request.sampling.max_new_tokens - request.n_generated
            starts[request.row] = RowStart(request.sampling, request.n_generated, n_left)
            self.running[request] = None
        # rows that ended on the host only are cleared first: they may have been given away again
        self.runner.clear(self._ended_rows)
        self._ended_rows = []
        self.runner.start(starts)

    def _make_room(self, count: int, spare: int = 0) -> bool:
        """Evict cached prefixes until `count` pages are free; False, evicting none, if `count + spare` do not fit."""
        n_free = self.cache.allocator.n_free
        n_missing = max(count + spare - n_free, 0)
        if self.prefix_cache.n_evictable(n_missing) < n_missing:
            return False
        self.prefix_cache.evict(max(count - n_free, 0))
        return True

    def _append_pages(self, request: Request, pages: Sequence[int]) -> None:
        assert request.row is not None
        first = len(request.pages)
        request.pages += pages
        self._new_places += [(request.row, first + i) for i in range(len(pages))]
        self._new_pages += pages

    def _next_chunks(self) -> list[tuple[Request, int]]:
        """Which prompts to prefill in this step, and how many tokens of each, oldest first."""
        budget = self.runner.max_prefill_tokens
        if self.prefill_tokens_per_step is not None and any(request.has_prompt for request in self.running):
            budget = min(budget, self.prefill_tokens_per_step)
        chunks: list[tuple[Request, int]] = []
        for request in self.running:
            if budget > 0 and not request.has_prompt:
                length = min(request.n_pending, budget)
                chunks.append((request, length))
                budget -= length
        return chunks

    def _with_room(self, decoding: list[Request]) -> list[tuple[Request, int]]:
        """The requests that have a page for their next token, after preempting the youngest if pages ran out."""
        for request in decoding:
            while request.row is not None and len(request.pages) < self.cache.pages_for(request.length):
                if self._make_room(1):
                    self._append_pages(request, self.cache.allocator.allocate(1))
                elif self._in_flight:
                    self._collect()  # a preempted request must know its tokens
                else:
                    self._preempt(next(reversed(self.running)))
        return [(request, 1) for request in decoding if request.row is not None]

    def _preempt(self, request: Request) -> None:
        self._release(request, keeps_prefix=True)
        self._preempted.appendleft(request)
        self.counters.preemptions += 1

    def _launch(
        self, chunks: list[tuple[Request, int]], launch: Callable[[list[tuple[Request, int]]], Draws | None]
    ) -> None:
        """Launch a batch; if that fails, each request alone, and end those that fail again."""
        if not chunks:
            return
        self.runner.set_pages(self._new_places, self._new_pages)
        self._new_places, self._new_pages = [], []
        try:
            draws = launch(chunks)
        except Exception as error:
            if len(chunks) > 1:
                for chunk in chunks:
                    self._launch([chunk], launch)
            else:
                self._fail(chunks[0][0], error)
            return
        for request, length in chunks:
            request.n_computed += length
        if draws is not None:
            drawn = [request for request, _ in chunks if request.n_pending == 0]
            for request in drawn:
                request.has_prompt = True
                request.n_launched += 1
            self._in_flight.append((drawn, draws))
            if not self.runner.lag:
                self._collect()

    def _prefill(self, chunks: list[tuple[Request, int]]) -> Draws | None:
        return self.runner.prefill(
            [
                Chunk(_row(r), r.tokens[r.n_computed : r.n_computed + n], r.n_computed, r.n_pending == n)
                for r, n in chunks
            ]
        )

    def _decode(self, chunks: list[tuple[Request, int]]) -> Draws:
        return self.runner.decode([_row(r) for r, _ in chunks], max(r.length for r, _ in chunks))

    def _collect(self) -> None:
        """Read the oldest launch."""
        requests, draws = self._in_flight.popleft()
        for request, draw in zip(requests, draws.read(), strict=True):
            if request.row is None:
                continue  # it has ended since
            if draw.finish == FAILED:
                self._fail(request, None)
                continue
            if request.n_generated == 0:  # the whole prompt is computed: other requests may share its pages
                self.prefix_cache.insert(request.tokens, request.pages, request.salt)
            request.tokens.append(draw.token)
            self.counters.generated_tokens += 1
            reason: FinishReason | None = None
            if draw.finish != CONTINUES:
                reason = "stop" if draw.finish == STOPPED else "length"
                self.end(request, reason)
            self._deliver(Step(request, draw.token, draw.logprob, reason))

    def _fail(self, request: Request, error: Exception | None) -> None:
        self.end(request, "error")
        self._deliver(Step(request, None, None, "error", error))

    def _release(self, request: Request, keeps_prefix: bool) -> None:
        """Take a request's row and pages."""
        if keeps_prefix:
            self.prefix_cache.insert(request.tokens[: request.n_certain], request.pages, request.salt)
        self.cache.allocator.release(request.pages)
        heapq.heappush(self._free_rows, _row(request))
        self._ended_rows.append(_row(request))
        del self.running[request]
        request.row, request.pages, request.n_computed = None, [], 0


def _row(request: Request) -> int:
    assert request.row is not None, "a request that does not run"
    return request.row
