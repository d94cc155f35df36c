"""What the loop reads: the rows of a step, whatever the ranks and micro-batches, and however often it was stopped."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.packed.sampler import RowOrder
from train.deepspeed.world import World
from train.loop import LoopConfig, StepReader, TrainingStage


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
