"""Order of admission, and steps whose cost does not depend on how many requests wait."""

from __future__ import annotations

import gc
import sys
from functools import partial
from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.inference.kv_cache import PagedKVCache
from model.inference.request import Request
from model.inference.runner import Runner
from model.inference.sampling import Sampling
from model.inference.scheduler import Scheduler, Step
from model.transformer import Transformer


def scheduler_of(n_pages: int = 40, n_rows: int = 2) -> tuple[Scheduler, list[Step]]:
    config = ModelConfig(vocab_size=31, d_model=8, n_layers=1, n_heads=1, d_head=8, d_ff=8, layers="G", max_length=64)
    model = Transformer(config, seed=1).eval()
    steps: list[Step] = []
    runner = Runner(model, PagedKVCache(config, n_pages, 4), n_rows, 64, wants_logprobs=False)
    return Scheduler(runner, 16, steps.append), steps


def request(length: int = 5, n_new: int = 4, after: Request | None = None, first: int = 1) -> Request:
    return Request([first, *range(2, length + 1)], Sampling(n_new, (), temperature=0), after=after)


def calls_of(step: Any) -> int:
    """Function calls of a step, of Python and of C."""
    n_calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal n_calls
        n_calls += event in ("call", "c_call")

    gc.collect()
    gc.disable()  # a collection calls back
    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(None)
        gc.enable()
    return n_calls


def test_a_step_does_not_look_at_the_requests_that_wait() -> None:
    found = []
    for n_waiting in (3, 3000):
        scheduler, _ = scheduler_of()
        for _ in range(2 + n_waiting):
            scheduler.add(request(n_new=30))
        for _ in range(3):
            scheduler.step()
        assert (len(scheduler.running), scheduler.n_waiting) == (2, n_waiting)
        last = scheduler.waiting[-1]
        found.append((calls_of(scheduler.step), calls_of(partial(scheduler.end, last, "cancelled"))))
    assert found[0] == found[1]


def test_requests_start_in_order_and_a_later_one_may_leave() -> None:
    scheduler, steps = scheduler_of()
    requests = [request(n_new=3, first=first) for first in range(1, 7)]
    for one in requests:
        scheduler.add(one)
    scheduler.step()
    scheduler.end(requests[4], "cancelled")
    while scheduler.has_work:
        scheduler.step()
    firsts = [step.request for step in steps if step.request.generated[:1] and step.token is not None]
    started = list(dict.fromkeys(firsts))
    assert started == [one for one in requests if one is not requests[4]]
    assert requests[4].has_ended and not requests[4].generated
    assert (scheduler.counters.finished, scheduler.counters.cancelled) == (5, 1)


@pytest.mark.parametrize("ends", [None, "cancelled", "error"])
def test_a_sample_waits_for_the_prompt_that_another_computes_unless_that_ends(ends: Any) -> None:
    scheduler, _ = scheduler_of()
    first = request(length=20)
    second = request(length=20, after=first)
    scheduler.prefill_tokens_per_step = scheduler.runner.max_prefill_tokens = 8
    scheduler.add(first)
    scheduler.add(second)
    scheduler.step()
    assert (first.row, second.row) == (0, None)
    if ends:
        scheduler.end(first, ends)
    while scheduler.has_work:
        scheduler.step()
    # of an unfinished prompt, the full pages that were computed; nothing of one that failed
    assert second.n_cached == {None: 16, "cancelled": 8, "error": 0}[ends]
    assert len(second.generated) == 4


def test_replies_of_a_row_given_away_are_not_the_old_ones() -> None:
    """A row's sampling state is the new request's, also where the old one was ended from outside."""
    scheduler, _ = scheduler_of(n_rows=1)
    hot = Request([1, 2, 3], Sampling(40, (), temperature=5.0, seed=1))
    cold = request(n_new=6)
    scheduler.add(hot)
    for _ in range(3):
        scheduler.step()
    scheduler.end(hot, "cancelled")
    scheduler.add(cold)
    while scheduler.has_work:
        scheduler.step()
    alone, _ = scheduler_of(n_rows=1)
    expected = request(n_new=6)
    alone.add(expected)
    while alone.has_work:
        alone.step()
    assert cold.generated == expected.generated
    assert torch.equal(scheduler.runner.rows.length_R, torch.zeros(1, dtype=torch.int32))


def test_the_page_tables_of_a_step_are_written_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, _ = scheduler_of(n_rows=4)
    calls: list[int] = []
    set_pages = scheduler.runner.set_pages

    def counted(places: Any, pages: Any) -> None:
        calls.append(len(places))
        set_pages(places, pages)

    monkeypatch.setattr(scheduler.runner, "set_pages", counted)
    for first in range(1, 5):
        scheduler.add(request(length=7, n_new=6, first=first))
    while scheduler.has_work:
        scheduler.step()
    # two pages of each prompt, and one for the tokens 9 to 12 of all
    assert [count for count in calls if count] == [8, 4]
