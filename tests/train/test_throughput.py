"""Speed figures count all ranks' tokens and FLOPs, over the seconds outside of pauses, since the last line."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.config import ModelConfig
from train.deepspeed.world import World
from train.throughput import Throughput

CONFIG = ModelConfig(
    vocab_size=31, d_model=16, n_layers=2, n_heads=2, d_head=8, d_ff=16, layers="SG", window=4, max_length=64
)


def batch(*lengths: int) -> Any:
    """Documents of these lengths, padded to a multiple of ten tokens."""
    return SimpleNamespace(tokens_T=torch.zeros(-(-sum(lengths) // 10) * 10), sequence_lengths=list(lengths))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr("train.throughput.time", SimpleNamespace(perf_counter=lambda: now.seconds))
    monkeypatch.setattr("train.throughput.peak_flops", lambda device: 1e6)
    return now


def test_figures_of_two_ranks_without_pauses(clock: SimpleNamespace) -> None:
    speed = Throughput(CONFIG, World(0, 2, torch.device("cpu")))
    clock.seconds += 3
    with speed.paused():
        clock.seconds += 50
    clock.seconds += 1
    speed.add([batch(7, 2), batch(3)], flops=5e6)
    speed.add([batch(10)], flops=3e6)
    assert speed.figures() == pytest.approx({"tokens_per_second": 2 * 30 / 4, "mfu": 8e6 / 4 / 2e6})
    clock.seconds += 2
    speed.add([batch(10)], flops=1e6)
    assert speed.figures() == pytest.approx({"tokens_per_second": 2 * 10 / 2, "mfu": 1e6 / 2 / 2e6})


def test_needed_flops_are_those_of_the_documents(clock: SimpleNamespace) -> None:
    speed = Throughput(CONFIG, World(0, 2, torch.device("cpu")))
    expected = CONFIG.training_flops([7, 2]) + CONFIG.training_flops([3])
    assert speed.needed_flops([batch(7, 2), batch(3)]) == expected
    assert speed.needed_flops([]) == 0
