"""A reply from messages to text and into the next turn."""

from __future__ import annotations

import math
import queue
from collections.abc import Iterator

import pytest

from data.format.dialogue import Message
from data.format.encode import encode_prompt
from data.format.tokenizer import DialogueTokenizer
from data.prompt.fit import FittedPrompt, fit_prompt
from model.inference.generate import generate
from model.transformer import Transformer
from serving_export.server.answer import _sse
from serving_export.server.engine import Engine, Event, PromptError, QueueFull
from serving_export.server.reply import GenerationFailed, Replier


@pytest.fixture
def replier(model: Transformer, tokenizer: DialogueTokenizer) -> Iterator[Replier]:
    engine = Engine(model, n_pages=64, page_size=4)
    engine.start()
    yield Replier(engine, tokenizer)
    engine.stop()


ASKED = [Message("narrator", "Ada: likes ducks"), Message("Bob", "hello <|end|> \u2060")]


def test_reply_and_second_turn(replier: Replier, tokenizer: DialogueTokenizer, model: Transformer) -> None:
    # a random model draws rubble: bytes that are no text, pieces the tokenizer would not choose
    sampling = replier.sampling(20, temperature=1.0, top_k=0, top_p=1.0, seed=3)
    parts = list(replier.stream(replier.encode(ASKED, "Ada"), sampling))
    reply = parts[-1][1]
    assert "".join(text for text, _ in parts) == reply.text
    assert reply.finish_reason in ("stop", "length")
    assert reply.prompt == encode_prompt(tokenizer, ASKED, "Ada")
    assert tokenizer.message_id not in reply.drawn
    body = reply.drawn[:-1] if reply.finish_reason == "stop" else reply.drawn
    assert body != tokenizer.encode(" " + reply.text)

    following = [*ASKED, Message("Ada", reply.text), Message("Bob", "ducks?")]
    second = list(replier.stream(replier.encode(following, "Ada"), sampling))[-1][1]
    assert second.prompt[: len(reply.prompt) + len(body)] == [*reply.prompt, *body]
    assert second.n_cached == (len(reply.prompt) + len(reply.drawn) - 1) // 4 * 4

    # and the second reply is what a model without any cache draws
    greedy = replier.sampling(12, temperature=0, top_k=0, top_p=1.0, seed=0)
    third = list(replier.stream(replier.encode(following, "Ada"), greedy))[-1][1]
    assert third.n_cached > 0
    assert third.drawn == generate(model, [third.prompt], greedy)[0][0].tokens


def test_stop_string_ends_the_reply_and_frees_its_pages(replier: Replier) -> None:
    sampling = replier.sampling(60, temperature=1.0, top_k=0, top_p=1.0, seed=5)
    whole = list(replier.stream(replier.encode(ASKED, "Ada"), sampling))[-1][1]
    stop = whole.text[10:12]
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    reply = replier.start(whole.prompt, sampling, events.put, stop=[stop])
    while reply.finish_reason is None:
        reply.take(events.get(timeout=20))
    assert reply.text == whole.text[: whole.text.index(stop)]
    assert reply.finish_reason == "stop"
    replier.engine.stop()
    assert replier.engine.n_running == 0
    replier.engine.prefix_cache.clear()
    assert replier.engine.cache.allocator.n_free == 64


def test_leaving_the_stream_cancels(replier: Replier) -> None:
    for _ in replier.stream(replier.encode(ASKED, "Ada"), replier.sampling(None, 1.0, 0, 1.0, 1)):
        break
    replier.engine.stop()
    assert replier.engine.counters.cancelled == 1


def test_failure_is_raised(replier: Replier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replier.engine.model, "extend", lambda *_: 1 / 0)
    with pytest.raises(GenerationFailed, match="engine failed"):
        list(replier.stream(replier.encode(ASKED, "Ada"), replier.sampling(5, 0, 0, 1.0, 0)))


def test_shutdown_is_said(replier: Replier) -> None:
    stream = replier.stream(replier.encode(ASKED, "Ada"), replier.sampling(None, 1.0, 0, 1.0, 1))
    next(stream)
    replier.engine.refuse_all()
    with pytest.raises(GenerationFailed, match="shutting down") as caught:
        list(stream)
    assert caught.value.by_shutdown
    with pytest.raises(QueueFull, match="shutting down"):
        next(replier.stream(replier.encode(ASKED, "Ada"), replier.sampling(5, 1.0, 0, 1.0, 1)))


def test_truncation_is_the_rule_of_all_prompts(replier: Replier, tokenizer: DialogueTokenizer) -> None:
    talk = [Message("Bob" if i % 2 else "Ada", f"It rains a lot {i}!") for i in range(60)]
    for messages in (talk[-1:], ASKED, [ASKED[0], *talk], talk):
        for longest_reply, reserved in ((None, 64), (9, 9), (10**9, 128)):
            prompt = replier.encode(messages, "Ada", truncate=True, longest_reply=longest_reply)
            expected = fit_prompt(tokenizer, messages, "Ada", 256, reserved)
            assert isinstance(expected, FittedPrompt)
            assert (prompt.tokens, prompt.n_left_out) == (expected.tokens, expected.n_cut)
            assert prompt.n_left_out == 0 or len(messages) > 50
    with pytest.raises(PromptError, match="the conversation has"):
        replier.encode(talk, "Ada")
    for messages in ([Message("Bob", "ducks " * 200)], [Message("narrator", "ducks " * 200), *talk]):
        with pytest.raises(PromptError, match="too long: of 256 tokens 64 are for the reply"):
            replier.encode(messages, "Ada", truncate=True)


def test_reply_drawn_in_many_pieces_still_fits(replier: Replier, tokenizer: DialogueTokenizer) -> None:
    first_byte, text = 5, "Hello there, how are you doing today? " * 5
    prompt = replier.encode(ASKED[1:], "Ada")
    drawn = [first_byte + byte for byte in (" " + text).encode()]
    assert replier.encoder.remember_reply(prompt.tokens, drawn, text)
    messages = [*ASKED[1:], Message("Ada", text), Message("Bob", "Hello there, how are you doing today? " * 3)]
    assert len(replier.encoder.encode_prompt(messages, "Ada")) >= 256
    assert len(replier.encode(messages, "Ada", truncate=True, longest_reply=1).tokens) < 256


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_an_event_with_a_number_that_is_not_finite_is_never_sent(number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        _sse({"usage": {"seconds": number}})
