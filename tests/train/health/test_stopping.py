"""Signals set a flag where the loop polls it, and raise where it does not and on a second Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from train.health.stopping import StopRequest

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    before = [signal.getsignal(number) for number in HANDLED]
    yield StopRequest()
    for number, handler in zip(HANDLED, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", HANDLED)
def test_where_nobody_polls_a_signal_raises(stop: StopRequest, number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    assert stop.requested()
    assert stop.by_keyboard == (number == signal.SIGINT)


@pytest.mark.parametrize("number", HANDLED)
def test_where_the_loop_polls_a_signal_is_a_request(stop: StopRequest, number: signal.Signals) -> None:
    with stop.polled():
        assert not stop.requested()
        signal.raise_signal(number)
        assert stop.requested()
        assert stop.by_keyboard == (number == signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # again, by a scheduler that repeats it
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


def test_after_the_end_only_ctrl_c_ends_the_process(stop: StopRequest) -> None:
    stop.end()
    assert [signal.getsignal(number) for number in HANDLED] == [signal.SIG_IGN, signal.SIG_DFL, signal.SIG_IGN]
