"""What the loop reads: the rows of a step, whatever the ranks and micro-batches, and however often it was stopped."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.packed.sampler import RowOrder
from model.config import ModelConfig
from train.checkpoint.best import BestWeights
from train.deepspeed.world import World
from train.loop import LoopConfig, Loss, StepReader, TrainingStage, accumulate, train
from train.schedule import WSD
from train.stage import share_of_rank
from train.throughput import Throughput


class Numbered(NamedTuple):
    """Rows that are nothing but numbers."""

    n_rows: int
    row_length: int = 16
    fingerprint: str = "f"


class Batch(NamedTuple):
    tokens_T: Any


def readers(n_rows: int, world_size: int, micro_batch: int, rows_per_step: int, seed: int) -> list[StepReader]:
    """The readers of all ranks of a run that has just started, or started again."""
    stage = TrainingStage(Numbered(n_rows), Batch, lambda batch: len(batch.tokens_T), lambda engine: {})
    config = LoopConfig(
        max_steps=99, rows_per_step=rows_per_step, rows_per_micro_batch=micro_batch, evaluate_every=99, save_every=None
    )
    worlds = [World(rank, world_size, torch.device("cpu")) for rank in range(world_size)]
    return [StepReader(stage, config, seed, world) for world in worlds]


@settings(max_examples=40, deadline=None)
@given(
    n_rows=st.integers(1, 60),
    runs=st.lists(st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 4]), st.integers(0, 4)), max_size=4),
    seed=st.integers(0, 9),
)
def test_every_run_reads_on_where_the_last_one_stopped(
    n_rows: int, runs: list[tuple[int, int, int]], seed: int
) -> None:
    """Runs of (ranks, rows a micro-batch, steps), one after the other; an epoch may end anywhere in a step."""
    rows_per_step, step, consumed = 24, 0, [np.zeros(0, np.int64)]
    for world_size, micro_batch, n_steps in runs:
        ranks = readers(n_rows, world_size, micro_batch, rows_per_step, seed)
        for _ in range(n_steps):
            of_ranks = [reader.read(step).result() for reader in ranks]
            micro_steps = zip(*(batches for _, batches in of_ranks), strict=True)
            consumed += [batch.tokens_T for micro_step in micro_steps for batch in micro_step]
            for rows, _ in of_ranks:  # what a failed step is reported with
                assert np.array_equal(rows, RowOrder(n_rows, seed).rows(step * rows_per_step, rows_per_step))
            step += 1
    assert np.array_equal(np.concatenate(consumed), RowOrder(n_rows, seed).rows(0, step * rows_per_step))


def accumulated(totals: list[float], count: float) -> tuple[list[float], dict[str, float]]:
    """What each micro-batch's loss is multiplied by, and the means."""
    factors: list[float] = []
    engine: Any = SimpleNamespace(
        world=World(0, 1, torch.device("cpu")),
        forward=lambda batch: Loss(torch.tensor(batch), {"margin": torch.tensor(2 * batch)}),
        accumulate=lambda loss: factors.append(float(loss)),
    )
    means = accumulate(engine, totals, count)
    return factors, means()


def test_each_micro_batch_adds_its_share_of_the_mean() -> None:
    factors, means = accumulated([6.0, 2.0], 4)
    assert factors == [1.5, 0.5]
    assert means == {"loss": 2.0, "margin": 4.0}


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_loss_that_is_not_finite_gives_a_gradient_that_is_not(bad: float) -> None:
    """From that micro-batch on: the gradient of an infinite loss may be finite."""
    factors, means = accumulated([6.0, bad, 2.0], 4)
    assert factors[0] == 1.5 and np.isnan(factors[1:]).all()
    assert not np.isfinite(means["loss"])


class Doubling(World):
    """Rank 0 of two ranks whose values are equal."""

    def sum(self, values: list[float]) -> list[float]:
        return [2 * value for value in values]

    def sum_later(self, values: dict[str, torch.Tensor]) -> Any:
        return lambda: {name: 2 * float(value) for name, value in values.items()}


def test_logged_speed_is_of_all_ranks_and_without_evaluations_and_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, world = SimpleNamespace(seconds=0.0), Doubling(0, 2, torch.device("cpu"))

    def takes(seconds: float, result: Any = None) -> Any:
        def action(*given: Any) -> Any:
            clock.seconds += seconds
            return result

        return action

    for module in ("loop", "throughput"):
        monkeypatch.setattr(f"train.{module}.time", SimpleNamespace(perf_counter=lambda: clock.seconds))
    monkeypatch.setattr("train.throughput.peak_flops", lambda device: 1e9)
    config = ModelConfig(vocab_size=9, d_model=8, n_layers=1, n_heads=1, d_head=8, d_ff=8, layers="G", max_length=16)
    batch = SimpleNamespace(tokens_T=torch.zeros(16), sequence_lengths=[9, 4])
    loss = Loss(torch.tensor(3.0))
    lines: list[tuple[int, dict[str, float]]] = []
    stage = TrainingStage(Numbered(8), lambda rows: batch, lambda batch: 13, takes(100, {"heldout_loss": 2.0}))
    engine = SimpleNamespace(world=world, forward=lambda batch: loss, accumulate=takes(1), peak_lr=1e-3)
    engine.step = takes(1, (0.5, True))
    checkpoints = SimpleNamespace(
        report=lambda: (0.0, 0.0), advance=takes(0), save=takes(50), finish=takes(0), abandon=takes(0)
    )
    metrics = SimpleNamespace(log=lambda step, values, reason=None: lines.append((step, values)), first_step=dict)
    settings = LoopConfig(
        max_steps=4, rows_per_step=4, rows_per_micro_batch=1, evaluate_every=1, save_every=1, log_every=2
    )
    given: Any = (
        stage,
        engine,
        settings,
        WSD(kind="wsd"),
        0,
        None,
        checkpoints,
        dict,
        metrics,
        lambda: False,
        tmp_path,
    )
    outcome = train(*given, Throughput(config, world), BestWeights(None, None, tmp_path, world, takes(0), None))
    assert (outcome.step, outcome.finished, outcome.last_evaluation) == (4, True, {"heldout_loss": 2.0})
    # two steps of two micro-batches a rank, each of one second, and a second for the update: six seconds
    steps = [values for _, values in lines if "loss" in values]
    assert [values["tokens_per_second"] for values in steps] == [2 * 2 * 2 * 16 / 6] * 2
    needed = 2 * 2 * 2 * config.training_flops([9, 4])
    assert [values["mfu"] for values in steps] == pytest.approx([needed / 6 / 2e9] * 2)
    assert [values["loss"] for values in steps] == pytest.approx([3.0 / 13] * 2)
    assert [values["save_seconds"] for values in steps] == [50.0] * 2


@pytest.mark.parametrize("at_step", [2, 3])
def test_a_stop_request_abandons_the_save_under_way_and_saves_once_more(tmp_path: Path, at_step: int) -> None:
    """The next to last save may take minutes, the time that a stop request leaves does not wait for two."""
    world, calls = World(0, 1, torch.device("cpu")), list[str]()
    config = ModelConfig(vocab_size=9, d_model=8, n_layers=1, n_heads=1, d_head=8, d_ff=8, layers="G", max_length=16)
    batch, n_steps = SimpleNamespace(tokens_T=torch.zeros(16), sequence_lengths=[16]), 0

    def record(call: str) -> None:
        assert world.progress.may_last, "the watchdog lets a rank wait for its disk"
        calls.append(call)

    def step(multiplier: float, accepts: Any) -> tuple[float, bool]:
        nonlocal n_steps
        n_steps += 1
        return 0.5, True

    engine = SimpleNamespace(
        world=world,
        forward=lambda batch: Loss(torch.tensor(3.0)),
        accumulate=lambda loss: None,
        peak_lr=1e-3,
        step=step,
    )
    checkpoints = SimpleNamespace(
        report=lambda: (0.0, 0.0), advance=lambda n_busy, n_failed: None,
        save=lambda state, snapshot: record(f"save {state.step}"),
        finish=lambda: record("finish"), abandon=lambda: record("abandon"),
    )  # fmt: skip
    stage = TrainingStage(Numbered(8), lambda rows: batch, lambda batch: 16, lambda engine: {"heldout_loss": 2.0})
    settings = LoopConfig(max_steps=9, rows_per_step=1, rows_per_micro_batch=1, evaluate_every=9, save_every=2)
    given: Any = (
        stage, engine, settings, WSD(kind="wsd"), 0, None, checkpoints, dict, None, lambda: n_steps >= at_step,
        tmp_path,
    )  # fmt: skip
    best = BestWeights(None, None, tmp_path, world, lambda directory: None, None)
    outcome = train(*given, Throughput(config, world), best)
    assert (outcome.step, outcome.finished) == (at_step, False)
    before = [] if at_step == 2 else ["save 2"]
    assert calls == [*before, "abandon", f"save {at_step}", "finish"]


@settings(max_examples=60, deadline=None)
@given(n_rows=st.integers(1, 40), size=st.integers(1, 5), micro_batch=st.integers(1, 9))
def test_ranks_evaluate_every_row_once(n_rows: int, size: int, micro_batch: int) -> None:
    if n_rows < size:
        return
    rows = np.arange(n_rows) * 3
    shares = [share_of_rank(rows, micro_batch, World(rank, size, torch.device("cpu"))) for rank in range(size)]
    assert all(shares) and max(len(part) for share in shares for part in share) <= micro_batch
    assert sorted(np.concatenate([part for share in shares for part in share])) == rows.tolist()
