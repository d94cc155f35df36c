"""Schedules: warm-up reaches the peak, the end is where the recipe says, nothing leaves [0, 1]."""

from __future__ import annotations

import pytest
from hypothesis import given
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
