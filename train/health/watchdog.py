"""Ends a job when a rank hangs, freezes or dies, with a message that names it, before a collective times out.

Each rank records its phase (`RankProgress`). A thread of each rank publishes it to the store that torchrun started, and
reads the others'. Rules:

- A rank has failed if its process is gone (checked on its own host) or it has published nothing for the timeout.
- When no rank has made progress for the timeout, the ranks that are furthest behind have failed: the others wait for
  them. If all are in the same phase, it is the ranks outside a collective whose GPU is idle. Phases that may last
  (everything before the first step, evaluating, saving, the end of the run) are then exempt.
- A rank that exited on its own has printed why. It is named if all others then wait for the timeout.
- Every sum over ranks counts as progress, so polling for a save or for rank 0 is never a hang.

torch has no replacement that does this: monitored_barrier names ranks that do not arrive, but not where they are, and
only if all others call it; NCCL's flight recorder is read after the fact, and gloo has none.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from types import TracebackType
from typing import Self

import psutil
import torch
from torch.distributed import PrefixStore, TCPStore

from train.deepspeed.world import World

EXIT_CODE = 3
_TOLD, _CODE = "has_told", "exit_code"
LOST_PEER_SECONDS = 10.0
"""How long to look for the peer that made a collective fail."""


@dataclass(frozen=True)
class Report:
    """What a rank publishes.

    beat: number of the report. seconds: since the last progress. line: where the main thread is. in_collective: the
    main thread is in a collective, or the GPU is busy. has_left: the rank is exiting and has printed why.
    silent_seconds (since the report arrived) and is_gone (the process does not exist) are set by the reader.
    """

    rank: int
    host: str
    pid: int
    beat: int = 0
    step: int = 0
    phase: str = "starting"
    n_phases: int = 0
    may_last: bool = True
    seconds: float = 0.0
    line: str = ""
    in_collective: bool = False
    has_left: bool = False
    pid_namespace: str = ""
    silent_seconds: float = 0.0
    is_gone: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"

    @property
    def place(self) -> str:
        return f"step {self.step}, {self.phase}"

    @property
    def idle_seconds(self) -> float:
        return self.seconds + self.silent_seconds


def verdict(reports: Sequence[Report], timeout_seconds: float, silence_seconds: float) -> str | None:
    """The message when a rank has failed by the rules above; None while none has.

    After `silence_seconds` without a report it is unknown whether a rank has made progress.
    """
    present = [report for report in reports if not report.has_left]
    failed = _lost(present, timeout_seconds)
    if present and all(report.idle_seconds > timeout_seconds and not report.may_last for report in present):
        left = [report for report in reports if report.has_left]
        failed |= {report.rank: f"{report} exited on its own at {report.place}, after printing why" for report in left}
    # the ranks that are behind may be waiting for a silent one, which is named once it has been silent for the timeout
    if not failed and all(report.silent_seconds <= silence_seconds for report in present):
        failed = _stuck(present, timeout_seconds)
    if not failed:
        return None
    waiting: dict[str, list[Report]] = defaultdict(list)
    for report in present:
        if report.rank not in failed:
            waiting[report.place].append(report)
    lines = [failed[rank] for rank in sorted(failed)]
    for place, at_place in waiting.items():
        names = ", ".join(str(report.rank) for report in at_place)
        longest = max(report.idle_seconds for report in at_place)
        lines.append(f"waiting at {place}, for {longest:.0f} s: rank {names}")
    return "\n".join(lines)


def _lost(present: list[Report], timeout_seconds: float) -> dict[int, str]:
    """Messages for ranks that are gone or silent."""
    lost = {}
    for report in present:
        last = f"Last report {report.silent_seconds:.0f} s ago, at {report.place}"
        if report.is_gone:
            lost[report.rank] = f"{report} is gone: its process has ended. {last}"
        elif report.silent_seconds > timeout_seconds:
            lost[report.rank] = (
                f"{report} has not responded for {report.silent_seconds:.0f} s: it is frozen, or its machine is down "
                f"or unreachable. {last}"
            )
    return lost


def _stuck(present: list[Report], timeout_seconds: float) -> dict[int, str]:
    """Messages for ranks that are alive and make no progress."""
    if any(report.idle_seconds <= timeout_seconds for report in present):
        return {}
    last = min((report.n_phases for report in present), default=0)
    behind = [report for report in present if report.n_phases == last]
    if len(behind) == len(present):
        if any(report.may_last for report in present):
            return {}
        behind = [report for report in present if not report.in_collective] or present
    return {
        report.rank: f"{report} is alive, but stuck for {report.idle_seconds:.0f} s at {report.place}; its main thread "
        f"is in {report.line}"
        for report in behind
    }


class Watchdog:
    """Inside `with`, a thread publishes this rank's progress and watches the other ranks.

    When a rank has failed, one rank prints which, and every rank exits with EXIT_CODE; torchrun ends the rest. A single
    rank is not watched.
    """

    def __init__(self, world: World, timeout_seconds: float):
        rank, size = world.rank, world.size
        self._progress, self._rank, self._size, self._device = world.progress, rank, size, world.device
        self._timeout = timeout_seconds
        self._period = min(5.0, timeout_seconds / 10)
        # two containers on one machine may share its host name, and have pids of their own
        namespace = os.readlink("/proc/self/ns/pid") if sys.platform == "linux" else ""
        self._me = Report(rank, socket.gethostname(), os.getpid(), pid_namespace=namespace)
        self._main_thread = threading.get_ident()
        first = rank - int(os.environ.get("LOCAL_RANK", rank))
        self._near = sorted({0, *range(first, min(size, first + int(os.environ.get("LOCAL_WORLD_SIZE", size))))})
        self._received: dict[int, tuple[int, float]] = {}
        """Of each rank: the newest beat, and when it arrived."""
        self._stop, self._reading = threading.Event(), threading.Lock()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._size > 1:
            # a connection of its own: calls on the process group's may block for as long as a collective
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            timeout = timedelta(seconds=max(30.0, 3 * self._period))
            store = TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timeout)
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._store = PrefixStore(f"watchdog_{attempt}", store)  # without the keys of an earlier attempt
            self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()
            try:
                self._publish(has_left=True)
            except RuntimeError:  # the host of the store has exited
                return

    def end(self, code: int, tell: Callable[[], object]) -> int:
        """Print why this rank exits (`tell`), unless another rank has printed; the exit code for all ranks.

        Call it inside `with`, so that this rank has printed before others see that it has left.
        """
        if self._thread is None:
            tell()
            return code
        try:
            is_first = self._store.add(_TOLD, 1) == 1
            if is_first:
                self._store.set(_CODE, str(code))
        except RuntimeError:  # the host of the store has exited, after printing why
            return code
        if is_first:
            tell()
            return code
        return self.code()

    def code(self) -> int:
        """The exit code of a rank that ends because another one does; returns after that one has had time to exit."""
        time.sleep(1.0)
        try:
            return int(self._store.get(_CODE)) if self._store.check([_CODE]) else EXIT_CODE
        except RuntimeError:
            return EXIT_CODE

    def explains(self, error: RuntimeError) -> bool:
        """Whether a collective failed because a peer has ended. The peer is named, unless it has printed why itself."""
        if self._thread is None or ("gloo" not in str(error).lower() and "nccl" not in str(error).lower()):
            return False
        until = time.monotonic() + LOST_PEER_SECONDS
        while time.monotonic() < until:
            try:
                if self._store.check([_TOLD]):
                    return True
                reports = self._read(range(self._size))
            except RuntimeError:
                return False
            if message := verdict(reports, self._timeout, silence_seconds=self._timeout):
                self._tell(message)
                return True
            if any(report.has_left for report in reports):
                return True
            time.sleep(0.2)
        return False

    def _run(self) -> None:
        if self._device.type == "cuda":  # the default would create a context on another rank's device
            torch.cuda.set_device(self._device)
        while not self._stop.wait(self._period):
            try:
                self._publish()
                message = self._watch()
                has_told = self._store.check([_TOLD])
            except RuntimeError as error:  # of torch's store
                if not self._stop.is_set():
                    print(f"rank {self._rank}: the other ranks can no longer be watched: {error}", file=sys.stderr)
                return
            if self._stop.is_set():
                return
            if message:
                self._tell(message)
                os._exit(EXIT_CODE)
            if has_told:
                os._exit(self.code())  # waits: torchrun kills all ranks when the first one exits, and one is printing

    def _watch(self) -> str | None:
        """The message about a failed rank, or None.

        Rank 0 reads all reports. The others read those of rank 0 and of their machine, and all reports only if one of
        these looks wrong: a thousand ranks that all read everything would overload the store.
        """
        silence = 4 * self._period
        if self._rank == 0 or any(
            report.silent_seconds > silence or report.is_gone or report.has_left for report in self._read(self._near)
        ):
            return verdict(self._read(range(self._size)), self._timeout, silence)
        return None

    def _publish(self, has_left: bool = False) -> None:
        progress = self._progress
        line, in_collective = self._line()
        self._me = replace(
            self._me, beat=self._me.beat + 1, step=progress.step, phase=progress.phase, n_phases=progress.n_phases,
            may_last=progress.may_last, seconds=time.monotonic() - progress.moved, line=line,
            in_collective=in_collective, has_left=has_left,
        )  # fmt: skip
        self._store.set(f"progress_{self._rank}", json.dumps(asdict(self._me)))

    def _read(self, ranks: Sequence[int]) -> list[Report]:
        """The reports of these ranks that have published one; a single round trip once all have."""
        keys = [f"progress_{rank}" for rank in ranks]
        if not self._store.check(keys):
            keys = [key for key in keys if self._store.check([key])]
        reports = []
        with self._reading:
            for text in self._store.multi_get(keys):
                report, now = Report(**json.loads(text)), time.monotonic()
                beat, arrived = self._received.get(report.rank, (-1, now))
                if beat != report.beat:
                    arrived = now
                self._received[report.rank] = (report.beat, arrived)
                is_near = (report.host, report.pid_namespace) == (self._me.host, self._me.pid_namespace)
                is_gone = is_near and not report.has_left and not _is_running(report.pid)
                reports.append(replace(report, silent_seconds=now - arrived, is_gone=is_gone))
        return reports

    def _line(self) -> tuple[str, bool]:
        """Where the main thread is, and whether it is in a collective or the GPU is busy."""
        frame = sys._current_frames().get(self._main_thread)
        if frame is None:
            return "?", False
        file = frame.f_code.co_filename
        in_collective = f"torch{os.sep}distributed{os.sep}" in file or f"deepspeed{os.sep}comm{os.sep}" in file
        # NCCL's collectives are waited for wherever a result is read
        return f"{file}:{frame.f_lineno} ({frame.f_code.co_name})", in_collective or _is_busy(self._device)

    def _tell(self, message: str) -> None:
        """Print the message, or, if another rank has printed one, give it time to finish."""
        try:
            is_first = self._store.add(_TOLD, 1) == 1
        except RuntimeError:
            is_first = True
        if is_first:
            print(
                f"\nA rank has failed, so the job ends (engine.timeout_minutes={self._timeout / 60:g}).\n{message}\n"
                "Run the same command again to resume from the last checkpoint.",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        else:
            time.sleep(1.0)


def _is_busy(device: torch.device) -> bool:
    """Whether a GPU has unfinished work on its default stream."""
    if device.type != "cuda":
        return False
    try:
        return not torch.cuda.default_stream(device).query()
    except RuntimeError:  # an earlier failure on the device, which the main thread will meet
        return False


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
