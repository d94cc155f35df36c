"""A rank that fails is named, with where it is and who waits for it; who takes long with good reason is left alone."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from train.deepspeed.world import RankProgress
from train.health.watchdog import EXIT_CODE, Report, _is_busy, _is_running, verdict

ROOT = Path(__file__).parents[3]
TIMEOUT, SILENCE = 600.0, 20.0


def rank(number: int, n_phases: int, seconds: float, silent: float = 0.0, gone: bool = False, **more: Any) -> Report:
    report = Report(
        number, f"node{number}", 4000 + number, step=7, phase=f"phase {n_phases}", n_phases=n_phases, seconds=seconds,
        may_last=False, line=f"file_{number}.py:1 (f)", silent_seconds=silent, is_gone=gone,
    )  # fmt: skip
    return replace(report, **more)


def judged(*ranks: Report) -> str | None:
    return verdict(ranks, TIMEOUT, SILENCE)


def test_a_stuck_rank_is_the_one_that_is_furthest_behind() -> None:
    message = judged(rank(0, 9, 700), rank(1, 8, 700), rank(2, 5, 700), rank(3, 9, 650))
    assert message is not None
    first, *others = message.splitlines()
    assert first.startswith("rank 2 (pid 4002 on node2) is alive, but stuck for 700 s at step 7, phase 5")
    assert "file_2.py:1" in first
    assert others == [
        "waiting at step 7, phase 9, for 700 s: rank 0, 3",
        "waiting at step 7, phase 8, for 700 s: rank 1",
    ]


@pytest.mark.parametrize(
    "ranks",
    [
        [rank(0, 9, 700), rank(1, 8, 599)],  # the one behind has moved
        [rank(0, 9, 599), rank(1, 8, 700)],  # nobody has waited long for it
        [rank(0, 8, 700, may_last=True), rank(1, 8, 700)],  # all compile, say
        [rank(0, 8, 700), rank(1, 8, 1, in_collective=True)],  # one of them has just come
        [rank(0, 9, 700, may_last=True), rank(1, 10, 700, has_left=True)],  # the first one still writes its files
        [rank(0, 9, 700), rank(1, 8, 700), rank(2, 7, 590, silent=100)],  # perhaps they wait for the silent one
    ],
)
def test_a_rank_that_takes_its_time_is_left_alone(ranks: list[Report]) -> None:
    assert judged(*ranks) is None


def test_in_one_phase_of_a_step_those_outside_collectives_are_stuck() -> None:
    message = judged(rank(0, 8, 700, in_collective=True), rank(1, 8, 650), rank(2, 8, 700, in_collective=True))
    assert message is not None
    assert re.findall(r"rank \d", message) == ["rank 1", "rank 0"]
    message = judged(rank(0, 8, 700), rank(1, 8, 650))
    assert message is not None
    assert message.count("alive, but stuck") == 2


def test_a_silent_rank_and_one_that_is_gone_are_named_wherever_they_are() -> None:
    message = judged(rank(0, 5, 700), rank(1, 9, 3, silent=601), rank(2, 5, 2, gone=True), rank(3, 4, 700))
    assert message is not None
    silent, gone, *waiting = message.splitlines()
    assert silent.startswith("rank 1 (pid 4001 on node1) has not responded for 601 s")
    assert gone.startswith("rank 2 (pid 4002 on node2) is gone")
    assert gone.endswith("Last report 0 s ago, at step 7, phase 5")
    assert [line.split()[0] for line in waiting] == ["waiting", "waiting"]


def test_a_rank_that_has_ended_is_named_when_the_others_wait_for_it() -> None:
    assert judged(rank(0, 9, 100), rank(1, 8, 700, has_left=True)) is None
    message = judged(rank(0, 9, 700), rank(1, 8, 700, has_left=True))
    assert message is not None
    assert message.startswith("rank 1 (pid 4001 on node1) exited on its own")
    assert message.endswith("rank 0")


def test_phases_may_last_until_the_first_step_is_taken() -> None:
    progress = RankProgress()
    assert progress.may_last
    found = []
    for step in (40, 41):
        progress.begin(step)
        progress.at("reading")
        found.append(progress.may_last)
        progress.at("evaluating", may_last=True)
        found.append(progress.may_last)
    assert found == [True, True, False, True]
    assert progress.n_phases == 4


def test_a_gpu_is_busy_until_it_has_done_all_it_was_given() -> None:
    assert not _is_busy(torch.device("cpu"))
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    device = torch.device("cuda", 0)
    torch.cuda._sleep(10**9)
    assert _is_busy(device)
    torch.cuda.synchronize()
    assert not _is_busy(device)


def start(how: str, failing: int, recipe: Path, *overrides: str) -> subprocess.Popen[str]:
    """The program fail_at.py on two ranks, which wait three seconds for each other; under NCCL where there are GPUs."""
    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        pytest.skip("two ranks need two GPUs, or none")
    accelerator = {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}
    program = [str(Path(__file__).parents[1] / "fail_at.py"), how, str(failing), str(recipe)]
    overrides = ("engine.timeout_minutes=0.05", *overrides)
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program, *overrides],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={
            **os.environ, **accelerator, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        },
    )  # fmt: skip


@pytest.mark.parametrize(
    ("how", "failing", "says"),
    [
        ("loop", 1, r"rank 1 \(pid \d+ on .+\) is alive, but stuck for \d+ s at step 2, optimizer step.+turn_for_ever"),
        ("freeze", 0, r"rank 0 \(pid \d+ on .+\) has not responded for \d+ s: it is frozen"),
        ("kill", 1, r"rank 1 \(pid \d+ on .+\) is gone: its process has ended"),
    ],
)
def test_a_failing_rank_ends_the_job_and_is_named(pretrain_recipe: Path, how: str, failing: int, says: str) -> None:
    job = start(how, failing, pretrain_recipe)
    assert job.stderr is not None
    said, ends = "", time.monotonic() + 120
    for line in job.stderr:  # until the job has ended
        assert time.monotonic() < ends
        said += line
        if how == "freeze" and (frozen := re.search(r"rank 0 \(pid (\d+)", line)):
            os.kill(int(frozen[1]), signal.SIGKILL)  # torchrun would wait half a minute before it does
    assert job.wait(60) != 0
    assert len(re.findall(says, said)) == 1, said
    assert said.count("A rank has failed, so the job ends (engine.timeout_minutes=0.05)") == 1
    assert re.search(rf"waiting at step 2, optimizer step, for \d+ s: rank {1 - failing}\n", said) or how == "kill"
    if how != "kill":
        assert f"exitcode  : {EXIT_CODE}" in said


def test_ranks_that_wait_for_a_slow_disk_or_for_rank_0_to_prepare_are_left_alone(pretrain_recipe: Path) -> None:
    job = start("slow", 0, pretrain_recipe, "loop.max_steps=4", "loop.save_every=4", "ngram_baselines=false")
    _, said = job.communicate(timeout=180)
    assert job.returncode == 0, said


def test_a_process_that_its_parent_has_not_reaped_is_gone() -> None:
    child = subprocess.Popen(["sleep", "600"])
    assert _is_running(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    assert not _is_running(child.pid)
    child.wait()
    assert not _is_running(child.pid)
