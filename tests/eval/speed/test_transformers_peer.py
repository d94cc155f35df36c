"""The peer of the speed benchmark runs as it is written, at a size that needs no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
PROGRAM = """
import deepspeed
import torch
from eval.speed.transformers_peer import Shape, measure

deepspeed.ops.__compatible_ops__ = {}  # or its CPU collectives are compiled for a minute
shape = Shape(n_layers=2, d_model=16, n_heads=2, d_head=8, d_ff=24, vocab_size=64, batch=1, length=8)
for deepspeed in (False, True):
    rate, n_parameters = measure(shape, torch.device("cpu"), steps=6, accumulate=2, deepspeed=deepspeed)
    assert rate > 0
    assert n_parameters == 64 * 16 + 2 * (2 * 16 * 16 + 2 * 8 * 16 + 3 * 24 * 16 + 2 * 16) + 16
    print("measured", deepspeed)
"""


def test_a_small_one_is_measured_with_and_without_deepspeed(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "measured False" in done.stdout and "measured True" in done.stdout
