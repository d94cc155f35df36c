"""A rank that is stuck, frozen or gone ends the job with a message that names it, instead of a collective's timeout.

Every rank says in an attribute where it is (`RankProgress`); a thread of each publishes that in the store that torchrun
started, and reads what the others say. The rules:

- A rank has failed whose process is gone (looked up on its own host), or that has published nothing for the timeout.
- When none has moved for the timeout, those have failed that are furthest behind: the others wait for them. If all are
  in the same phase, it is those that are not in a collective, and whose GPU is not in one either, since it has done all
  it was given. But then a phase that may last is left alone: any of them until the first step is taken (checking data,
  compiling), evaluating, saving, and what comes after the last step.
- A rank that has ended by itself has told why; it is named if all others then wait for the timeout.
- Every finished sum over the ranks is a move: whoever waits by polling, for a save or for rank 0, is never stuck.
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
from dataclasses import asdict, dataclass
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

    beat: grows with each report; seconds: since it has moved; line: where its main thread is; in_collective: whether
    that is a collective, or its GPU has not done all that it was given; has_left: it ends by itself, and tells why if
    there is something to tell.
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

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"

    @property
    def place(self) -> str:
        return f"step {self.step}, {self.phase}"


@dataclass(frozen=True)
class Heard:
    """A rank's last report, how long ago it came, and whether its process is known to be gone."""

    report: Report
    silent_seconds: float = 0.0
    is_gone: bool = False

    @property
    def idle_seconds(self) -> float:
        return self.report.seconds + self.silent_seconds


def verdict(ranks: Sequence[Heard], timeout_seconds: float, silence_seconds: float) -> str | None:
    """What to tell when a rank has failed by the rules above; None while none has.

    silence_seconds: of a rank that has published nothing for so long it is not known whether it is stuck.
    """
    there = [heard for heard in ranks if not heard.report.has_left]
    failed = _lost(there, timeout_seconds)
    if there and all(heard.idle_seconds > timeout_seconds and not heard.report.may_last for heard in there):
        ended = [heard.report for heard in ranks if heard.report.has_left]
        failed |= {report.rank: f"{report} has ended by itself at {report.place}, and said why" for report in ended}
    # while one is silent, those behind others may be waiting for it; it will be named when its time is up
    if not failed and all(heard.silent_seconds <= silence_seconds for heard in there):
        failed = _stuck(there, timeout_seconds)
    if not failed:
        return None
    waiting: dict[str, list[Heard]] = defaultdict(list)
    for heard in there:
        if heard.report.rank not in failed:
            waiting[heard.report.place].append(heard)
    lines = [failed[rank] for rank in sorted(failed)]
    for place, those in waiting.items():
        names = ", ".join(str(heard.report.rank) for heard in those)
        longest = max(heard.idle_seconds for heard in those)
        lines.append(f"waiting at {place}, for {longest:.0f} s: rank {names}")
    return "\n".join(lines)


def _lost(there: list[Heard], timeout_seconds: float) -> dict[int, str]:
    """Ranks that are gone or silent, and what to say of each."""
    lost = {}
    for heard in there:
        report = heard.report
        last = f"Last heard of {heard.silent_seconds:.0f} s ago, at {report.place}"
        if heard.is_gone:
            lost[report.rank] = f"{report} is gone: its process has ended. {last}"
        elif heard.silent_seconds > timeout_seconds:
            lost[report.rank] = (
                f"{report} has given no sign of life for {heard.silent_seconds:.0f} s: it is frozen, or its machine is "
                f"gone or cannot be reached. {last}"
            )
    return lost


def _stuck(there: list[Heard], timeout_seconds: float) -> dict[int, str]:
    """Ranks that are alive and do not move, and what to say of each."""
    if any(heard.idle_seconds <= timeout_seconds for heard in there):
        return {}
    last = min((heard.report.n_phases for heard in there), default=0)
    behind = [heard for heard in there if heard.report.n_phases == last]
    if len(behind) == len(there):
        if any(heard.report.may_last for heard in there):
            return {}
        behind = [heard for heard in there if not heard.report.in_collective] or there
    return {
        heard.report.rank: f"{heard.report} is alive, but stuck for {heard.idle_seconds:.0f} s at "
        f"{heard.report.place}; its program is in {heard.report.line}"
        for heard in behind
    }


class Watchdog:
    """The thread of a rank that publishes its progress and looks at the others', while inside `with`.

    It ends the process with EXIT_CODE when a rank has failed, after one rank has told which; torchrun then ends the
    others. A rank alone is not watched.
    """

    def __init__(self, world: World, timeout_seconds: float):
        rank, size = world.rank, world.size
        self._progress, self._rank, self._size, self._device = world.progress, rank, size, world.device
        self._timeout = timeout_seconds
        self._period = min(5.0, timeout_seconds / 10)
        # two containers of one machine may have its name, and each its own process numbers
        namespace = os.readlink("/proc/self/ns/pid") if sys.platform == "linux" else ""
        self._me = Report(rank, socket.gethostname(), os.getpid(), pid_namespace=namespace)
        self._main_thread = threading.get_ident()
        first = rank - int(os.environ.get("LOCAL_RANK", rank))
        self._near = sorted({0, *range(first, min(size, first + int(os.environ.get("LOCAL_WORLD_SIZE", size))))})
        self._heard: dict[int, tuple[Report, float]] = {}
        self._stop, self._looks = threading.Event(), threading.Lock()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._size > 1:
            # a connection of its own: a call on the process group's may block for as long as a collective
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            timeout = timedelta(seconds=max(30.0, 3 * self._period))
            store = TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timeout)
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._store = PrefixStore(f"watchdog_{attempt}", store)  # not what an earlier attempt has told
            self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()
            try:
                self._publish(has_left=True)
            except RuntimeError:  # the store's host has left before
                return

    def end(self, code: int, tell: Callable[[], object]) -> int:
        """Say why this rank ends by itself, unless another has said so; the exit code for all ranks.

        Call it inside `with`: a rank that finds this one gone must find that it has told.
        """
        if self._thread is None:
            tell()
            return code
        try:
            is_first = self._store.add(_TOLD, 1) == 1
            if is_first:
                self._store.set(_CODE, str(code))
        except RuntimeError:  # the store's host has left, and with it whoever has told
            return code
        if is_first:
            tell()
            return code
        return self.code()

    def code(self) -> int:
        """The exit code of a rank that ends since another one does, after that one has had time to end first."""
        time.sleep(1.0)
        try:
            return int(self._store.get(_CODE)) if self._store.check([_CODE]) else EXIT_CODE
        except RuntimeError:
            return EXIT_CODE

    def explains(self, error: RuntimeError) -> bool:
        """Whether a failed collective is the doing of a peer that has ended; it is named, unless it told why itself."""
        if self._thread is None or ("gloo" not in str(error).lower() and "nccl" not in str(error).lower()):
            return False
        until = time.monotonic() + LOST_PEER_SECONDS
        while time.monotonic() < until:
            try:
                if self._store.check([_TOLD]):
                    return True
                ranks = self._look(range(self._size))
            except RuntimeError:
                return False
            if message := verdict(ranks, self._timeout, silence_seconds=self._timeout):
                self._tell(message)
                return True
            if any(heard.report.has_left for heard in ranks):
                return True
            time.sleep(0.2)
        return False

    def _run(self) -> None:
        if self._device.type == "cuda":  # for this thread, which would else come to another rank's
            torch.cuda.set_device(self._device)
        while not self._stop.wait(self._period):
            try:
                self._publish()
                message = self._watch()
                has_told = self._store.check([_TOLD])
            except RuntimeError as error:  # of torch's store
                if not self._stop.is_set():
                    print(f"rank {self._rank}: the other ranks cannot be watched any more: {error}", file=sys.stderr)
                return
            if self._stop.is_set():
                return
            if message:
                self._tell(message)
                os._exit(EXIT_CODE)
            if has_told:
                os._exit(self.code())  # torchrun ends all ranks when the first one has ended: the other speaks before

    def _watch(self) -> str | None:
        """What to tell, or None. Rank 0 looks at all, the others at it and at those of their machine, or at all then.

        Reading everything on every rank would be too much for one store when there are a thousand.
        """
        silence = 4 * self._period
        if self._rank != 0:
            near = self._look(self._near)
            if all(
                heard.silent_seconds <= silence and not heard.is_gone and not heard.report.has_left for heard in near
            ):
                return None
        return verdict(self._look(range(self._size)), self._timeout, silence)

    def _publish(self, has_left: bool = False) -> None:
        now, progress = time.monotonic(), self._progress
        beat = self._me.beat + 1
        self._me = Report(
            self._rank, self._me.host, self._me.pid, beat, progress.step, progress.phase, progress.n_phases,
            progress.may_last, now - progress.moved, *self._line(), has_left,
            self._me.pid_namespace,
        )  # fmt: skip
        self._store.set(f"progress_{self._rank}", json.dumps(asdict(self._me)))

    def _look(self, ranks: Sequence[int]) -> list[Heard]:
        """Read the reports of some ranks, in one round trip once all have made one."""
        keys = [f"progress_{rank}" for rank in ranks]
        if not self._store.check(keys):
            keys = [key for key in keys if self._store.check([key])]
        found = []
        with self._looks:
            for text in self._store.multi_get(keys):
                report = Report(**json.loads(text))
                known = self._heard.get(report.rank)
                if known is None or known[0].beat != report.beat:
                    self._heard[report.rank] = known = (report, time.monotonic())
                is_near = (report.host, report.pid_namespace) == (self._me.host, self._me.pid_namespace)
                gone = is_near and not report.has_left and not _is_running(report.pid)
                found.append(Heard(report, time.monotonic() - known[1], gone))
        return found

    def _line(self) -> tuple[str, bool]:
        """Where the main thread is, and whether that is inside a collective or the device may be."""
        frame = sys._current_frames().get(self._main_thread)
        if frame is None:
            return "?", False
        file = frame.f_code.co_filename
        in_collective = f"torch{os.sep}distributed{os.sep}" in file or f"deepspeed{os.sep}comm{os.sep}" in file
        # NCCL's are waited for wherever a result is read
        return f"{file}:{frame.f_lineno} ({frame.f_code.co_name})", in_collective or _is_busy(self._device)

    def _tell(self, message: str) -> None:
        """Print it, unless another rank does."""
        try:
            is_first = self._store.add(_TOLD, 1) == 1
        except RuntimeError:
            is_first = True
        if is_first:
            print(
                f"\nA rank has failed, so the job ends (engine.timeout_minutes={self._timeout / 60:g}).\n{message}\n"
                "The same command continues from the last checkpoint.",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        else:
            time.sleep(1.0)


def _is_busy(device: torch.device) -> bool:
    """Whether a GPU has not done all that the default stream gave it."""
    if device.type != "cuda":
        return False
    try:
        return not torch.cuda.default_stream(device).query()
    except RuntimeError:  # of an earlier failure on the device, which the main thread will meet
        return False


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
