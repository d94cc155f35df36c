"""A client that leaves, at whatever stage, ends quietly, frees what it held and is counted."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from serving_export.server.conversation import ConversationEncoder

MESSAGES = [{"role": "user", "content": "Hello there, how are you? It rains a lot in November!"}]


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it never happened")


def assert_left_at(running: Any, stage: str, before: float) -> None:
    wait_until(lambda: running.metric(f'client_disconnects_total{{stage="{stage}"}}') == before + 1)
    running.wait_until_idle()
    running.engine.prefix_cache.evict(10**9)
    assert running.engine.cache.allocator.n_free == running.engine.cache.allocator.n_pages
    assert running.http.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 2}).status_code == 200


def n_left(running: Any, stage: str) -> float:
    return running.metric(f'client_disconnects_total{{stage="{stage}"}}')


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Any:
    """Nothing is logged by the end of a test."""
    with caplog.at_level(logging.WARNING):
        yield
    assert caplog.records == []


def test_while_the_body_is_read(running: Any) -> None:
    before, answered = n_left(running, "body"), running.metric('http_requests_total{status="499"}')
    running.send({"messages": MESSAGES}, n_bytes=20).close()
    assert_left_at(running, "body", before)
    assert running.metric('http_requests_total{status="499"}') == answered + 1


def test_while_it_is_encoded(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = n_left(running, "encode")
    started, released = threading.Event(), threading.Event()
    original = ConversationEncoder.encode_prompt

    def held(*arguments: Any) -> Any:
        started.set()
        released.wait(20)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ConversationEncoder, "encode_prompt", held)
        connection = running.send({"messages": MESSAGES, "temperature": 0})
        assert started.wait(20)
        connection.close()
        wait_until(lambda: n_left(running, "encode") == before + 1)
        released.set()
    assert_left_at(running, "encode", before)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stage", ["queue", "prefill"])
def test_while_it_waits(running: Any, monkeypatch: pytest.MonkeyPatch, stage: str, stream: bool) -> None:
    before = n_left(running, stage)
    engine = running.engine
    with monkeypatch.context() as patch:
        if stage == "queue":
            patch.setattr(engine.scheduler, "_admit", lambda: time.sleep(0.001))
        else:
            patch.setattr(engine.runner, "max_prefill_tokens", 0)
        connection = running.send({"messages": MESSAGES, "stream": stream})
        wait_until(lambda: bool(engine.n_waiting if stage == "queue" else engine.n_running))
        if stage == "prefill":
            assert running.metric("kv_cache_usage_perc") > 0
        connection.close()
        wait_until(lambda: n_left(running, stage) == before + 1)
        running.wait_until_idle()
    assert_left_at(running, stage, before)


@pytest.mark.parametrize("stream", [False, True])
def test_while_it_is_written(running: Any, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    before = n_left(running, "decode")
    first = running.tokenizer.end_id + 1
    with monkeypatch.context() as patch:
        # the reply never ends by itself before the client has gone
        patch.setattr("model.inference.runner.sample", lambda logits, *_: (logits[:, first:].argmax(-1) + first, None))
        connection = running.send({"messages": MESSAGES, "stream": stream, "n": 2, "max_tokens": 200})
        wait_until(lambda: any(g.n_generated > 3 for g in list(running.engine.scheduler.running)))
        connection.close()
        wait_until(lambda: not running.engine.n_running)
    assert_left_at(running, "decode", before)


def test_usage_is_of_running_requests_only(running: Any) -> None:
    running.wait_until_idle()
    running.engine.prefix_cache.evict(10**9)
    assert running.metric("kv_cache_reusable_perc") == 0
    running.http.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 2})
    running.wait_until_idle()
    assert running.engine.prefix_cache.n_pages > 0
    assert running.metric("kv_cache_usage_perc") == 0
    share = running.engine.prefix_cache.n_pages / running.engine.cache.allocator.n_pages
    assert running.metric("kv_cache_reusable_perc") == pytest.approx(share)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_reads_its_whole_answer_has_not_left(running: Any, stream: bool) -> None:
    before = running.metric("client_disconnects_total")
    for _ in range(2):  # the second is answered after the first has ended on the server too
        response = running.http.post(
            "/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 2, "stream": stream}
        )
        assert response.status_code == 200
    running.wait_until_idle()
    assert running.metric("client_disconnects_total") == before
