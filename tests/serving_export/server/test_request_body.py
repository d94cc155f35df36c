"""Bodies are bounded before they are parsed, prompts before they are encoded, and neither stops the event loop."""

from __future__ import annotations

import asyncio
import json
import pkgutil
import threading
import tracemalloc
from typing import Any

import httpx
import pytest
from starlette.requests import Request

from data.format.dialogue import Message
from data.format.encode import encode_prompt
from data.format.tokenizer import DialogueTokenizer
from model.transformer import Transformer
from serving_export.bundle import Bundle, SamplingDefaults
from serving_export.export.manifest import Defaults
from serving_export.server.__main__ import create_app
from serving_export.server.conversation import ConversationEncoder
from serving_export.server.engine import Engine
from serving_export.server.protocol import RequestError
from serving_export.server.reply import Replier
from serving_export.server.request import PromptError
from serving_export.server.request_body import MAX_BODY_BYTES, longest_body, parse_body, read_body

HELLO = [{"role": "user", "content": "Hello there"}]
PATH = "/v1/chat/completions"


def never(*_: Any) -> None:
    raise AssertionError("this should not have been reached")


@pytest.mark.parametrize(
    "slow",
    [
        "serving_export.server.request_body:parse_request",
        "serving_export.server.conversation:ConversationEncoder.encode_prompt",
    ],
)
def test_loop_turns_while_a_request_is_worked_on(
    model: Transformer, tokenizer: DialogueTokenizer, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    started, released = threading.Event(), threading.Event()
    in_time: list[bool] = []
    original = pkgutil.resolve_name(slow)

    def held(*arguments: Any) -> Any:
        started.set()
        in_time.append(released.wait(20))
        return original(*arguments)

    monkeypatch.setattr(slow.replace(":", "."), held)
    engine = Engine(model, n_pages=40)
    bundle = Bundle("m", model, tokenizer, Defaults("Bob", "Ada", 256), SamplingDefaults(1.0, 0, 1.0))

    async def serve() -> None:
        n_turns = 0

        async def count_turns() -> None:
            nonlocal n_turns
            while True:
                n_turns += 1
                await asyncio.sleep(0)

        app = create_app(bundle, engine)
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                counting = asyncio.create_task(count_turns())
                answer = asyncio.create_task(client.post(PATH, json={"messages": HELLO, "max_tokens": 3}))
                assert await asyncio.to_thread(started.wait, 20)
                before = n_turns
                for _ in range(10):
                    assert (await client.get("/health")).status_code == 200
                    await asyncio.sleep(0)
                assert n_turns >= before + 10
                released.set()
                assert (await answer).status_code == 200
                counting.cancel()

    asyncio.run(serve())
    assert in_time == [True]


MANY = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([{"role": "user", "content": "ducks " * 2_600_000}], "at most 524,288 are accepted"),
        (MANY * 500_000, "at most 524,288 are accepted"),
    ],
)
def test_oversized_body_is_refused_unparsed(
    running: Any, monkeypatch: pytest.MonkeyPatch, messages: list[dict[str, str]], says: str
) -> None:
    monkeypatch.setattr("serving_export.server.__main__.parse_body", never)
    response = running.http.post(PATH, json={"messages": messages})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, "messages", "context_length_exceeded")
    assert says in error["message"]


def test_body_beyond_the_hard_limit_is_not_read(running: Any) -> None:
    with running.send({"messages": MANY * 600_000}, n_bytes=10) as connection:
        assert b" 413 " in connection.recv(100)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([{"role": "user", "content": "ducks " * 80_000}], "at least"),
        (MANY * 9_000, "at least 36,003 tokens; at most 255"),
        ([{**MANY[0], "name": "duck" * 100_000}], "at least"),
        (MANY * 12_000, "12,000 messages; at most 10,000"),
    ],
)
def test_long_prompt_is_refused_unencoded(
    running: Any, monkeypatch: pytest.MonkeyPatch, messages: list[dict[str, str]], says: str
) -> None:
    monkeypatch.setattr(ConversationEncoder, "encode_prompt", never)
    response = running.http.post(PATH, json={"messages": messages})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, "messages", "context_length_exceeded")
    assert says in error["message"]


@pytest.mark.parametrize("text", ["", " ", "<|end|>", "Hello there, how are you doing today?", "ß\u2060" * 9, "a" * 70])
@pytest.mark.parametrize("n_messages", [0, 1, 3])
def test_fewest_tokens_is_a_lower_bound(tokenizer: DialogueTokenizer, text: str, n_messages: int) -> None:
    name = text.replace(":", "").strip() or "B"
    messages = [Message(name, text)] * n_messages
    fewest = ConversationEncoder(tokenizer).fewest_tokens(messages, name)
    assert 3 + 4 * n_messages <= fewest <= len(encode_prompt(tokenizer, messages, name))


def test_terminal_has_the_same_bound(
    model: Transformer, tokenizer: DialogueTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ConversationEncoder, "encode_prompt", never)
    with pytest.raises(PromptError, match="at most 255 leave room"):
        Replier(Engine(model, n_pages=40), tokenizer).encode([Message("Bob", "ducks " * 10_000)], "Ada")


def test_reading_ends_at_the_hard_limit_where_no_length_is_announced() -> None:
    n_read = 0

    async def receive() -> dict[str, Any]:
        nonlocal n_read
        n_read += 1
        assert n_read <= MAX_BODY_BYTES // 2**20 + 1, "read beyond the limit"
        return {"type": "http.request", "body": b" " * 2**20, "more_body": True}

    with pytest.raises(RequestError, match="longer than") as refused:
        asyncio.run(read_body(Request({"type": "http", "method": "POST", "headers": []}, receive), 1024))
    assert refused.value.status == 413


def test_a_body_beyond_the_limit_is_not_kept() -> None:
    """Not even its beginning: while the rest is read, only the latest chunk is in memory."""
    limit, in_memory = longest_body(1), list[int]()

    async def receive() -> dict[str, Any]:
        in_memory.append(tracemalloc.get_traced_memory()[0])
        return {"type": "http.request", "body": bytes(limit - 1), "more_body": len(in_memory) < 20}

    tracemalloc.start()
    try:
        with pytest.raises(RequestError, match="at most 524,288 are accepted"):
            asyncio.run(read_body(Request({"type": "http", "method": "POST", "headers": []}, receive), 1))
    finally:
        tracemalloc.stop()
    assert len(in_memory) == 20
    assert max(in_memory[2:]) < 1.5 * limit


def test_limits_grow_with_the_model() -> None:
    assert longest_body(1) == longest_body(256) < longest_body(32_768) < longest_body(10**9) == MAX_BODY_BYTES


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "1" * 5000, "-" + "9" * 400])
@pytest.mark.parametrize(
    "field",
    ["temperature", "top_p", "top_k", "seed", "max_tokens", "max_completion_tokens", "n", "frequency_penalty",
     "presence_penalty", "logit_bias", "top_logprobs", "metadata", "user", "stop", "character", "stream"],
)  # fmt: skip
def test_numbers_that_are_none_are_refused_by_name(field: str, value: str) -> None:
    body = f'{{"messages": {json.dumps(HELLO)}, "{field}": {value}}}'
    with pytest.raises(RequestError, match=f"^{field}: ") as caught:
        parse_body(body.encode())
    assert (caught.value.param, caught.value.status) == (field, 400)


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", v) for v in ("0", "-0.0", "5e-324", "1e-400", "1e-40", "2", "2.0")]
    + [("top_p", v) for v in ("5e-324", "1e-40", "1", "1.0")]
    + [("top_k", v) for v in ("0", "-1", "1", "9" * 400)]
    + [("max_tokens", "9" * 400), ("seed", "-9223372036854775808"), ("metadata", '{"a": "b"}')],
)
def test_extreme_values_are_answered(running: Any, field: str, value: str) -> None:
    body = f'{{"messages": {json.dumps(HELLO)}, "n": 2, "max_completion_tokens": 4, "{field}": {value}}}'
    if field == "max_tokens":
        body = body.replace('"max_completion_tokens": 4, ', "")
    response = running.http.post(PATH, content=body)
    assert response.status_code == 200, response.text
    assert len(response.json()["choices"]) == 2
