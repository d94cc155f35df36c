"""A disk that is really full, or read-only, ends a run with one clear error, and costs nothing saved before."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from data.packed.sampler import RowOrder
from data.packed.shards import PackedDataset
from tests.small_file_system import needs_mount, run_on_small_file_system
from train.checkpoint.checkpoint import damage
from train.metrics import Metrics, WandbConfig

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
PRETRAIN = [sys.executable, "-m", "train.pretrain"]
ON_A_SMALL_DISK = """
disk, logs, *train = sys.argv[1:]

def start(name):
    with open(f"{logs}/{name}.log", "w") as log:
        code = subprocess.run(train, stdout=log, stderr=log).returncode
        log.write(f"{code}\\n")

mount(disk, "size=1000k")
start("full")
print(*os.listdir(f"{disk}/run/checkpoints"))
remount(disk, "ro")
start("read_only")
remount(disk, "rw,size=50m")
start("room")
"""
WITH_FILE_LIMIT = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
del sys.argv[1]
runpy.run_module("train.launch", run_name="__main__", alter_sys=True)
"""


@needs_mount
def test_a_full_and_a_read_only_file_system(pretrain_recipe: Path, tmp_path: Path) -> None:
    """The first checkpoint fits, the second does not; then it is read-only; then it is large enough."""
    disk = tmp_path / "disk"
    disk.mkdir()
    train = [*PRETRAIN, pretrain_recipe, f"run_dir={disk / 'run'}", "ngram_baselines=false"]
    ran = run_on_small_file_system(tmp_path / "program.py", ON_A_SMALL_DISK, disk, tmp_path, *train)
    assert ran.returncode == 0, ran.stderr
    full, read_only, room = ((tmp_path / f"{name}.log").read_text() for name in ("full", "read_only", "room"))
    assert full.endswith("\n1\n")
    assert re.search(r"CheckpointError: checkpoint \S+step_00000004 could not be written: .*No space left", full)
    assert "Traceback" not in full + read_only + room
    assert set(ran.stdout.split()) == {"latest", "step_00000002"}
    assert read_only.endswith("\n2\n")
    assert re.search(r"RunDirectoryError: run_dir \S+run cannot be written .*Read-only file system", read_only)
    assert room.endswith("\n0\n")
    assert re.search(r"resuming from \S+step_00000002", room)


def test_a_save_that_fails_on_two_ranks_is_told_once(pretrain_recipe: Path, tmp_path: Path) -> None:
    """No file may grow to what their optimizer states need."""
    program = tmp_path / "program.py"
    program.write_text(WITH_FILE_LIMIT)
    options = ["--nproc-per-node", "2", *PRETRAIN[1:], str(pretrain_recipe), "ngram_baselines=false"]
    options += ["loop.evaluate_every=100"]
    checkpoints = tmp_path / "run" / "checkpoints"

    def start(*overrides: str, file_bytes: int = resource.RLIM_INFINITY) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(program), str(file_bytes), *options, *overrides], cwd=ROOT, capture_output=True,
            text=True, timeout=300, env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)}, check=False,
        )  # fmt: skip

    limited = start("loop.save_every=4", file_bytes=100_000)
    assert limited.returncode == 1, limited.stderr
    assert (
        len(re.findall(r"CheckpointError: checkpoint \S+step_00000004 could not be .*File too large", limited.stderr))
        == 1
    )
    assert list(checkpoints.iterdir()) == []
    assert start("loop.save_every=4", "loop.max_steps=12").returncode == 0
    assert [damage(path) for path in checkpoints.glob("step_*")] == [None, None]


def test_metrics_that_cannot_be_written_say_which_file(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, Console(quiet=True), WandbConfig(mode="disabled"), {}, start=-1, max_steps=3)
    metrics._file = open("/dev/full", "w")  # noqa: SIM115 (Metrics closes it)
    with pytest.raises(OSError, match=r"No space left on device: '\S+metrics.jsonl'"), metrics:
        metrics.log(1, {"loss": 1.0})


def test_steps_that_are_never_finite_end_the_run(pretrain_recipe: Path, data_dir: Path, tmp_path: Path) -> None:
    """Through the command line, with a learning rate that no weight survives."""
    done = subprocess.run(
        [*PRETRAIN, str(pretrain_recipe), "optimizer.lr=1e30", "loop.max_skipped_steps=2", "loop.save_every=1"],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "TrainingError: 3 consecutive steps were skipped: 3 had a non-finite loss or gradient" in done.stderr
    assert "Traceback" not in done.stderr
    bad = json.loads((tmp_path / "run" / "bad_step.json").read_text())
    dataset = PackedDataset(data_dir / "train")
    rows = RowOrder(dataset.n_rows, seed=1).rows((bad["step"] - 1) * 4, 4)
    assert np.array_equal(bad["rows"], rows)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines if "skipped" in line] == [1, 2, 3]
