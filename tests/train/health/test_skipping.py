"""Spikes are told from the steps before them, the same after a resume as without; too many skipped steps end a run."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.deepspeed.world import World
from train.health.skipping import NO_TARGET, RecentSteps, SkippedSteps, SkipSpikes, TrainingError

ALONE = World(0, 1, torch.device("cpu"))


def accepts(recent: RecentSteps, loss: float, gradient_norm: float) -> bool:
    accept = recent.check(lambda: {"loss": loss})
    assert accept is not None
    return accept(gradient_norm)


def after(values: list[float], settings: SkipSpikes) -> RecentSteps:
    recent = RecentSteps(settings, ALONE)
    for value in values:
        assert accepts(recent, value, 2 * value)
    return recent


def test_without_the_option_there_is_nothing_to_ask() -> None:
    recent = RecentSteps(None, ALONE)
    assert recent.check(dict) is None
    assert recent.state() is None


def test_a_window_that_is_not_half_full_refuses_nothing() -> None:
    settings = SkipSpikes(sigma=6.0, window=8)
    assert accepts(after([1.0, 1.1, 0.9], settings), 1e9, 1e9)
    assert not accepts(after([1.0, 1.1, 0.9, 1.0], settings), 1e9, 1.0)


@pytest.mark.parametrize("which", ["loss", "gradient_norm"])
def test_the_bound_is_sigma_deviations_above_the_last_accepted_steps(which: str) -> None:
    settings = SkipSpikes(sigma=3.0, window=6)
    values = [9.0, 5.0, 4.0, 1.0, 1.2, 0.9, 1.1, 1.0, 0.8]
    counted = values[-6:] if which == "loss" else [2 * value for value in values[-6:]]
    bound = mean(counted) + 3.0 * stdev(counted)

    def checked(value: float) -> tuple[bool, str | None]:
        recent = RecentSteps(settings, ALONE, {"loss": values[-6:], "gradient_norm": [2 * v for v in values[-6:]]})
        taken = accepts(recent, value, 2.0) if which == "loss" else accepts(recent, 1.0, value)
        return taken, recent.refusal

    assert checked(bound * 0.999) == (True, None)
    taken, refusal = checked(bound * 1.001)
    assert not taken
    assert refusal is not None and refusal.startswith(which) and "3.0 standard deviations above the mean" in refusal
    assert checked(0.0) == (True, None), "only what lies above is a spike"


def test_a_spike_does_not_widen_the_bounds_and_an_accepted_step_moves_the_window() -> None:
    recent = after([1.0, 1.1, 0.9, 1.0], SkipSpikes(sigma=6.0, window=4))
    before = recent.state()
    assert not accepts(recent, 50.0, 2.0)
    assert recent.state() == before
    assert accepts(recent, 1.2, 2.0)
    assert recent.refusal is None
    assert recent.state() == {"loss": [1.1, 0.9, 1.0, 1.2], "gradient_norm": [2.2, 1.8, 2.0, 2.0]}


@given(st.lists(st.floats(0.01, 10.0), min_size=2, max_size=40), st.integers(0, 39), st.floats(0.5, 3.0))
def test_a_resumed_window_judges_as_if_nothing_had_happened(values: list[float], at: int, sigma: float) -> None:
    settings = SkipSpikes(sigma=sigma, window=6)
    whole = RecentSteps(settings, ALONE)
    expected = [accepts(whole, value, value / 3) for value in values]
    recent, found = RecentSteps(settings, ALONE), []
    for number, value in enumerate(values):
        if number == at:
            recent = RecentSteps(settings, ALONE, json.loads(json.dumps(recent.state())))
        found.append(accepts(recent, value, value / 3))
    assert found == expected
    assert recent.state() == whole.state()


@pytest.mark.parametrize("settings", [None, SkipSpikes(sigma=6.0, window=4)])
def test_a_step_without_targets_is_not_taken_and_enters_no_window(settings: SkipSpikes | None, tmp_path: Path) -> None:
    recent = RecentSteps(settings, ALONE)
    before = recent.state()
    accepts = recent.check(lambda: {"loss": 0.0}, n_targets=0)
    assert accepts is not None and not accepts(0.0)
    assert recent.refusal == NO_TARGET and recent.state() == before
    skipped = SkippedSteps(most_in_a_row=0, run_dir=tmp_path, world=ALONE, total=0)
    assert skipped.note(False, recent.refusal) == NO_TARGET
    with pytest.raises(TrainingError, match=r"1 had no target token in any row.*rows_per_step"):
        skipped.give_up(1, np.array([1]))
    recent.check(lambda: {"loss": 1.0}, n_targets=3)
    assert recent.refusal is None


def test_all_ranks_skip_what_one_of_them_rejects() -> None:
    """Ranks' values may differ in the last bits, so that one alone finds a spike."""
    other: Any = SimpleNamespace(sum=lambda values: [value + 1.0 for value in values])
    recent = RecentSteps(SkipSpikes(sigma=6.0, window=4), other)
    before = recent.state()
    assert not accepts(recent, 1.0, 1.0)
    assert recent.refusal == "rejected by another rank"
    assert recent.state() == before


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    before = SkippedSteps(most_in_a_row=2, run_dir=tmp_path, world=ALONE, total=0)
    for _ in range(2):
        before.note(False, None)
    after = SkippedSteps(2, tmp_path, ALONE, before.total, before.in_a_row)
    assert not after.too_many
    after.note(False, "loss 9 is high")
    assert after.too_many
    assert (after.total, len(after.in_a_row)) == (3, 3)


def test_too_many_in_a_row_end_the_training_and_say_which_kind(tmp_path: Path) -> None:
    skipped = SkippedSteps(most_in_a_row=2, run_dir=tmp_path, world=ALONE, total=5)
    for refusal in (None, "loss 9 is high", None):
        skipped.note(False, refusal)
    assert skipped.too_many
    skipped.note(True, None)
    assert not skipped.too_many
    skipped.note(False, None)
    assert skipped.note(False, "loss 8 is high") == "loss 8 is high"
    assert not skipped.too_many
    skipped.note(False, "loss 9 is high")
    assert skipped.too_many
    assert skipped.total == 11
    with pytest.raises(TrainingError, match="1 had a non-finite loss or gradient and 2 had a spike") as error:
        skipped.give_up(40, np.array([3, 1, 2]))
    assert "step 40 (loss 9 is high)" in str(error.value)
    assert "loop.skip_spikes.sigma" in str(error.value)
    assert json.loads((tmp_path / "bad_step.json").read_text()) == {
        "step": 40,
        "rows": [3, 1, 2],
        "reason": "loss 9 is high",
    }
