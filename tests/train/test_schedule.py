"""Schedules: warm-up reaches the peak, the end is where the recipe says, nothing leaves [0, 1]."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from train.schedule import WSD, Cosine


def test_wsd_warms_up_stays_and_decays() -> None:
    schedule = WSD(kind="wsd", warmup_steps=4, decay_fraction=0.5, final_fraction=0.1)
    values = [schedule.multiplier(step, 20) for step in range(21)]
    assert values[:4] == [0.25, 0.5, 0.75, 1.0]
    assert values[4:11] == [1.0] * 7
    assert values[15] == pytest.approx(0.55)
    assert values[20] == pytest.approx(0.1)


def test_cosine_ends_at_its_final_fraction() -> None:
    schedule = Cosine(kind="cosine", warmup_steps=2, final_fraction=0.1)
    assert schedule.multiplier(1, 10) == 1.0
    assert schedule.multiplier(6, 10) == pytest.approx(0.55)
    assert schedule.multiplier(10, 10) == pytest.approx(0.1)


@given(
    warmup=st.integers(0, 50),
    max_steps=st.integers(1, 100),
    final=st.floats(0, 1),
    decay=st.floats(0, 1),
    step=st.integers(0, 100),
)
def test_multipliers_stay_in_range(warmup: int, max_steps: int, final: float, decay: float, step: int) -> None:
    for schedule in (
        WSD(kind="wsd", warmup_steps=warmup, decay_fraction=decay, final_fraction=final),
        Cosine(kind="cosine", warmup_steps=warmup, final_fraction=final),
    ):
        assert 0 <= schedule.multiplier(step, max_steps) <= 1 + 1e-12


@given(warmup=st.integers(0, 50), max_steps=st.integers(1, 200), final=st.floats(0, 1), decay=st.floats(0, 1))
def test_up_then_down_and_to_the_peak_between(warmup: int, max_steps: int, final: float, decay: float) -> None:
    assume(warmup < max_steps)
    wsd = WSD(kind="wsd", warmup_steps=warmup, decay_fraction=decay, final_fraction=final)
    cosine = Cosine(kind="cosine", warmup_steps=warmup, final_fraction=final)
    for schedule in (wsd, cosine):
        values = [schedule.multiplier(step, max_steps) for step in range(max_steps + 1)]
        assert values[:warmup] == [(step + 1) / warmup for step in range(warmup)]  # the first step learns already
        after = values[warmup:]
        assert all(later <= earlier + 1e-12 for earlier, later in pairwise(after))
        assert all(value >= final - 1e-12 for value in after)
    assert cosine.multiplier(warmup, max_steps) == pytest.approx(1)
    assert cosine.multiplier(max_steps, max_steps) == pytest.approx(final)
    if decay * max_steps > 1e-6:
        assert wsd.multiplier(max_steps, max_steps) == pytest.approx(final)
    stays = range(warmup, int(max_steps - decay * max_steps) + 1)
    assert all(wsd.multiplier(step, max_steps) == pytest.approx(1) for step in stays)


@given(warmup=st.integers(1, 50), max_steps=st.integers(1, 200), final=st.floats(0, 1))
def test_the_last_step_of_a_warm_up_is_at_the_peak(warmup: int, max_steps: int, final: float) -> None:
    for schedule in (
        WSD(kind="wsd", warmup_steps=warmup, decay_fraction=0.0, final_fraction=final),
        Cosine(kind="cosine", warmup_steps=warmup, final_fraction=final),
    ):
        assert schedule.multiplier(warmup - 1, max_steps) == 1
        # beyond the end, a longer run's step: no further down
        assert schedule.multiplier(max_steps + warmup + 9, max_steps) <= 1


@pytest.mark.parametrize("max_steps", [1, 7, 10])
def test_without_decay_the_rate_stays(max_steps: int) -> None:
    schedule = WSD(kind="wsd", decay_fraction=0.0)
    assert [schedule.multiplier(step, max_steps) for step in range(max_steps + 1)] == [1.0] * (max_steps + 1)


@given(warmup=st.integers(0, 50), max_steps=st.integers(1, 200), more=st.integers(0, 200), decay=st.floats(0, 1))
def test_stable_steps_are_those_of_every_longer_run(warmup: int, max_steps: int, more: int, decay: float) -> None:
    schedule = WSD(kind="wsd", warmup_steps=warmup, decay_fraction=decay)
    n_stable = schedule.stable_steps(max_steps)
    assert 1 <= n_stable <= max_steps
    rates = [[schedule.multiplier(step, steps) for step in range(n_stable)] for steps in (max_steps, max_steps + more)]
    assert rates[0] == rates[1]
    assert Cosine(kind="cosine", warmup_steps=warmup).stable_steps(max_steps) == 0
