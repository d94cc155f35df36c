"""The answer to a chat request: sampling values, latencies, stage, and requests that are freed on errors."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from data.format.dialogue import Message
from data.format.tokenizer import DialogueTokenizer
from model.transformer import Transformer
from serving_export.bundle import Bundle, SamplingDefaults
from serving_export.export.manifest import Defaults
from serving_export.server.answer import Answer, failure, sampling_of
from serving_export.server.engine import Engine
from serving_export.server.metrics import ServerMetrics
from serving_export.server.protocol import ChatRequest, parse_request
from serving_export.server.reply import Replier
from serving_export.server.request import GenerationFailed, QueueFull

DEFAULTS = SamplingDefaults(0.7, 5, 0.9)
Make = Callable[..., Answer]


def chat(**fields: Any) -> ChatRequest:
    return parse_request({"messages": [{"role": "user", "content": "Hello there"}], **fields})


@pytest.fixture
def engine(model: Transformer) -> Engine:
    return Engine(model, n_pages=64, page_size=4, max_waiting=2)


@pytest.fixture
def metrics(engine: Engine) -> ServerMetrics:
    return ServerMetrics(engine, "m")


@pytest.fixture
def make(engine: Engine, metrics: ServerMetrics, model: Transformer, tokenizer: DialogueTokenizer) -> Make:
    replier = Replier(engine, tokenizer)
    bundle = Bundle("m", model, tokenizer, Defaults("Bob", "Ada", 256), DEFAULTS)
    prompt = replier.encode([Message("Bob", "Hello there")], "Ada")
    return lambda **fields: Answer(replier, metrics, bundle, chat(**fields), prompt)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (0.7, 5, 0.9)),
        ({"temperature": 0}, (0, 5, 0.9)),
        ({"top_k": 0}, (0.7, 0, 0.9)),
        ({"top_k": -1}, (0.7, 0, 0.9)),
        ({"top_k": 3, "top_p": 0.5}, (0.7, 3, 0.5)),
    ],
)
def test_values_of_the_request_or_else_of_the_bundle(
    engine: Engine, tokenizer: DialogueTokenizer, fields: dict[str, Any], expected: tuple[float, int, float]
) -> None:
    sampling = sampling_of(chat(**fields), 0, DEFAULTS, Replier(engine, tokenizer))
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == expected


def test_each_choice_has_its_own_seed(engine: Engine, tokenizer: DialogueTokenizer) -> None:
    replier = Replier(engine, tokenizer)

    def seeds(**fields: Any) -> list[int]:
        return [sampling_of(chat(**fields), index, DEFAULTS, replier).seed for index in range(4)]

    assert seeds(seed=7) == seeds(seed=7) != seeds(seed=8)
    assert len({*seeds(seed=7), *seeds(seed=8), *seeds(), *seeds()}) == 16


def test_a_full_queue_frees_the_choices_that_were_queued_before(engine: Engine, make: Make) -> None:
    async def ask() -> None:
        with pytest.raises(QueueFull, match="2 requests are waiting"):
            make(n=3)

    asyncio.run(ask())
    assert engine.n_waiting == 2
    assert not engine.step()
    assert (engine.counters.cancelled, engine.counters.generated_tokens) == (2, 0)


def test_stage_is_that_of_the_most_advanced_choice(engine: Engine, make: Make) -> None:
    async def ask() -> None:
        engine.runner.max_prefill_tokens = 3
        answer = make(n=2, max_tokens=9)
        order, seen = ("queue", "prefill", "decode"), set()
        for _ in range(12):
            stages = [request.stage for request in answer._requests]
            assert answer.stage == max(stages, key=order.index)
            seen.add(tuple(stages))
            engine.step()
        assert {("queue", "queue"), ("prefill", "queue"), ("decode", "queue"), ("decode", "decode")} <= seen
        answer.cancel()
        engine.step()

    asyncio.run(ask())


def test_latencies(engine: Engine, metrics: ServerMetrics, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that advances by one second whenever it is read."""
    clock = itertools.count()
    monkeypatch.setattr("serving_export.server.answer.time.perf_counter", lambda: float(next(clock)))
    body: dict[str, Any] = {}

    async def ask() -> None:
        engine.start()
        body.update(await make(max_tokens=6, temperature=0, seed=1).finish())
        await asyncio.to_thread(engine.stop)

    asyncio.run(ask())
    n_tokens = body["usage"]["completion_tokens"]
    assert n_tokens > 3

    def observed(name: str) -> tuple[float | None, float | None]:
        found = metrics.registry.get_sample_value
        return found(f"dramatis_{name}_count"), found(f"dramatis_{name}_sum")

    assert observed("time_to_first_token_seconds") == (1, 1)
    assert observed("inter_token_latency_seconds") == (n_tokens - 1, n_tokens - 1)
    assert observed("e2e_request_latency_seconds") == (1, n_tokens + 1)


def test_a_shutdown_is_unavailable_and_a_failure_is_an_error() -> None:
    assert failure(GenerationFailed(None)).status == 503
    assert failure(GenerationFailed("broken")).status == 500
    assert "broken" in str(failure(GenerationFailed("broken")))
