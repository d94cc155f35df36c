"""The replies to one chat request, and their way back to the client: one body, or server-sent events."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from model.inference.generate import Sampling
from recipes.json_text import json_text
from serving_export.bundle import SamplingDefaults
from serving_export.server.engine import Event
from serving_export.server.metrics import ServerMetrics
from serving_export.server.protocol import ChatRequest, Completion, RequestError, usage
from serving_export.server.reply import EncodedPrompt, GenerationFailed, Replier, Reply


class Answer:
    """The `n` replies to one request. Raises PromptError or QueueFull, and then has queued none."""

    def __init__(
        self,
        replier: Replier,
        metrics: ServerMetrics,
        completion: Completion,
        chat: ChatRequest,
        prompt: EncodedPrompt,
        defaults: SamplingDefaults,
    ):
        self._replier, self._metrics, self._completion = replier, metrics, completion
        self._chat, self._prompt = chat, prompt
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._arrived = time.perf_counter()
        self._latest = [self._arrived] * chat.n  # when each reply's last token came
        self._replies: list[Reply] = []
        self.is_over = False
        try:
            for index in range(chat.n):
                self._replies.append(self._start(index, defaults, asyncio.get_running_loop()))
        except Exception:
            self.cancel()
            raise

    def _start(self, index: int, defaults: SamplingDefaults, loop: asyncio.AbstractEventLoop) -> Reply:
        def emit(event: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        sampling = sampling_of(self._chat, index, defaults, self._replier)
        return self._replier.start(self._prompt.tokens, sampling, emit, self._chat.cache_salt, self._chat.stop)

    @property
    def stage(self) -> str:
        """How far the furthest reply is: "queue", "prefill" or "decode"."""
        stages = [reply.stage for reply in self._replies]
        return next((stage for stage in ("decode", "prefill") if stage in stages), "queue")

    async def finish(self) -> dict[str, Any]:
        """The whole answer. Raises GenerationFailed."""
        async for _ in self._texts():
            pass
        self.is_over = True
        return self._completion.body([(r.text, r.finish_reason or "stop") for r in self._replies], self._usage())

    async def stream(self) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        with_usage = self._chat.include_usage
        try:
            for index in range(len(self._replies)):
                opening = {"role": "assistant", "content": ""}
                yield _sse(self._completion.chunk(index, opening, None, with_usage))
            async for index, text, reason in self._texts():
                if text:
                    yield _sse(self._completion.chunk(index, {"content": text}, None, with_usage))
                if reason is not None:
                    yield _sse(self._completion.chunk(index, {}, reason, with_usage))
            if with_usage:
                yield _sse(self._completion.usage_chunk(self._usage()))
        except GenerationFailed as error:
            yield _sse(failure(error).body())
        self.is_over = True
        yield "data: [DONE]\n\n"

    async def _texts(self) -> AsyncIterator[tuple[int, str, str | None]]:
        """(choice, new text, finish reason) as they come, until all replies have ended."""
        while any(reply.finish_reason is None for reply in self._replies):
            index, event = await self._events.get()
            reply = self._replies[index]
            if reply.finish_reason is not None:  # cut by a stop string; what the engine drew meanwhile is dropped
                continue
            now = time.perf_counter()
            metrics = self._metrics
            observed = metrics.inter_token_seconds if reply.drawn else metrics.time_to_first_token_seconds
            observed.observe(now - self._latest[index])
            self._latest[index] = now
            text = reply.take(event)
            if reply.finish_reason is not None:  # decodes and hashes the whole conversation
                await asyncio.to_thread(reply.remember)
            yield index, text, reply.finish_reason
        self._metrics.request_seconds.observe(time.perf_counter() - self._arrived)

    def _usage(self) -> dict[str, Any]:
        n_drawn = sum(len(reply.drawn) for reply in self._replies)
        return usage(len(self._prompt.tokens), n_drawn, max(reply.n_cached for reply in self._replies))

    def cancel(self) -> None:
        """Free whatever is still being generated."""
        for reply in self._replies:
            reply.cancel()


class EventStream(StreamingResponse):
    """An answer as server-sent events; `left` is called with the answer's stage when the client leaves early.

    The replies are freed at every end, also one before the first event, when the stream itself never runs.
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
    """How choice `index` is drawn: the request's values, and the bundle's where it gives none."""
    return replier.sampling(
        chat.longest_reply,
        defaults.temperature if chat.temperature is None else chat.temperature,
        max(defaults.top_k if chat.top_k is None else chat.top_k, 0),
        defaults.top_p if chat.top_p is None else chat.top_p,
        secrets.randbits(62) if chat.seed is None else (chat.seed * 1_000_003 + index) % 2**63,
    )


def failure(error: GenerationFailed) -> RequestError:
    """The error of a reply that the engine gave up."""
    return RequestError(str(error), status=503 if error.by_shutdown else 500)


def _sse(content: dict[str, Any]) -> str:
    return f"data: {json_text(content)}\n\n"
