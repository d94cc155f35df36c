"""What a user can get wrong ends a training stage with one message and exit code 2, however many ranks there are."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.deepspeed.world import LaunchError, World, check_launch
from train.health.rank_messages import rank_0_speaks
from train.launch import exit_code
from train.stage import share_of_rank

ROOT = Path(__file__).parents[2]
ALONE = [sys.executable, "-m", "train.pretrain"]
TWO_RANKS = [sys.executable, "-m", "train.launch", "--nproc-per-node", "2", "-m", "train.pretrain"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "train.pretrain"]
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}


def run(command: list[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    words = [*command, *map(str, arguments)]
    return subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("loop.max_stepz=2", "RecipeError: "),  # before the ranks have joined
        ("run_dir=pyproject.toml", "RunDirectoryError: run_dir pyproject.toml: a file"),  # on rank 0 alone
        ("loop.rows_per_step=3", "LoopError: loop.rows_per_step=3 is not a multiple"),  # on both
    ],
)
def test_two_ranks_tell_an_error_once(pretrain_recipe: Path, override: str, words: str) -> None:
    done = run(TWO_RANKS, pretrain_recipe, override)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(words)
    assert done.stderr.count("Error") == 1
    assert len(done.stderr.splitlines()) <= 2


def test_torchrun_s_ranks_tell_an_error_once(pretrain_recipe: Path) -> None:
    done = run(TORCHRUN, pretrain_recipe, "evaluation_rows=1")
    assert done.stderr.count("LoopError: 2 ranks need a held-out row each, found 1") == 1
    assert "raise evaluation_rows" in done.stderr


@pytest.mark.parametrize("command", [ALONE, TWO_RANKS], ids=["alone", "two ranks"])
def test_a_truncated_shard_is_named_with_both_sizes(
    command: list[str], pretrain_recipe: Path, data_dir: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(data_dir, data)
    shard = data / "train" / "shard_00000.tokens.bin"
    n_bytes = shard.stat().st_size
    os.truncate(shard, n_bytes - 100)
    done = run(command, pretrain_recipe, f"data={data}")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"ShardError: {shard}: {n_bytes - 100} bytes, the manifest says {n_bytes}; ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("when", ["before the first step", "in training"])
def test_ctrl_c_is_one_line_and_exit_130(pretrain_recipe: Path, tmp_path: Path, when: str) -> None:
    words = [*TWO_RANKS, str(pretrain_recipe), "loop.max_steps=100000", "loop.save_every=50000"]
    job = subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics, began = tmp_path / "run" / "metrics.jsonl", time.monotonic()
    awaited = metrics if when == "in training" else metrics.with_name("recipe.yaml")
    while not (awaited.exists() and (awaited != metrics or metrics.stat().st_size > 400)):
        assert time.monotonic() - began < 120
        assert job.poll() is None
        time.sleep(0.02)
    job.send_signal(signal.SIGINT)
    output, errors = job.communicate(timeout=120)
    assert job.returncode == 130, output + errors
    assert "Traceback" not in errors
    said = [line for line in (output + errors).splitlines() if "the same command continues" in line]
    assert len(said) == 1, output + errors
    checkpoints = list((tmp_path / "run" / "checkpoints").glob("step_*"))
    assert len(checkpoints) <= 1
    if when == "in training":
        assert checkpoints


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 6))
def test_every_rank_evaluates_a_row_where_there_are_as_many(n_rows: int, per_micro_batch: int, ranks: int) -> None:
    rows = np.arange(max(n_rows, ranks))
    shares = [share_of_rank(rows, per_micro_batch, World(r, ranks, torch.device("cpu"))) for r in range(ranks)]
    assert all(shares)
    parts = [part for share in shares for part in share]
    assert sorted(np.concatenate(parts)) == list(rows)
    assert max(map(len, parts)) <= per_micro_batch


GOOD = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: expected whole numbers"),
        ({"RANK": "2"}, "RANK=2 of WORLD_SIZE=2 ranks"),
        ({"MASTER_PORT": "", "LOCAL_RANK": ""}, "RANK is set without LOCAL_RANK, MASTER_PORT"),
        ({"RANK": ""}, "WORLD_SIZE=2 without RANK"),
    ],
)
def test_a_wrong_environment_is_named(monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], words: str) -> None:
    for name, value in (GOOD | changes).items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    with pytest.raises(LaunchError, match=words):
        check_launch()


def test_another_rank_speaks_when_rank_0_has_nothing_to_say(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("train.health.rank_messages.SECONDS_FOR_RANK_0", 0.0)

    def ends_in_error() -> None:
        with rank_0_speaks():
            print("twice")
            print("only here", file=sys.stderr)
            sys.exit(2)

    with pytest.raises(SystemExit):
        ends_in_error()
    assert capsys.readouterr() == ("", "only here\n")


class Failure:
    def __init__(self, exitcode: int, timestamp: int):
        self.exitcode, self.timestamp = exitcode, timestamp


@pytest.mark.parametrize(
    ("codes", "expected"), [([3, 2], 2), ([-15, 2], 2), ([3, 130], 130), ([1, 3], 1), ([-9, 3], 137), ([3, -9], 3)]
)
def test_the_exit_code_is_that_of_the_rank_that_failed_first(codes: list[int], expected: int) -> None:
    failures: Any = [Failure(code, at) for at, code in enumerate(codes)]
    assert exit_code(failures) == expected
