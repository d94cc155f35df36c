"""A killed run continues and ends with the same bits; damage and changed data are named; two ranks train as one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import cast

import psutil
import pytest
import torch
from rich.console import Console

from data.packed.sampler import DataPosition
from data.packed.shards import PackedDataset
from train.checkpoint.checkpoint import CheckpointError, Checkpoints, CheckpointState, damage
from train.deepspeed.engine import TrainingEngine
from train.deepspeed.world import World
from train.run import resume

ROOT = Path(__file__).parents[2]


def command(recipe: Path, *overrides: str, ranks: int = 1) -> list[str]:
    launcher = ["-m", "train.launch", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, "-m", "train.pretrain", str(recipe), *overrides]


def environment() -> dict[str, str]:
    return {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}


def run(recipe: Path, *overrides: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(recipe, *overrides, ranks=ranks), cwd=ROOT, env=environment(), capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip


def losses(run_dir: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_any_moment_it_ends_with_the_same_bits(pretrain_recipe: Path, ranks: int) -> None:
    """The loss stays where it is and the bound on spikes is tight: what is skipped hangs on what a run remembers."""
    text = pretrain_recipe.read_text()
    text = text.replace("keep: 2}", "keep: 2, skip_spikes: {sigma: 0.3, window: 4}}").replace("lr: 3e-3", "lr: 1e-5")
    pretrain_recipe.write_text(text)
    program = [sys.executable, str(Path(__file__).with_name("kill_at_random.py")), "--kills", "3"]
    done = subprocess.run(
        [*program, "--ranks", str(ranks), "--recipe", str(pretrain_recipe)], cwd=ROOT, env=environment(),
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"3 kills .*[1-9]\d* steps skipped in each", done.stdout), done.stdout


def test_sigterm_saves_and_damage_is_named(pretrain_recipe: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    child = subprocess.Popen(
        command(pretrain_recipe, "loop.max_steps=100000", "loop.save_every=50000"), cwd=ROOT, env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    metrics, began = run_dir / "metrics.jsonl", time.monotonic()
    while not (metrics.exists() and metrics.stat().st_size > 400):
        assert time.monotonic() - began < 120
        assert child.poll() is None
        time.sleep(0.02)
    child.send_signal(signal.SIGTERM)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 0, output
    assert "the same command continues" in output
    (checkpoint,) = (run_dir / "checkpoints").glob("step_*")

    weights = checkpoint / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 4
    weights.write_bytes(content)
    again = run(pretrain_recipe, "loop.max_steps=100000", "loop.save_every=50000")
    assert again.returncode == 1
    assert "model/model.safetensors does not have the hash it was written with" in again.stdout.replace("\n", "")
    content[-5] ^= 4
    weights.write_bytes(content)

    refused = run(pretrain_recipe, "loop.max_steps=100000", "loop.save_every=50000", "optimizer.lr=1e-3")
    assert refused.returncode == 2
    assert "optimizer.lr" in refused.stderr


@pytest.mark.parametrize("whom", ["launcher", "one rank"])
def test_sigterm_to_two_ranks_saves_and_the_same_command_continues(
    pretrain_recipe: Path, tmp_path: Path, whom: str
) -> None:
    """The launcher exits 0, since all ranks do."""
    overrides = ("loop.max_steps=100000", "loop.save_every=50000", "ngram_baselines=false")
    job = subprocess.Popen(
        command(pretrain_recipe, *overrides, ranks=2), cwd=ROOT, env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    metrics, began = tmp_path / "run" / "metrics.jsonl", time.monotonic()
    while not (metrics.exists() and metrics.stat().st_size > 400):
        assert time.monotonic() - began < 120
        assert job.poll() is None
        time.sleep(0.02)
    ranks = [child for child in psutil.Process(job.pid).children() if os.getsid(child.pid) == child.pid]
    assert len(ranks) == 2
    (job if whom == "launcher" else ranks[1]).send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 0, output
    assert "the same command continues" in output
    assert "A rank has failed" not in output
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    assert damage(checkpoint) is None


def test_a_checkpoint_of_other_data_is_refused(data_dir: Path, tmp_path: Path) -> None:
    world, console = World(0, 1, torch.device("cpu")), Console(quiet=True)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1, world, console)
    position = DataPosition(seed=1, epoch=0, tokens_consumed=64, fingerprint="0" * 64)
    checkpoints.save(CheckpointState(1, position, 1, 0), lambda: lambda staging, abandoned: {})
    checkpoints.finish()
    with pytest.raises(CheckpointError, match="the corpus has changed"):
        resume(checkpoints, cast(TrainingEngine, None), PackedDataset(data_dir / "train"), console)


def test_two_ranks_train_as_one(pretrain_recipe: Path, tmp_path: Path) -> None:
    for ranks, name in ((1, "one"), (2, "two")):
        done = run(
            pretrain_recipe, f"run_dir={tmp_path / name}", "loop.max_steps=4", "loop.rows_per_micro_batch=1",
            "loop.evaluate_every=2", ranks=ranks,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys() == {1, 2, 3, 4}
    assert all(one[step] == pytest.approx(two[step], rel=1e-4) for step in one)
