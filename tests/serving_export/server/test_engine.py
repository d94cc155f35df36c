"""Whatever the concurrency, the chunks, the evictions and preemptions: every reply is the uncached greedy one."""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.attention_ops import Documents
from model.config import ModelConfig, TailSharing
from model.inference.request import Request
from model.inference.rows import Rows
from model.inference.runner import Draw, Draws, Runner
from model.inference.sampler import sample
from model.inference.sampling import Sampling
from model.transformer import Transformer
from serving_export.server import engine as engine_module
from serving_export.server.engine import Engine
from serving_export.server.request import Event, PromptError, QueueFull, ServedRequest

VOCAB = 41
STOP = 4


@functools.cache
def tiny() -> Transformer:
    config = ModelConfig(
        vocab_size=VOCAB, d_model=16, n_layers=4, n_heads=2, d_head=8, d_ff=16, layers="SG", window=5,
        kv_sharing=TailSharing(kind="tail", n_layers=2), max_length=48,
    )  # fmt: skip
    return Transformer(config, seed=5).eval()


@functools.cache
@torch.no_grad()
def uncached_greedy(prompt: tuple[int, ...], n_new: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + n_new and (len(tokens) == len(prompt) or tokens[-1] != STOP):
        hidden_TD = tiny()(torch.tensor(tokens), Documents.from_lengths([len(tokens)]))
        tokens.append(int(tiny().logits(hidden_TD[-1:]).argmax()))
    return tokens[len(prompt) :]


def greedy(n_new: int) -> Sampling:
    return Sampling(max_new_tokens=n_new, stop_ids=(STOP,), temperature=0)


class LaggingRunner(Runner):
    """The plain path as if on a GPU: the host reads late, and does not know which rows have stopped."""

    lag = 1

    def decode(self, rows: Sequence[int], longest: int) -> Draws:
        active = [row for row in rows if self.rows.length_R[row] > 0]
        drawn = {draw.row: draw for draw in super().decode(active, longest).read()} if active else {}
        return _Late([drawn.get(row, Draw(row, 7, 0, None)) for row in rows])


@dataclass
class _Late:
    draws: list[Draw]

    def read(self) -> list[Draw]:
        return self.draws


def lagging(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next engine run on a LaggingRunner."""
    monkeypatch.setattr(
        engine_module, "open_runner", lambda model, cache, n_rows, max_length, **_: LaggingRunner(
            model, cache, n_rows, max_length, wants_logprobs=False
        )
    )  # fmt: skip


class Listener:
    """Collects the events of one request."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        assert not self.events or self.events[-1].finish_reason is None, "an event after the last"
        self.events.append(event)

    @property
    def tokens(self) -> list[int]:
        return [event.token for event in self.events if event.token is not None]


def finish(engine: Engine) -> None:
    for _ in range(3000):
        if not engine.step():
            return
    raise AssertionError("the engine makes no progress")


def assert_only_the_cache_holds_pages(engine: Engine) -> None:
    allocator = engine.cache.allocator
    assert allocator.n_free + engine.prefix_cache.n_pages == allocator.n_pages
    engine.prefix_cache.evict(10**9)
    assert allocator.n_free == allocator.n_pages


def poisoned(engine: Engine) -> Engine:
    for pool in (*engine.cache.k_SGK.values(), *engine.cache.v_SGK.values()):
        pool.fill_(float("nan"))
    return engine


def test_a_reply_may_end_with_its_first_token() -> None:
    prompt = (2, 7, 8, 9)
    first = uncached_greedy(prompt, 1)[0]
    engine, listener = Engine(tiny(), 20, 4), Listener()
    engine.submit(prompt, Sampling(max_new_tokens=5, stop_ids=(first,), temperature=0), listener)
    finish(engine)
    assert [(event.token, event.finish_reason) for event in listener.events] == [(first, "stop")]


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_replies_equal_uncached_greedy(data: st.DataObject) -> None:
    page_size = data.draw(st.sampled_from([1, 3, 4]), "page_size")
    n_tokens = data.draw(st.sampled_from([24, 48, 96, 400]), "cache tokens")  # 24: hardly one request at a time
    chunk = data.draw(st.sampled_from([1, 3, 7, 64]), "prefill chunk")
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans(), "reads late"):
            lagging(patch)
        pages = n_tokens // page_size
        engine = poisoned(Engine(tiny(), pages, page_size, max_running=5, prefill_tokens_per_step=chunk))
    engine.runner.max_prefill_tokens = chunk
    stems = [[2, 7, 8, 9, 10, 11, 12], [2, 7, 8, 9, 5]]
    jobs: list[tuple[tuple[int, ...], int, Listener]] = []
    for _ in range(data.draw(st.integers(1, 7), "requests")):
        tail = data.draw(st.lists(st.integers(5, 8), min_size=1, max_size=9))
        prompt = tuple(data.draw(st.sampled_from(stems)) + tail)
        n_new = min(data.draw(st.integers(1, 10)), engine.max_length - len(prompt))
        listener = Listener()
        engine.submit(prompt, greedy(n_new), listener, salt=data.draw(st.sampled_from([None, "a"])))
        jobs.append((prompt, n_new, listener))
        for _ in range(data.draw(st.integers(0, 3), "steps between")):
            engine.step()
    finish(engine)
    for prompt, n_new, listener in jobs:
        expected = uncached_greedy(prompt, n_new)
        assert listener.tokens == expected
        assert listener.events[-1].finish_reason == ("stop" if expected[-1] == STOP else "length")
    assert_only_the_cache_holds_pages(engine)


@pytest.mark.parametrize("late", [False, True])
def test_pressure_preempts_and_evicts(monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    if late:
        lagging(monkeypatch)
    engine = poisoned(Engine(tiny(), n_pages=10, page_size=4))
    scheduler, preempt = engine.scheduler, engine.scheduler._preempt

    def checked(request: Request) -> None:
        assert requests.index(request) == max(map(requests.index, scheduler.running)), "not the youngest"
        preempt(request)
        assert request is scheduler.waiting[0], "not the first to be admitted again"

    monkeypatch.setattr(scheduler, "_preempt", checked)
    listeners = [Listener() for _ in range(6)]
    prompts = [(2, *range(5 + i, 15 + i)) for i in range(6)]
    rule = Sampling(max_new_tokens=20, stop_ids=(), temperature=0)
    requests: list[Request] = [
        engine.submit(prompt, rule, listener) for prompt, listener in zip(prompts, listeners, strict=True)
    ]
    finish(engine)
    assert engine.counters.preemptions > 0
    assert engine.prefix_cache.counters.evicted_pages > 0
    # a preempted request is looked up once, and what it drew before is not emitted again
    assert [len(listener.tokens) for listener in listeners] == [20] * 6
    assert engine.counters.prompt_tokens == sum(map(len, prompts))
    assert_only_the_cache_holds_pages(engine)


def test_a_prompt_is_shared_while_its_reply_is_generated() -> None:
    engine = Engine(tiny(), n_pages=40, page_size=4)
    prompt = [2, *range(5, 14)]
    first = engine.submit(prompt, Sampling(20, (), temperature=0), Listener())
    engine.step()
    second = engine.submit(prompt, Sampling(3, (), temperature=0), Listener())
    engine.step()
    assert (first.n_cached, second.n_cached, first.finish_reason) == (0, 8, None)
    assert first.pages[:2] == second.pages[:2]
    finish(engine)
    assert second.generated == first.generated[:3]


def test_a_request_is_admitted_when_each_running_one_keeps_a_page_to_grow() -> None:
    engine = Engine(tiny(), n_pages=4, page_size=4)
    listeners = [Listener(), Listener()]
    prompts = [(2, *range(5 + i, 12 + i)) for i in range(2)]  # two pages each
    for prompt, listener in zip(prompts, listeners, strict=True):
        engine.submit(prompt, Sampling(4, (), temperature=0), listener)
    engine.step()
    assert (engine.n_running, engine.n_waiting) == (1, 1)
    finish(engine)
    assert [len(listener.tokens) for listener in listeners] == [4, 4]
    assert engine.counters.preemptions == 0


def test_a_request_whose_receiver_fails_is_cancelled() -> None:
    """As when the event loop of the client's connection is closed."""
    engine, beside = Engine(tiny(), n_pages=20, page_size=4), Listener()

    def closed(event: Event) -> None:
        raise RuntimeError("the event loop is closed")

    request = engine.submit([2, 7, 8], Sampling(20, (), temperature=0), closed)
    engine.submit([2, 5, 6], greedy(8), beside)
    finish(engine)
    assert (request.n_generated, request.finish_reason) == (2, "cancelled"), "ended by the second step"
    assert beside.tokens == uncached_greedy((2, 5, 6), 8)
    assert_only_the_cache_holds_pages(engine)


def test_a_step_prefills_at_most_its_budget_the_oldest_request_first(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny(), n_pages=40, page_size=4, prefill_tokens_per_step=6)
    engine.runner.max_prefill_tokens = 6
    planned: list[list[tuple[int, int]]] = []
    next_chunks = engine.scheduler._next_chunks

    def recorded() -> Any:
        chunks = next_chunks()
        planned.append([(requests.index(request), length) for request, length in chunks])
        return chunks

    monkeypatch.setattr(engine.scheduler, "_next_chunks", recorded)
    requests: list[Request] = [engine.submit([2, *range(5, 4 + length)], greedy(3), Listener()) for length in (5, 9, 3)]
    finish(engine)
    assert [chunks for chunks in planned if chunks] == [[(0, 5), (1, 1)], [(1, 6)], [(1, 2), (2, 3)]]


def test_a_prompt_waits_for_replies_but_not_for_an_idle_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny(), n_pages=40, page_size=4, prefill_tokens_per_step=6)
    lengths: list[int] = []
    prefill = engine.runner.prefill

    def recorded(chunks: Any) -> Any:
        lengths.append(sum(len(chunk.tokens) for chunk in chunks))
        return prefill(chunks)

    monkeypatch.setattr(engine.runner, "prefill", recorded)
    beside = engine.submit([2, *range(5, 20)], Sampling(30, (), temperature=0), Listener())
    engine.step()
    assert lengths == [16]
    engine.submit([2, *range(6, 25)], greedy(3), Listener())
    for _ in range(4):
        engine.step()
    assert lengths == [16, 6, 6, 6, 2]
    assert beside.n_generated == 2 + 4


def converse(engine: Engine, prompt: Sequence[int], n_new: int, salt: str | None = None) -> ServedRequest:
    request = engine.submit(prompt, Sampling(n_new, (), temperature=0), Listener(), salt)
    finish(engine)
    return request


def test_next_turn_reuses_prompt_and_reply() -> None:
    engine = poisoned(Engine(tiny(), n_pages=40, page_size=4))
    prompt = [2, *range(5, 14)]
    reply = converse(engine, prompt, 7).generated
    second = converse(engine, [*prompt, *reply, 5, 6], 3)
    # the last token drawn is never computed
    assert second.n_cached == (len(prompt) + len(reply) - 1) // 4 * 4 == 16
    counters = engine.prefix_cache.counters
    assert (counters.hit_tokens, counters.missed_tokens) == (16, 10 + 3)
    changed = [*prompt[:5], 30, *prompt[6:], *reply, 5, 6]
    assert converse(engine, changed, 3).n_cached == 4
    assert converse(engine, [*prompt, *reply, 5, 6], 3, salt="other").n_cached == 0


def test_sampled_reply_does_not_depend_on_company() -> None:
    def draw(company: int) -> list[int]:
        engine = Engine(tiny(), n_pages=12, page_size=4)
        listener = Listener()
        for i in range(company):
            engine.submit([2, 9, 9 + i], Sampling(12, (), temperature=1.5, seed=i), Listener())
        engine.submit([2, 5, 6, 7], Sampling(12, (STOP,), temperature=1.3, top_k=20, seed=11), listener)
        finish(engine)
        return listener.tokens

    assert draw(0) == draw(5)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 3, 6])
def test_cancelled_request_frees_its_pages(monkeypatch: pytest.MonkeyPatch, steps: int, late: bool) -> None:
    if late:
        lagging(monkeypatch)
    engine = Engine(tiny(), n_pages=8, page_size=4, prefill_tokens_per_step=3)
    listeners = [Listener(), Listener()]
    requests = [engine.submit([2, *range(5, 15)], greedy(20), listener) for listener in listeners]
    for _ in range(steps):
        engine.step()
    requests[0].cancel()
    requests[0].cancel()
    finish(engine)
    assert listeners[0].events[-1].finish_reason == "cancelled"
    assert listeners[1].tokens == uncached_greedy((2, *range(5, 15)), 20)
    assert engine.counters.cancelled == 1
    assert_only_the_cache_holds_pages(engine)


def test_failed_step_ends_its_requests_and_the_engine_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny(), n_pages=8, page_size=4)
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "extend", lambda *_: 1 / 0)
        engine.start()
        engine.submit([2, 5], greedy(3), events.put)
        assert events.get(timeout=20).finish_reason == "error"
    engine.submit([2, 5], greedy(3), events.put)
    assert [events.get(timeout=20).token for _ in range(3)] == uncached_greedy((2, 5), 3)
    engine.stop()
    assert_only_the_cache_holds_pages(engine)


@pytest.mark.parametrize("n_running", [0, 2])
def test_failed_scheduling_ends_the_running_requests_or_else_the_first_waiting_one(
    monkeypatch: pytest.MonkeyPatch, n_running: int
) -> None:
    """One request fails at a time, so that a request that cannot be scheduled does not block those behind it."""
    engine = Engine(tiny(), n_pages=30, page_size=4, max_running=2)
    events: list[queue.SimpleQueue[Event]] = [queue.SimpleQueue() for _ in range(4)]
    scheduler, failing = engine.scheduler, threading.Event()
    admit = scheduler._admit

    def scheduled() -> None:
        if n_running == 0 and requests[0] in scheduler.waiting:
            raise RuntimeError("cannot be scheduled")
        if n_running and engine.n_running == n_running and not failing.is_set():
            failing.set()
            raise RuntimeError("failed once")
        admit()

    monkeypatch.setattr(scheduler, "_admit", scheduled)
    requests = [engine.submit([2, 5 + number], greedy(8), events[number].put) for number in range(4)]
    failed = range(max(n_running, 1))
    engine.start()
    try:
        for number in range(4):
            last = events[number].get(timeout=20)
            tokens = [last.token]
            while last.finish_reason is None:
                last = events[number].get(timeout=20)
                tokens.append(last.token)
            if number in failed:
                assert (last.finish_reason, last.token) == ("error", None)
                assert "its log says why" in (last.error or "")
            else:
                assert tokens == uncached_greedy((2, 5 + number), 8)
    finally:
        engine.stop()
    assert engine.counters.failed == len(failed)
    assert_only_the_cache_holds_pages(engine)


@pytest.mark.parametrize("fails", ["not a number", "raises"])
def test_failed_row_ends_its_own_request(monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    bad_seed = 13

    def failing(logits_BV: torch.Tensor, rows: Rows, wants_logprobs: bool) -> Any:
        for row, (sampling, n_drawn) in enumerate(zip(rows.samplings, rows.n_drawn_R.tolist(), strict=True)):
            if sampling is not None and sampling.seed == bad_seed and n_drawn == 2:
                if fails == "raises":
                    raise RuntimeError("out of memory")
                logits_BV[row, 3] = torch.nan
        return sample(logits_BV, rows, wants_logprobs)

    monkeypatch.setattr("model.inference.runner.sample", failing)
    engine = poisoned(Engine(tiny(), n_pages=60, page_size=4))
    prompts = [(2, 5, 6, 7, 8 + i) for i in range(4)]
    listeners = [Listener() for _ in prompts]
    drawn = Listener()
    engine.submit([2, 9, 9], Sampling(9, (), temperature=1.5, seed=3), drawn)
    for i, (prompt, listener) in enumerate(zip(prompts, listeners)):
        rule = Sampling(9, (STOP,), temperature=0, seed=bad_seed if i == 1 else 0)
        engine.submit(prompt, rule, listener, salt="bad" if i == 1 else None)
    finish(engine)
    failed = listeners.pop(1)
    assert (failed.events[-1].finish_reason, failed.events[-1].token) == ("error", None)
    assert failed.events[-1].error
    assert len(failed.tokens) == 2
    assert [listener.tokens for listener in listeners] == [uncached_greedy(p, 9) for p in (prompts[0], *prompts[2:])]
    assert (engine.counters.failed, engine.counters.finished) == (1, 4)
    # what the failed request computed is not read by another
    assert engine.prefix_cache.match([*prompts[1], 5], "bad") == []
    monkeypatch.undo()
    alone = Engine(tiny(), n_pages=60, page_size=4)
    expected = Listener()
    alone.submit([2, 9, 9], Sampling(9, (), temperature=1.5, seed=3), expected)
    finish(alone)
    assert drawn.tokens == expected.tokens
    assert_only_the_cache_holds_pages(engine)


def test_many_threads_submit() -> None:
    engine = Engine(tiny(), n_pages=30, page_size=4)
    engine.start()
    replies: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        engine.submit([2, 5 + number, 7], greedy(8), events.put)
        tokens: list[int] = []
        while True:
            event = events.get(timeout=20)
            tokens += [] if event.token is None else [event.token]
            if event.finish_reason:
                break
        replies[number] = tokens

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.stop()
    assert replies == {number: uncached_greedy((2, 5 + number, 7), 8) for number in range(12)}


def test_stop_ends_what_is_left() -> None:
    engine = Engine(tiny(), n_pages=12, page_size=4, max_running=1)
    listeners = [Listener(), Listener(), Listener()]
    for listener in listeners:
        engine.submit([2, 5], greedy(30), listener)
    engine.step()
    engine.stop()
    assert [listener.events[-1].finish_reason for listener in listeners] == ["cancelled"] * 3
    assert_only_the_cache_holds_pages(engine)
    with pytest.raises(QueueFull, match="shutting down"):
        engine.submit([2, 5], greedy(3), Listener())


def test_refused_prompts() -> None:
    engine = Engine(tiny(), n_pages=5, page_size=4, max_waiting=1)
    assert engine.max_length == 20
    for prompt in ([], [2, VOCAB], [-1]):
        with pytest.raises(PromptError, match="from 0 to 40"):
            engine.submit(prompt, greedy(3), Listener())
    with pytest.raises(PromptError, match="has 20 tokens; at most 19"):
        engine.submit([2] * 20, greedy(3), Listener())
    with pytest.raises(PromptError, match="at least 1"):
        engine.submit([2], greedy(0), Listener())
    request = engine.submit([2] * 19, greedy(30), Listener())
    assert request.sampling.max_new_tokens == 1
    with pytest.raises(QueueFull, match="1 requests"):
        engine.submit([2], greedy(3), Listener())


def test_pages_that_two_requests_share_are_in_use_once() -> None:
    engine = Engine(tiny(), n_pages=32, page_size=4)
    prompt = list(range(5, 18))  # three full pages and one token
    engine.submit(prompt, greedy(1), Listener())
    finish(engine)
    assert engine.n_pages_in_use() == 0, "what only the prefix cache holds is not in use"
    for _ in range(2):
        engine.submit(prompt, Sampling(max_new_tokens=9, stop_ids=()), Listener())
    engine.step()
    assert engine.n_running == 2
    assert engine.n_pages_in_use() == 3 + 2
    finish(engine)
    assert engine.n_pages_in_use() == 0
