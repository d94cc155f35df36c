"""The answer to one chat request: one JSON body, or server-sent events."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from model.inference.sampling import Sampling
from recipes.json_text import json_text
from serving_export.bundle import Bundle, SamplingDefaults
from serving_export.server.conversation import EncodedPrompt
from serving_export.server.metrics import ServerMetrics
from serving_export.server.protocol import (
    ChatRequest,
    RequestError,
    completion_body,
    completion_chunk,
    completion_head,
    usage,
    usage_chunk,
)
from serving_export.server.reply import Replier
from serving_export.server.request import Event, GenerationFailed, ServedRequest


class Answer:
    """The `n` replies to one chat request. Raises PromptError or QueueFull, with no request left in the engine."""

    def __init__(
        self, replier: Replier, metrics: ServerMetrics, bundle: Bundle, chat: ChatRequest, prompt: EncodedPrompt
    ):
        self._replier, self._metrics = replier, metrics
        self._chat, self._prompt = chat, prompt
        self._head = completion_head(bundle.name, prompt.n_left_out if chat.truncation == "auto" else None)
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._arrived = time.perf_counter()
        self._requests: list[ServedRequest] = []
        self.is_over = False
        try:
            for index in range(chat.n):
                self._requests.append(self._start(index, bundle.sampling, asyncio.get_running_loop()))
        except Exception:
            self.cancel()
            raise

    def _start(self, index: int, defaults: SamplingDefaults, loop: asyncio.AbstractEventLoop) -> ServedRequest:
        def emit(event: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        sampling = sampling_of(self._chat, index, defaults, self._replier)
        first = self._requests[0] if self._requests else None
        return self._replier.start(self._prompt, sampling, emit, self._chat.cache_salt, self._chat.stop, first)

    @property
    def stage(self) -> str:
        """The most advanced stage of the requests: "queue", "prefill" or "decode"."""
        stages = [request.stage for request in self._requests]
        return next((stage for stage in ("decode", "prefill") if stage in stages), "queue")

    async def finish(self) -> dict[str, Any]:
        """The body of the whole answer. Raises GenerationFailed."""
        async for _ in self._received():
            pass
        choices = [(request.text, str(request.finish_reason)) for request in self._requests]
        return completion_body(self._head, choices, self._usage())

    async def stream(self) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        chunk = partial(completion_chunk, self._head, with_usage_field=self._chat.include_usage)
        try:
            for index in range(len(self._requests)):
                yield _sse(chunk(index, {"role": "assistant", "content": ""}, None))
            async for index, event in self._received():
                if event.text:
                    yield _sse(chunk(index, {"content": event.text}, None))
                if event.finish_reason is not None:
                    yield _sse(chunk(index, {}, event.finish_reason))
            if self._chat.include_usage:
                yield _sse(usage_chunk(self._head, self._usage()))
        except GenerationFailed as error:
            yield _sse(failure(error).body())
        self.is_over = True
        yield "data: [DONE]\n\n"

    async def _received(self) -> AsyncIterator[tuple[int, Event]]:
        """(choice, event) in order of arrival, until all replies have ended. Raises GenerationFailed."""
        latest: dict[int, float] = {}  # when each choice's last event arrived
        n_running = len(self._requests)
        while n_running:
            index, event = await self._events.get()
            now = time.perf_counter()
            metrics = self._metrics
            histogram = metrics.inter_token_seconds if index in latest else metrics.time_to_first_token_seconds
            histogram.observe(now - latest.get(index, self._arrived))
            latest[index] = now
            event.check()
            if event.finish_reason is not None:
                n_running -= 1
                self._replier.remember(self._prompt, self._requests[index])
            yield index, event
        self._metrics.request_seconds.observe(time.perf_counter() - self._arrived)

    def _usage(self) -> dict[str, Any]:
        n_generated = sum(request.n_generated for request in self._requests)
        return usage(len(self._prompt.tokens), n_generated, max(request.n_cached or 0 for request in self._requests))

    def cancel(self) -> None:
        """Cancel the requests that are still running."""
        for request in self._requests:
            request.cancel()


class EventStream(StreamingResponse):
    """An answer as server-sent events; `left` is called with the answer's stage if the client disconnects early.

    The requests are always cancelled at the end, even if the client disconnects before the stream starts.
    """

    def __init__(self, answer: Answer, left: Callable[[str], object]):
        super().__init__(answer.stream(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._answer, self._left = answer, left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if not self._answer.is_over:
                self._left(self._answer.stage)
            self._answer.cancel()


def sampling_of(chat: ChatRequest, index: int, defaults: SamplingDefaults, replier: Replier) -> Sampling:
    """Sampling of choice `index`: the values of `chat`, and the bundle's defaults for those that it omits."""
    return replier.sampling(
        chat.longest_reply,
        defaults.temperature if chat.temperature is None else chat.temperature,
        max(defaults.top_k if chat.top_k is None else chat.top_k, 0),
        defaults.top_p if chat.top_p is None else chat.top_p,
        secrets.randbits(62) if chat.seed is None else (chat.seed * 1_000_003 + index) % 2**63,
    )


def failure(error: GenerationFailed) -> RequestError:
    """The HTTP error of a request that the engine ended early."""
    return RequestError(str(error), status=503 if error.by_shutdown else 500)


def _sse(content: dict[str, Any]) -> str:
    return f"data: {json_text(content)}\n\n"
