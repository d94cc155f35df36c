"""Training speed: tokens/s and model FLOPs utilization (MFU, appendix B of arXiv 2204.02311)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from model.config import ModelConfig
from train.deepspeed.world import World

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "GB200": 2250e12, "L40S": 362e12}
"""Dense bfloat16 FLOP/s from the vendors' data sheets, without sparsity."""


class Batch(Protocol):
    """A micro-batch, as far as the loop looks at it: its tokens and the lengths of its documents."""

    @property
    def tokens_T(self) -> Tensor: ...

    @property
    def sequence_lengths(self) -> list[int]:
        """Lengths of the documents or sequences, without padding."""
        ...


def peak_flops(device: torch.device) -> float | None:
    """The device's data-sheet bfloat16 FLOP/s; None for a device that is not listed."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    return next((PEAK_FLOPS[word] for word in words if word in PEAK_FLOPS), None)


class Throughput:
    """Tokens, needed FLOPs and seconds since the last log line. Counters cover all ranks."""

    def __init__(self, config: ModelConfig, world: World):
        peak = peak_flops(world.device)
        self._config, self._world = config, world
        self._peak = None if peak is None else peak * world.size
        self._tokens, self._flops, self._began = 0, 0.0, time.perf_counter()

    def needed_flops(self, batches: Sequence[Batch]) -> float:
        """FLOPs that this rank's micro-batches need (`ModelConfig.training_flops`)."""
        return float(sum(self._config.training_flops(batch.sequence_lengths) for batch in batches))

    def add(self, batches: Sequence[Batch], flops: float) -> None:
        """Count a step: this rank's micro-batches (every rank has as many tokens), and the FLOPs of all ranks."""
        self._tokens += sum(len(batch.tokens_T) for batch in batches) * self._world.size
        self._flops += flops

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the seconds spent inside (evaluation, saving)."""
        entered = time.perf_counter()
        yield
        self._began += time.perf_counter() - entered

    def figures(self) -> dict[str, float]:
        """tokens_per_second; on a GPU memory_gib (this rank's peak allocation) and, for a listed one, mfu.

        Resets the counters.
        """
        now = time.perf_counter()
        seconds = now - self._began
        values = {"tokens_per_second": self._tokens / seconds}
        if self._peak is not None:
            values["mfu"] = self._flops / seconds / self._peak
        if self._world.device.type == "cuda":
            values["memory_gib"] = torch.cuda.max_memory_allocated(self._world.device) / 2**30
        self._tokens, self._flops, self._began = 0, 0.0, now
        return values
