"""Losses of runs held against each other: the largest difference is found, and what cannot be compared is said."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from eval.speed.compare_losses import CompareError, largest_difference, losses, main


def write_run(run_dir: Path, values: dict[int, float]) -> Path:
    run_dir.mkdir()
    lines = [{"step": 0, "heldout_loss": 9.0}, *({"step": step, "loss": value} for step, value in values.items())]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run_dir


def test_the_largest_relative_difference_over_common_steps(tmp_path: Path) -> None:
    ours = losses(write_run(tmp_path / "a", {1: 2.0, 2: 4.4, 3: 5.0}))
    theirs = losses(write_run(tmp_path / "b", {1: 2.02, 2: 4.0, 9: 1.0}))
    assert largest_difference(ours, theirs) == (pytest.approx(0.1), 2, 2)
    with pytest.raises(CompareError, match="no step in common"):
        largest_difference({1: 1.0}, {2: 1.0})


def test_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / name, {1: value}) for name, value in (("a", 2.0), ("b", 2.5))]
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["compare_losses", *map(str, runs)])
    assert main() == 0
    assert "2.5e-01" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["compare_losses", str(runs[0]), str(tmp_path / "c")])
    assert main() == 2
    assert "c/metrics.jsonl does not exist" in capsys.readouterr().err.replace("\n", "")
