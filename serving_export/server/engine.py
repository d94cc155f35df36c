"""The serving engine: a thread that runs the scheduler, and the way of requests in and of their events out.

`submit` and `cancel` may be called from any thread.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from model.inference.kv_cache import PagedKVCache
from model.inference.request import Request
from model.inference.runner import Path, open_runner
from model.inference.sampling import Sampling
from model.inference.scheduler import Scheduler, SchedulerCounters, Step
from model.transformer import Transformer
from serving_export.server.detokenizer import Detokenizer
from serving_export.server.request import Event, FinishReason, PromptError, QueueFull, ServedRequest

_LOG = logging.getLogger(__name__)


class Engine:
    """Continuous batching with a prefix cache (see `Scheduler`), in a thread of its own."""

    def __init__(
        self,
        model: Transformer,
        n_pages: int,
        page_size: int = 16,
        max_running: int = 64,
        max_waiting: int = 1024,
        prefill_tokens_per_step: int = 512,
        path: Path = "auto",
        deterministic: bool = False,
    ):
        assert n_pages > 0 and max_running > 0
        self.model = model
        weight_VD = model.embed_tokens.weight
        self.device = weight_VD.device
        self.cache = PagedKVCache(model.config, n_pages, page_size, weight_VD.dtype, self.device)
        self.max_length = min(model.config.max_length, n_pages * page_size)
        """Most tokens (prompt and reply) of one request: limited by the model's max_length and by the cache."""
        self.runner = open_runner(
            model, self.cache, max_running, self.max_length, path=path, deterministic=deterministic
        )
        self.scheduler = Scheduler(self.runner, prefill_tokens_per_step, self._deliver)
        self.prefix_cache = self.scheduler.prefix_cache
        self.max_waiting = max_waiting
        self._inbox: deque[ServedRequest] = deque()
        self._cancelled: deque[ServedRequest] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._refusing = False
        self._thread: threading.Thread | None = None

    @property
    def counters(self) -> SchedulerCounters:
        """Totals since start."""
        return self.scheduler.counters

    @property
    def is_alive(self) -> bool:
        """Whether the loop's thread runs."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def n_running(self) -> int:
        return len(self.scheduler.running)

    @property
    def n_waiting(self) -> int:
        return self.scheduler.n_waiting + len(self._inbox)

    def n_pages_in_use(self) -> int:
        """Cache pages of running requests, shared pages counted once; pages that only the prefix cache holds are not
        in use."""
        return len(set(itertools.chain.from_iterable(tuple(r.pages) for r in tuple(self.scheduler.running))))

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
            self._wake.notify()

    def stop(self) -> None:
        """Cancel all requests and end the loop's thread."""
        self.refuse_all()
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._take_requests()

    def submit(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        emit: Callable[[Event], None],
        salt: str | None = None,
        detokenizer: Detokenizer | None = None,
        after: ServedRequest | None = None,
    ) -> ServedRequest:
        """Queue a prompt. `emit` is called on the engine's thread for every token and must not block.

        Prefixes are shared only between requests with the same `salt`. Without a `detokenizer` events have no text.
        after: a request with the same prompt, which is computed once for both. Raises PromptError or QueueFull.
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
        request = ServedRequest(
            list(prompt), sampling, salt, after, emit=emit, detokenizer=detokenizer, on_cancel=self._cancelled.append
        )
        with self._wake:
            if self._refusing:
                raise QueueFull("the engine is shutting down")
            if self.n_waiting >= self.max_waiting:
                raise QueueFull(f"{self.max_waiting} requests are waiting already")
            self._inbox.append(request)
            self._wake.notify()
        return request

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._stopping or self._inbox or self.scheduler.has_work):
                    self._wake.wait()
                if self._stopping:
                    return
            try:
                self.step()
            except Exception as error:  # in scheduling, so no single request is to blame; the service goes on
                _LOG.exception("the engine's scheduling failed; its requests are ended")
                for request in [*self.scheduler.running] or self.scheduler.waiting[:1]:
                    self.scheduler.end(request, "error")
                    self._finish(_served(request), "error", error=_described(error))

    def step(self) -> bool:
        """Take new requests, drop cancelled ones, run a step; False when no request is left."""
        self._take_requests()
        self.scheduler.step()
        return bool(self.scheduler.has_work or self._inbox)

    def _take_requests(self) -> None:
        """Take new requests and drop cancelled ones."""
        # a cancelled request is new at most until the inbox is empty
        cancelled = [self._cancelled.popleft() for _ in range(len(self._cancelled))]
        while self._inbox:
            self.scheduler.add(self._inbox.popleft())
        if self._refusing:
            cancelled += map(_served, self.scheduler.unfinished)
        for request in cancelled:
            if not request.has_ended:
                self.scheduler.end(request, "cancelled")
                self._finish(request, "cancelled")

    def _deliver(self, step: Step) -> None:
        """Emit the event of a token; whatever fails here ends this request alone."""
        try:
            self._emit_token(_served(step.request), step)
        except Exception as error:
            self._fail(_served(step.request), error)

    def _emit_token(self, request: ServedRequest, step: Step) -> None:
        if step.token is None:
            if step.error is not None:
                raise step.error
            place = f"token {request.n_generated} of the reply"
            message = f"the model's logits for {place} are not finite numbers, so none can be drawn"
            _LOG.error("a request is ended: %s", message)
            self._finish(request, "error", error=message)
            return
        text = "" if request.detokenizer is None else request.detokenizer.push(step.token)
        if step.finish_reason is None and request.detokenizer is not None and request.detokenizer.stopped:
            self.scheduler.end(request, "stop")
            self._finish(request, "stop", step.token, text)
        elif step.finish_reason is not None:
            self._finish(request, step.finish_reason, step.token, text)
        else:
            self._emit(request, Event(step.token, text, None))

    def _fail(self, request: ServedRequest, error: Exception) -> None:
        _LOG.error("a request failed and is ended", exc_info=error)
        if not request.has_ended:
            self.scheduler.end(request, "error")
        self._finish(request, "error", error=_described(error))

    def _finish(
        self,
        request: ServedRequest,
        reason: FinishReason,
        token: int | None = None,
        text: str = "",
        error: str | None = None,
    ) -> None:
        """Emit the last event of a request that the scheduler has ended."""
        if request.detokenizer is not None:
            text += request.detokenizer.finish()
        request.finish_reason = reason
        self._emit(request, Event(token, text, reason, error))

    def _emit(self, request: ServedRequest, event: Event) -> None:
        try:
            request.emit(event)
        except Exception:  # the receiver is gone (a closed event loop)
            _LOG.debug("a receiver of events failed", exc_info=True)
            request.cancel()


def _served(request: Request) -> ServedRequest:
    assert isinstance(request, ServedRequest)
    return request


def _described(error: Exception) -> str:
    return f"the engine failed ({type(error).__name__}); its log says why"
