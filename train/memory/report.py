"""What is printed before and after training: the model's cost, and estimated and measured memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table

from model.execution import Recompute
from train.deepspeed.world import World
from train.memory.estimate import GIB, Estimate, Load

STAGES = (1, 2, 3)
WORLD_SIZES = (1, 2, 8, 64)


@dataclass(frozen=True)
class Summary:
    """Lines about a run, and its memory load (None while the architecture is unknown).

    bound: what the load assumes about the data, where it is an upper bound.
    """

    lines: list[str]
    load: Load | None
    rows_per_micro_batch: int = 1
    bound: str = ""

    def print(self, console: Console) -> None:
        """Print the lines, and the memory of this recipe on the launched number of ranks."""
        lines = list(self.lines)
        if self.load:
            size = launched_ranks()
            lines.append(
                f"{'memory a rank':<24}{_gib(self.load.estimate(size).total)} GiB of a GPU on {size} rank(s), "
                f"estimated{self._bound}"
            )
        for line in lines:
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    def print_memory(self, console: Console) -> None:
        """Print a table of memory by ZeRO stage and number of ranks, and the parts of the recipe's own estimate."""
        if self.load is None:
            return
        size, stage = launched_ranks(), self.load.engine.zero_stage
        sizes = sorted({*WORLD_SIZES, size})
        table = Table(title="GiB of device memory a rank, estimated", title_justify="left")
        table.add_column("ranks")
        for ranks in sizes:
            table.add_column(f"{ranks:,}", justify="right")
        for row in STAGES:
            cells = [self._cell(row, ranks, row == stage and ranks == size) for ranks in sizes]
            table.add_row(f"ZeRO-{row}", *cells)
        console.print(table)
        own = self.load.step_estimate(size)
        parts = ", ".join(f"{name} {_gib(value)}" for name, value in own.parts.items())
        host = self.load.host_bytes(size, is_main=True), self.load.host_bytes(size, is_main=False)
        for line in (
            f"* this recipe on {size} rank(s), peak at the {own.moment}: {parts}",
            *self._start(size, own),
            f"  recompute {self._recompute}; not included: CUDA context (0.5 to 1 GiB), NCCL, fragmentation",
            f"  a checkpoint's copy in host memory: {_gib(host[0])} GiB on rank 0, {_gib(host[1])} on the others",
        ):
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    def warn(self, console: Console, world: World) -> None:
        """Print what to change when the estimate exceeds the device's memory."""
        if self.load is None or world.device.type != "cuda":
            return
        there = torch.cuda.get_device_properties(world.device).total_memory
        if text := warning(self.load, self.rows_per_micro_batch, world.size, there):
            console.print(f"[bold yellow]memory[/]: {text}", highlight=False, soft_wrap=True)

    def compare(self, console: Console, world: World) -> None:
        """Print the measured peak next to the estimate, at the end of a run."""
        if self.load is None or world.device.type != "cuda":
            return
        measured, expected = torch.cuda.max_memory_allocated(world.device), self.load.estimate(world.size)
        console.print(
            f"memory a rank: {_gib(measured)} GiB at the peak, {_gib(expected.total)} estimated "
            f"({measured / expected.total - 1:+.0%})",
            highlight=False,
        )

    def _start(self, size: int, own: Estimate) -> list[str]:
        assert self.load
        start = self.load.estimate(size)
        if start.total <= own.total:
            return []
        return [f"  a step needs {_gib(own.total)}; at the start every rank holds all weights: {_gib(start.total)}"]

    @property
    def _recompute(self) -> str:
        assert self.load
        engine = self.load.engine
        return engine.recompute + (f", {engine.recompute_blocks} whole blocks" if engine.recompute_blocks else "")

    @property
    def _bound(self) -> str:
        return f" ({self.bound})" if self.bound else ""

    def _cell(self, stage: int, ranks: int, is_own: bool) -> str:
        assert self.load
        if self.load.optimizer == "muon" and stage > 1:
            return "-"  # refused by Muon.obstacle
        return _gib(self.load.estimate(ranks, stage).total) + (" *" if is_own else "")


def launched_ranks() -> int:
    """Number of ranks that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def warning(load: Load, rows_per_micro_batch: int, world_size: int, device_bytes: int) -> str | None:
    """What to change in a recipe whose estimate exceeds the device's memory; None when it fits."""
    own = load.estimate(world_size)
    if own.total <= device_bytes:
        return None
    changes = list(_changes(load, rows_per_micro_batch, world_size, device_bytes))
    enough = [f"{change} ({_gib(estimate.total)})" for change, estimate in changes if estimate.total <= device_bytes]
    less = [f"{change} ({_gib(estimate.total)})" for change, estimate in changes if estimate.total < own.total]
    advice = f"set {' or '.join(enough)}" if enough else f"combine {', '.join([*less, 'more ranks'])}"
    return (
        f"a rank needs about {_gib(own.total)} GiB at the {own.moment}, the device has {_gib(device_bytes)}; "
        f"if it runs out of memory, {advice}"
    )


def _changes(
    load: Load, rows_per_micro_batch: int, world_size: int, device_bytes: int
) -> Iterator[tuple[str, Estimate]]:
    """Single changes of a recipe that save memory, cheapest first."""
    levels = [level for level in get_args(Recompute) if level != "elementwise" or load.fused]
    if load.engine.recompute in levels:
        levels = levels[levels.index(load.engine.recompute) + 1 :]
    variants = [(f"engine.recompute={level}", {"recompute": level}, load.tokens) for level in levels]
    if rows_per_micro_batch > 1:
        tokens = load.tokens // rows_per_micro_batch
        variants.append(("loop.rows_per_micro_batch=1", {}, tokens))
    if load.optimizer == "adamw":
        stages = [stage for stage in STAGES if stage > load.engine.zero_stage and world_size > 1]
        variants += [(f"engine.zero_stage={stage}", {"zero_stage": stage}, load.tokens) for stage in stages]
    for change, update, tokens in variants:
        changed = replace(load, engine=load.engine.model_copy(update=update), tokens=tokens)
        yield change, changed.estimate(world_size)
    if load.engine.recompute != "block":
        yield from islice(_fewest_blocks(load, world_size, device_bytes), 1)


def _fewest_blocks(load: Load, world_size: int, device_bytes: int) -> Iterator[tuple[str, Estimate]]:
    """Numbers of blocks to recompute as a whole that fit."""
    for n_blocks in range(load.engine.recompute_blocks + 1, load.config.n_layers):
        engine = load.engine.model_copy(update={"recompute_blocks": n_blocks})
        estimate = replace(load, engine=engine).estimate(world_size)
        if estimate.total <= device_bytes:
            yield f"engine.recompute_blocks={n_blocks}", estimate


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / GIB:.1f}"
