"""Fifty steps of the demo's architecture on the demo's data, one thread: the losses are those written down.

To write them anew after a change that is meant to change them, run this file with DRAMATIS_WRITE_GOLDEN=1.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("golden_losses.json")
OVERRIDES = (
    "loop.max_steps=50", "loop.rows_per_step=1", "loop.rows_per_micro_batch=1", "loop.evaluate_every=50",
    "loop.save_every=50", "evaluation_rows=4", "ngram_baselines=false", "threads=1", "wandb.mode=disabled",
)  # fmt: skip


def test_fifty_steps_of_the_demo(tmp_path: Path) -> None:
    pytest.importorskip("chitchat_dataset", reason="the demo extra holds the conversations")
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    for module, recipe, *overrides in (
        ("data.prepare", "data", f"run_dir={tmp_path / 'data'}"),
        ("train.pretrain", "pretrain", f"run_dir={tmp_path / 'run'}", f"data={tmp_path / 'data'}", *OVERRIDES),
    ):
        done = subprocess.run(
            [sys.executable, "-m", module, f"recipes/demo/{recipe}.yaml", *overrides], cwd=ROOT, env=environment,
            capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = {
        "fingerprint": json.loads((tmp_path / "data" / "train" / "manifest.json").read_text())["fingerprint"],
        "losses": [line["loss"] for line in lines if "loss" in line],
        "heldout_loss": lines[-1]["heldout_loss"],
    }
    if os.environ.get("DRAMATIS_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert found["fingerprint"] == golden["fingerprint"], "the demo's data changed"
    # another CPU sums in another order; a change of the model or the data order is far above this
    assert found["losses"] == pytest.approx(golden["losses"], rel=2e-3)
    assert found["heldout_loss"] == pytest.approx(golden["heldout_loss"], rel=2e-3)
