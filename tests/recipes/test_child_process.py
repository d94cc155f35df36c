"""Stop requests reach a child one at a time, however closely they follow each other."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from recipes.child_process import Child, StopRequests


@pytest.fixture
def stops() -> StopRequests:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    requests = StopRequests()
    for number, handler in before.items():
        signal.signal(number, handler)
    return requests


def test_two_requests_between_two_looks_kill_what_does_not_listen(stops: StopRequests, tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    log = tmp_path / "log"
    with log.open("wb") as file:
        child = Child([sys.executable, "-c", deaf], os.environ, log=file)
    while log.read_text() != "deaf\n":
        time.sleep(0.02)
    assert child.poll(stops) is None
    stops.received += [signal.SIGTERM, signal.SIGTERM]
    assert child.poll(stops) is None  # asks
    assert child.poll(stops) is None  # kills
    child.process.wait(30)
    ended = child.poll(stops)
    assert ended is not None
    assert ended.code == -signal.SIGKILL
    assert ended.peak_bytes > 0


def test_the_kill_reaches_processes_whose_parent_has_ended(stops: StopRequests, tmp_path: Path) -> None:
    deaf = """import signal, subprocess, time
signal.signal(15, signal.SIG_IGN)  # its children inherit this
subprocess.run(["sh", "-c", "sleep 60 & echo $!"])
time.sleep(60)"""
    log = tmp_path / "log"
    with log.open("wb") as file:
        child = Child([sys.executable, "-c", deaf], os.environ, log=file)
    while not log.read_text().endswith("\n"):
        time.sleep(0.02)
    orphan = psutil.Process(int(log.read_text()))
    stops.received += [signal.SIGTERM, signal.SIGTERM]
    assert child.poll(stops) is None
    assert is_alive(orphan)
    assert child.poll(stops) is None
    child.process.wait(30)
    deadline = time.monotonic() + 30
    while is_alive(orphan) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_alive(orphan)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_what_need_not_be_measured_is_not(stops: StopRequests) -> None:
    child = Child([sys.executable, "-c", "import time; time.sleep(0.2)"], os.environ)
    while (ended := child.poll(stops, measure=False)) is None:
        time.sleep(0.02)
    assert (ended.code, ended.peak_bytes) == (0, 0)
