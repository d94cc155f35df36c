"""A finished run with more steps goes on, and ends with the bits of a run that had them from the beginning."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}


def run(recipe: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "train.pretrain", str(recipe), "ngram_baselines=false", *overrides]
    return subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)


def test_more_steps_continue_from_before_the_decay(pretrain_recipe: Path, tmp_path: Path) -> None:
    """Of eight steps the rate falls in the last four; a run of twelve comes by the checkpoint of step five."""
    wsd = ("schedule.decay_fraction=0.5", "loop.save_every=4", "loop.keep=1")
    short = run(pretrain_recipe, *wsd, "loop.max_steps=8")
    assert short.returncode == 0, short.stderr
    longer = run(pretrain_recipe, *wsd, "loop.max_steps=12")
    assert longer.returncode == 0, longer.stdout + longer.stderr
    said = longer.stdout.replace("\n", " ")
    assert re.search(r"not continuing from \S+step_00000008: it was saved with max_steps=8", said), said
    assert re.search(r"resuming from \S+step_00000005: ", said), said
    fresh = run(pretrain_recipe, *wsd, "loop.max_steps=12", f"run_dir={tmp_path / 'fresh'}")
    assert fresh.returncode == 0, fresh.stderr
    found, expected = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "fresh"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    losses = [
        [
            (line["step"], line["loss"])
            for line in map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
            if "loss" in line
        ]
        for name in ("run", "fresh")
    ]
    assert losses[0] == losses[1]


def test_more_steps_of_a_cosine_are_another_run(pretrain_recipe: Path) -> None:
    cosine = "schedule={kind: cosine}"
    assert run(pretrain_recipe, cosine, "loop.max_steps=2").returncode == 0
    refused = run(pretrain_recipe, cosine, "loop.max_steps=4")
    assert refused.returncode == 2
    assert "loop.max_steps: there 2, here 4" in refused.stderr
