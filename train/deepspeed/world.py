"""The process group of a run: joining it, sums and barriers over ranks, and each rank's progress."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import torch
from torch import Tensor


class LaunchError(ValueError):
    """The environment variables do not describe a rank that this machine can run."""


@dataclass
class RankProgress:
    """Where a rank is in the run. All ranks go through the same phases in the same order.

    may_last: the phase may take longer than the timeout. moved: monotonic time of the last progress.
    """

    step: int = 0
    phase: str = "starting"
    n_phases: int = 0
    may_last: bool = True
    moved: float = field(default_factory=time.monotonic)
    _first_step: int | None = None

    def begin(self, step: int) -> None:
        """Start an iteration of the training loop."""
        self.step = step
        self._first_step = step if self._first_step is None else self._first_step

    def at(self, phase: str, may_last: bool = False) -> None:
        """Start a phase. Until the first step is taken (data checks, compilation) any phase may last."""
        self.phase = phase
        self.may_last = may_last or self._first_step is None or self.step == self._first_step
        self.n_phases += 1
        self.moved = time.monotonic()

    def tick(self) -> None:
        """Record progress within a phase; ranks may tick at different rates."""
        self.moved = time.monotonic()


@dataclass(frozen=True)
class World:
    """This process's rank, and collectives over all ranks."""

    rank: int
    size: int
    device: torch.device
    progress: RankProgress = field(default_factory=RankProgress, compare=False)
    cpu_group: torch.distributed.ProcessGroup | None = field(default=None, compare=False)
    """A gloo group of all ranks beside NCCL, so that summing host numbers does not wait for the GPU."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Each value summed over all ranks, in float64."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(total, group=self.cpu_group)
        values = total.tolist()
        self.progress.tick()
        return values

    def sum_later(self, values: dict[str, Tensor]) -> Callable[[], dict[str, float]]:
        """Start summing device scalars over all ranks; calling the result waits for the sums."""
        names = sorted(values)
        totals = torch.stack([values[name].detach().double() for name in names])
        if self.size > 1:
            torch.distributed.all_reduce(totals)
        host, arrived = totals, None
        if totals.device.type == "cuda":
            host = torch.empty_like(totals, device="cpu", pin_memory=True).copy_(totals, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()

        def sums() -> dict[str, float]:
            if arrived:
                arrived.synchronize()
            self.progress.tick()
            return dict(zip(names, host.tolist(), strict=True))

        return sums

    def first_text(self, text: str | None) -> str:
        """The text of the lowest rank that has one, prefixed with the rank; empty if none has."""
        if self.size == 1:
            return text or ""
        texts: list[str | None] = [None] * self.size
        torch.distributed.all_gather_object(texts, text, group=self.cpu_group)
        return next((f"rank {rank}: {text}" for rank, text in enumerate(texts) if text), "")

    def barrier(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()


def check_launch() -> None:
    """Raise LaunchError unless the environment describes a rank that this machine can run, or none."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    there = [name for name in names if os.environ.get(name)]
    advice = "start ranks with python -m train.launch (or torchrun), or unset them to train in this process alone"
    if "RANK" not in there:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise LaunchError(f"environment: WORLD_SIZE={os.environ['WORLD_SIZE']} without RANK; {advice}")
        return
    if missing := [name for name in names if name not in there]:
        raise LaunchError(f"environment: RANK is set without {', '.join(missing)}; {advice}")
    numbers = {name: os.environ[name] for name in names if name != "MASTER_ADDR"}
    if wrong := [f"{name}={text}" for name, text in numbers.items() if not text.isdecimal()]:
        raise LaunchError(f"environment: {', '.join(wrong)}: expected whole numbers; {advice}")
    if int(numbers["RANK"]) >= int(numbers["WORLD_SIZE"]):
        raise LaunchError(f"environment: RANK={numbers['RANK']} of WORLD_SIZE={numbers['WORLD_SIZE']} ranks; {advice}")
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else None
    if n_gpus is not None and int(numbers["LOCAL_RANK"]) >= n_gpus:
        raise LaunchError(f"rank {numbers['RANK']} finds no GPU: this machine has {n_gpus}; lower --nproc-per-node")


def join_world(timeout_minutes: float) -> World:
    """Join the process group that torchrun describes, or make one of a single rank."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    from deepspeed import comm

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # No operators: DeepSpeed would run a C compiler to find out which it can build, and build collectives in shared
    # memory, which only inference uses, in a minute of the first run.
    deepspeed.ops.__compatible_ops__ = {}
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    # longer than the watchdog's timeout, whose message is better
    timeout = timedelta(minutes=1.25 * timeout_minutes + 0.5)
    comm.init_distributed(backend, verbose=False, timeout=timeout)
    size = int(os.environ["WORLD_SIZE"])
    cpu_group = torch.distributed.new_group(backend="gloo", timeout=timeout) if backend == "nccl" and size > 1 else None
    return World(int(os.environ["RANK"]), size, device, cpu_group=cpu_group)
