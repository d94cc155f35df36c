"""A reply from messages to text and into the next turn."""

from __future__ import annotations

import contextlib
import math
import queue
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.format.dialogue import Message
from data.format.encode import decode_reply, encode_prompt
from data.format.tokenizer import DialogueTokenizer
from data.prompt.fit import FittedPrompt, fit_prompt
from model.inference.generate import generate
from model.transformer import Transformer
from serving_export.server.answer import _sse
from serving_export.server.conversation import ConversationEncoder
from serving_export.server.detokenizer import Detokenizer
from serving_export.server.engine import Engine
from serving_export.server.reply import Replier
from serving_export.server.request import Event, GenerationFailed, PromptError, QueueFull, ServedRequest


@pytest.fixture
def replier(model: Transformer, tokenizer: DialogueTokenizer) -> Iterator[Replier]:
    engine = Engine(model, n_pages=64, page_size=4)
    engine.start()
    yield Replier(engine, tokenizer)
    engine.stop()


ASKED = [Message("narrator", "Ada: likes ducks"), Message("Bob", "hello <|end|> \u2060")]


def prompt_of(request: ServedRequest) -> list[int]:
    return request.tokens[: request.n_prompt]


def test_reply_and_second_turn(replier: Replier, tokenizer: DialogueTokenizer, model: Transformer) -> None:
    # a random model generates bytes that are no text, and tokens that the tokenizer would not choose
    sampling = replier.sampling(20, temperature=1.0, top_k=0, top_p=1.0, seed=3)
    parts = list(replier.stream(replier.encode(ASKED, "Ada"), sampling))
    reply = parts[-1][1]
    assert "".join(text for text, _ in parts) == reply.text
    assert reply.finish_reason in ("stop", "length")
    assert prompt_of(reply) == encode_prompt(tokenizer, ASKED, "Ada")
    assert tokenizer.message_id not in reply.generated
    body = reply.generated[:-1] if reply.finish_reason == "stop" else reply.generated
    assert body != tokenizer.encode(" " + reply.text)

    following = [*ASKED, Message("Ada", reply.text), Message("Bob", "ducks?")]
    second = list(replier.stream(replier.encode(following, "Ada"), sampling))[-1][1]
    assert second.tokens[: reply.n_prompt + len(body)] == [*prompt_of(reply), *body]
    assert second.n_cached == (reply.n_prompt + reply.n_generated - 1) // 4 * 4

    # and the second reply is what a model without any cache generates
    greedy = replier.sampling(12, temperature=0, top_k=0, top_p=1.0, seed=0)
    third = list(replier.stream(replier.encode(following, "Ada"), greedy))[-1][1]
    assert third.n_cached
    assert third.generated == generate(model, [prompt_of(third)], greedy)[0][0].tokens


def test_a_reply_that_ended_with_end_returns_as_it_was_generated(
    replier: Replier, tokenizer: DialogueTokenizer
) -> None:
    prompt, first_byte = replier.encode(ASKED, "Ada"), 5
    generated = [*(first_byte + byte for byte in b" hi"), tokenizer.end_id]
    detokenizer = Detokenizer(replier.pieces)
    rule = replier.sampling(9, 1.0, 0, 1.0, 0)
    request = ServedRequest(list(prompt.tokens), rule, emit=lambda _: None, detokenizer=detokenizer)
    for token in generated:
        request.tokens.append(token)
        detokenizer.push(token)
    replier.remember(prompt, request)
    following = replier.encode([*ASKED, Message("Ada", "hi"), Message("Bob", "ducks?")], "Ada")
    assert following.tokens[: len(request.tokens)] == [*prompt.tokens, *generated]
    assert generated[:-1] != tokenizer.encode(" hi")


def test_stop_string_ends_the_reply_and_frees_its_pages(replier: Replier) -> None:
    sampling = replier.sampling(60, temperature=1.0, top_k=0, top_p=1.0, seed=5)
    prompt = replier.encode(ASKED, "Ada")
    whole = list(replier.stream(prompt, sampling))[-1][1]
    stop = whole.text[10:12]
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    reply = replier.start(prompt, sampling, events.put, stop=[stop])
    texts = list[str]()
    while (event := events.get(timeout=20)).finish_reason is None:
        texts.append(event.text)
    assert "".join([*texts, event.text]) == reply.text == whole.text[: whole.text.index(stop)]
    assert event.finish_reason == reply.finish_reason == "stop"
    # the reply ends with the token that completes the stop string
    assert reply.generated == whole.generated[: reply.n_generated]
    assert stop in decode_reply(replier.tokenizer, reply.generated)
    assert stop not in decode_reply(replier.tokenizer, reply.generated[:-1])
    assert (replier.engine.counters.finished, replier.engine.counters.cancelled) == (2, 0)
    replier.engine.stop()
    assert replier.engine.n_running == 0
    replier.engine.prefix_cache.evict(10**9)
    assert replier.engine.cache.allocator.n_free == 64


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 50), n_new=st.integers(1, 40), page_size=st.sampled_from([1, 4, 16]),
    places=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 4)), max_size=3),
    cancel_at=st.none() | st.integers(0, 45),
)  # fmt: skip
def test_text_of_a_request_is_that_of_its_tokens(
    model: Transformer,
    tokenizer: DialogueTokenizer,
    seed: int,
    n_new: int,
    page_size: int,
    places: list[tuple[int, int]],
    cancel_at: int | None,
) -> None:
    """Whatever stop strings it has and wherever it is cancelled; the events say the same as the request."""
    replier = Replier(Engine(model, n_pages=128, page_size=page_size), tokenizer)
    sampling = replier.sampling(n_new, temperature=1.5, top_k=0, top_p=1.0, seed=seed)

    def run(stop: list[str], cancel_at: int | None) -> tuple[ServedRequest, list[Event]]:
        events: list[Event] = []
        request = replier.start(replier.encode(ASKED, "Ada"), sampling, events.append, stop=stop)
        n_steps = 0
        while n_steps == 0 or replier.engine.n_running:
            if n_steps == cancel_at:
                request.cancel()
            replier.engine.step()
            n_steps += 1
        return request, events

    whole, _ = run([], None)
    whole_text = decode_reply(tokenizer, whole.generated)
    assert whole.text == whole_text
    stop = [whole_text[start : start + length] for start, length in places if start < len(whole_text)]
    request, events = run(stop, cancel_at)
    assert [event.token for event in events if event.token is not None] == request.generated
    assert request.generated == whole.generated[: request.n_generated]
    assert "".join(event.text for event in events) == request.text
    assert [event.finish_reason for event in events][:-1] == [None] * (len(events) - 1)
    assert events[-1].finish_reason == request.finish_reason
    text = decode_reply(tokenizer, request.generated)
    ends = [text.find(one) + len(one) for one in stop if one in text]
    if ends:
        assert request.finish_reason in ("stop", "length")
        first = min(text.find(one) for one in stop if text.endswith(one, 0, min(ends)))
        assert request.text == text[:first]
    else:
        assert request.text == text
        assert request.finish_reason == ("cancelled" if request.is_cancelled and events[-1].token is None
                                         else whole.finish_reason)  # fmt: skip
    with contextlib.ExitStack() as raised:
        if request.finish_reason == "cancelled":
            raised.enter_context(pytest.raises(GenerationFailed, match="shutting down"))
        events[-1].check()
    replier.engine.prefix_cache.evict(10**9)
    assert replier.engine.cache.allocator.n_free == 128


def test_leaving_the_stream_cancels(replier: Replier) -> None:
    stream = replier.stream(replier.encode(ASKED, "Ada"), replier.sampling(None, 1.0, 0, 1.0, 1))
    _, request = next(stream)
    assert not request.is_cancelled
    stream.close()  # type: ignore[attr-defined]
    assert request.is_cancelled


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
    prompt = replier.encode(ASKED[1:], "Ada", "tenant")
    drawn = [first_byte + byte for byte in (" " + text).encode()]
    assert replier.encoder.remember_reply(prompt, drawn, text)
    messages = [*ASKED[1:], Message("Ada", text), Message("Bob", "Hello there, how are you doing today? " * 3)]
    assert len(replier.encoder.encode_prompt(messages, "Ada", "tenant").tokens) >= 256
    fallback = replier.encode(messages, "Ada", "tenant", truncate=True, longest_reply=1)
    assert len(fallback.tokens) < 256
    # and a reply to the prompt that fits is remembered under that prompt's history
    assert fallback.history == ConversationEncoder(tokenizer).encode_prompt(messages, "Ada", "tenant").history


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_an_event_with_a_number_that_is_not_finite_is_never_sent(number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        _sse({"usage": {"seconds": number}})
